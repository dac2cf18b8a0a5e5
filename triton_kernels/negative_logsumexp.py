"""The forward tile: exponentials of a chunk of classes, their row sums, the nearest negative (docs/math.md 1)."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from . import configs, tiles
from .tiles import bend, class_cosines, store_parts, tile_origin

SUMS, EXPONENTIALS, PEAKS = 0, 1, 2

_NO_INDEX = tl.constexpr(tiles.NO_INDEX)
_EXPONENTIALS = tl.constexpr(EXPONENTIALS)
_PEAKS = tl.constexpr(PEAKS)


@triton.jit
def forward_tile(
    x,  # (N, D)
    p,  # (C, K, D) this chunk's prototypes
    labels,  # (ld,) int32 global class ids, negative: none
    offsets,  # (ld,) float32 exponent offset, base 2
    nearest,  # (ld,) float32 nearest cosine of the chunks before
    rules,  # (12, ld) float32
    exponentials,  # (N, ld_e) out
    sums,  # (tiles of classes, ld) float32 out
    cosines,  # (tiles of classes, ld) float32 out
    indices,  # (tiles of classes, ld) int32 out, class of this chunk
    N, C, first, ld, ld_e, k2,
    D: tl.constexpr, K: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr,
    RULES: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """e = 2^(k2 f(c) - offset) of the negatives: row sums, and e g(c) itself where MODE is EXPONENTIALS. PEAKS: max k2 f(c) as `sums`."""
    row0, class0 = tile_origin(N, BN, BC)
    rows = row0 + tl.arange(0, BN)
    classes = class0 + tl.arange(0, BC)
    c, winner = class_cosines(x, p, row0, class0, N, C, D, K, BN, BC, BK, STAGES, TMA)
    label = tl.load(labels + rows)
    negative = (classes[None, :] + first != label[:, None]) & (classes < C)[None, :]
    out = (class0 // BC).to(tl.int64) * ld + rows
    f, g = bend(c, rules, rows, ld, RULES)
    if MODE == _PEAKS:
        tl.store(sums + out, tl.max(tl.where(negative, f * k2, float("-inf")), 1))
    else:
        seen = tl.where(negative, c, float("-inf"))
        top = tl.max(seen, 1)
        index = tl.full([BN], _NO_INDEX, tl.int32)
        # the index costs a pass over the tile: only where some row's nearest can be here
        if tl.max((top > tl.load(nearest + rows)).to(tl.int32), 0) > 0:
            index = tl.min(tl.where(seen == top[:, None], classes[None, :], _NO_INDEX), 1)
        tl.store(cosines + out, top)
        tl.store(indices + out, index)
        e = tl.where(negative, tl.exp2(f * k2 - tl.load(offsets + rows)[:, None]), 0.0)
        tl.store(sums + out, tl.sum(e, 1))
        if MODE == _EXPONENTIALS:
            store_parts(exponentials, e * g, winner, rows, classes, N, C, ld_e, label, offsets, K, False)


def run_forward_tile(
    x: Tensor,  # (N, D) float32 or bfloat16
    p: Tensor,  # (C, K, D) as x
    labels: Tensor,  # (ld,) int32
    offsets: Tensor,  # (ld,)
    nearest: Tensor,  # (ld,)
    rules: Tensor | None,  # (12, ld)
    exponentials: Tensor | None,  # (N, ld_e), the chunk's in its first C K columns
    partials: tuple[Tensor, Tensor, Tensor],  # (T, ld) sums, cosines, indices
    *,
    first: int,
    k2: float,
    peaks: bool = False,
    tile: configs.Tile | None = None,
) -> int:
    """Launches `forward_tile`; how many rows of the partials it wrote."""
    tile = tile or configs.choose("negative_logsumexp", x)
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
        n, c, first, labels.shape[0], ld_e, k2, K=k, RULES=rules is not None, MODE=mode, **operands[2],
    )  # fmt: skip
    return int(classes)
