"""Every margin with every method on 2, 3 and 4 ranks, rows uneven, absent on a rank and even: loss and gradients of one process."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from ranks import Ranks, ranks
from sharded import MARGINS, SPLITS, Problem, close, joined, split_steps
from torch import Tensor

processes = pytest.fixture(scope="module")(ranks)

METHODS: dict[str, dict[str, Any]] = {
    "plain": {},
    "subcenters": {"options": {"subcenters": 2}},
    "uir": {"options": {"unknown_weight": 0.3}},
    "vpl": {"policy": "vpl"},
    "qaface": {"policy": "qaface"},
}
# 10 classes: 5 and 5; 4, 4 and 2; 3, 3, 3 and 1.
CLASSES = 10
# Of float64: another order of summation makes 1e-13.
BUDGET = 1e-10


def problems(margin: str, odd: int) -> list[Problem]:
    """One of each method; every second one with HeadSGD, the others with torch's SGD, whose dW can be looked at."""
    scale = 256.0 if margin == "circle" else 16.0
    shared: dict[str, Any] = {"classes": CLASSES, "margin": margin, "labels": "mixed", "double": True, "scale": scale}
    return [Problem(SPLITS[1][0], **shared, **method, fused=at % 2 == odd) for at, method in enumerate(METHODS.values())]


@functools.cache
def of_one_process(margin: str, odd: int) -> list[list[dict[str, Tensor]]]:
    return split_steps(None, 1, problems(margin, odd))


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("margin", list(MARGINS))
def test_ranks_are_one_process(processes: Ranks, margin: str, world: int) -> None:
    """Numbers of rows, dx, dW (or velocity), margin and memory after every step; both optimizers for every margin and method."""
    found = processes.run(world, split_steps, world, problems(margin, world % 2))
    for at, (method, truth) in enumerate(zip(METHODS, of_one_process(margin, world % 2), strict=True)):
        for step, expected in enumerate(truth):
            got = joined([of_rank[at][step] for of_rank in found])
            assert set(got) == set(expected)
            for name, value in expected.items():
                same = close(got[name], value, BUDGET) if value.dtype.is_floating_point else torch.equal(got[name], value)
                assert same, (method, f"step {step}, rows {(*SPLITS[world], 'at the end')[step]}", name, got[name], value)


def test_a_group_of_one_is_one_process(processes: Ranks) -> None:
    """The same bits, and no messages: the head takes the path of a process without a group."""
    for got, truth in zip(processes.run(1, split_steps, 1, problems("adaface", 0))[0], of_one_process("adaface", 0), strict=True):
        for one, expected in zip(got, truth, strict=True):
            assert set(one) == set(expected)
            assert all(torch.equal(one[name], value) for name, value in expected.items())
