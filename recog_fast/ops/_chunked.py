"""CPU sweeps of a W that is no float32 tensor: a chunk of classes is joined, the compiled kernels run over it, results are merged in
the order of the classes.

What is float32 at a time is bounded (`_planes.CHUNK`). A class's gradient and step do not depend on the others beside it; the
forward's sums of several chunks are added in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import native, reference
from . import _planes, _stochastic
from ._cpu import threads

Sweep = tuple[Tensor, Tensor, Tensor, Tensor]
Memory = tuple[Tensor | None, Tensor | None, Tensor | None]


def _module() -> Any:
    module, reason = native.load()
    assert module is not None, reason  # else the reference runs
    return module


def _joined(high: Tensor, low: Tensor) -> Tensor:
    """`_planes.join` of contiguous planes."""
    rows = torch.empty(high.shape, dtype=torch.float32)
    _module().join_planes(high=high.data_ptr(), low=low.data_ptr(), out=rows.data_ptr(), n=rows.numel(), threads=threads())
    return rows


def _split(values: Tensor, high: Tensor, low: Tensor) -> None:
    """`_planes.split`, all contiguous."""
    _module().split_planes(values=values.data_ptr(), high=high.data_ptr(), low=low.data_ptr(), n=values.numel(), threads=threads())


def _round(values: Tensor, rounded: Tensor, rounding: Tensor, first: int) -> None:
    """`_stochastic.round_into` of rows first, first + 1, ... of W, all contiguous."""
    seed, step, at = rounding.tolist()
    columns = values.shape[-1]
    _module().round_by_chance(
        values=values.data_ptr(), rounded=rounded.data_ptr(), R=values.numel() // columns, D=columns, seed=seed, step=step, first=at + first,
        threads=threads(),
    )  # fmt: skip


def _memory_of(memory: Memory, start: int, stop: int) -> Memory:
    """The memory of classes start .. stop - 1."""
    rows, strength, slot = memory
    if rows is None or strength is None:
        return memory
    return rows, strength, torch.arange(start, stop, dtype=torch.int32) if slot is None else slot[start:stop]


def _local(ids: Tensor, start: int, stop: int, elsewhere: int = -2) -> Tensor:
    """Ids in [start, stop) relative to start; -1 stays; `elsewhere` for others."""
    inside = (ids >= start) & (ids < stop)
    return torch.where(inside, ids - start, torch.where(ids < 0, ids, elsewhere))


def _members_of(members: Tensor, start: int, stop: int) -> Tensor:
    """The ascending members in [start, stop), relative to start."""
    first, last = torch.searchsorted(members, torch.tensor([start, stop])).tolist()
    return members[first:last] - start


def prototypes(sweep: Callable[..., Tensor], weight: Tensor, residual: Tensor, memory: Memory, renormalize: bool) -> Tensor:
    """`effective_prototypes` of W in planes: (C, D) or (C, K, D) float32."""
    made = torch.empty(weight.shape, dtype=torch.float32)
    for start, stop in _planes.chunks(weight):
        rows = _joined(weight[start:stop], residual[start:stop])
        made[start:stop] = sweep(rows, *_memory_of(memory, start, stop), renormalize)
    return made


class _Merged:
    """The forward sweep's results over the classes so far."""

    def __init__(self, unit_embeddings: Tensor, want_pull: bool) -> None:
        n, d = unit_embeddings.shape
        self.lse = torch.full((n,), -math.inf, dtype=torch.float64)
        self.cosine, self.index = torch.full((n,), -2.0), torch.full((n,), -1)
        self.pull = torch.zeros(n if want_pull else 0, d, dtype=torch.float64)

    def add(self, part: Sweep, start: int) -> None:
        """Classes after those so far: an equal cosine there does not win."""
        lse, cosine, index, pull = part
        both = torch.logaddexp(self.lse, lse)
        if self.pull.shape[0]:
            before, now = (torch.exp(t - both).masked_fill(both == -math.inf, 0.0).unsqueeze(1) for t in (self.lse, lse))
            self.pull = before * self.pull + now * pull
        better = (index >= 0) & ((self.index < 0) | (cosine > self.cosine))
        self.lse = both
        self.cosine, self.index = torch.where(better, cosine, self.cosine), torch.where(better, index + start, self.index)

    def results(self) -> Sweep:
        return self.lse, self.cosine, self.index, self.pull.float()


def forward(
    sweep: Callable[..., Sweep], unit_embeddings: Tensor, weight: Tensor, residual: Tensor, labels: Tensor, scale: float,
    rules: Tensor | None, memory: Memory, renormalize: bool, half: bool, want_pull: bool, members: Tensor | None,
) -> Sweep:  # fmt: skip
    """`negative_logsumexp` of W in planes; rows labelled -1 among members are the caller's to take apart."""
    merged = _Merged(unit_embeddings, want_pull)
    for start, stop in _planes.chunks(weight):
        inside = None if members is None else _members_of(members, start, stop)
        if inside is not None and inside.numel() == 0:
            continue
        rows = _joined(weight[start:stop], residual[start:stop])
        part = sweep(
            unit_embeddings, rows, _local(labels, start, stop), scale, rules, *_memory_of(memory, start, stop), False, renormalize,
            half, want_pull, None, inside,
        )  # fmt: skip
        if stop - start == weight.shape[0]:
            return part
        merged.add(part, start)
    return merged.results()


def unknown(
    sweep: Callable[..., Sweep], unit_embeddings: Tensor, weight: Tensor, residual: Tensor, nearest: Tensor, lse: Tensor,
    first_mean: Tensor, scale: float, memory: Memory, renormalize: bool, half: bool, low: Tensor | None,
) -> Sweep:  # fmt: skip
    """`unknown_rejection` of W in planes: sums over the classes of each chunk add."""
    n, d = unit_embeddings.shape
    mass, remainder, mean = (torch.zeros(n, dtype=torch.float64) for _ in range(3))
    pull = torch.zeros(n, d, dtype=torch.float64)
    for start, stop in _planes.chunks(weight):
        rows = _joined(weight[start:stop], residual[start:stop])
        part = sweep(
            unit_embeddings, rows, _local(nearest, start, stop, -1), lse, first_mean, scale, *_memory_of(memory, start, stop),
            False, renormalize, half, low,
        )  # fmt: skip
        for total, sums in zip((mass, remainder, mean, pull), part, strict=True):
            total += sums
    return mass, remainder, mean, pull.float()


def step(
    sweep: Callable[..., None], unit_embeddings: Tensor, targets: Tensor, terms: Tensor, weight: Tensor, residual: Tensor | None,
    velocity: Tensor | None, rounding: Tensor | None, scale: float, rules: Tensor | None, memory: Memory, sgd: tuple[Any, ...], half: bool,
    members: Tensor | None, sparse: bool,
) -> None:  # fmt: skip
    """`class_step`, in place, of W in planes or of a velocity in bfloat16; sgd: renormalize, lr, momentum, weight decay, Nesterov."""
    subcenters = weight.shape[1] if weight.dim() == 3 else 1
    for start, stop in _planes.chunks(weight):
        at = _local(targets, start * subcenters, stop * subcenters)
        its_terms, inside, any_row = _rows_of(at, terms, members, start, stop, weight)
        if sparse and not any_row:
            continue
        n = unit_embeddings.shape[0] if any_row else 0
        rows = weight[start:stop] if residual is None else _joined(weight[start:stop], residual[start:stop])
        speed = None if velocity is None else velocity[start:stop].float()  # float32: itself
        sweep(
            unit_embeddings[:n], at[:n], its_terms[:, :n], rows, speed, scale, None if rules is None else rules[:, :n],
            *_memory_of(memory, start, stop), *sgd, half, None, inside, sparse,
        )  # fmt: skip
        if residual is not None:
            _split(rows, weight[start:stop], residual[start:stop])
        if velocity is not None and speed is not None and _stochastic.wanted(velocity):
            assert rounding is not None
            _round(speed, velocity[start:stop], rounding, start * subcenters)


def _rows_of(
    at: Tensor, terms: Tensor, members: Tensor | None, start: int, stop: int, weight: Tensor
) -> tuple[Tensor, Tensor | None, bool]:
    """(terms, members, whether any row reaches a class) of a class sweep over start .. stop - 1; at: targets there."""
    kind = terms[4]
    single = kind == reference.UNKNOWN_SINGLE
    if bool(single.any()):  # h = C p - 1, and the sweep's C is that of the chunk
        terms = terms.clone()
        terms[0] -= torch.where(single, math.log(weight.shape[0] / (stop - start)), 0.0)
    if members is None:
        return terms, None, True
    inside = _members_of(members, start, stop)
    if inside.numel():
        return terms, inside, True
    terms = terms.clone()  # nobody's negatives: what is left are targets and unknown rows
    terms[1] = torch.where(kind == reference.MARGIN, 0.0, terms[1])
    if bool((kind != reference.MARGIN).any()):
        return terms, None, True
    owners = (at[at >= 0] // (weight.shape[1] if weight.dim() == 3 else 1)).unique()
    return terms, owners if owners.numel() else None, bool(owners.numel())
