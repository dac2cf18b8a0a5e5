"""Bad rows of a sharded head on a device: no step waits, every rank leaves them out, every rank says so at the next forward."""

from __future__ import annotations

import pytest
import torch
from ranks import Ranks, ranks
from sharded import UNEVEN, Problem, close
from sharded_ranks import deferred_steps, spoiled_rows

processes = pytest.fixture(scope="module")(ranks)

PROBLEMS = {
    "plain": Problem(UNEVEN[3]),
    "adaface, subcenters": Problem(UNEVEN[2], margin="adaface", options={"subcenters": 2}),
    "bf16": Problem(UNEVEN[2], half=True),
    "memory": Problem(UNEVEN[3], policy="qaface"),
    "float64": Problem(UNEVEN[4], double=True),
}
# What waits (docs/training-ranks.md) must be right all the same; a third of the rows is unlabelled, the first bad one too.
WAITING = {
    "uir": Problem(UNEVEN[3], labels="mixed", options={"unknown_weight": 0.3}),
    "uir, adaface, float64": Problem(UNEVEN[4], labels="mixed", options={"unknown_weight": 0.3}, margin="adaface", double=True),
    "curricular": Problem(UNEVEN[2], margin="curricular"),
}


@pytest.mark.parametrize("nonfinite", [False, True], ids=["labels", "a nan"])
@pytest.mark.parametrize("name", [*PROBLEMS, *WAITING])
def test_no_step_waits_and_bad_rows_take_no_part_on_any_rank(processes: Ranks, name: str, nonfinite: bool) -> None:
    problem = {**PROBLEMS, **WAITING}[name]
    found = processes.run(len(problem.sizes), deferred_steps, problem, nonfinite)
    truth = deferred_steps(None, problem, nonfinite)
    _, _, good = spoiled_rows(problem, nonfinite)
    allowed = 1e-9 if problem.double else 2e-3 if problem.half else 1e-5
    for one in found:
        assert bool(one["loss"].isnan()) if nonfinite else close(one["loss"], truth["loss"], allowed)
    dx = torch.cat([one["dx"] for one in found])
    assert close(dx[good], truth["dx"], allowed) and not dx[~good].any()
    assert close(torch.cat([one["lse"] for one in found])[good], truth["lse"], allowed)
    for state in ("W", "momentum"):
        assert close(torch.cat([one[state] for one in found]), truth[state], allowed)
    if problem.policy is not None:
        assert torch.equal(torch.cat([one["entries ids"] for one in found]), truth["entries ids"])
    owners = [rank for rank, size in enumerate(problem.sizes) for _ in range(size)]
    inside = [row - sum(problem.sizes[: owners[row]]) for row in (~good).nonzero().flatten().tolist()]
    complaints = {owners[1]: f"non-finite value in row {inside[0]} (1 bad" if nonfinite else f"got -9 in row {inside[0]} (1 bad",
                  owners[-1]: f"got {problem.classes + 7} in row {inside[1]} (1 bad"}  # fmt: skip
    for rank, one in enumerate(found):
        first, second = one["said"]
        own = complaints.get(rank, f"got a refusal of rank {min(complaints)}: MarginHead: in an earlier call: expected")
        assert own in first and "in an earlier call" in first
        assert (second == "") == (problem.policy is None)  # the memory then says it of its own writes
