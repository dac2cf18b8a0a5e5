"""Inputs and float64 truth on the device itself: nothing of size N x C is kept, so both reach C = 10M."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .contenders import Arena
from .problems import MARGIN, SCALE, Problem, add_look_alikes, random_loss, rows_with_gaps, target_gaps
from .truth import Truth, arcface_target, tangent

REGIMES = ("R0", "R1-0.22", "R1-0.87", "R1-1.5", "R2", "R4")
_CHUNK = 16384  # classes of a float64 chunk
_LEAN = 0.5  # of R2's rows towards their common direction: a cosine of 0.45 with it
_HUBS = 2000  # classes to one hub


@dataclass(frozen=True)
class DeviceProblem(Problem):
    """A problem whose weight and velocity can be put back without a second copy: `refill` draws them again."""

    refill: Callable[[], None] = lambda: None


class DeviceArena(Arena):
    """The inputs all contenders of a case share; W and velocity are drawn again before each run."""

    def __init__(self, problem: DeviceProblem) -> None:
        super().__init__(problem, restore=False)
        self._refill = problem.refill

    def reset(self) -> None:
        super().reset()
        with torch.no_grad():
            self._refill()


def make_device_problem(regime: str, rows: int, classes: int, dimension: int, device: torch.device, seed: int = 0) -> DeviceProblem:
    """Regimes of performance.md: R0 random, R1-<mean loss> converged, R2 hubs near a direction all rows lean to, R4 rows that share
    a sixteenth of the labels. Raises ValueError for another."""
    if regime not in REGIMES:
        raise ValueError(f"make_device_problem: expected a regime of {REGIMES}, got {regime!r}")
    generator = torch.Generator(device).manual_seed(seed)
    directions = normalize(torch.randn(rows, dimension, generator=generator, device=device))
    common = normalize(torch.randn(1, dimension, generator=generator, device=device))
    distinct = max(rows // 16, 1) if regime == "R4" else rows
    drawn = torch.randint(0, classes, (distinct,), generator=generator, device=device)
    labels = drawn[torch.arange(rows, device=device) % distinct]
    norms = 5 + 20 * torch.rand(rows, 1, generator=generator, device=device)
    weight = torch.empty(classes, dimension, device=device)
    velocity = torch.empty_like(weight)
    refill = partial(_fill, regime, weight, velocity, common, seed)
    refill()
    expected, tolerance, unit = math.nan, math.inf, directions
    if regime in ("R0", "R4"):
        # R4's rows meet R0's cosines: all the same, but with fewer independent targets
        expected, tolerance = random_loss(classes, dimension), 4 * SCALE * math.cos(MARGIN) / math.sqrt(dimension * rows) + 0.1
    elif regime == "R2":
        unit = normalize(directions + _LEAN * common)
    else:
        expected = float(regime[3:])
        tolerance = 0.02 * expected + 0.01
        order = torch.randperm(rows, generator=generator, device=device)
        gaps = target_gaps(rows, expected).to(device)[order]
        unit = rows_with_gaps(weight, labels, directions, gaps)
    return DeviceProblem(regime, unit * norms, weight, velocity, labels, expected, tolerance, refill)


@torch.no_grad()
def _fill(regime: str, weight: Tensor, velocity: Tensor, common: Tensor, seed: int) -> None:
    """The same values in every call."""
    generator = torch.Generator(weight.device).manual_seed(seed + 1)
    weight.normal_(0.0, 0.01, generator=generator)
    velocity.normal_(0.0, 1e-6, generator=generator)
    if regime.startswith("R1"):
        add_look_alikes(weight, generator)
    if regime == "R2":
        hubs = weight[:: _HUBS]  # a view: in place
        hubs.add_(common, alpha=0.01 * math.sqrt(weight.shape[1]))


class _Sweep:
    """Float64 cosines of a problem's rows with its classes, a chunk at a time."""

    def __init__(self, problem: Problem, classes: Tensor | None) -> None:
        self.weight, self.take = problem.weight.detach(), classes
        self.count = self.weight.shape[0] if classes is None else classes.numel()
        self.labels = problem.labels if classes is None else torch.searchsorted(classes, problem.labels)
        embeddings = problem.embeddings.detach().double()
        self.norm = embeddings.norm(dim=1, keepdim=True)
        self.unit = embeddings / self.norm
        self.rows = torch.arange(self.labels.numel(), device=self.labels.device)

    def prototypes(self, columns: slice | Tensor) -> Tensor:
        """Unit rows (S, D) of these columns."""
        part = self.weight[columns] if self.take is None else self.weight[self.take[columns]]
        return normalize(part.double())

    def logits(self, start: int) -> tuple[Tensor, Tensor, Tensor]:
        """(SCALE cosines (N, S) with -inf at the targets, P (S, D), rows whose target is here) of one chunk."""
        p = self.prototypes(slice(start, min(start + _CHUNK, self.count)))
        z = SCALE * (self.unit @ p.t())
        here = ((self.labels >= start) & (self.labels < start + p.shape[0])).nonzero().squeeze(1)
        z[here, self.labels[here] - start] = -math.inf
        return z, p, here


@torch.no_grad()
def device_truth(problem: Problem, margin: float, classes: Tensor | None = None, seed: int = 1) -> Truth:
    """`truth.compute_truth` on the problem's own device: two passes over chunks of classes, all of them float64."""
    sweep = _Sweep(problem, classes)
    labels, unit, rows = sweep.labels, sweep.unit, sweep.rows
    cosine = (unit * sweep.prototypes(labels)).sum(1)
    value, slope = arcface_target(cosine, margin)
    lse = torch.full_like(cosine, -math.inf)
    best, nearest = unit.new_empty(rows.numel(), 0), labels.new_empty(rows.numel(), 0)
    for start in range(0, sweep.count, _CHUNK):
        z, _, _ = sweep.logits(start)
        lse = torch.logaddexp(lse, torch.logsumexp(z, 1))
        top = z.topk(min(5, z.shape[1]), dim=1)
        best, nearest = torch.cat([best, top.values], 1), torch.cat([nearest, top.indices + start], 1)
        kept = best.topk(min(5, best.shape[1]), dim=1)
        best, nearest = kept.values, nearest.gather(1, kept.indices)
    share = SCALE / rows.numel() * torch.sigmoid(lse - SCALE * value)
    d_unit = torch.zeros_like(unit)
    for start in range(0, sweep.count, _CHUNK):
        z, p, here = sweep.logits(start)
        d_cosine = z.sub_(lse.unsqueeze(1)).exp_().mul_(share.unsqueeze(1))
        d_cosine[here, labels[here] - start] = -share[here] * slope[here]
        d_unit += d_cosine @ p
    sample, targets = _sample(sweep, nearest, seed)
    chosen = sweep.weight[sample if classes is None else classes[sample]].double()
    length = chosen.norm(dim=1, keepdim=True)
    d_cosine = torch.exp(SCALE * (unit @ (chosen / length).t()) - lse.unsqueeze(1)) * share.unsqueeze(1)
    d_cosine[rows, torch.searchsorted(sample[:targets], labels)] = -share * slope
    d_weight = tangent(d_cosine.t() @ unit, chosen / length, length)
    loss = torch.logaddexp(torch.zeros_like(lse), lse - SCALE * value).mean()
    ids = sample if classes is None else classes[sample]
    return Truth(float(loss), tangent(d_unit, unit, sweep.norm), d_weight, ids, targets)


def _sample(sweep: _Sweep, nearest: Tensor, seed: int) -> tuple[Tensor, int]:
    """Columns: all targets in ascending order, each row's nearest negatives, 512 random others; and how many targets."""
    targets = torch.unique(sweep.labels)
    generator = torch.Generator(nearest.device).manual_seed(seed)
    others = torch.randint(0, sweep.count, (512,), generator=generator, device=nearest.device)
    rest = torch.unique(torch.cat([nearest.flatten(), others]))
    return torch.cat([targets, rest[~torch.isin(rest, targets)]]), targets.numel()
