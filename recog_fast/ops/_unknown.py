"""Rows of unknown identities in a batch: their second sweep, excess and slopes (math.md 3)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import reference
from ._planes import Weight, plane, residual
from ._rows import Injection, target_prototypes
from .unknown_rejection import double_slope, excess_double

if TYPE_CHECKING:
    from .margin_softmax import Batch, LossOptions


@dataclass
class Unknown:
    """UIR of the unlabelled rows: their indices and what the second sweep found."""

    at: Tensor  # (U,)
    nearest: Tensor  # (U,) row of W that enters the class gradient by itself
    top: Tensor  # (U,) its slope, per s
    excess: Tensor  # (U,) float64
    d_unit: Tensor  # (U, D) d excess / d x^
    slope: Tensor  # (U,) weight of the class gradient, per s
    mean: Tensor  # (U,)
    kind: int


def _prototype_sum(weight: Weight, injection: Injection, chunk: int = 8192) -> Tensor:
    """sum_j P_j (D,) float64, a chunk of classes at a time."""
    total = torch.zeros(weight.shape[-1], dtype=torch.float64, device=weight.device)
    for start in range(0, weight.shape[0], chunk):
        ids = torch.arange(start, min(start + chunk, weight.shape[0]), device=weight.device)
        rows = torch.ops.recog_fast.effective_prototypes(weight[start : start + chunk], *injection.of(ids).arguments(), True)
        total += rows.double().reshape(-1, weight.shape[-1]).sum(0)
    return total


def _pull_of(batch: Batch, at: Tensor) -> Tensor:
    """The rows' pull (U, D); zeros where no backward pass follows and none was made."""
    return batch.pull[at] if batch.pull.shape[0] else torch.zeros_like(batch.unit[at])


def _unlabelled(batch: Batch, options: LossOptions) -> Tensor:
    """Indices (U,) of the rows without a label; among labelled ones their number is something only the device knows."""
    if options.margin is None:  # of `unknown_rejection_loss`: all of them
        return torch.arange(batch.labels.numel(), device=batch.labels.device)
    if batch.labels.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "margin softmax: expected unknown_weight = 0 in a CUDA graph, got unlabelled rows to count: the number of these rows "
            "decides shapes; capture `unknown_rejection_loss` of a batch of its own instead"
        )
    return (batch.labels == -1).nonzero().squeeze(1)


def reject_unknown(batch: Batch, exact: Tensor, nearest: Tensor, weight: Weight, options: LossOptions) -> Unknown | None:
    """Excess of the unlabelled rows and its slopes; None where it does not count. exact: x^ (N, D) in double."""
    if options.unknown_weight == 0:
        return None
    at = _unlabelled(batch, options)
    if at.numel() == 0:
        return None
    unit, lse, pull, classes = batch.unit[at], batch.lse[at], _pull_of(batch, at), weight.shape[0]
    if options.softmax == "single":
        if weight.dim() == 3:
            raise ValueError("unknown_rejection_loss: expected weight of shape (C, D) with softmax='single', got sub-centers")
        total = _prototype_sum(weight, options.injection)
        excess = classes * (lse - math.log(classes)) - options.scale * (unit.double() @ total)
        d_unit = options.scale * (classes * pull.double() - total)
        one = torch.ones_like(lse)
        nobody = torch.full_like(at, -1)
        return Unknown(at, nobody, one, excess.clamp_min(0.0), d_unit.to(unit.dtype), one, one, reference.UNKNOWN_SINGLE)
    return _reject_double(batch, exact[at], weight, options, at, nearest[at])


def _reject_double(batch: Batch, exact: Tensor, weight: Weight, options: LossOptions, at: Tensor, nearest: Tensor) -> Unknown:
    """The double softmax: sums over all classes but the nearest, whose p_0 = 1 - (their mass) enters by itself.

    All p are those of an lse from float32 (or 16-bit) logits, and the large ones come in double: they and the mass add up to
    1 + error, by which every p is divided, the sums to first order. So lse may as well be rounded to float32, as the kernels
    read it: with their float32 correction for what that loses, p_0 and the other p would be of two sums 6e-8 apart.
    """
    unit, lse, pull, classes = batch.unit[at], batch.lse[at].to(batch.unit.dtype).double(), _pull_of(batch, at).double(), weight.shape[0]
    cosine, sub, top_prototype = target_prototypes(exact, weight, nearest, options.injection)
    estimate = torch.exp(options.scale * cosine - lse)
    first_mean = (estimate * torch.expm1(estimate)).to(unit.dtype)
    mass, remainder, mean, push = torch.ops.recog_fast.unknown_rejection(
        unit, plane(weight), nearest, lse, first_mean, options.scale, *options.injection.arguments(), False, True, batch.half,
        (exact - unit.double()).to(unit.dtype), residual(weight),
    )  # fmt: skip
    whole = mass + estimate
    remainder, mean = remainder - (whole - 1) * mean, mean / whole**2
    mass, estimate = mass / whole, estimate / whole
    p = torch.where(mass < 0.5, 1 - mass, estimate)
    h = torch.expm1(p)
    top = p * (torch.where(mass < 0.5, mass, 1 - p) * h - mean)  # p (h - E), E = mean + p h
    remainder, mean = remainder + h - p, mean + p * h
    rest = pull - p.unsqueeze(1) * top_prototype  # sum_{j != 0} p_j P_j, no longer than the mass: what is, is rounding
    rest *= (mass / rest.norm(dim=1).clamp_min(1e-300)).clamp(0.0, 1.0).unsqueeze(1)
    d_logits = top.unsqueeze(1) * top_prototype + push.double() - (mean - first_mean.double()).unsqueeze(1) * rest
    slope = double_slope(remainder, classes)
    d_unit = (options.scale * slope).unsqueeze(1) * d_logits
    subcenters = weight.shape[1] if weight.dim() == 3 else 1
    return Unknown(
        at, nearest * subcenters + sub, slope * top, excess_double(remainder, classes), d_unit.to(unit.dtype), slope, mean,
        reference.UNKNOWN_DOUBLE,
    )  # fmt: skip
