"""What follows dP of a chunk: the chain through both normalisations, then SGD in place or the gradient of W (docs/math.md 1, 2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .planes import load_rows, plane_pointers, rounded_by_chance, store_rows
from .tiles import injected, renormalised, through_normalisation, unit_rows


@dataclass(frozen=True)
class Sgd:
    """The step of `reference.sgd_update`."""

    lr: float | Tensor  # a 0-dim tensor: read on the device
    momentum: float
    weight_decay: float
    nesterov: bool

    def packed(self, device: torch.device) -> Tensor:
        """(3,) float32 on the device as the kernels read it, made without waiting: a CUDA graph takes new values with each replay."""
        values = torch.empty(3, dtype=torch.float32, device=device)
        for at, value in zip(values, (self.lr, self.momentum, self.weight_decay), strict=True):
            at.copy_(value.reshape(())) if isinstance(value, Tensor) else at.fill_(value)
        return values


@triton.jit
def class_epilogue(
    d_prototypes,  # (R, D) float32
    weight, low,  # (R, D) float32, in and out with STEP; SPLIT: two int16 planes
    velocity,  # (R, D) float32 or, with CHANCE, bfloat16 as int16, in and out with VELOCITY
    gradient,  # (R, D) float32, out without STEP
    memory, strength, slot,  # (S, D), (S,), (R,) as in prototype_rows
    rates,  # (3,) float32: learning rate, momentum, weight decay
    rounding, numbers,  # (3,) int64 seed, step, first row of W; NUMBERED: (R,) int64 row of W
    R, first,
    D: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr, MEMORY: tl.constexpr, RENORMALIZE: tl.constexpr,
    STEP: tl.constexpr, VELOCITY: tl.constexpr, NESTEROV: tl.constexpr,
    SPLIT: tl.constexpr, CHANCE: tl.constexpr, NUMBERED: tl.constexpr,
):  # fmt: skip
    """dW = chain(dP); STEP: g = dW + wd W, v <- mu v + g, W <- W - lr v (Nesterov: W - lr (g + mu v))."""
    rows = tl.program_id(0) * BR + tl.arange(0, BR)
    d = tl.arange(0, BD)
    inside = (rows < R)[:, None] & (d < D)[None, :]
    at = rows[:, None].to(tl.int64) * D + d[None, :]
    w = load_rows(weight, low, at, inside, SPLIT)
    unit, norm = unit_rows(w)
    d_unit = tl.load(d_prototypes + at, mask=inside, other=0.0)
    if MEMORY and RENORMALIZE:
        lam, mixed = injected(unit, memory, strength, slot, rows, rows < R, D, BD)
        mixed_unit, mixed_norm, used = renormalised(mixed, lam)
        d_unit = tl.where(used[:, None], through_normalisation(d_unit, mixed_unit, mixed_norm), d_unit)
    g = through_normalisation(d_unit, unit, norm)
    if STEP:
        momentum = tl.load(rates + 1)
        g += tl.load(rates + 2) * w
        step = g
        if VELOCITY:
            if CHANCE:
                v = momentum * (tl.load(velocity + at, mask=inside, other=0).to(tl.int32) << 16).to(tl.float32, bitcast=True) + g
                number = rows.to(tl.int64) + first
                if NUMBERED:
                    number = tl.load(numbers + rows, mask=rows < R, other=0)
                tl.store(velocity + at, rounded_by_chance(v, rounding, number, d), mask=inside)
            else:
                v = momentum * tl.load(velocity + at, mask=inside, other=0.0) + g
                tl.store(velocity + at, v, mask=inside)
            step = v
            if NESTEROV:
                step = g + momentum * v
        store_rows(weight, low, at, w - tl.load(rates) * step, inside, SPLIT)
    else:
        tl.store(gradient + at, g, mask=inside)


def run_class_epilogue(
    d_prototypes: Tensor,  # (R, D) float32
    weight: Tensor,  # (R, D) float32, or bfloat16 with residual
    injection: tuple[Tensor, Tensor, Tensor] | None,  # memory (S, D), strength (S,), slot (R,) int32
    *,
    renormalize: bool,
    gradient: Tensor | None = None,  # (R, D) out: dW, or
    velocity: Tensor | None = None,  # (R, D) and
    rates: Tensor | None = None,  # (3,) `Sgd.packed`: the step of weight and velocity in place
    nesterov: bool = False,
    residual: Tensor | None = None,  # (R, D) int16
    rounding: Tensor | None = None,  # (3,) int64, with a velocity in bfloat16: seed, step, row of W that row 0 is
    numbers: Tensor | None = None,  # (R,) int64: which rows of W these are, where they do not follow each other from
    first: int = 0,
) -> None:
    """Launches `class_epilogue`."""
    count, dimension = weight.shape
    block = configs.row_block(dimension, weight.device)
    memory, strength, slot = injection or (weight, weight, weight)
    chance = velocity is not None and velocity.dtype == torch.bfloat16
    numbers = numbers if chance else None
    speed = weight if velocity is None else velocity.view(torch.int16) if chance else velocity
    class_epilogue[(triton.cdiv(count, block.rows),)](
        d_prototypes, *plane_pointers(weight, residual), speed, weight if gradient is None else gradient, memory, strength, slot, weight if rates is None else rates,
        weight if rounding is None else rounding, weight if numbers is None else numbers, count, first if chance else 0,
        D=dimension, BD=block.dimension, BR=block.rows, MEMORY=injection is not None, RENORMALIZE=renormalize,
        STEP=rates is not None, VELOCITY=velocity is not None, NESTEROV=nesterov,
        SPLIT=residual is not None, CHANCE=chance, NUMBERED=numbers is not None, num_warps=block.warps,
    )  # fmt: skip
