"""Row records: all a class sweep needs of a batch once the forward sweep is done (CONTRIBUTING.md)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import reference
from ..rules import NO_CLAMP, NO_THRESHOLD, PLAIN
from ._kept import Lease
from ._planes import Weight

Key = tuple[int | float, ...]


@dataclass(frozen=True)
class Injection:
    """The memory a sweep sees: rows (S, D), strength (S,), slot (C,) int32; never a C x D tensor."""

    rows: Tensor | None = None
    strength: Tensor | None = None
    slot: Tensor | None = None

    def arguments(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """As the operations take them."""
        return self.rows, self.strength, self.slot

    def versions(self) -> tuple[int, ...]:
        """Changes with every write into the memory."""
        return tuple(-1 if t is None or t.is_inference() else t._version for t in self.arguments())

    def check_versions(self, versions: tuple[int, ...]) -> None:
        """RuntimeError where the memory was written since `versions`: a class sweep would see other prototypes than forward."""
        if versions != self.versions():
            raise RuntimeError(
                "margin softmax: expected backward before the memory changes, got one after a write (a memory's flush: with an "
                "ordinary optimizer the next training forward); call backward after each forward, or use HeadSGD"
            )

    def of(self, ids: Tensor) -> Injection:
        """The same for the classes `ids` alone: one row per id."""
        if self.rows is None or self.strength is None:
            return self
        at = ids if self.slot is None else self.slot.long()[ids]
        there = at.clamp_min(0)
        strength = torch.where(at >= 0, self.strength[there], torch.zeros_like(self.strength[there]))
        return Injection(self.rows[there], strength)


def target_prototypes(unit: Tensor, weight: Weight, labels: Tensor, injection: Injection) -> tuple[Tensor, Tensor, Tensor]:
    """Target cosine (N,), winning sub-center (N,), its prototype (N, D), in unit's dtype; label -1 uses class 0 as filler."""
    ids = labels.clamp_min(0)
    rows = reference.effective_prototypes(weight[ids].to(unit.dtype), *injection.of(ids).arguments())
    rows = rows.reshape(ids.numel(), weight[0].numel() // weight.shape[-1], weight.shape[-1])
    cosines = torch.einsum("nkd,nd->nk", rows, unit)
    sub = (cosines == cosines.amax(dim=1, keepdim=True)).to(torch.int8).argmax(dim=1)
    at = torch.arange(ids.numel(), device=ids.device)
    return cosines[at, sub], sub, rows[at, sub]


@dataclass(frozen=True)
class RowRecords:
    """unit_embeddings (N, D), targets (N,) rows of W, terms (5, N), rules (12, N) or None; `key` is the state of scale,
    W, memory and clock they were made under; members (M,) the classes margin rows saw, None: all (or no negatives)."""

    unit_embeddings: Tensor
    targets: Tensor
    terms: Tensor
    rules: Tensor | None
    scale: float
    injection: Injection
    key: Key = ()
    half: bool = False  # made by 16-bit sweeps
    kept: Lease | None = None  # exponentials of these very rows
    members: Tensor | None = None


def _plain_rules(n: int, like: Tensor) -> Tensor:
    column = [NO_CLAMP, NO_THRESHOLD, *PLAIN, *PLAIN]
    packed = torch.empty(len(column), n, dtype=like.dtype, device=like.device)
    for row, value in zip(packed, column, strict=True):
        row.fill_(value)
    return packed


def join(records: Sequence[RowRecords]) -> RowRecords:
    """One record of all rows (micro-batches of one optimizer step)."""
    first = records[0]
    if len(records) == 1:
        return first
    rules = None
    if any(r.rules is not None for r in records):
        rules = torch.cat(
            [_plain_rules(r.targets.numel(), r.terms) if r.rules is None else r.rules.to(r.terms.dtype) for r in records], dim=1
        )
    return RowRecords(
        torch.cat([r.unit_embeddings for r in records]),
        torch.cat([r.targets for r in records]),
        torch.cat([r.terms for r in records], dim=1),
        rules,
        first.scale,
        first.injection,
        first.key,
        all(r.half for r in records),
        members=next((r.members for r in records if r.members is not None), None),
    )


def without(record: RowRecords, dropped: Tensor) -> RowRecords:
    """The record without the rows where `dropped` (N,) is true."""
    at = (~dropped).nonzero().squeeze(1)
    rules = None if record.rules is None else record.rules[:, at]
    return dataclasses.replace(
        record, unit_embeddings=record.unit_embeddings[at], targets=record.targets[at], terms=record.terms[:, at].contiguous(),
        rules=rules, kept=None,
    )  # fmt: skip


def least_mass(mass: Tensor, share: float) -> Tensor:
    """(N,) bool: the rows of least mass whose masses together are at most `share` of the whole; none where that is not finite."""
    order, whole = torch.argsort(mass, stable=True), mass.sum()
    inside = (torch.cumsum(mass[order], 0) <= share * whole) & torch.isfinite(whole)
    return torch.zeros_like(inside).scatter(0, order, inside)


def wants_half(embeddings: Tensor, compute_dtype: torch.dtype | None) -> bool:
    """Whether the sweeps take 16-bit operands: asked for, or half-precision embeddings, or autocast."""
    if compute_dtype is not None:
        return compute_dtype == torch.bfloat16
    return embeddings.dtype in (torch.bfloat16, torch.float16) or torch.is_autocast_enabled(embeddings.device.type)
