"""Checkpoints: folders written by torch.distributed.checkpoint, atomic, verified on reading, never unpickling foreign objects.

A checkpoint folder holds the tensors (`*.distcp`, `.metadata`: torch.distributed.checkpoint), `state.json` (everything that is
no tensor, and where each tensor belongs) and `manifest.json` (size and CRC-32 of every other file).
"""

from __future__ import annotations

import enum
import io
import json
import os
import pickle
import re
import shutil
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

FORMAT = 1
_STATE, _MANIFEST = "state.json", "manifest.json"
_RESERVED = ("head", "optimizer", "step")
_NAME = re.compile(r"step_(\d+)")
_REPLACED = ".old.tmp"  # suffix of the former checkpoint while a new one takes its place


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, or does not fit what it is loaded into."""


def save_checkpoint(
    path: str | os.PathLike[str], *, head: torch.nn.Module, optimizer: Any = None, step: int, **more: Any
) -> None:
    """Writes head, optimizer, step and `more` to the folder `path`, all or nothing.

    `more` takes nested dicts, lists and tuples of tensors, numpy arrays, numbers, strings, bytes, booleans and None;
    `load_checkpoint` returns it under the same keys. The folder is written under a temporary name beside `path`, synced to
    disk and renamed, so a crash leaves the previous checkpoint as it was. Every rank calls it; a replicated head is written
    by rank 0.

    Raises ValueError when the memory has queued writes or the head has pending rows (save after `step()`),
    TypeError for values of other types.
    """
    if not isinstance(step, int) or step < 0:
        raise ValueError(f"save_checkpoint: expected step to be an int >= 0, got {step!r}")
    for name in _RESERVED:
        if name in more:
            raise ValueError(f"save_checkpoint: expected names other than {_RESERVED} in **more, got {name!r}")
    _refuse_pending(head)
    content = {
        "head": head.state_dict(),
        "optimizer": None if optimizer is None else optimizer.state_dict(),
        "step": step,
        **more,
    }
    tensors: dict[str, Tensor] = {}
    structure = _encode(content, "", tensors)
    if _rank() == 0:
        _write(Path(path), structure, tensors)
    if _world() > 1:
        torch.distributed.barrier()


def load_checkpoint(path: str | os.PathLike[str], *, head: torch.nn.Module, optimizer: Any = None) -> dict[str, Any]:
    """Restores head and optimizer from the folder `path` and returns {"step": ..., **more} with tensors on the CPU.

    Raises CheckpointError (a ValueError) when the folder is missing, a file is damaged, or the contents do not fit.
    """
    content = read_checkpoint(path)
    shapes = {name: tuple(value.shape) for name, value in head.state_dict().items()}
    for name, value in content["head"].items():  # before anything is copied: a refused checkpoint changes nothing
        if shapes.get(name, tuple(value.shape)) != tuple(value.shape):
            raise CheckpointError(
                f"load_checkpoint: {path} does not fit this head: expected {name} of shape {shapes[name]}, got {tuple(value.shape)}"
            )
    try:
        head.load_state_dict(content.pop("head"))
    except (RuntimeError, KeyError) as error:
        raise CheckpointError(
            f"load_checkpoint: {path} does not fit this head: {' '.join(str(error).split())}"
        ) from error
    saved = content.pop("optimizer")
    if optimizer is not None:
        if saved is None:
            raise CheckpointError(f"load_checkpoint: expected an optimizer state in {path}, it was saved without one")
        try:
            optimizer.load_state_dict(saved)
        except (RuntimeError, KeyError, ValueError) as error:
            raise CheckpointError(f"load_checkpoint: {path} does not fit this optimizer: {error}") from error
    return content


def read_checkpoint(path: str | os.PathLike[str], keys: tuple[str, ...] | None = None) -> dict[str, Any]:
    """The contents of a checkpoint as plain dicts and CPU tensors; with `keys` only those top-level entries are read.

    Raises CheckpointError when the folder is missing or damaged.
    """
    folder = Path(path)
    _recover(folder)
    _verify(folder)
    try:
        state = json.loads((folder / _STATE).read_text())
    except ValueError as error:
        raise CheckpointError(f"load_checkpoint: {folder / _STATE} is damaged: {error}") from error
    if state.get("format") != FORMAT:
        raise CheckpointError(
            f"load_checkpoint: expected checkpoint format {FORMAT} in {folder}, got {state.get('format')!r}"
        )
    entries = [[key, value] for key, value in state["content"]["dict"] if keys is None or key in keys]
    wanted: set[str] = set()
    _tensor_keys(entries, wanted)
    content = _decode({"dict": entries}, _read_tensors(folder, wanted))
    assert isinstance(content, dict)
    return content


def checkpoint_path(folder: str | os.PathLike[str], step: int) -> Path:
    """folder/step_00000012: where the checkpoint of a step lies in a run's checkpoint folder."""
    return Path(folder) / f"step_{step:08d}"


def latest_checkpoint(folder: str | os.PathLike[str]) -> Path | None:
    """The complete checkpoint of the highest step in a run's checkpoint folder, None when there is none."""
    for replaced in Path(folder).glob(f".step_*{_REPLACED}"):
        _recover(replaced.with_name(replaced.name[1 : -len(_REPLACED)]))
    found = _checkpoints(Path(folder))
    return found[-1] if found else None


def prune_checkpoints(folder: str | os.PathLike[str], keep: int) -> None:
    """Deletes all but the last `keep` checkpoints of a run's checkpoint folder, and temporary folders of crashed saves."""
    if keep < 1:
        raise ValueError(f"prune_checkpoints: expected keep >= 1, got {keep}")
    latest_checkpoint(folder)  # puts back what a crash left half replaced, so that only leftovers are deleted
    for old in [*_checkpoints(Path(folder))[:-keep], *Path(folder).glob(".step_*.tmp")]:
        shutil.rmtree(old, ignore_errors=True)


def _checkpoints(folder: Path) -> list[Path]:
    found = [p for p in folder.glob("step_*") if _NAME.fullmatch(p.name) and (p / _MANIFEST).is_file()]
    return sorted(found, key=lambda p: int(p.name[len("step_") :]))


def _refuse_pending(head: torch.nn.Module) -> None:
    """Rows waiting for step() and queued memory writes are not state: saving between them would lose both."""
    rows = getattr(head, "pending_rows", 0)
    if rows:
        raise ValueError(
            f"save_checkpoint: expected no pending rows on the head, got {rows}: call step() or zero_grad() first"
        )
    queued = getattr(getattr(head, "memory", None), "pending", 0)
    if queued:
        raise ValueError(
            f"save_checkpoint: expected no queued memory writes, got {queued}: they apply after the optimizer's step()"
        )


# --- what is no tensor goes to JSON ---------------------------------------------------------------------------------


def _encode(value: Any, key: str, tensors: dict[str, Tensor]) -> Any:
    """JSON form of `value`; tensors are put into `tensors` under their path and referred to."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    while key in tensors:  # {"a/b": t, "a": {"b": u}} meet at one path
        key += "'"
    if isinstance(value, Tensor):
        tensors[key] = value.detach()
        return {"tensor": key}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        # As bytes: torch has no tensor of every numpy dtype, and the bits must come back.
        tensors[key] = (
            torch.frombuffer(bytearray(value.tobytes()), dtype=torch.uint8)
            if value.nbytes
            else torch.empty(0, dtype=torch.uint8)
        )
        return {"array": key, "dtype": value.dtype.str, "shape": list(value.shape)}
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    if isinstance(value, (list, tuple)):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [_encode(item, f"{key}/{i}", tensors) for i, item in enumerate(value)]}
    if isinstance(value, dict):
        for name in value:
            if not isinstance(name, (str, int)):
                raise TypeError(
                    f"save_checkpoint: expected dict keys of type str or int at {key!r}, got {type(name).__name__}"
                )
        return {
            "dict": [
                [name, _encode(item, f"{key}/{name}" if key else str(name), tensors)] for name, item in value.items()
            ]
        }
    raise TypeError(
        f"save_checkpoint: expected tensors, arrays and plain values, got {type(value).__name__} at {key!r}"
    )


def _decode(value: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    kind = next(iter(value))
    if kind == "tensor":
        return tensors[value["tensor"]]
    if kind == "array":
        flat = np.frombuffer(tensors[value["array"]].numpy().tobytes(), dtype=np.dtype(value["dtype"]))
        return flat.reshape(value["shape"]).copy()
    if kind == "bytes":
        return bytes.fromhex(value["bytes"])
    if kind == "dict":
        return {name: _decode(item, tensors) for name, item in value["dict"]}
    items = [_decode(item, tensors) for item in value[kind]]
    return tuple(items) if kind == "tuple" else items


def _tensor_keys(value: Any, found: set[str]) -> None:
    if isinstance(value, list):
        for item in value:
            _tensor_keys(item, found)
    elif isinstance(value, dict):
        kind, inner = next(iter(value.items()))
        if kind in ("tensor", "array"):
            found.add(inner)
        else:
            _tensor_keys(inner, found)


# --- files ----------------------------------------------------------------------------------------------------------


def _write(path: Path, structure: Any, tensors: dict[str, Tensor]) -> None:
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        save(dict(tensors), storage_writer=FileSystemWriter(temporary), no_dist=True)
    (temporary / _STATE).write_text(json.dumps({"format": FORMAT, "content": structure}))
    files = {p.name: {"bytes": p.stat().st_size, "crc32": _crc32(p)} for p in sorted(temporary.iterdir())}
    (temporary / _MANIFEST).write_text(json.dumps(files, indent=1))
    for name in (_STATE, _MANIFEST):
        _fsync(temporary / name)
    _fsync(temporary)
    _recover(path)
    replaced = path.with_name(f".{path.name}{_REPLACED}")
    shutil.rmtree(replaced, ignore_errors=True)
    if path.exists():
        os.replace(path, replaced)
    os.replace(temporary, path)
    _fsync(path.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _recover(path: Path) -> None:
    """Puts the former checkpoint back where a crash came between the two renames of its replacement."""
    replaced = path.with_name(f".{path.name}{_REPLACED}")
    if replaced.is_dir() and not path.exists():
        os.replace(replaced, path)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _crc32(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return value


def _verify(folder: Path) -> None:
    if not folder.is_dir():
        raise CheckpointError(f"load_checkpoint: expected a checkpoint folder, got {folder}, which is no folder")
    if not (folder / _MANIFEST).is_file():
        raise CheckpointError(f"load_checkpoint: {folder} is no complete checkpoint: {_MANIFEST} is missing")
    try:
        files = json.loads((folder / _MANIFEST).read_text())
        expected = {str(name): (int(entry["bytes"]), int(entry["crc32"])) for name, entry in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"load_checkpoint: {folder / _MANIFEST} is damaged: {error}") from error
    for name, (size, crc) in expected.items():
        file = folder / Path(name).name
        if not file.is_file():
            raise CheckpointError(f"load_checkpoint: {folder} is damaged: {name} is missing")
        if file.stat().st_size != size:
            raise CheckpointError(
                f"load_checkpoint: {file} is damaged: expected {size} bytes, got {file.stat().st_size}"
            )
        if _crc32(file) != crc:
            raise CheckpointError(
                f"load_checkpoint: {file} is damaged: its CRC-32 is not the one recorded when it was written"
            )


def _read_tensors(folder: Path, wanted: set[str]) -> dict[str, Tensor]:
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    class Reader(FileSystemReader):
        def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
            return metadata

    metadata: Metadata = _read_metadata(folder)
    tensors: dict[str, Tensor] = {}
    for key in sorted(wanted):
        entry = metadata.state_dict_metadata.get(key)
        if not isinstance(entry, TensorStorageMetadata):
            raise CheckpointError(f"load_checkpoint: {folder} is damaged: tensor {key!r} is missing")
        tensors[key] = torch.empty(entry.size, dtype=entry.properties.dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        load(tensors, storage_reader=Reader(folder), no_dist=True)
    return tensors


def _read_metadata(folder: Path) -> Any:
    """`.metadata` of torch.distributed.checkpoint is a pickle: read it with the few classes it is made of and no other."""
    try:
        metadata = _MetadataUnpickler(io.BytesIO((folder / ".metadata").read_bytes())).load()
    except (pickle.UnpicklingError, EOFError, AttributeError, OSError) as error:
        raise CheckpointError(f"load_checkpoint: {folder / '.metadata'} is damaged: {error}") from error
    return metadata


def _enum_member(kind: Any, name: str) -> Any:
    if not (isinstance(kind, type) and issubclass(kind, enum.Enum) and name in kind.__members__):
        raise pickle.UnpicklingError(f"{kind!r}.{name} does not belong in a checkpoint")
    return kind[name]


class _MetadataUnpickler(pickle.Unpickler):
    _METADATA = (
        "Metadata TensorStorageMetadata BytesStorageMetadata ChunkStorageMetadata TensorProperties MetadataIndex StorageMeta _MEM_FORMAT_ENCODING"
    ).split()
    _OTHER = frozenset(
        {
            ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
            ("torch", "Size"),
            ("torch.serialization", "_get_layout"),
            ("pathlib", "PosixPath"),
            ("pathlib", "WindowsPath"),
            ("collections", "OrderedDict"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _enum_member  # how Python 3.11.0 to 3.11.3 write a member of an Enum
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        metadata = module == "torch.distributed.checkpoint.metadata" and name in self._METADATA
        if not (dtype or metadata or (module, name) in self._OTHER):
            raise pickle.UnpicklingError(f"{module}.{name} does not belong in a checkpoint")
        return super().find_class(module, name)


def _world() -> int:
    ready = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if ready else 1


def _rank() -> int:
    return torch.distributed.get_rank() if _world() > 1 else 0
