"""float64 truth of a problem on a sample of classes, and the gate every time must pass.

Written apart from the package: chunked, from math.md 1 alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .problems import SCALE, Problem

_CHUNK = 8192


@dataclass(frozen=True)
class Truth:
    """Mean loss; d_embeddings (N, D); d_weight (S, D) of the sampled classes; float64.

    sample (S,) int64: the distinct target classes first (`targets` of them), then top negatives and random others.
    """

    loss: float
    d_embeddings: Tensor
    d_weight: Tensor
    sample: Tensor
    targets: int


@dataclass(frozen=True)
class Gate:
    """Relative errors against float64 (loss: |error|/|truth|; gradients: Frobenius norms), and two runs compared bit by bit."""

    loss: float
    d_embeddings: float
    d_weight: float
    d_weight_negatives: float
    step: float
    same_bits: bool
    limit: float
    needs_same_bits: bool

    @property
    def error(self) -> float:
        """The largest of the errors; NaN if any is (`max` alone would drop it)."""
        errors = (self.loss, self.d_embeddings, self.d_weight, self.d_weight_negatives, self.step)
        return math.nan if any(math.isnan(e) for e in errors) else max(errors)

    @property
    def passes(self) -> bool:
        """Every error is finite and below the limit, and the bits are equal where that is promised."""
        return math.isfinite(self.error) and self.error <= self.limit and (self.same_bits or not self.needs_same_bits)


def arcface_target(cosine: Tensor, margin: float) -> tuple[Tensor, Tensor]:
    """phi(c) and phi'(c) of ArcFace."""
    if margin == 0:
        return cosine, torch.ones_like(cosine)
    theta = torch.arccos(cosine.clamp(-1, 1))
    inside = theta < math.pi - margin
    value = torch.where(inside, torch.cos(theta + margin), cosine - margin * math.sin(margin))
    slope = torch.sin(theta + margin) / torch.sin(theta).clamp_min(1e-6)
    return value, torch.where(inside, slope, torch.ones_like(slope))


def tangent(gradient: Tensor, unit: Tensor, norm: Tensor) -> Tensor:
    return (gradient - (gradient * unit).sum(1, keepdim=True) * unit) / norm


def compute_truth(problem: Problem, margin: float, classes: Tensor | None = None, seed: int = 1) -> Truth:
    """Mean ArcFace loss and its gradients. `classes` (S',) sorted: the only classes that take part (a sampled schedule); ids
    in `Truth.sample` stay those of the whole head."""
    take = torch.arange(problem.weight.shape[0]) if classes is None else classes
    labels = torch.searchsorted(take, problem.labels)
    count, rows = take.numel(), labels.numel()
    norm = problem.embeddings.double().norm(dim=1, keepdim=True)
    unit = problem.embeddings.double() / norm
    at = torch.arange(rows)
    cosine = torch.empty(rows, count, dtype=torch.float64)
    for start in range(0, count, _CHUNK):
        part = problem.weight[take[start : start + _CHUNK]].double()
        cosine[:, start : start + _CHUNK] = unit @ torch.nn.functional.normalize(part).t()
    value, slope = arcface_target(cosine[at, labels], margin)
    sample, targets = _sample(cosine, labels, seed)
    logits = cosine.mul_(SCALE)
    logits[at, labels] = float("-inf")
    lse = torch.logsumexp(logits, 1)
    share = torch.sigmoid(lse - SCALE * value)
    d_cosine = logits.sub_(lse.unsqueeze(1)).exp_().mul_((SCALE / rows * share).unsqueeze(1))
    d_cosine[at, labels] = -SCALE / rows * share * slope
    d_unit = torch.zeros_like(unit)
    for start in range(0, count, _CHUNK):
        part = problem.weight[take[start : start + _CHUNK]].double()
        d_unit += d_cosine[:, start : start + _CHUNK] @ torch.nn.functional.normalize(part)
    chosen = problem.weight[take[sample]].double()
    length = chosen.norm(dim=1, keepdim=True)
    d_weight = tangent(d_cosine[:, sample].t() @ unit, chosen / length, length)
    loss = torch.logaddexp(torch.zeros_like(lse), lse - SCALE * value).mean()
    return Truth(float(loss), tangent(d_unit, unit, norm), d_weight, take[sample], targets)


def _sample(cosine: Tensor, labels: Tensor, seed: int) -> tuple[Tensor, int]:
    """Column ids: all targets, the four nearest negatives of each row, 512 random others; and how many targets."""
    count = cosine.shape[1]
    targets = torch.unique(labels)
    nearest = cosine.topk(min(5, count), dim=1).indices.flatten()
    others = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:512]
    rest = torch.unique(torch.cat([nearest, others]))
    return torch.cat([targets, rest[~torch.isin(rest, targets)]]), targets.numel()


def relative(value: Tensor, truth: Tensor) -> float:
    """|value - truth| / |truth| in Frobenius norm."""
    size = float(truth.norm())
    return float((value.double() - truth).norm()) / size if size > 0 else float((value.double() - truth).norm())
