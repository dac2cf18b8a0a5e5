"""memory_write: N rows into a full memory of 2048 slots, against a loop over the rows."""

from __future__ import annotations

import torch
from torch import Tensor

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
    stamp = torch.where(owner >= 0, torch.arange(op_bench.SLOTS).flip(0), -1)
    return (rows, strength, stamp, owner, slot, used.sum(), unit, labels, torch.ones(labels.numel()), op_bench.SLOTS)


def _plain(
    rows: Tensor, row_strength: Tensor, stamp: Tensor, owner: Tensor, slot: Tensor, cursor: Tensor,
    embeddings: Tensor, labels: Tensor, strengths: Tensor, step: int,
) -> None:  # fmt: skip
    """One class after the other: its own slot, else a free one, else the oldest of a class outside the batch."""
    last: dict[int, int] = {}
    for row, label in enumerate(labels.tolist()):
        last.pop(label, None)  # a class stands where its last row stands
        last[label] = row
    taken = {label: int(slot[label]) for label in last}
    ages = sorted((age, at) for at, age in enumerate(stamp.tolist()) if at not in taken.values())
    oldest = (at for _, at in ages)
    for label, row in last.items():
        at = taken[label] if taken[label] >= 0 else next(oldest)
        if taken[label] < 0:
            if owner[at] >= 0:
                slot[owner[at]] = -1
            cursor.add_(1).clamp_(max=stamp.numel())
        rows[at], row_strength[at], stamp[at], owner[at], slot[label] = embeddings[row], strengths[row], step, label, at


OPERATION = op_bench.Operation("memory_write", _arguments, _plain, written=(0, 1, 2, 3, 4, 5), products=0, streams=0)


def test_memory_write(op_size: tuple[int, int], results: Results) -> None:
    """Gate of the written memory against float64, then time."""
    results.add("ops", op_bench.measure(OPERATION, *op_size))
