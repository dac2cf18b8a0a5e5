"""unknown_rejection: the second sweep of unlabelled rows, the streaming sums of UIR (4NCD)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import op_bench
from .problems import SCALE, Problem
from .store import Results


def _arguments(problem: Problem) -> op_bench.Arguments:
    unit, lse, cosine, nearest = op_bench.row_sums(problem, torch.full((problem.shape[0],), -1))
    largest = torch.exp(SCALE * cosine - lse)
    first_mean = largest * torch.expm1(largest)
    return (unit, problem.weight, nearest, lse, first_mean, SCALE, None, None, None, False, True)


def _plain(
    unit: Tensor, weight: Tensor, nearest: Tensor, lse: Tensor, first_mean: Tensor, scale: float, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """p stored; expm1(p) - p by three terms of its series where it would cancel."""
    prototypes = F.normalize(weight)
    p = torch.exp(scale * (unit @ prototypes.t()) - lse.unsqueeze(1))
    p[torch.arange(nearest.numel()), nearest] = 0
    h = torch.expm1(p)
    remainder = torch.where(p < 0.03, p * p * (0.5 + p * (1 / 6 + p / 24)), h - p)
    push = (p * (h - first_mean.unsqueeze(1))) @ prototypes
    return p.sum(1), remainder.sum(1), (p * h).sum(1), push


OPERATION = op_bench.Operation("unknown_rejection", _arguments, _plain)


def test_unknown_rejection(op_size: tuple[int, int], results: Results) -> None:
    """Gate against float64, then time."""
    results.add("ops", op_bench.measure(OPERATION, *op_size))
