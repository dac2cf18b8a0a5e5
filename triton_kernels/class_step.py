"""What follows dP of a chunk: the chain through both normalisations, then SGD in place or the gradient of W (docs/math.md 1, 2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
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
    weight,  # (R, D) float32, in and out with STEP
    velocity,  # (R, D) float32, in and out with VELOCITY
    gradient,  # (R, D) float32, out without STEP
    memory, strength, slot,  # (S, D), (S,), (R,) as in prototype_rows
    rates,  # (3,) float32: learning rate, momentum, weight decay
    R,
    D: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr, MEMORY: tl.constexpr, RENORMALIZE: tl.constexpr,
    STEP: tl.constexpr, VELOCITY: tl.constexpr, NESTEROV: tl.constexpr,
):  # fmt: skip
    """dW = chain(dP); STEP: g = dW + wd W, v <- mu v + g, W <- W - lr v (Nesterov: W - lr (g + mu v))."""
    rows = tl.program_id(0) * BR + tl.arange(0, BR)
    d = tl.arange(0, BD)
    inside = (rows < R)[:, None] & (d < D)[None, :]
    at = rows[:, None].to(tl.int64) * D + d[None, :]
    w = tl.load(weight + at, mask=inside, other=0.0)
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
            v = momentum * tl.load(velocity + at, mask=inside, other=0.0) + g
            tl.store(velocity + at, v, mask=inside)
            step = v
            if NESTEROV:
                step = g + momentum * v
        tl.store(weight + at, w - tl.load(rates) * step, mask=inside)
    else:
        tl.store(gradient + at, g, mask=inside)


def run_class_epilogue(
    d_prototypes: Tensor,  # (R, D) float32
    weight: Tensor,  # (R, D) float32
    injection: tuple[Tensor, Tensor, Tensor] | None,  # memory (S, D), strength (S,), slot (R,) int32
    *,
    renormalize: bool,
    gradient: Tensor | None = None,  # (R, D) out: dW, or
    velocity: Tensor | None = None,  # (R, D) and
    rates: Tensor | None = None,  # (3,) `Sgd.packed`: the step of weight and velocity in place
    nesterov: bool = False,
) -> None:
    """Launches `class_epilogue`."""
    count, dimension = weight.shape
    block = configs.row_block(dimension, weight.device)
    memory, strength, slot = injection or (weight, weight, weight)
    class_epilogue[(triton.cdiv(count, block.rows),)](
        d_prototypes, weight, weight if velocity is None else velocity, weight if gradient is None else gradient,
        memory, strength, slot, weight if rates is None else rates, count,
        D=dimension, BD=block.dimension, BR=block.rows, MEMORY=injection is not None, RENORMALIZE=renormalize,
        STEP=rates is not None, VELOCITY=velocity is not None, NESTEROV=nesterov, num_warps=block.warps,
    )  # fmt: skip
