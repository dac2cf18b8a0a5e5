"""Adds what the tiles of a chunk found to the running results of the rows, always in the same order: no atomics."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import configs, tiles

_NO_INDEX = tl.constexpr(tiles.NO_INDEX)


@triton.jit
def merge_tiles(
    sums,  # (T, ld) float32
    cosines,  # (T, ld) float32
    indices,  # (T, ld) int32 class of this chunk
    total,  # (ld,) float64 in and out
    nearest,  # (ld,) float32 in and out
    index,  # (ld,) int64 in and out, global
    T, ld, first,
    BT: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Sums in float64; the larger cosine wins, of equal ones the lowest class (earlier chunks are lower)."""
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    value = tl.load(total + rows)
    best = tl.load(nearest + rows)
    found = tl.load(index + rows)
    for t in range(0, T, BT):
        at = t + tl.arange(0, BT)
        inside = (at < T)[:, None]
        there = at[:, None].to(tl.int64) * ld + rows[None, :]
        value += tl.sum(tl.load(sums + there, mask=inside, other=0.0).to(tl.float64), 0)
        cosine = tl.load(cosines + there, mask=inside, other=float("-inf"))
        top = tl.max(cosine, 0)
        lowest = tl.load(indices + there, mask=inside, other=_NO_INDEX)
        lowest = tl.min(tl.where(cosine == top[None, :], lowest, _NO_INDEX), 0)
        better = top > best
        found = tl.where(better, lowest.to(tl.int64) + first, found)
        best = tl.where(better, top, best)
    tl.store(total + rows, value)
    tl.store(nearest + rows, best)
    tl.store(index + rows, found)


@triton.jit
def add_partials(
    partials,  # (S, M) float32, row s at s * stride
    total,  # (M,) float64 in and out
    S, M, stride,
    BS: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """total += sum over s, in float64."""
    at = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    value = tl.load(total + at, mask=at < M, other=0.0)
    for first in range(0, S, BS):
        s = first + tl.arange(0, BS)
        inside = (s < S)[:, None] & (at < M)[None, :]
        block = tl.load(partials + s[:, None].to(tl.int64) * stride + at[None, :], mask=inside, other=0.0)
        value += tl.sum(block.to(tl.float64), 0)
    tl.store(total + at, value, mask=at < M)


def run_merge_tiles(
    partials: tuple[Tensor, Tensor, Tensor],  # (T, ld) sums, cosines, indices
    total: Tensor,  # (ld,) float64
    nearest: Tensor,  # (ld,) float32
    index: Tensor,  # (ld,) int64
    written: int,
    first: int,
) -> None:
    """Launches `merge_tiles` over the first `written` tiles."""
    ld = nearest.shape[0]
    block = configs.merge_block(ld, nearest.device)
    merge_tiles[(ld // block.elements,)](
        *partials, total, nearest, index, written, ld, first, BT=block.partials, BN=block.elements, num_warps=block.warps
    )


def run_add_partials(partials: Tensor, total: Tensor, written: int) -> None:
    """total (...) float64 += the first `written` of partials (S, ...) float32, contiguous but for the first dimension."""
    block = configs.merge_block(total.numel(), total.device)
    add_partials[(triton.cdiv(total.numel(), block.elements),)](
        partials, total, written, total.numel(), partials.stride(0), BS=block.partials, B=block.elements, num_warps=block.warps
    )
