"""P_j = normalize(normalize(W_j) + lam_j M_j), cast to the sweep's dtype, in one pass (docs/math.md 2)."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .planes import load_rows, plane_pointers
from .tiles import injected, renormalised, unit_rows


@triton.jit
def prototype_rows(
    weight, low,  # (R, D) float32; SPLIT: two int16 planes
    memory,  # (S, D) float32 or bfloat16
    strength,  # (S,) float32
    slot,  # (R,) int32
    prototypes,  # (R, D) out
    R,
    D: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr, MEMORY: tl.constexpr, RENORMALIZE: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """One program: BR whole rows."""
    rows = tl.program_id(0) * BR + tl.arange(0, BR)
    d = tl.arange(0, BD)
    inside = (rows < R)[:, None] & (d < D)[None, :]
    at = rows[:, None].to(tl.int64) * D + d[None, :]
    unit, _norm = unit_rows(load_rows(weight, low, at, inside, SPLIT))
    if MEMORY:
        lam, mixed = injected(unit, memory, strength, slot, rows, rows < R, D, BD)
        if RENORMALIZE:
            again, _length, used = renormalised(mixed, lam)
            unit = tl.where(used[:, None], again, unit)
        else:
            unit = mixed
    tl.store(prototypes + at, unit.to(prototypes.dtype.element_ty), mask=inside)


def run_prototype_rows(
    weight: Tensor,  # (R, D) float32, or bfloat16 with residual
    injection: tuple[Tensor, Tensor, Tensor] | None,  # memory (S, D), strength (S,), slot (R,) int32
    prototypes: Tensor,  # (R, D) float32 or bfloat16, out
    *,
    renormalize: bool,
    residual: Tensor | None = None,  # (R, D) int16, beside a bfloat16 weight
) -> None:
    """Launches `prototype_rows`."""
    count, dimension = weight.shape
    if count == 0:
        return
    block = configs.row_block(dimension, weight.device)
    memory, strength, slot = injection or (weight, weight, weight)
    prototype_rows[(triton.cdiv(count, block.rows),)](
        *plane_pointers(weight, residual), memory, strength, slot, prototypes, count, D=dimension, BD=block.dimension, BR=block.rows,
        MEMORY=injection is not None, RENORMALIZE=renormalize, SPLIT=residual is not None, num_warps=block.warps,
    )  # fmt: skip
