"""memory_write: N rows into a memory of 2048 slots; no compiled kernel, so the only contender is the operation itself."""

from __future__ import annotations

import torch

from recog_fast import reference

from . import op_bench
from .problems import Problem
from .store import Results


def _arguments(problem: Problem) -> op_bench.Arguments:
    _, classes, dimension = problem.shape
    rows, strength, slot = op_bench.memory(classes, dimension)
    owner = torch.full((op_bench.SLOTS,), -1, dtype=torch.int64)
    used = slot >= 0
    owner[slot[used].long()] = used.nonzero().squeeze(1)
    unit, _ = reference.unit_rows(problem.embeddings)
    labels = problem.labels
    stamp = torch.where(owner >= 0, 5, -1)
    return (rows, strength, stamp, owner, slot, used.sum(), unit, labels, torch.ones(labels.numel()), 6)


OPERATION = op_bench.Operation(
    "memory_write", _arguments, None, written=(0, 1, 2, 3, 4, 5), products=0, streams=0
)


def test_memory_write(op_size: tuple[int, int], results: Results) -> None:
    """Gate of the written memory against float64, then time."""
    results.add("ops", op_bench.measure(OPERATION, *op_size))
