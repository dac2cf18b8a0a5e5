"""save_checkpoint: at once, or in a thread while training goes on."""

from __future__ import annotations

import functools
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from ..sharding import ShardGroup
from .files import write
from .state import Content, collect

ONE_PROCESS, RANKS = 1, 2  # formats: with the memory's ring as it is; with W, momentum and memory by class from any number of ranks
_RESERVED = ("head", "optimizer", "step")
_SAVERS: list[ThreadPoolExecutor] = []  # one thread: saves end in the order they began; it ends before the process does


def save_checkpoint(path: str | os.PathLike[str], *, head: torch.nn.Module, optimizer: Any = None, step: int, **more: Any) -> None:
    """Writes head, optimizer, step and `more` to the folder `path`, all or nothing.

    `more` takes nested dicts, lists and tuples of tensors, numpy arrays, numbers, strings, bytes, booleans and None;
    `load_checkpoint` returns it under the same keys. The folder is written under a temporary name beside `path`, synced to
    disk and renamed, so a crash leaves the previous checkpoint as it was. Every rank calls it, with a folder that all see: of a
    sharded head each rank writes its classes (weight, the optimizer's state of it, memory entries), of everything else rank 0
    its own; so it does of a head that is not sharded.

    Raises ValueError when the memory has queued writes or the head has pending rows (save after `step()`),
    TypeError for values of other types; an error of one rank is raised on all.
    """
    ranks = _ranks(head)
    _save(Path(path), _content(ranks, head, optimizer, step, more), ranks, sharded=_is_sharded(head))


def save_checkpoint_async(
    path: str | os.PathLike[str], *, head: torch.nn.Module, optimizer: Any = None, step: int, **more: Any
) -> Future[None]:
    """`save_checkpoint` of the state as it is now, written by a thread: costs a copy of it in memory, then training goes on.

    Returns a future: `result()` waits until the folder is there and raises what went wrong. Saves of one process are written one
    after the other. Ranks use a process group of their own for it, made at the first call; where the head's group is a part of all
    ranks there is none, and it is written at once.

    Raises ValueError and TypeError for arguments as `save_checkpoint`, at once; what goes wrong while writing is the future's.
    """
    ranks = _ranks(head)
    content = _content(ranks, head, optimizer, step, more)
    saver = None if ranks is None else ranks.saver()
    if ranks is not None and saver is None:
        done: Future[None] = Future()
        try:
            _save(Path(path), content, ranks, sharded=_is_sharded(head))
            done.set_result(None)
        except Exception as error:
            done.set_exception(error)
        return done
    content = content.detached()
    if not _SAVERS:
        _SAVERS.append(ThreadPoolExecutor(1, "checkpoint"))
    return _SAVERS[0].submit(_save, Path(path), content, saver, sharded=_is_sharded(head))


def _content(ranks: ShardGroup | None, head: torch.nn.Module, optimizer: Any, step: int, more: dict[str, Any]) -> Content:
    """What is to be written; where one rank refuses, all do."""

    def check() -> None:
        if not isinstance(step, int) or step < 0:
            raise ValueError(f"save_checkpoint: expected step to be an int >= 0, got {step!r}")
        for name in _RESERVED:
            if name in more:
                raise ValueError(f"save_checkpoint: expected names other than {_RESERVED} in **more, got {name!r}")
        _refuse_pending(head)

    if ranks is None:
        check()
    else:
        ranks.agree("save_checkpoint", check, {"step": step, "names": sorted(more), "optimizer": type(optimizer).__name__})
    return collect(head, optimizer, step, more, ranks if _is_sharded(head) else None)


def _save(path: Path, content: Content, ranks: ShardGroup | None, *, sharded: bool) -> None:
    structure = {"format": RANKS if sharded else ONE_PROCESS, "content": content.structure}
    tensors = content.tensors
    if ranks is not None:
        tensors = content.of_rank(ranks) if sharded else tensors if ranks.rank == 0 else {}
    write(path, structure, tensors, ranks)


def _is_sharded(head: torch.nn.Module) -> bool:
    return getattr(head, "shards", None) is not None


def _ranks(head: torch.nn.Module) -> ShardGroup | None:
    """The ranks that save together: a sharded head's, else all."""
    shards: ShardGroup | None = getattr(head, "shards", None)
    distributed = torch.distributed
    if shards is None and distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        world = distributed.group.WORLD
        assert world is not None
        return _all_ranks(world)
    return shards


@functools.lru_cache(maxsize=1)
def _all_ranks(world: torch.distributed.ProcessGroup) -> ShardGroup:
    return ShardGroup(world)


def _refuse_pending(head: torch.nn.Module) -> None:
    """Rows waiting for step() and queued memory writes are not state: saving between them would lose both."""
    rows = getattr(head, "pending_rows", 0)
    if rows:
        raise ValueError(f"save_checkpoint: expected no pending rows on the head, got {rows}: call step() or zero_grad() first")
    queued = getattr(getattr(head, "memory", None), "pending", 0)
    if queued:
        raise ValueError(f"save_checkpoint: expected no queued memory writes, got {queued}: they apply after the optimizer's step()")
