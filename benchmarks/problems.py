"""Inputs of the benchmarks: random heads (R0) and converged ones (R1), with the loss each must have."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

SCALE = 64.0
MARGIN = 0.5  # ArcFace, radians
GAP_SPREAD = 6.4  # nats; spread of s t_i - L_i over the rows of trained models
LOOK_ALIKE = 0.05  # share of classes that resemble another one in R1
LOOK_ALIKE_COSINE = 0.4


@dataclass(frozen=True)
class Problem:
    """One batch and head. embeddings (N, D), weight (C, D), velocity (C, D) float32; labels (N,) int64.

    expected_loss: what the mean ArcFace loss must be within +- tolerance, by construction and not by computing it.
    """

    regime: str
    embeddings: Tensor
    weight: Tensor
    velocity: Tensor
    labels: Tensor
    expected_loss: float
    tolerance: float

    @property
    def shape(self) -> tuple[int, int, int]:
        """(N, C, D)"""
        return self.embeddings.shape[0], self.weight.shape[0], self.weight.shape[1]


def arcface(cosine: Tensor, margin: float) -> Tensor:
    """cos(theta + m); linear c - m sin m past theta = pi - m (math.md 1.1). Any shape and float dtype."""
    # clamp_min(0) would make the gradient NaN at |cosine| = 1
    sine = torch.sqrt((1 - cosine * cosine).clamp_min(1e-12))
    inside = cosine * math.cos(margin) - sine * math.sin(margin)
    return torch.where(cosine > -math.cos(margin), inside, cosine - margin * math.sin(margin))


def random_loss(classes: int, dimension: int, scale: float = SCALE, margin: float = MARGIN) -> float:
    """ln C + s^2/(2D) + s sin m (1 - 1/(2D)): mean ArcFace loss when every cosine is N(0, 1/D). 46.1 at C = 93k, D = 512.

    Holds while s^2/D is well below 2 ln C: else the largest of the C logits carries the sum, and it is smaller.
    """
    return math.log(max(classes - 1, 1)) + scale**2 / (2 * dimension) + scale * math.sin(margin) * (1 - 0.5 / dimension)


def make_problem(regime: str, rows: int, classes: int, dimension: int, seed: int = 0) -> Problem:
    """`regime` "R0": random initialisation; "R1-0.22", "R1-0.87", ...: converged to that mean loss.

    Raises ValueError for another regime.
    """
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(classes, dimension, generator=generator).mul_(0.01)
    velocity = torch.randn(classes, dimension, generator=generator).mul_(1e-6)
    labels = torch.randint(0, classes, (rows,), generator=generator)
    norms = 5 + 20 * torch.rand(rows, 1, generator=generator)
    directions = torch.nn.functional.normalize(torch.randn(rows, dimension, generator=generator))
    if regime == "R0":
        # sd of the mean target logit, four of them, and 0.1 for the finite sum over C
        tolerance = 4 * SCALE * math.cos(MARGIN) / math.sqrt(dimension * rows) + 0.1
        return Problem(regime, directions * norms, weight, velocity, labels, random_loss(classes, dimension), tolerance)
    if not regime.startswith("R1-"):
        raise ValueError(f"make_problem: expected regime 'R0' or 'R1-<mean loss>', got {regime!r}")
    wanted = float(regime[3:])
    add_look_alikes(weight, generator)
    gaps = target_gaps(rows, wanted)[torch.randperm(rows, generator=generator)]
    unit = rows_with_gaps(weight, labels, directions, gaps)
    return Problem(regime, unit * norms, weight, velocity, labels, wanted, 0.02 * wanted + 0.01)


def add_look_alikes(weight: Tensor, generator: torch.Generator) -> None:
    """Turns 5 % of the classes towards another class, to cosine 0.4; in place."""
    classes = weight.shape[0]
    order = torch.randperm(classes, generator=generator, device=weight.device)
    count = int(classes * LOOK_ALIKE)
    copies, models = order[:count], order[count : 2 * count]
    sine = math.sqrt(1 - LOOK_ALIKE_COSINE**2)
    weight[copies] = LOOK_ALIKE_COSINE * weight[models] + sine * weight[copies]


def target_gaps(rows: int, wanted: float) -> Tensor:
    """Quantiles of N(mu, 6.4) with mu such that the mean of softplus(-gap) is `wanted`. (rows,) float64."""
    position = (torch.arange(rows, dtype=torch.float64) + 0.5) / rows
    spread = GAP_SPREAD * math.sqrt(2) * torch.erfinv(2 * position - 1)
    low, high = -60.0, 60.0
    for _ in range(100):
        middle = (low + high) / 2
        loss = float(torch.logaddexp(torch.zeros_like(spread), -(spread + middle)).mean())
        low, high = (middle, high) if loss > wanted else (low, middle)
    return spread + low


def rows_with_gaps(weight: Tensor, labels: Tensor, directions: Tensor, gaps: Tensor) -> Tensor:
    """x^_i = c_i W^_y + sqrt(1 - c_i^2) u_i, u_i orthogonal to W^_y, with c_i by bisection on s t_i - L_i = gap_i. (N, D)"""
    unit = torch.nn.functional.normalize(weight)
    own = unit[labels]
    noise = torch.nn.functional.normalize(directions - (directions * own).sum(1, keepdim=True) * own)
    along, across = own @ unit.t(), noise @ unit.t()
    at = torch.arange(labels.numel(), device=labels.device)
    low, high = torch.full_like(along[:, 0], -1.0), torch.ones_like(along[:, 0])
    for _ in range(30):
        cosine = (low + high) / 2
        logits = SCALE * (cosine.unsqueeze(1) * along + torch.sqrt(1 - cosine * cosine).unsqueeze(1) * across)
        logits[at, labels] = float("-inf")
        reached = SCALE * arcface(cosine, MARGIN) - torch.logsumexp(logits, 1) > gaps
        low, high = torch.where(reached, low, cosine), torch.where(reached, cosine, high)
    return low.unsqueeze(1) * own + torch.sqrt(1 - low * low).unsqueeze(1) * noise
