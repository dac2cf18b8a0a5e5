"""The class sweep's tile: dloss/dcosine of a chunk of classes, margin and unknown rows alike (docs/math.md 1, 3)."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .tiles import bend, class_cosines, expm1_remainder, store_parts, tile_origin

# Kinds of rows, as reference.py names them: MARGIN, UNKNOWN_DOUBLE, UNKNOWN_SINGLE.
_DOUBLE = tl.constexpr(1.0)
_SINGLE = tl.constexpr(2.0)
_LARGEST = tl.constexpr(115.4)  # exponents are capped at 80 nats: a margin row far off its lse gives a large number, no inf


@triton.jit
def slope_tile(
    x,  # (N, D)
    p,  # (C, K, D) this chunk's prototypes
    targets,  # (ld,) int32 class * K + sub-center within all classes, negative: none
    terms,  # (5, ld) float32: lse in base 2, weight of the negatives, gradient of the target cosine, E, kind
    rules,  # (12, ld) float32
    seen,  # (C,) int8 whether margin rows see the class
    slopes,  # (N, ld_e) out
    N, C, first, ld, ld_e, k2, count,
    D: tl.constexpr, K: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr,
    RULES: tl.constexpr, SEEN: tl.constexpr,
):  # fmt: skip
    """slopes_ij = weight_i h_ij of the negatives, the target's gradient at the target; count: number of all classes."""
    row0, class0 = tile_origin(N, BN, BC)
    rows = row0 + tl.arange(0, BN)
    classes = class0 + tl.arange(0, BC)
    c, winner = class_cosines(x, p, row0, class0, N, C, D, K, BN, BC, BK, STAGES, TMA)
    f, g = bend(c, rules, rows, ld, RULES)
    kind = tl.load(terms + 4 * ld + rows)
    probability = tl.exp2(tl.minimum(f * k2 - tl.load(terms + rows)[:, None], _LARGEST))
    h = probability * g
    if tl.max(kind, 0) > 0.0:
        capped = tl.minimum(probability, 1.0)
        expm1 = capped + expm1_remainder(capped)
        mean = tl.load(terms + 3 * ld + rows)[:, None]
        h = tl.where((kind == _DOUBLE)[:, None], capped * (expm1 - mean), h)
        h = tl.where((kind == _SINGLE)[:, None], probability * count - 1.0, h)
    target = tl.load(targets + rows)
    owner = tl.where(target >= 0, target // K, -1)
    negative = classes[None, :] + first != owner[:, None]
    if SEEN:
        sampled = tl.load(seen + classes, mask=classes < C, other=0) != 0
        negative = negative & (sampled[None, :] | (kind > 0.0)[:, None])
    slope = tl.where(negative, h * tl.load(terms + ld + rows)[:, None], 0.0)
    here = tl.where(target >= 0, target - first * K, -1)
    store_parts(slopes, slope, winner, rows, classes, N, C, ld_e, here, tl.load(terms + 2 * ld + rows), K, True)


def run_slope_tile(
    x: Tensor,  # (N, D) float32 or bfloat16
    p: Tensor,  # (C, K, D) as x
    targets: Tensor,  # (ld,) int32
    terms: Tensor,  # (5, ld)
    rules: Tensor | None,  # (12, ld)
    seen: Tensor | None,  # (C,) int8
    slopes: Tensor,  # (N, ld_e), the chunk's in its first C K columns
    *,
    first: int,
    k2: float,
    count: int,
    tile: configs.Tile | None = None,
) -> None:
    """Launches `slope_tile`."""
    tile = tile or configs.choose("class_gradient", x)
    n, c, k = x.shape[0], p.shape[0], p.shape[1]
    operands: tuple[Any, Any, dict[str, Any]] = configs.operands(x, p, tile)
    slope_tile[(triton.cdiv(n, tile.rows) * triton.cdiv(c, tile.classes),)](
        operands[0], operands[1], targets, terms, terms if rules is None else rules, targets if seen is None else seen, slopes,
        n, c, first, targets.shape[0], slopes.stride(0), k2, float(count), K=k, RULES=rules is not None, SEEN=seen is not None,
        **operands[2],
    )  # fmt: skip
