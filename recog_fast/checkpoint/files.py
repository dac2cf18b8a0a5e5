"""Folders of checkpoints: written under another name, synced and renamed; a manifest with sizes and hashes; the last k kept."""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from ..sharding import ShardGroup
from .errors import CheckpointError
from .metadata import read_metadata

T = TypeVar("T")

STATE, MANIFEST, METADATA = "state.json", "manifest.json", ".metadata"
_NAME = re.compile(r"step_(\d+)")
_REPLACED = ".old.tmp"  # suffix of the former checkpoint while a new one takes its place


def checkpoint_path(folder: str | os.PathLike[str], step: int) -> Path:
    """folder/step_00000012: where the checkpoint of a step lies in a run's checkpoint folder."""
    return Path(folder) / f"step_{step:08d}"


def latest_checkpoint(folder: str | os.PathLike[str], *, verified: bool = False) -> Path | None:
    """The complete checkpoint of the highest step in a run's checkpoint folder, None when there is none.

    verified: reads it (and its hashes); a damaged one is named in a warning and the one before is taken. Raises CheckpointError
    where all of them are damaged.
    """
    for replaced in Path(folder).glob(f".step_*{_REPLACED}"):
        recover(replaced.with_name(replaced.name[1 : -len(_REPLACED)]))
    found = _checkpoints(Path(folder))
    if not verified or not found:
        return found[-1] if found else None
    for newest in reversed(found):
        try:
            verify(newest)
        except CheckpointError as error:
            warnings.warn(f"latest_checkpoint: {error}; going back to the checkpoint before it", stacklevel=2)
        else:
            return newest
    raise CheckpointError(f"latest_checkpoint: all {len(found)} checkpoints in {folder} are damaged")


def prune_checkpoints(folder: str | os.PathLike[str], keep: int) -> None:
    """Deletes all but the last `keep` checkpoints of a run's checkpoint folder, and temporary folders of crashed saves.

    Raises ValueError for keep < 1: nothing is deleted then.
    """
    if keep < 1:
        raise ValueError(f"prune_checkpoints: expected keep >= 1, got {keep}")
    latest_checkpoint(folder)  # puts back what a crash left half replaced, so that only leftovers are deleted
    for old in [*_checkpoints(Path(folder))[:-keep], *Path(folder).glob(".step_*.tmp")]:
        shutil.rmtree(old, ignore_errors=True)


def _checkpoints(folder: Path) -> list[Path]:
    found = [p for p in folder.glob("step_*") if _NAME.fullmatch(p.name) and (p / MANIFEST).is_file()]
    return sorted(found, key=lambda p: int(p.name[len("step_") :]))


def write(path: Path, structure: Any, tensors: Mapping[str, Tensor], ranks: ShardGroup | None = None) -> None:
    """The folder `path` with everything in it or, on any error of any rank, as it was before.

    With ranks every one of them writes its own tensors (class-sharded ones as DTensors) and hashes its own files; rank 0 writes
    `structure`, the manifest and the name. All see the same folder.
    """
    temporary = path.parent / f".{path.name}.tmp"

    def prepare() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)

    first = ranks is None or ranks.rank == 0
    together(ranks, prepare if first else _nothing)
    hashes = together(ranks, lambda: _write_tensors(temporary, tensors, ranks))
    told = [hashes] if ranks is None else ranks.exchange(hashes)
    together(ranks, (lambda: _publish(path, temporary, structure, {k: v for part in told for k, v in part.items()})) if first else _nothing)


def together(ranks: ShardGroup | None, act: Callable[[], T]) -> T:
    """act() on every rank; where it fails on one, all raise: nobody goes on alone, nobody waits."""
    if ranks is None:
        return act()
    result, failure = None, None
    try:
        result = act()
    except Exception as error:
        failure = error
    told = ranks.exchange(None if failure is None else f"{type(failure).__name__}: {failure}")
    if failure is not None:
        raise failure
    for rank, text in enumerate(told):
        if text is not None:
            raise CheckpointError(f"checkpoint: expected every rank to succeed, got a failure of rank {rank}: {text}")
    return cast("T", result)


def _nothing() -> None:
    return None


def _write_tensors(folder: Path, tensors: Mapping[str, Tensor], ranks: ShardGroup | None) -> dict[str, dict[str, int]]:
    """This rank's files by torch.distributed.checkpoint, synced; their sizes and hashes."""
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            save(
                dict(tensors),
                storage_writer=FileSystemWriter(folder),
                process_group=None if ranks is None else ranks.hosts,
                no_dist=ranks is None,
            )
        except CheckpointException as error:  # a BaseException, on every rank
            for failure in error.failures.values():
                if not isinstance(failure[0], Exception):  # Ctrl-C, SystemExit: no fault of the disk
                    raise failure[0] from None
            reasons = "; ".join(f"rank {rank}: {failure[0]}" for rank, failure in error.failures.items())
            raise CheckpointError(f"save_checkpoint: {folder} could not be written: {reasons}") from error
    own = folder.iterdir() if ranks is None else folder.glob(f"__{ranks.rank}_*")
    return {p.name: _entry(p) for p in sorted(own)}


def _entry(path: Path) -> dict[str, int]:
    return {"bytes": path.stat().st_size, "crc32": _crc32(path)}


def _publish(path: Path, temporary: Path, structure: Any, files: dict[str, dict[str, int]]) -> None:
    """state.json, the manifest, everything on disk, then the name."""
    (temporary / STATE).write_text(json.dumps(structure))
    files |= {name: _entry(temporary / name) for name in (STATE, METADATA)}
    (temporary / MANIFEST).write_text(json.dumps(dict(sorted(files.items())), indent=1))
    for name in (STATE, MANIFEST):
        _fsync(temporary / name)
    _fsync(temporary)
    recover(path)
    replaced = path.with_name(f".{path.name}{_REPLACED}")
    shutil.rmtree(replaced, ignore_errors=True)
    if path.exists():
        os.replace(path, replaced)
    os.replace(temporary, path)
    _fsync(path.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def recover(path: Path) -> None:
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


def verify(folder: Path, part: int = 0, parts: int = 1) -> None:
    """CheckpointError unless every file is there as it was written; of the hashes only every `parts`-th file's, from `part`."""
    if not folder.is_dir():
        raise CheckpointError(f"load_checkpoint: expected a checkpoint folder, got {folder}, which is no folder")
    if not (folder / MANIFEST).is_file():
        raise CheckpointError(f"load_checkpoint: {folder} is no complete checkpoint: {MANIFEST} is missing")
    try:
        files = json.loads((folder / MANIFEST).read_text())
        expected = {str(name): (int(entry["bytes"]), int(entry["crc32"])) for name, entry in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"load_checkpoint: {folder / MANIFEST} is damaged: {error}") from error
    if not {STATE, METADATA} <= set(expected):
        raise CheckpointError(f"load_checkpoint: {folder / MANIFEST} is damaged: it names no {STATE} or {METADATA}")
    for number, (name, (size, crc)) in enumerate(expected.items()):
        file = folder / Path(name).name
        if not file.is_file():
            raise CheckpointError(f"load_checkpoint: {folder} is damaged: {name} is missing")
        if file.stat().st_size != size:
            raise CheckpointError(
                f"load_checkpoint: {file} is damaged: expected {size} bytes, got {file.stat().st_size}"
            )
        if number % parts == part and _crc32(file) != crc:
            raise CheckpointError(
                f"load_checkpoint: {file} is damaged: its CRC-32 is not the one recorded when it was written"
            )


def read_tensors(folder: Path, wanted: Mapping[str, Tensor]) -> None:
    """Fills the tensors (a DTensor: this rank's part) from the folder, each rank by itself."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import Metadata
    from torch.distributed.checkpoint.state_dict_loader import load

    class Reader(FileSystemReader):
        def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
            found: Metadata = read_metadata(folder)
            return found

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        load(dict(wanted), storage_reader=Reader(folder), no_dist=True)


def sizes_of(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape over all ranks and dtype of every tensor in the folder."""
    metadata = read_metadata(folder)
    sizes = {}
    for key, entry in metadata.state_dict_metadata.items():
        if hasattr(entry, "size"):
            sizes[key] = (entry.size, entry.properties.dtype)
    return sizes
