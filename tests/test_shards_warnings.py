"""A sharded memory that evicts says so in the step that evicts, once on every rank."""

from __future__ import annotations

import pytest
from evicting_ranks import evicting_steps
from ranks import Ranks, ranks

processes = pytest.fixture(scope="module")(ranks)


def test_a_full_ring_is_told_once_by_the_step_that_fills_it(processes: Ranks) -> None:
    found = processes.run(2, evicting_steps)
    assert all(sum(said) == 1 for said in found) and any(said[0] for said in found), found
