"""The ranks that share a head's classes: which classes are whose, and every collective a step makes."""

from __future__ import annotations

import atexit
import functools
import gc
import hashlib
import re
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

_REFUSED, _STATISTICS, _EMBEDDINGS = 1, 2, 4  # flags of a header


_living: weakref.WeakSet[ShardGroup] = weakref.WeakSet()


@functools.cache
def _at_exit() -> None:
    atexit.register(free_groups)


def free_groups() -> None:
    """Lets go of the process groups of all heads, and of what else only the garbage collector frees; Python calls it when the process ends.

    A head and its HeadSGD hold each other, and so do the parts of a DistributedDataParallel. Left to the interpreter's last moments, a
    thread of their group asks for its lock, and a process that has done all its work ends by SIGABRT (torch 2.13, gloo).
    """
    for shards in list(_living):
        shards.__dict__.update(group=None, hosts=None, _saver=None)
    gc.collect()


def class_range(num_classes: int, ranks: int, rank: int) -> tuple[int, int]:
    """(first, last + 1) class of a rank: torch.chunk's ranges, ceil(C/R) each, the last ones smaller or empty."""
    size = -(-num_classes // ranks)
    return min(rank * size, num_classes), min((rank + 1) * size, num_classes)


@dataclass(frozen=True)
class Admission:
    """What all ranks agreed to run: rows of each, and whether anyone wants statistics of unlabelled rows or a gradient."""

    sizes: tuple[int, ...]
    statistics: bool
    d_embeddings: bool


class ShardGroup:
    """A process group whose ranks hold the classes of one head, each `class_range`'s.

    Rows are numbered over all ranks in rank order; a rank's own are `own(sizes)`. Collectives run on the group's backend;
    headers (a few integers per call, which carry batch sizes and errors) on CPU tensors, so no device is waited for.
    """

    num_classes = start = stop = 0

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self.hosts = _host_group(group)
        self._saver: ShardGroup | None = None
        self.timeout: timedelta | None = None  # of the saver's group; None: torch's own
        _living.add(self)
        _at_exit()

    def spread(self, num_classes: int) -> tuple[int, int]:
        """Takes the classes to share; (first, last + 1) of this rank."""
        self.num_classes = num_classes
        self.start, self.stop = class_range(num_classes, self.size, self.rank)
        return self.start, self.stop

    def __deepcopy__(self, _: Any) -> ShardGroup:
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError("MarginHead: expected a head without a process group to pickle, got a sharded one: use save_checkpoint")

    def saver(self) -> ShardGroup | None:
        """The same ranks in a group of their own, for a thread that saves while training goes on; every rank asks for it.

        None for a part of all ranks: the others would have to take part in making it.
        """
        if self._saver is None and self.size == dist.get_world_size():
            made = dist.new_group(backend="gloo", timeout=self.timeout)
            assert isinstance(made, dist.ProcessGroup)
            self._saver = ShardGroup(made)
            self._saver.spread(self.num_classes)
        return self._saver

    # -- agreement -------------------------------------------------------------------------------------------------------

    def exchange(self, value: Any) -> list[Any]:
        """Every rank's value (small, of plain types), in rank order."""
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, value, group=self.hosts)
        return gathered

    def agree(
        self,
        where: str,
        check: Callable[[], object],
        facts: Mapping[str, object],
        rows: int = 0,
        *,
        statistics: bool = False,
        d_embeddings: bool = False,
    ) -> Admission:
        """One header before the collectives of a call. Where a rank's `check` raises, or `facts` differ, every rank raises.

        The refusing rank raises its own error, the others a ValueError naming it; nobody waits for a rank that left.
        """
        refusal: Exception | None = None
        try:
            check()
        except Exception as error:
            refusal = error
        said = {"call": where} | {name: _plain(value) for name, value in facts.items()}
        digest = int.from_bytes(hashlib.blake2b(repr(said).encode(), digest_size=8).digest(), "big", signed=True)
        flags = _REFUSED * (refusal is not None) + _STATISTICS * statistics + _EMBEDDINGS * d_embeddings
        headers = self._headers([rows, digest, flags])
        if any(flags & _REFUSED for _, _, flags in headers) or any(other != digest for _, other, _ in headers):
            self._disagree(where, said, refusal)
        union = 0
        for _, _, flags in headers:
            union |= flags
        return Admission(tuple(n for n, _, _ in headers), bool(union & _STATISTICS), bool(union & _EMBEDDINGS))

    def _headers(self, mine: list[int]) -> list[list[int]]:
        device = "cpu" if "gloo" in str(dist.get_backend_config(self.hosts)) else "cuda"
        header = torch.tensor(mine, device=device)
        gathered = torch.empty(self.size * len(mine), dtype=torch.int64, device=device)
        _gather(gathered, header, self.hosts)
        rows: list[list[int]] = gathered.reshape(self.size, -1).tolist()
        return rows

    def _disagree(self, where: str, said: dict[str, str], refusal: Exception | None) -> NoReturn:
        """Every rank gets here: say who refused, or which fact differs where."""
        told = self.exchange((None if refusal is None else str(refusal), said))
        if refusal is not None:
            raise refusal
        for rank, (message, _) in enumerate(told):
            if message is not None:
                raise ValueError(f"{where}: expected a call that every rank accepts, got a refusal of rank {rank}: {message}")
        first = told[0][1]
        for rank, (_, other) in enumerate(told):
            for name in dict.fromkeys([*first, *other]):
                mine, theirs = first.get(name, "nothing"), other.get(name, "nothing")
                if mine != theirs:
                    raise ValueError(f"{where}: expected the same {name} on every rank, got {mine} on rank 0 and {theirs} on rank {rank}")
        raise ValueError(f"{where}: expected the same call on every rank, got different ones")

    # -- collectives -----------------------------------------------------------------------------------------------------

    def own(self, sizes: tuple[int, ...]) -> slice:
        """This rank's rows among all."""
        first = sum(sizes[: self.rank])
        return slice(first, first + sizes[self.rank])

    def gather(self, columns: list[Tensor], sizes: tuple[int, ...]) -> list[Tensor]:
        """All ranks' rows (N, ...) of tensors (n, ...) of any dtypes, in one all-gather of max(n) rows' bytes."""
        n = sizes[self.rank]
        parts = [c.detach().reshape(n, _width(c)).contiguous().view(torch.uint8) for c in columns]
        most, width, device = max(sizes), sum(part.shape[1] for part in parts), columns[0].device
        send = torch.zeros(most, width, dtype=torch.uint8, device=device)
        send[:n] = torch.cat(parts, dim=1)
        received = torch.empty(self.size * most, width, dtype=torch.uint8, device=device)
        _gather(received, send, self.group)
        received = received.reshape(self.size, most, width)
        rows = torch.cat([received[rank, :count] for rank, count in enumerate(sizes)])
        out, at = [], 0
        for column in columns:
            wide = _width(column) * column.element_size()
            piece = rows[:, at : at + wide].contiguous().view(column.dtype)
            out.append(piece.reshape(rows.shape[0], *column.shape[1:]))
            at += wide
        return out

    def scatter_sum(self, rows: Tensor, sizes: tuple[int, ...]) -> Tensor:
        """(N, w) of every rank -> the sum of this rank's own rows (n, w), in one reduce-scatter."""
        most, width = max(sizes), rows.shape[1]
        padded = rows.contiguous()
        if any(n != most for n in sizes):
            padded = rows.new_zeros(self.size, most, width)
            for rank, part in enumerate(rows.split(list(sizes))):
                padded[rank, : part.shape[0]] = part
            padded = padded.reshape(-1, width)
        result = rows.new_empty(most, width)
        _reduce_scatter(result, padded, self.group)
        return result[: sizes[self.rank]]

    def sum_(self, values: Tensor) -> Tensor:
        """All-reduce(sum), in place."""
        dist.all_reduce(values, dist.ReduceOp.SUM, group=self.group)
        return values

    def max_(self, values: Tensor) -> Tensor:
        """All-reduce(max), in place."""
        dist.all_reduce(values, dist.ReduceOp.MAX, group=self.group)
        return values

    def min_(self, values: Tensor) -> Tensor:
        """All-reduce(min), in place."""
        dist.all_reduce(values, dist.ReduceOp.MIN, group=self.group)
        return values

    def swap_columns(self, values: Tensor, rows: tuple[int, ...], columns: tuple[int, ...]) -> Tensor:
        """(N, w_r) of all rows over this rank's columns -> (n_r, sum w) of its own rows over all columns; all-to-all."""
        mine, n = columns[self.rank], rows[self.rank]
        received = values.new_empty(n * sum(columns))
        dist.all_to_all_single(received, values.contiguous().flatten(), [n * w for w in columns], [m * mine for m in rows], group=self.group)
        return torch.cat([part.reshape(n, w) for part, w in zip(received.split([n * w for w in columns]), columns, strict=True)], dim=1)

    def swap_rows(self, values: Tensor, rows: tuple[int, ...], columns: tuple[int, ...]) -> Tensor:
        """`swap_columns` back: (n_r, sum w) -> (N, w_r)."""
        mine, n = columns[self.rank], rows[self.rank]
        send = torch.cat([part.flatten() for part in values.split(list(columns), dim=1)])
        received = values.new_empty(sum(rows) * mine)
        dist.all_to_all_single(received, send, [m * mine for m in rows], [n * w for w in columns], group=self.group)
        return received.reshape(sum(rows), mine)


def _plain(value: object) -> str:
    """A repr that is the same in every process: no tensor's values, no addresses."""
    return "a tensor" if isinstance(value, Tensor) else re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def join_group(group: dist.ProcessGroup | None) -> ShardGroup | None:
    """The ranks a head's classes are spread over; None for one process.

    Raises ValueError for None where torch.distributed runs with more than one rank, for a group this rank is not in and for
    what is no process group.
    """
    if group is None:
        ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        if ranks > 1:
            raise ValueError(f"MarginHead: expected group=torch.distributed.group.WORLD or another process group under {ranks} ranks, got None")
        return None
    if not isinstance(group, dist.ProcessGroup):
        raise ValueError(f"MarginHead: expected group to be a torch.distributed.ProcessGroup that this rank is in, got {group!r}")
    return ShardGroup(group) if dist.get_world_size(group) > 1 else None


def _host_group(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """A group of the same ranks that takes CPU tensors: itself with gloo, else a gloo one beside it.

    A part of all ranks cannot make one by itself: then the group, whose headers wait for the device.
    """
    if "gloo" in str(dist.get_backend_config(group)) or dist.get_world_size(group) < dist.get_world_size():
        return group
    made = dist.new_group(backend="gloo")
    assert isinstance(made, dist.ProcessGroup)
    return made


def _width(column: Tensor) -> int:
    width = 1
    for size in column.shape[1:]:
        width *= size
    return width


# all_gather_single and reduce_scatter_single are the names since torch 2.12
def _gather(received: Tensor, send: Tensor, group: dist.ProcessGroup) -> None:
    getattr(dist, "all_gather_single", dist.all_gather_into_tensor)(received, send, group=group)


def _reduce_scatter(result: Tensor, rows: Tensor, group: dist.ProcessGroup) -> None:
    getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)(result, rows, group=group)
