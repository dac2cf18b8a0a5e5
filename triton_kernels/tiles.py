"""What the tile kernels share: a tile of cosines, the negative rules, expm1, unit rows (docs/math.md 1, 1.2, 3).

A tile is (BN rows of the batch) x (BC classes). Addresses that multiply by C or D are int64. Vectors over the rows of the batch are
padded to a multiple of BN, so they are read without a mask.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = 1.4426950408889634
NO_INDEX = 2**31 - 1  # "no class" in int32 partials: loses every minimum
ZERO_NORM = 1e-12
CANCELLED = 1e-4

_ZERO_NORM = tl.constexpr(ZERO_NORM)
_CANCELLED = tl.constexpr(CANCELLED)


@triton.jit
def tile_origin(N, BN: tl.constexpr, BC: tl.constexpr):
    """(first row, first class) of this program: the row tiles of one range of classes run together."""
    row_tiles = tl.cdiv(N, BN)
    at = tl.program_id(0)
    return (at % row_tiles) * BN, (at // row_tiles) * BC


@triton.jit
def _block(t, row0, column0, rows, columns, stride, B0: tl.constexpr, BK: tl.constexpr, MASK: tl.constexpr, TMA: tl.constexpr):
    """(B0, BK) of t at (row0, column0), zeros outside `rows` and `columns`; t is a descriptor or a pointer."""
    if TMA:
        block = t.load([row0, column0])
    else:
        r = row0 + tl.arange(0, B0)
        k = column0 + tl.arange(0, BK)
        inside = (r < rows)[:, None]
        if MASK:
            inside = inside & (k < columns)[None, :]
        block = tl.load(t + r[:, None].to(tl.int64) * stride + k[None, :], mask=inside, other=0.0)
    return block


@triton.jit
def _part_cosines(
    x, p, row0, class0, part, N, C,
    D: tl.constexpr, K: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """<x_i, P_{j, part}> (BN, BC) float32; float32 operands are multiplied as IEEE float32."""
    c = tl.zeros([BN, BC], tl.float32)
    MASK: tl.constexpr = D % BK != 0
    for k in range(0, D, BK):
        a = _block(x, row0, k, N, D, D, BN, BK, MASK, TMA)
        b = _block(p, class0, part * D + k, C, part * D + D, K * D, BC, BK, MASK, TMA)
        c = tl.dot(a, tl.trans(b), c, input_precision="ieee")
    return c


@triton.jit
def class_cosines(
    x, p, row0, class0, N, C,
    D: tl.constexpr, K: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """c_ij = max_k <x_i, P_jk> (BN, BC) and the winning k (ties: the lowest); x (N, D), p (C, K, D)."""
    c = _part_cosines(x, p, row0, class0, 0, N, C, D, K, BN, BC, BK, TMA)
    winner = tl.zeros([BN, BC], tl.int32)
    if K > 1:
        for part in range(1, K):
            other = _part_cosines(x, p, row0, class0, part, N, C, D, K, BN, BC, BK, TMA)
            winner = tl.where(other > c, part, winner)
            c = tl.where(other > c, other, c)
    return c, winner


@triton.jit
def _coefficient(rules, rows, ld, at: tl.constexpr, above):
    """Coefficient `at` of (a2 a1 a0 b1 b0) of each element: above its row's threshold or below."""
    high = tl.load(rules + (2 + at) * ld + rows)
    low = tl.load(rules + (7 + at) * ld + rows)
    return tl.where(above, high[:, None], low[:, None])


@triton.jit
def _clamped(c, rules, rows):
    clamp = tl.load(rules + rows)[:, None]
    return tl.minimum(tl.maximum(c, -clamp), clamp)


@triton.jit
def bent(c, rules, rows, ld, RULES: tl.constexpr):
    """f(c) of docs/math.md 1.2; rules (12, ld) as rules.py packs them."""
    f = c
    if RULES:
        u = _clamped(c, rules, rows)
        above = u > tl.load(rules + ld + rows)[:, None]
        f = (_coefficient(rules, rows, ld, 0, above) * u + _coefficient(rules, rows, ld, 1, above)) * u
        f += _coefficient(rules, rows, ld, 2, above)
    return f


@triton.jit
def times_slope(e, c, rules, rows, ld, RULES: tl.constexpr):
    """e g(c); g = 0 where the clamp holds. Apart from `bent`: f and g of a tile together cost more registers than there are."""
    if RULES:
        u = _clamped(c, rules, rows)
        above = u > tl.load(rules + ld + rows)[:, None]
        g = _coefficient(rules, rows, ld, 3, above) * u + _coefficient(rules, rows, ld, 4, above)
        e = tl.where(u == c, e * g, 0.0)
    return e


@triton.jit
def expm1_remainder(p):
    """expm1(p) - p for p in [0, 1], to float32's precision: the series, nothing cancels."""
    q = 1.0 / 3628800 + p * (1.0 / 39916800)
    q = 1.0 / 362880 + p * q
    q = 1.0 / 40320 + p * q
    q = 1.0 / 5040 + p * q
    q = 1.0 / 720 + p * q
    q = 1.0 / 120 + p * q
    q = 1.0 / 24 + p * q
    q = 1.0 / 6 + p * q
    return p * p * (0.5 + p * q)


@triton.jit
def store_parts(
    out, values, winner, rows, classes, ld, targets, target_values,
    K: tl.constexpr, TARGETS: tl.constexpr,
):  # fmt: skip
    """out (rows of whole tiles, ld): values (BN, BC) at column class * K + winning sub-center, 0 at its siblings; target_values
    at column `targets`. No mask: it would keep the stores from being vectors."""
    at = rows[:, None].to(tl.int64) * ld + classes[None, :] * K
    for part in tl.static_range(K):
        mine = values
        if K > 1:
            mine = tl.where(winner == part, values, 0.0)
        if TARGETS:
            mine = tl.where(classes[None, :] * K + part == targets[:, None], target_values[:, None], mine)
        tl.store(out + at + part, mine.to(out.dtype.element_ty))


@triton.jit
def unit_rows(w):
    """w (B, BD) -> (w/|w|, |w|), both float32; a row with |w| <= 1e-12 becomes 0. Safe for any finite magnitude."""
    largest = tl.max(tl.abs(w), 1)
    scaled = w / tl.where(largest > 0, largest, 1.0)[:, None]
    length = tl.sqrt(tl.sum(scaled * scaled, 1))
    norm = length * largest
    unit = scaled / tl.maximum(length, _ZERO_NORM)[:, None]
    return tl.where((norm <= _ZERO_NORM)[:, None], 0.0, unit), norm


@triton.jit
def through_normalisation(d_unit, unit, norm):
    """dw = (d_unit - <d_unit, unit> unit)/|w|; 0 for a zero row."""
    tangent = d_unit - tl.sum(d_unit * unit, 1)[:, None] * unit
    inverse = tl.where(norm <= _ZERO_NORM, 0.0, 1.0 / tl.maximum(norm, _ZERO_NORM))
    return tangent * inverse[:, None]


@triton.jit
def injected(unit, memory, strength, slot, rows, inside, D: tl.constexpr, BD: tl.constexpr):
    """(lam (B,), W^ + lam M (B, BD)) of rows of W; memory (S, D), strength (S,), slot (C,) with -1 for none."""
    at = tl.load(slot + rows, mask=inside, other=-1)
    lam = tl.load(strength + at, mask=at >= 0, other=0.0)
    d = tl.arange(0, BD)
    there = (lam != 0.0)[:, None] & (d < D)[None, :]
    push = tl.load(memory + at[:, None].to(tl.int64) * D + d[None, :], mask=there, other=0.0).to(tl.float32)
    return lam, unit + lam[:, None] * push


@triton.jit
def renormalised(mixed, lam):
    """(u/|u|, |u|, whether it replaces W^) of u = W^ + lam M: not where lam = 0 or |u| < 1e-4 (cancellation)."""
    unit, norm = unit_rows(mixed)
    return unit, norm, (lam != 0.0) & (norm >= _CANCELLED)
