"""class_gradient: the class sweep to a dense dW (4NCD recomputing, dW written)."""

from __future__ import annotations

from . import op_bench
from .problems import SCALE, Problem
from .store import Results


def _arguments(problem: Problem) -> op_bench.Arguments:
    unit, lse, *_ = op_bench.row_sums(problem, problem.labels)
    terms = op_bench.gradient_terms(problem.shape[0], lse)
    return (unit, problem.labels, terms, problem.weight, SCALE, None, None, None, None, False, True)


OPERATION = op_bench.Operation("class_gradient", _arguments, op_bench.plain_class_gradient, streams=2)


def test_class_gradient(op_size: tuple[int, int], results: Results) -> None:
    """Gate against float64, then time."""
    results.add("ops", op_bench.measure(OPERATION, *op_size))
