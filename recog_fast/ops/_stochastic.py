"""Rounding to bfloat16 up or down by chance, unbiased, the same for everyone who asks (docs/math.md 1.5).

The random bits of an element are a hash of (seed, step, row of W, column) and of nothing else: the same for any number of threads, chunks and
ranks. `triton_kernels/planes.py` and `csrc/cpu/planes.cpp` repeat this arithmetic on unsigned integers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# A bijection of 32-bit integers with little left of its input (C. Wellons' lowbias32); the golden ratio spreads columns.
FIRST, SECOND, SPREAD = 0x7FEB352D, 0x846CA68B, 0x9E3779B9
_BLOCK = 1 << 18  # elements whose hashes exist at a time
_LOW = 0xFFFFFFFF


def _signed(constant: int) -> int:
    """The int32 of the same bits."""
    return constant - 2**32 if constant >= 2**31 else constant


def _mixed(x: Tensor) -> Tensor:
    """x (...) int32 in place: xor with itself shifted right (zeros coming in), multiply (wrapping), twice and a half."""
    for shift, factor in ((16, FIRST), (15, SECOND), (16, None)):
        x ^= (x >> shift) & (_LOW >> shift)
        if factor is not None:
            x *= _signed(factor)
    return x


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """Lower and upper 32 bits of int64, as int32."""
    low = x & _LOW
    return torch.where(low >= 2**31, low - 2**32, low).to(torch.int32), (x >> 32).to(torch.int32)


def _row_keys(rounding: Tensor, rows: Tensor) -> Tensor:
    """(R,) int32 of rounding (3,) int64 (seed, step, first row) and rows (R,) int64."""
    key = torch.zeros((), dtype=torch.int32, device=rows.device)
    for word in (*_halves(rounding[0]), *_halves(rounding[1]), *_halves(rows + rounding[2])):
        key = _mixed(key ^ word)
    return key


def noise(rounding: Tensor, rows: Tensor, columns: int) -> Tensor:
    """(R, D) int32 in [0, 2^16), uniform: 16 random bits for each element of these rows of W."""
    spread = torch.arange(columns, device=rows.device, dtype=torch.int64) * SPREAD
    keys = _row_keys(rounding, rows).unsqueeze(1) + _halves(spread)[0]
    return _mixed(keys) >> 16 & 0xFFFF


@torch.no_grad()
def round_into(values: Tensor, rounded: Tensor, rounding: Tensor, rows: Tensor | None = None) -> None:
    """Writes values (R, ..., D) float32 into rounded, likewise, bfloat16: one of the two neighbours, in expectation the value.

    rounding (3,) int64: seed, step, row of W that values begin at; rows (R,) int64: which they are, for a selection of classes.
    What bfloat16 holds stays; above its largest value inf is the upper neighbour; NaN stays NaN.
    """
    source, target = values.reshape(-1, values.shape[-1]), rounded.view(-1, values.shape[-1])
    columns = source.shape[1]
    if rows is None:
        rows = torch.arange(source.shape[0], device=values.device)
    elif source.shape[0] != rows.numel():  # classes of several rows
        each = source.shape[0] // rows.numel()
        rows = (rows.unsqueeze(1) * each + torch.arange(each, device=rows.device)).flatten()
    step = max(1, _BLOCK // columns)
    for start in range(0, source.shape[0], step):
        part, out = source[start : start + step], target[start : start + step]
        bits = noise(rounding, rows[start : start + step], columns)
        bits += part.contiguous().view(torch.int32)
        out.view(torch.int16).copy_(bits >> 16)
        out.masked_fill_(torch.isnan(part), math.nan)


def wanted(velocity: Tensor | None) -> bool:
    """Whether this velocity is kept in bfloat16."""
    return velocity is not None and velocity.dtype == torch.bfloat16
