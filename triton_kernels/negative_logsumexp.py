"""The forward tile: exponentials of a chunk of classes, their row sums, the nearest negative (docs/math.md 1)."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from . import configs, tiles
from .tiles import bent, class_cosines, store_parts, tile_origin, times_slope

SUMS, EXPONENTIALS, PEAKS = 0, 1, 2

_NO_INDEX = tl.constexpr(tiles.NO_INDEX)
_EXPONENTIALS = tl.constexpr(EXPONENTIALS)
_PEAKS = tl.constexpr(PEAKS)


@triton.jit
def _exponents(c, rules, rows, ld, k2, RULES: tl.constexpr):
    """k2 f(c); -inf where c is."""
    z = bent(c, rules, rows, ld, RULES) * k2
    if RULES:
        z = tl.where(c == float("-inf"), float("-inf"), z)
    return z


@triton.jit
def forward_tile(
    x,  # (N, D)
    p,  # (C, K, D) this chunk's prototypes
    labels,  # (ld,) int32 global class ids, negative: none
    offsets,  # (ld,) float32 exponent offset, base 2
    nearest,  # (ld,) float32 nearest cosine of the chunks before
    rules,  # (12, ld) float32
    exponentials,  # (ld, ld_e) out
    sums,  # (tiles of classes, ld) float32 out
    cosines,  # (tiles of classes, ld) float32 out
    indices,  # (tiles of classes, ld) int32 out, class of this chunk
    N, C, first, ld, ld_e, k2,
    D: tl.constexpr, K: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, TMA: tl.constexpr,
    RULES: tl.constexpr, MODE: tl.constexpr, LAZY: tl.constexpr,
):  # fmt: skip
    """e = 2^(k2 f(c) - offset) of the negatives: row sums, and e g(c) itself where MODE is EXPONENTIALS. PEAKS: max k2 f(c) as `sums`."""
    row0, class0 = tile_origin(N, BN, BC)
    rows = row0 + tl.arange(0, BN)
    classes = class0 + tl.arange(0, BC)
    c, winner = class_cosines(x, p, row0, class0, N, C, D, K, BN, BC, BK, TMA)
    label = tl.load(labels + rows)
    # -inf in place of what is no negative: cheaper than a mask that lives on
    c = tl.where((classes[None, :] + first != label[:, None]) & (classes < C)[None, :], c, float("-inf"))
    out = (class0 // BC).to(tl.int64) * ld + rows
    if MODE == _PEAKS:
        tl.store(sums + out, tl.max(_exponents(c, rules, rows, ld, k2, RULES), 1))
    else:
        top = tl.max(c, 1)
        index = tl.full([BN], _NO_INDEX, tl.int32)
        if LAZY:  # the index costs a pass over the tile: only where some row's nearest can be here
            if tl.max((top > tl.load(nearest + rows)).to(tl.int32), 0) > 0:
                index = tl.min(tl.where(c == top[:, None], classes[None, :], _NO_INDEX), 1)
        else:
            index = tl.min(tl.where(c == top[:, None], classes[None, :], _NO_INDEX), 1)
        tl.store(cosines + out, top)
        tl.store(indices + out, index)
        e = tl.exp2(_exponents(c, rules, rows, ld, k2, RULES) - tl.load(offsets + rows)[:, None])
        tl.store(sums + out, tl.sum(e, 1))
        if MODE == _EXPONENTIALS:
            store_parts(exponentials, times_slope(e, c, rules, rows, ld, RULES), winner, rows, classes, ld_e, label, offsets, K, False)


def run_forward_tile(
    x: Tensor,  # (N, D) float32 or bfloat16
    p: Tensor,  # (C, K, D) as x
    labels: Tensor,  # (ld,) int32
    offsets: Tensor,  # (ld,)
    nearest: Tensor,  # (ld,)
    rules: Tensor | None,  # (12, ld)
    exponentials: Tensor | None,  # (ld, ld_e) whole tiles, the chunk's in its first C K columns
    partials: tuple[Tensor, Tensor, Tensor],  # (T, ld) sums, cosines, indices
    *,
    first: int,
    k2: float,
    peaks: bool = False,
    tile: configs.Tile,
) -> int:
    """Launches `forward_tile`; how many rows of the partials it wrote."""
    n, c, k = x.shape[0], p.shape[0], p.shape[1]
    sums, cosines, indices = partials
    classes = triton.cdiv(c, tile.classes)
    grid = (triton.cdiv(n, tile.rows) * classes,)
    if peaks:
        mode = PEAKS
    else:
        mode = SUMS if exponentials is None else EXPONENTIALS
    ld_e = 0 if exponentials is None else exponentials.stride(0)
    operands: tuple[Any, Any, dict[str, Any]] = configs.operands(x, p, tile)
    forward_tile[grid](
        operands[0], operands[1], labels, offsets, nearest, labels if rules is None else rules,
        sums if exponentials is None else exponentials, sums, cosines, indices,
        n, c, first, labels.shape[0], ld_e, k2, K=k, RULES=rules is not None, MODE=mode, LAZY=tile.lazy_index, **operands[2],
    )  # fmt: skip
    return int(classes)
