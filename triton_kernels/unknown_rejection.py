"""The second sweep of unknown identity rejection: sums and slopes without each row's nearest class (docs/math.md 3)."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .tiles import class_cosines, expm1_remainder, store_parts, tile_origin


@triton.jit
def unknown_tile(
    x,  # (N, D)
    p,  # (C, K, D) this chunk's prototypes
    nearest,  # (ld,) int32 global class left out
    lse_high,  # (ld,) float32: lse in base 2, high part
    lse_low,  # (ld,) float32: what the high part leaves
    first_mean,  # (ld,) float32
    slopes,  # (ld, ld_e) out: p (expm1(p) - first_mean)
    sums,  # (tiles of classes, 3, ld) float32 out: p, expm1(p) - p, p expm1(p)
    N, C, first, ld, ld_e, k2,
    D: tl.constexpr, K: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """p = min(2^(k2 c - lse), 1) of all classes but the row's nearest."""
    row0, class0 = tile_origin(N, BN, BC)
    rows = row0 + tl.arange(0, BN)
    classes = class0 + tl.arange(0, BC)
    c, winner = class_cosines(x, p, row0, class0, N, C, D, K, BN, BC, BK, TMA)
    left_out = tl.load(nearest + rows)
    others = (classes[None, :] + first != left_out[:, None]) & (classes < C)[None, :]
    z = (c * k2 - tl.load(lse_high + rows)[:, None]) - tl.load(lse_low + rows)[:, None]
    probability = tl.where(others, tl.minimum(tl.exp2(z), 1.0), 0.0)
    remainder = expm1_remainder(probability)
    expm1 = probability + remainder
    out = sums + (class0 // BC).to(tl.int64) * 3 * ld + rows
    tl.store(out, tl.sum(probability, 1))
    tl.store(out + ld, tl.sum(remainder, 1))
    tl.store(out + 2 * ld, tl.sum(probability * expm1, 1))
    slope = probability * (expm1 - tl.load(first_mean + rows)[:, None])
    store_parts(slopes, slope, winner, rows, classes, ld_e, left_out, lse_low, K, False)


def run_unknown_tile(
    x: Tensor,  # (N, D) float32 or bfloat16
    p: Tensor,  # (C, K, D) as x
    nearest: Tensor,  # (ld,) int32
    lse: tuple[Tensor, Tensor],  # (ld,) float32 each: high and low part, base 2
    first_mean: Tensor,  # (ld,)
    slopes: Tensor,  # (ld, ld_e) whole tiles
    sums: Tensor,  # (T, 3, ld) float32
    *,
    first: int,
    k2: float,
    tile: configs.Tile,
) -> int:
    """Launches `unknown_tile`; how many of the T rows of the sums it wrote."""
    n, c, k = x.shape[0], p.shape[0], p.shape[1]
    classes = triton.cdiv(c, tile.classes)
    operands: tuple[Any, Any, dict[str, Any]] = configs.operands(x, p, tile)
    unknown_tile[(triton.cdiv(n, tile.rows) * classes,)](
        operands[0], operands[1], nearest, *lse, first_mean, slopes, sums,
        n, c, first, nearest.shape[0], slopes.stride(0), k2, K=k, **operands[2],
    )  # fmt: skip
    return int(classes)

