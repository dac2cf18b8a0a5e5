"""Tensors -> pointers for the compiled CPU kernels. Shapes were checked by the public functions."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..reference import TERM_ROWS, touched_classes
from ..rules import RULE_ROWS
from . import _checks


def float_rows(t: Tensor) -> Tensor:
    """Contiguous float32 (no copy where it already is)."""
    return t.detach().to(torch.float32).contiguous()


def address(t: Tensor | None) -> int:
    """Where the data lies; 0 for None."""
    return 0 if t is None else t.data_ptr()


def float_terms(terms: Tensor, rows: int) -> Tensor:
    """`terms` (5, N) as the kernels read them."""
    _expect_shape(terms, (TERM_ROWS, rows), "terms (5, N)")
    return float_rows(terms)


def _expect_shape(t: Tensor, shape: tuple[int, ...], name: str) -> None:
    """The kernels read by pointer: what torch.ops.recog_fast.* is given must fit, whoever calls it."""
    _checks.expect(tuple(t.shape) == shape, "recog_fast", f"{name} = {shape}", f"shape {tuple(t.shape)}")


class Operands:
    """The extension's views of the classes and rows of one call; keeps the tensors behind them alive."""

    def __init__(
        self,
        module: ModuleType,
        weight: Tensor,
        memory_rows: Tensor | None,
        strength: Tensor | None,
        slot: Tensor | None,
        *,
        unit: bool = False,
        renormalize: bool = True,
        members: Tensor | None = None,
        seen: Tensor | None = None,
    ) -> None:
        self.module = module
        _checks.expect(weight.dim() in (2, 3), "recog_fast", "weight of shape (C, D) or (C, K, D)", tuple(weight.shape))
        _checks.expect(weight.dim() == 2 or weight.shape[1] >= 1, "recog_fast", "weight (C, K, D) with K >= 1", tuple(weight.shape))
        self.weight = float_rows(weight)
        self.memory = self._memory(memory_rows, strength, slot)
        self.subcenters = weight.shape[1] if weight.dim() == 3 else 1
        rows, lam, at = self.memory
        self.members, self.seen = members, None if seen is None else seen.to(torch.uint8)
        self._numbers = None if members is None else members.to(torch.int32)
        self.classes: Any = module.Classes(
            weight=address(self.weight),
            memory_rows=address(rows),
            strength=address(lam),
            slot=address(at),
            C=weight.shape[0] if members is None else members.numel(),
            K=self.subcenters,
            D=weight.shape[-1],
            S=0 if rows is None else rows.shape[0],
            unit=unit,
            memory_bf16=rows is not None and rows.dtype == torch.bfloat16,
            renormalize=renormalize,
            members=address(self._numbers),
            seen=address(self.seen),
            all=weight.shape[0],
        )

    def _memory(
        self, memory_rows: Tensor | None, strength: Tensor | None, slot: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        if memory_rows is None or strength is None:
            return None, None, None
        s, c = memory_rows.shape[0], self.weight.shape[0]
        _expect_shape(memory_rows, (s, self.weight.shape[-1]), "memory_rows (S, D)")
        _expect_shape(strength, (s,), "strength (S,)")
        _expect_shape(slot, (c,), "slot (C,)") if slot is not None else _checks.expect(s == c, "recog_fast", "S = C without slot", s)
        if slot is None:
            slot = torch.arange(self.weight.shape[0], dtype=torch.int32)
        rows = memory_rows.detach().contiguous()
        if rows.dtype != torch.bfloat16:
            rows = rows.to(torch.float32)
        return rows, float_rows(strength), slot.to(torch.int32).contiguous()

    def rows(self, unit_embeddings: Tensor, targets: Tensor, rules: Tensor | None, scale: float, half: bool = False) -> Any:
        """The extension's Rows; `targets` are rows of W (class * K + sub-center); half: 16-bit operands."""
        n = unit_embeddings.shape[0]
        _expect_shape(unit_embeddings, (n, self.weight.shape[-1]), "unit_embeddings (N, D)")
        _expect_shape(targets, (n,), "targets (N,)")
        if rules is not None:
            _expect_shape(rules, (RULE_ROWS, n), "rules (12, N)")
        self.unit_embeddings = float_rows(unit_embeddings)
        self.targets = self._positions(targets.to(torch.int64)).contiguous()
        self.rules = None if rules is None else float_rows(rules)
        return self.module.Rows(
            unit_embeddings=address(self.unit_embeddings),
            target=address(self.targets),
            rules=address(self.rules),
            N=unit_embeddings.shape[0],
            scale=scale,
            half=half,
        )

    def _positions(self, targets: Tensor) -> Tensor:
        """Rows of W -> rows of the sweep; -2 where the class is not in it."""
        if self.members is None:
            return targets
        ids = targets // self.subcenters
        at = torch.searchsorted(self.members, ids).clamp_max(self.members.numel() - 1)
        return torch.where(self.members[at] == ids, at * self.subcenters + targets % self.subcenters, -2)


def check_members(members: Tensor, classes: int) -> Tensor:
    """(M,) int64, ascending, in [0, C), M >= 1: the kernels read rows of W by it."""
    ids = members.to(torch.int64).contiguous()
    _checks.expect(ids.dim() == 1 and ids.numel() >= 1, "recog_fast", "members of shape (M,), M >= 1", f"shape {tuple(ids.shape)}")
    fits = bool((ids[1:] > ids[:-1]).all()) and 0 <= int(ids[0]) and int(ids[-1]) < classes
    _checks.expect(fits, "recog_fast", f"members ascending in [0, C) = [0, {classes})", ids)
    return ids


def class_sweep_members(
    members: Tensor | None, targets: Tensor, terms: Tensor, weight: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """(classes (T,) a class sweep visits, which of them (T,) margin rows see) for margin rows' `members`; None = all."""
    if members is None:
        return None, None
    members = check_members(members, weight.shape[0])
    visited = touched_classes(targets, terms, weight, members)
    if visited is None:
        return None, torch.zeros(weight.shape[0], dtype=torch.bool).index_fill_(0, members, True)
    return check_members(visited, weight.shape[0]), None if visited.numel() == members.numel() else torch.isin(visited, members)


def kept(module: ModuleType, buffer: Tensor | None, floor: Tensor | None = None) -> Any:
    """The extension's view of a buffer for exponentials (1-D float32, bfloat16 for 16 bits each, int32 for element lists, which
    a forward sweep makes with `floor` (N,)); None: nothing is kept."""
    if buffer is None:
        return module.Kept()
    _checks.expect(
        buffer.dim() == 1 and buffer.is_contiguous() and buffer.dtype in (torch.float32, torch.bfloat16, torch.int32),
        "recog_fast", "kept as a contiguous 1-D float32, bfloat16 or int32 tensor", (tuple(buffer.shape), buffer.dtype),
    )  # fmt: skip
    return module.Kept(
        address=address(buffer), bytes=buffer.numel() * buffer.element_size(), half=buffer.dtype == torch.bfloat16,
        lists=buffer.dtype == torch.int32, floor=address(floor),
    )  # fmt: skip


def kept_of(kept: Tensor | None, members: Tensor | None, visited: Tensor | None) -> Tensor | None:
    """The forward sweep's exponentials, where the class sweep visits the classes it did (the members, no other)."""
    same = members is None or (visited is not None and visited.numel() == members.numel())
    return kept if same else None


def threads() -> int:
    """As many threads as torch uses; results do not depend on it."""
    return torch.get_num_threads()
