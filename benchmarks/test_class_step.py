"""class_step: the class sweep with SGD in it (4NCD recomputing; W read and written, velocity read and written)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import op_bench
from .contenders import DECAY, LR, MOMENTUM
from .problems import SCALE, Problem
from .store import Results


def _arguments(problem: Problem) -> op_bench.Arguments:
    unit, lse, *_ = op_bench.row_sums(problem, problem.labels)
    terms = op_bench.gradient_terms(problem.shape[0], lse)
    rows = (unit, problem.labels, terms, problem.weight, problem.velocity)
    return (*rows, SCALE, None, None, None, None, True, LR, MOMENTUM, DECAY, False)


def _plain(unit: Tensor, targets: Tensor, terms: Tensor, weight: Tensor, velocity: Tensor, scale: float, *_: Any) -> None:
    """A dense dW, then torch's fused SGD on the same storage."""
    parameter = nn.Parameter(weight)
    parameter.grad = op_bench.plain_class_gradient(unit, targets, terms, weight, scale)
    optimizer = torch.optim.SGD([parameter], lr=LR, momentum=MOMENTUM, weight_decay=DECAY, fused=True)
    optimizer.state[parameter]["momentum_buffer"] = velocity
    optimizer.step()


OPERATION = op_bench.Operation("class_step", _arguments, _plain, written=(3, 4), streams=4)


def test_class_step(op_size: tuple[int, int], results: Results) -> None:
    """Gate of the new W and velocity against float64, then time."""
    results.add("ops", op_bench.measure(OPERATION, *op_size))
