"""W as two 16-bit planes: the nearest bfloat16 and what it lacks of the float32 value (docs/math.md 1.5)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from . import _checks

CHUNK = 1 << 20  # elements of W that are float32 at a time on the CPU


def join(high: Tensor, low: Tensor) -> Tensor:
    """float32 of high (...) bfloat16 and low (...) int16: bits(w) = (bits(high) << 16) + low; any shape, a new tensor."""
    bits = high.detach().contiguous().view(torch.int16).to(torch.int32)
    bits <<= 16
    return bits.add_(low).view(torch.float32)


@torch.no_grad()
def split(values: Tensor, high: Tensor, low: Tensor) -> None:
    """Writes values (...) float32 into high (...) bfloat16 and low (...) int16; `join` gives every bit back.

    high is values rounded to the nearest bfloat16, ties away from zero (to even, a tie could need low = 2^15); beyond
    bfloat16's largest finite value it is inf, and low finds the way back. A NaN comes back as the NaN 0x7fc0: one of another
    payload could leave a number in the high plane, for which its readers would take it.
    """
    bits = values.contiguous().view(torch.int32)
    low.copy_(bits)  # the lower half: narrowing wraps
    high.view(torch.int16).copy_((bits + 0x8000) >> 16)
    if values.is_cuda or not math.isfinite(float(values.sum())):  # on CUDA nobody waits to know
        missing = torch.isnan(values)
        high.masked_fill_(missing, math.nan)
        low.masked_fill_(missing, 0)


@dataclass(frozen=True)
class Planes:
    """W of a split head where a float32 tensor would stand: shapes, and float32 rows by index."""

    high: Tensor  # (C, D) or (C, K, D) bfloat16
    low: Tensor  # likewise, int16

    @property
    def shape(self) -> torch.Size:
        return self.high.shape

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def device(self) -> torch.device:
        return self.high.device

    def dim(self) -> int:
        return self.high.dim()

    def numel(self) -> int:
        return self.high.numel()

    def __getitem__(self, at: Tensor | slice | int) -> Tensor:
        return join(self.high[at], self.low[at])


Weight = Tensor | Planes


def held(weight: Tensor, residual: Tensor | None) -> Weight:
    """W of an operation's arguments `weight` and `residual`."""
    return weight if residual is None else Planes(weight.detach(), residual)


def plane(weight: Weight) -> Tensor:
    """The argument `weight` of the operations."""
    return weight.high if isinstance(weight, Planes) else weight


def residual(weight: Weight) -> Tensor | None:
    """Their argument `residual`."""
    return weight.low if isinstance(weight, Planes) else None


def whole(weight: Tensor, residual: Tensor | None, like: Tensor) -> Tensor:
    """W in one tensor, in like's dtype where it comes in planes: for the reference, which stores what it likes."""
    return weight if residual is None else join(weight, residual).to(like.dtype)


def check_planes(weight: Tensor, residual: Tensor, where: str) -> None:
    """weight bfloat16, residual int16, of one shape, contiguous, side by side."""
    _checks.expect(weight.dtype == torch.bfloat16, where, "a bfloat16 weight with residual", weight.dtype)
    _checks.expect(residual.dtype == torch.int16, where, "an int16 residual", residual.dtype)
    beside = residual.shape == weight.shape and residual.device == weight.device
    _checks.expect(beside, where, f"residual of shape {tuple(weight.shape)} beside weight", (tuple(residual.shape), residual.device))
    _checks.expect(weight.is_contiguous() and residual.is_contiguous(), where, "contiguous planes", (weight.stride(), residual.stride()))


def chunks(weight: Tensor) -> Iterator[tuple[int, int]]:
    """(first class, last + 1) of chunks of W of at most `CHUNK` elements."""
    classes, width = weight.shape[0], weight.shape[1:].numel()
    step = max(1, CHUNK // width)
    for start in range(0, classes, step):
        yield start, min(start + step, classes)


def refuse_gradient(residual: Tensor | None) -> None:
    """RuntimeError where backward is to make a gradient of a weight in planes: autograd would round it to bfloat16."""
    if residual is not None:
        raise RuntimeError(
            "MarginHead: expected HeadSGD with weight_format='split', got a backward pass to head.weight without one (in training mode): "
            "any other optimizer would step the bfloat16 plane and lose what weight_low holds; rf.HeadSGD(head, lr), or weight_format='float32'"
        )
