"""effective_prototypes: P from W and a memory of 2048 classes (W read, P written)."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from . import op_bench
from .problems import Problem
from .store import Results


def _arguments(problem: Problem) -> op_bench.Arguments:
    _, classes, dimension = problem.shape
    return (problem.weight, *op_bench.memory(classes, dimension), True)


def _plain(weight: Tensor, rows: Tensor, strength: Tensor, slot: Tensor, *_: Any) -> Tensor:
    """Normalise all, then inject and normalise again the classes that have a memory."""
    unit = F.normalize(weight)
    held = (slot >= 0).nonzero().squeeze(1)
    at = slot[held].long()
    unit[held] = F.normalize(unit[held] + strength[at].unsqueeze(1) * rows[at])
    return unit


OPERATION = op_bench.Operation("effective_prototypes", _arguments, _plain, products=0, streams=2)


def test_effective_prototypes(op_size: tuple[int, int], results: Results) -> None:
    """Gate against float64, then time."""
    results.add("ops", op_bench.measure(OPERATION, *op_size))
