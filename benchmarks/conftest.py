"""Options and the results file of `pytest benchmarks`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from . import machine, report, suite

SIZES = ("toy", "full", "large")


def pytest_addoption(parser: pytest.Parser) -> None:
    """--sizes, --results."""
    parser.addoption(
        "--sizes",
        choices=SIZES,
        default=os.environ.get("RECOG_FAST_BENCH_SIZES", "toy"),
        help="toy: correctness gates at small sizes; full: N=64, C=100k and the speed gates; large: C=500k and 1M only",
    )
    parser.addoption(
        "--results",
        default=None,
        help="folder of the results (full: benchmarks/results/<device>; toy: runs/benchmarks)",
    )


@pytest.fixture(scope="session")
def sizes(request: pytest.FixtureRequest) -> str:
    """ "toy", "full" or "large"."""
    return str(request.config.getoption("--sizes"))


@pytest.fixture(scope="session")
def collected(request: pytest.FixtureRequest, sizes: str) -> Iterator[dict[str, Any]]:
    """Everything measured in this session; its page is printed at the end."""
    empty: dict[str, Any] = {"cases": [], "memory": [], "per_class": [], "gates": []}
    everything = {"sizes": sizes, "environment": machine.describe(), **empty}
    yield everything
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print(f"\n{report.markdown(everything)}")


@pytest.fixture
def results(request: pytest.FixtureRequest, sizes: str, collected: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What a test adds to; written as JSON and Markdown after each, so that a run cut short leaves what it had."""
    yield collected
    named = request.config.getoption("--results")
    stored = machine.ROOT / "runs" / "benchmarks" if sizes == "toy" else machine.RESULTS / machine.slug()
    folder = Path(named) if named else stored
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{sizes}.json").write_text(json.dumps(collected, indent=1) + "\n")
    (folder / f"{sizes}.md").write_text(report.markdown(collected))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`case`: the cases of --sizes."""
    if "case" in metafunc.fixturenames:
        cases = suite.CASES[metafunc.config.getoption("--sizes")]
        metafunc.parametrize("case", cases, ids=[f"{c.regime}-{c.rows}x{c.classes}x{c.dimension}" for c in cases])
