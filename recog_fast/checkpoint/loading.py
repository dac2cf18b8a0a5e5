"""load_checkpoint: what any number of ranks saved, on any number of ranks."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..sharding import ShardGroup
from .encoding import decode, tensor_keys
from .errors import CheckpointError
from .files import STATE, read_tensors, recover, sizes_of, together, verify
from .saving import ONE_PROCESS, RANKS
from .state import ENTRIES, restore_head, spread


def load_checkpoint(path: str | os.PathLike[str], *, head: torch.nn.Module, optimizer: Any = None) -> dict[str, Any]:
    """Restores head and optimizer from the folder `path` and returns {"step": ..., **more} with tensors on the CPU.

    Every rank of a sharded head calls it and reads its own classes, however many ranks (or one process) saved them.

    Raises CheckpointError (a ValueError) when the folder is missing, a file is damaged, or the contents do not fit: then head and
    optimizer are as they were, on every rank.
    """
    folder = Path(path)
    ranks: ShardGroup | None = getattr(head, "shards", None)
    entries = _open(folder, ranks)
    content = together(ranks, lambda: _read(folder, entries, head, ranks))
    saved_head, saved = content.pop("head"), content.pop("optimizer")

    def restore() -> None:
        if optimizer is not None and saved is None:
            raise CheckpointError(f"load_checkpoint: expected an optimizer state in {folder}, it was saved without one")
        try:
            restore_head(head, saved_head, str(folder))
        except (RuntimeError, KeyError) as error:
            raise CheckpointError(f"load_checkpoint: {folder} does not fit this head: {' '.join(str(error).split())}") from error
        if optimizer is not None:
            try:
                optimizer.load_state_dict(saved)
            except (RuntimeError, KeyError, ValueError) as error:
                raise CheckpointError(f"load_checkpoint: {folder} does not fit this optimizer: {error}") from error

    together(ranks, restore)
    return content


def read_checkpoint(path: str | os.PathLike[str], keys: tuple[str, ...] | None = None) -> dict[str, Any]:
    """The contents of a checkpoint as plain dicts and CPU tensors; with `keys` only those top-level entries are read.

    Raises CheckpointError when the folder is missing or damaged.
    """
    folder = Path(path)
    entries = [[key, value] for key, value in _open(folder, None) if keys is None or key in keys]
    return _fill(folder, entries, {})


def _open(folder: Path, ranks: ShardGroup | None) -> list[list[Any]]:
    """The top-level entries of a folder whose files are all as they were written; ranks share the hashing."""
    part, parts = (0, 1) if ranks is None else (ranks.rank, ranks.size)

    def state() -> list[list[Any]]:
        verify(folder, part, parts)
        try:
            state = json.loads((folder / STATE).read_text())
        except ValueError as error:
            raise CheckpointError(f"load_checkpoint: {folder / STATE} is damaged: {error}") from error
        if state.get("format") not in (ONE_PROCESS, RANKS):
            raise CheckpointError(
                f"load_checkpoint: expected checkpoint format {ONE_PROCESS} or {RANKS} in {folder}, got {state.get('format')!r}"
            )
        entries: list[list[Any]] = state["content"]["dict"]
        return entries

    together(ranks, lambda: recover(folder) if part == 0 else None)
    return together(ranks, state)


def _read(folder: Path, entries: list[list[Any]], head: torch.nn.Module, ranks: ShardGroup | None) -> dict[str, Any]:
    """All contents; of a sharded head the rows of this rank's classes, and of the memory the parts it overlaps."""
    if ranks is None:
        return _fill(folder, entries, {})
    weight: Any = head.weight
    shape = (ranks.num_classes, *weight.shape[1:])
    sizes = sizes_of(folder)
    saved = dict(entries)
    found = tuple(sizes["head/weight"][0]) if "head/weight" in sizes else None
    if found != shape:
        raise CheckpointError(f"load_checkpoint: {folder} does not fit this head: expected weight of shape {shape} over all ranks, got {found}")
    keys: set[str] = set()
    tensor_keys(saved.get("optimizer"), keys)
    rows = {"head/weight"} | {key for key in keys if tuple(sizes[key][0]) == shape}
    targets = {key: spread(torch.empty(weight.shape, dtype=sizes[key][1]), ranks) for key in rows}
    for name, value in saved["head"]["dict"]:
        if name == ENTRIES:
            value["list"] = [part for part in value["list"] if _overlaps(part, ranks)]
    return _fill(folder, entries, targets)


def _overlaps(part: dict[str, Any], ranks: ShardGroup) -> bool:
    """Whether a part of the memory may hold classes of this rank; the first is always read, for its dtypes."""
    range_ = dict(part["dict"])
    return bool(range_["first"] == 0 or (range_["first"] < ranks.stop and ranks.start < range_["last"]))


def _fill(folder: Path, entries: list[list[Any]], spread_: dict[str, Any]) -> dict[str, Any]:
    """The entries with their tensors, read into new ones or, where `spread_` has the name, into its."""
    wanted: set[str] = set()
    tensor_keys(entries, wanted)
    sizes = sizes_of(folder)
    targets: dict[str, Any] = {}
    for key in sorted(wanted):
        if key not in sizes:
            raise CheckpointError(f"load_checkpoint: {folder} is damaged: tensor {key!r} is missing")
        targets[key] = spread_[key] if key in spread_ else torch.empty(sizes[key][0], dtype=sizes[key][1])
    read_tensors(folder, targets)
    tensors: dict[str, Tensor] = {key: value.to_local() if key in spread_ else value for key, value in targets.items()}
    content = decode({"dict": entries}, tensors)
    assert isinstance(content, dict)
    return content
