"""A process that is done ends well: nothing holds its process group until the interpreter is torn down."""

from __future__ import annotations

import pytest
from evicting_ranks import references_at_exit
from ranks import Ranks, ranks

processes = pytest.fixture(scope="module")(ranks)


def test_no_head_holds_its_group_at_the_end(processes: Ranks) -> None:
    for before, held, dropped, after in processes.run(2, references_at_exit):
        assert held > before and dropped > before, "head and HeadSGD hold each other"
        assert after == before
