"""W as two 16-bit planes, and a velocity rounded to bfloat16 by chance, inside the kernels (docs/math.md 1.5).

The same bits as `recog_fast/ops/_planes.py` and `_stochastic.py`, whose constants these are. Both planes come as int16.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

FIRST, SECOND, SPREAD = 0x7FEB352D, 0x846CA68B, 0x9E3779B9

_FIRST = tl.constexpr(FIRST)
_SECOND = tl.constexpr(SECOND)
_SPREAD = tl.constexpr(SPREAD)


@triton.jit
def load_rows(weight, low, at, inside, SPLIT: tl.constexpr):
    """float32 W at `at`; SPLIT: bits = (high << 16) + low."""
    if SPLIT:
        high = tl.load(weight + at, mask=inside, other=0).to(tl.int32)
        w = ((high << 16) + tl.load(low + at, mask=inside, other=0).to(tl.int32)).to(tl.float32, bitcast=True)
    else:
        w = tl.load(weight + at, mask=inside, other=0.0)
    return w


@triton.jit
def store_rows(weight, low, at, w, inside, SPLIT: tl.constexpr):
    """The inverse; a NaN becomes 0x7fc0 and 0, so that the high plane has it too."""
    if SPLIT:
        bits = w.to(tl.int32, bitcast=True)
        missing = w != w
        tl.store(weight + at, tl.where(missing, 0x7FC0, (bits + 0x8000) >> 16).to(tl.int16), mask=inside)
        tl.store(low + at, tl.where(missing, 0, bits).to(tl.int16), mask=inside)
    else:
        tl.store(weight + at, w, mask=inside)


@triton.jit
def _mixed(x):
    """A bijection of uint32 that leaves little of its input."""
    x = (x ^ (x >> 16)) * _FIRST
    x = (x ^ (x >> 15)) * _SECOND
    return x ^ (x >> 16)


@triton.jit
def _with_word(key, word):
    """Both halves of an int64 mixed into the key."""
    key = _mixed(key ^ word.to(tl.uint32))
    return _mixed(key ^ (word >> 32).to(tl.uint32))


@triton.jit
def rounded_by_chance(v, rounding, rows, d):
    """v (B, BD) float32 -> bfloat16 bits, int16: 16 random bits of (seed, step, row, column) are added before the lower half is cut off.

    rounding (3,) int64: seed, step, first row of W; rows (B,) int64; d (BD,).
    """
    key = _with_word(_with_word(tl.full([], 0, tl.uint32), tl.load(rounding)), tl.load(rounding + 1))
    keys = _with_word(key, rows + tl.load(rounding + 2))
    noise = _mixed(keys[:, None] + d.to(tl.uint32)[None, :] * _SPREAD) >> 16
    bits = (v.to(tl.uint32, bitcast=True) + noise) >> 16
    return tl.where(v != v, 0x7FC0, bits).to(tl.int16)


def plane_pointers(weight: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """(weight, low) as the kernels take them."""
    return (weight, weight) if residual is None else (weight.view(torch.int16), residual)
