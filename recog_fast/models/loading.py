"""Loading backbone weights with a report: a silent partial load gives strangers a cosine of 0.99."""

from __future__ import annotations

import os
import pickle
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from recog_fast._arguments import refusal

from .adaface import BGR, adaface_state, is_adaface

# Wrappers that put their own name in front of every key: DistributedDataParallel, torch.compile.
_PREFIXES = ("module.", "_orig_mod.")
# Where training scripts keep the backbone inside a checkpoint (arcface_torch; common usage).
_NESTED = ("state_dict_backbone", "state_dict", "model")
_SHOWN = 8

Shape = tuple[int, ...]


@dataclass(frozen=True)
class LoadReport:
    """What `load_backbone` found. str(report) is the message a user reads.

    loaded: number of tensors copied into the model (0 when strict loading refused the file).
    missing: keys of the model that the file lacks. unexpected: keys of the file that the model lacks.
    wrong_shape: (key, shape in the model, shape in the file). source: the path, or "state dict".
    """

    source: str
    loaded: int
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    wrong_shape: tuple[tuple[str, Shape, Shape], ...] = ()

    @property
    def complete(self) -> bool:
        """True when the file and the model hold exactly the same keys and shapes."""
        return not (self.missing or self.unexpected or self.wrong_shape)

    def __str__(self) -> str:
        shapes = [f"{key}: model {expected}, file {got}" for key, expected, got in self.wrong_shape]
        parts = [
            _listing("missing", self.missing),
            _listing("unexpected", self.unexpected),
            _listing("wrong shape", shapes),
        ]
        return f"{self.source}: {self.loaded} tensors loaded" + "".join(f"; {part}" for part in parts if part)


def _listing(title: str, keys: Iterable[str]) -> str:
    listed = list(keys)
    if not listed:
        return ""
    more = f", and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
    return f"{len(listed)} {title} ({', '.join(listed[:_SHOWN])}{more})"


def _bare(key: str) -> str:
    """The key without wrapper prefixes, however they are nested."""
    while key.startswith(_PREFIXES):
        key = key.split(".", 1)[1]
    return key


def _bare_keys(names: Iterable[str], source: str) -> dict[str, str]:
    """{key without wrapper prefix: key as written}; two spellings of one key raise."""
    found: dict[str, str] = {}
    for name in names:
        if _bare(name) in found:
            raise ValueError(f"load_backbone: expected each key once in {source}, got {found[_bare(name)]!r} and {name!r}")
        found[_bare(name)] = name
    return found


def _read(path: str) -> object:
    if path.endswith(".safetensors"):
        from safetensors.torch import load_file

        return load_file(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError) as error:
        raise ValueError(
            f"load_backbone: expected {path} to be a torch.save file of tensors only, got: {refusal(error)}"
        ) from error


def _tensors(content: object, source: str) -> dict[str, Tensor]:
    """The state dict inside a file's content, unwrapped from a training checkpoint if need be."""
    if isinstance(content, Mapping) and not all(isinstance(value, Tensor) for value in content.values()):
        nested = next((content[key] for key in _NESTED if isinstance(content.get(key), Mapping)), None)
        content = content if nested is None else nested
    if not isinstance(content, Mapping):  # ValueError, not TypeError: the fault lies in the file, not in the call
        raise ValueError(f"load_backbone: expected {source} to hold a state dict, got {type(content).__name__}")
    wrong = [str(key) for key, value in content.items() if not isinstance(key, str) or not isinstance(value, Tensor)]
    if wrong or not content:
        raise ValueError(f"load_backbone: expected {source} to map names to tensors, got others at {wrong[:_SHOWN]}")
    return dict(content)


def load_backbone(
    model: nn.Module, path_or_state: str | os.PathLike[str] | Mapping[str, Tensor], *, strict: bool = True
) -> LoadReport:
    """Copy weights into `model` and say exactly which: all of them, or a ValueError, or (strict=False) a warning.

    path_or_state: a torch.save file (read with weights_only=True: no code runs) or a .safetensors file, holding a state dict or
    a checkpoint with one under "state_dict_backbone", "state_dict" or "model"; or a state dict itself. "module." and
    "_orig_mod." prefixes of DDP and torch.compile are dropped on both sides. Values are cast to the model's dtype and device.
    AdaFace's checkpoints are known by their names and rewritten for IResNet (`adaface_state`); the model then takes BGR.

    strict=True: a missing, unexpected or wrongly shaped key raises ValueError with the report and the model is left untouched.
    strict=False: what matches is loaded, the rest is named in a UserWarning and in the report; nothing matching raises ValueError.
    Raises FileNotFoundError for a path that is no file, ValueError for a file that is not tensors only, TypeError for what is neither
    path nor mapping. Sources of the layouts: arcface_torch, github.com/mk-minchul/AdaFace.
    """
    content: object
    if isinstance(path_or_state, Mapping):
        source, content = "state dict", path_or_state
    elif isinstance(path_or_state, str | os.PathLike):
        source = os.fspath(path_or_state)
        content = _read(source)
    else:
        raise TypeError(f"load_backbone: expected path_or_state as a path or mapping, got {type(path_or_state).__name__}")
    given = _tensors(content, source)
    foreign = is_adaface(given)
    given = adaface_state(given) if foreign else given
    own = model.state_dict()
    if any(value.is_meta for value in own.values()):
        raise ValueError("load_backbone: expected model with storage, got one on the meta device (see Module.to_empty)")
    given_keys, own_keys = _bare_keys(given, source), _bare_keys(own, "model")
    common = [key for key in own_keys if key in given_keys]
    pairs = {key: (own[own_keys[key]], given[given_keys[key]]) for key in common}
    wrong = tuple((key, tuple(a.shape), tuple(b.shape)) for key, (a, b) in pairs.items() if a.shape != b.shape)
    missing = tuple(key for key in own_keys if key not in given_keys)
    unexpected = tuple(key for key in given_keys if key not in own_keys)
    fitting = {own_keys[key]: b for key, (a, b) in pairs.items() if a.shape == b.shape}
    report = LoadReport(source, len(fitting), missing, unexpected, wrong)
    if not report.complete:
        if strict or not fitting:
            refused = LoadReport(source, 0, missing, unexpected, wrong)
            raise ValueError(f"load_backbone: expected all {len(own)} tensors of {type(model).__name__}, got {refused}")
        warnings.warn(f"load_backbone: partial load, {report}", stacklevel=2)
    model.load_state_dict(fitting, strict=False)
    if foreign:
        model.preprocessing = BGR  # type: ignore[assignment]
    return report
