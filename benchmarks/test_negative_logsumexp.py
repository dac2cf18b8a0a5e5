"""negative_logsumexp: the forward sweep, logsumexp of the negatives, nearest negative and pull (4NCD)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import op_bench
from .problems import SCALE, Problem
from .store import Results


def _arguments(problem: Problem) -> op_bench.Arguments:
    unit, *_ = op_bench.row_sums(problem, problem.labels)
    return (unit, problem.weight, problem.labels, SCALE, None, None, None, None, False, True)


def _plain(unit: Tensor, weight: Tensor, labels: Tensor, scale: float, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    prototypes = F.normalize(weight)
    cosine = unit @ prototypes.t()
    cosine[torch.arange(labels.numel()), labels] = float("-inf")
    nearest, index = cosine.max(dim=1)
    logits = scale * cosine
    return torch.logsumexp(logits, dim=1), nearest, index, torch.softmax(logits, dim=1) @ prototypes


OPERATION = op_bench.Operation("negative_logsumexp", _arguments, _plain)


def test_negative_logsumexp(op_size: tuple[int, int], results: Results) -> None:
    """Gate against float64, then time."""
    results.add("ops", op_bench.measure(OPERATION, *op_size))
