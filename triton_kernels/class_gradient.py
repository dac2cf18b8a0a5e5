"""The class sweep's tile: dloss/dcosine of a chunk of classes, margin and unknown rows alike (docs/math.md 1, 3)."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .tiles import bent, class_cosines, expm1_remainder, store_parts, tile_origin, times_slope

# Kinds of rows, as reference.py names them: MARGIN, UNKNOWN_DOUBLE, UNKNOWN_SINGLE.
_DOUBLE = tl.constexpr(1.0)
_SINGLE = tl.constexpr(2.0)
_LARGEST = tl.constexpr(115.4)  # exponents are capped at 80 nats: a margin row far off its lse gives a large number, no inf


@triton.jit
def _probabilities(c, terms, rules, rows, ld, k2, RULES: tl.constexpr):
    """exp(s f(c) - lse)."""
    return tl.exp2(tl.minimum(bent(c, rules, rows, ld, RULES) * k2 - tl.load(terms + rows)[:, None], _LARGEST))


@triton.jit
def _unknown_slopes(h, probability, terms, rows, ld, count):
    """h of unknown rows in place of the margin's."""
    kind = tl.load(terms + 4 * ld + rows)[:, None]
    capped = tl.minimum(probability, 1.0)
    expm1 = capped + expm1_remainder(capped)
    h = tl.where(kind == _DOUBLE, capped * (expm1 - tl.load(terms + 3 * ld + rows)[:, None]), h)
    return tl.where(kind == _SINGLE, probability * count - 1.0, h)


@triton.jit
def _negatives(target, kind, seen, classes, first, C, K: tl.constexpr, SEEN: tl.constexpr):
    """(BN, BC): the classes that are not the row's target; of margin rows only those they see."""
    negative = classes[None, :] + first != tl.where(target >= 0, target // K, -1)[:, None]
    if SEEN:
        sampled = tl.load(seen + classes, mask=classes < C, other=0) != 0
        negative = negative & (sampled[None, :] | (kind > 0.0)[:, None])
    return negative


@triton.jit
def slope_tile(
    x,  # (N, D)
    p,  # (C, K, D) this chunk's prototypes
    targets,  # (ld,) int32 class * K + sub-center within all classes, negative: none
    terms,  # (5, ld) float32: lse in base 2, weight of the negatives, gradient of the target cosine, E, kind
    rules,  # (12, ld) float32
    seen,  # (C,) int8 whether margin rows see the class
    slopes,  # (ld, ld_e) out
    N, C, first, ld, ld_e, k2, count,
    D: tl.constexpr, K: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, TMA: tl.constexpr,
    RULES: tl.constexpr, SEEN: tl.constexpr,
):  # fmt: skip
    """slopes_ij = weight_i h_ij of the negatives, the target's gradient at the target; count: number of all classes."""
    row0, class0 = tile_origin(N, BN, BC)
    rows = row0 + tl.arange(0, BN)
    classes = class0 + tl.arange(0, BC)
    c, winner = class_cosines(x, p, row0, class0, N, C, D, K, BN, BC, BK, TMA)
    kind = tl.load(terms + 4 * ld + rows)
    target = tl.load(targets + rows)
    here = tl.where(target >= 0, target - first * K, -1)
    weight = tl.load(terms + ld + rows)[:, None]
    target_slope = tl.load(terms + 2 * ld + rows)
    # two whole branches: values that both would hand on to one store cost more registers than there are
    if tl.max(kind, 0) > 0.0:
        probability = _probabilities(c, terms, rules, rows, ld, k2, RULES)
        h = _unknown_slopes(times_slope(probability, c, rules, rows, ld, RULES), probability, terms, rows, ld, count)
        slope = tl.where(_negatives(target, kind, seen, classes, first, C, K, SEEN), h * weight, 0.0)
        store_parts(slopes, slope, winner, rows, classes, ld_e, here, target_slope, K, True)
    else:
        h = times_slope(_probabilities(c, terms, rules, rows, ld, k2, RULES), c, rules, rows, ld, RULES)
        slope = tl.where(_negatives(target, kind, seen, classes, first, C, K, SEEN), h * weight, 0.0)
        store_parts(slopes, slope, winner, rows, classes, ld_e, here, target_slope, K, True)


def run_slope_tile(
    x: Tensor,  # (N, D) float32 or bfloat16
    p: Tensor,  # (C, K, D) as x
    targets: Tensor,  # (ld,) int32
    terms: Tensor,  # (5, ld)
    rules: Tensor | None,  # (12, ld)
    seen: Tensor | None,  # (C,) int8
    slopes: Tensor,  # (ld, ld_e) whole tiles, the chunk's in its first C K columns
    *,
    first: int,
    k2: float,
    count: int,
    tile: configs.Tile,
) -> None:
    """Launches `slope_tile`."""
    n, c, k = x.shape[0], p.shape[0], p.shape[1]
    operands: tuple[Any, Any, dict[str, Any]] = configs.operands(x, p, tile)
    slope_tile[(triton.cdiv(n, tile.rows) * triton.cdiv(c, tile.classes),)](
        operands[0], operands[1], targets, terms, terms if rules is None else rules, targets if seen is None else seen, slopes,
        n, c, first, targets.shape[0], slopes.stride(0), k2, float(count), K=k, RULES=rules is not None, SEEN=seen is not None,
        **operands[2],
    )  # fmt: skip
