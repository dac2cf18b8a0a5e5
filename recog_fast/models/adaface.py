"""AdaFace's checkpoints (github.com/mk-minchul/AdaFace) as IResNet weights.

Its IR networks are IResNets under other names, with two differences that are rewritten exactly: the first stage's
shortcut is a strided identity (here: a 1x1 convolution by the identity matrix, and a BatchNorm that does nothing), and the
last BatchNorm has no scale and shift (here: 1 and 0). They were trained on BGR pixels.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .backbone import Preprocessing

BGR = Preprocessing(color_order="BGR")
_PREFIX = "model."
_STEM = {"input_layer.0": "conv1", "input_layer.1": "bn1", "input_layer.2": "prelu"}
_HEAD = {"output_layer.0": "bn2", "output_layer.3": "fc", "output_layer.4": "features"}
_BLOCK = {"0": "bn1", "1": "conv1", "2": "bn2", "3": "prelu", "4": "conv2", "5": "bn3"}
_EPSILON = 1e-5  # of nn.BatchNorm2d


def is_adaface(state: Mapping[str, object]) -> bool:
    """Whether a state dict has AdaFace's names, with its "model." prefix or without."""
    return any(name.removeprefix(_PREFIX) == "input_layer.0.weight" for name in state)


def adaface_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The backbone of an AdaFace state dict under IResNet's names; the head's entries ("head.*") are left out.

    Raises ValueError for a name that is neither, or blocks that do not come in four stages.
    """
    prefixed = any(name.startswith(_PREFIX) for name in state)
    own = {n.removeprefix(_PREFIX): v for n, v in state.items() if n.startswith(_PREFIX if prefixed else "")}
    places = _stages(own)
    made: dict[str, Tensor] = {}
    for name, value in own.items():
        parts = name.split(".")
        outer, rest = ".".join(parts[:2]), ".".join(parts[2:])
        if outer in _STEM or outer in _HEAD:
            made[f"{(_STEM | _HEAD)[outer]}.{rest}"] = value
        elif parts[0] == "body" and len(parts) == 5 and parts[2] == "res_layer" and parts[3] in _BLOCK:
            made[f"{places[int(parts[1])]}.{_BLOCK[parts[3]]}.{parts[4]}"] = value
        elif parts[0] == "body" and len(parts) == 5 and parts[2] == "shortcut_layer":
            made[f"{places[int(parts[1])]}.downsample.{parts[3]}.{parts[4]}"] = value
        elif not name.startswith("head."):
            raise ValueError(f"load_backbone: expected AdaFace's names in the state dict, got {name!r}")
    if "features.running_mean" in made:
        made["features.weight"] = torch.ones_like(made["features.running_mean"])
        made["features.bias"] = torch.zeros_like(made["features.running_mean"])
    if "layer1.0.downsample.0.weight" not in made and "conv1.weight" in made:
        made |= _identity(made["conv1.weight"])
    return made


def _stages(own: Mapping[str, Tensor]) -> dict[int, str]:
    """{block number: "layer<stage>.<block>"}: a stage begins where the width changes, the first at block 0."""
    places: dict[int, str] = {}
    stage, block, width = 0, 0, 0
    numbers = sorted({int(n.split(".")[1]) for n in own if n.startswith("body.") and n.split(".")[1].isdigit()})
    for number in numbers:
        conv = own.get(f"body.{number}.res_layer.1.weight")
        channels = 0 if conv is None else len(conv)
        stage, block = (stage + 1, 0) if channels != width else (stage, block + 1)
        width = channels
        places[number] = f"layer{stage}.{block}"
    if numbers != list(range(len(numbers))) or stage != 4:
        raise ValueError(
            f"load_backbone: expected AdaFace's blocks in four stages, got {len(numbers)} blocks in {stage}"
        )
    return places


def _identity(like: Tensor) -> dict[str, Tensor]:
    channels = like.shape[0]
    ones = like.new_ones(channels)
    return {
        "layer1.0.downsample.0.weight": torch.eye(channels, dtype=like.dtype)[:, :, None, None],
        "layer1.0.downsample.1.weight": ones,
        "layer1.0.downsample.1.bias": torch.zeros_like(ones),
        "layer1.0.downsample.1.running_mean": torch.zeros_like(ones),
        "layer1.0.downsample.1.running_var": ones - _EPSILON,
        "layer1.0.downsample.1.num_batches_tracked": torch.zeros((), dtype=torch.int64),
    }
