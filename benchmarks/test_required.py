"""The required numbers of `gates`, asserted on what full sizes stored; each fails, passes, or says why it decides nothing."""

from __future__ import annotations

import pytest

from . import gates
from .store import Results


@pytest.mark.parametrize("gate", gates.GATES, ids=lambda g: g.name)
def test_required(gate: gates.Gate, sizes: str, results: Results) -> None:
    """The verdict of one required number."""
    if sizes != "full":
        pytest.skip("required numbers are judged at full size: pytest benchmarks --sizes full")
    shown, verdict = gate.verdict(results.data)
    if verdict.startswith("undecided") or verdict == "not measured":
        pytest.skip(f"{gate.name}: {shown}; {verdict}")
    assert verdict == "yes", f"{gate.name}: wanted {gate.wanted()}, measured {shown}"
