"""Options and the results file of `pytest benchmarks`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from . import machine, report

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
def results(request: pytest.FixtureRequest, sizes: str) -> Iterator[dict[str, Any]]:
    """What the tests add to; written as JSON and Markdown, and printed, at the end of the session."""
    collected: dict[str, Any] = {
        "sizes": sizes,
        "environment": machine.describe(),
        "cases": [],
        "memory": [],
        "per_class": [],
        "gates": [],
    }
    yield collected
    named = request.config.getoption("--results")
    folder = (
        Path(named)
        if named
        else (machine.ROOT / "runs" / "benchmarks" if sizes == "toy" else machine.RESULTS / machine.slug())
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{sizes}.json").write_text(json.dumps(collected, indent=1) + "\n")
    page = report.markdown(collected)
    (folder / f"{sizes}.md").write_text(page)
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print(f"\n{page}\n-> {folder / sizes}.json, .md")
