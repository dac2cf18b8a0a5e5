"""Options and the results file of `pytest benchmarks`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from . import machine, op_bench, report, suite
from .store import Results

SIZES = ("toy", "full")


def pytest_addoption(parser: pytest.Parser) -> None:
    """--sizes, --results."""
    parser.addoption(
        "--sizes",
        choices=SIZES,
        default=os.environ.get("RECOG_FAST_BENCH_SIZES", "toy"),
        help="toy: correctness gates at small sizes; full: N {64, 256} x C {1e4, 1e5, 5e5}, scaling to 1e6, the required numbers",
    )
    parser.addoption(
        "--results",
        default=None,
        help="folder of the results (full: benchmarks/results/<device>, merged; toy: runs/benchmarks, fresh)",
    )


@pytest.fixture(scope="session")
def sizes(request: pytest.FixtureRequest) -> str:
    """ "toy" or "full"."""
    return str(request.config.getoption("--sizes"))


@pytest.fixture(scope="session")
def results(request: pytest.FixtureRequest, sizes: str) -> Iterator[Results]:
    """What tests add to; full sizes join what earlier runs stored. The page is printed at the end."""
    named = request.config.getoption("--results")
    stored = machine.ROOT / "runs" / "benchmarks" if sizes == "toy" else machine.RESULTS / machine.slug()
    made = Results((Path(named) if named else stored) / f"{sizes}.json", sizes, fresh=sizes == "toy")
    yield made
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print(f"\n{report.markdown(made.data)}")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`case`, `op_size`, `memory_case`, `accuracy_classes`: those of --sizes."""
    sizes = metafunc.config.getoption("--sizes")
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", suite.CASES[sizes], ids=lambda case: case.name)
    if "op_size" in metafunc.fixturenames:
        metafunc.parametrize("op_size", op_bench.SIZES[sizes], ids=lambda size: "x".join(map(str, size)))
    if "memory_case" in metafunc.fixturenames:
        metafunc.parametrize("memory_case", suite.MEMORY[sizes], ids=lambda case: f"{case[0]}, {case[1]}x{case[2]}")
    if "accuracy_classes" in metafunc.fixturenames:
        metafunc.parametrize("accuracy_classes", suite.ACCURACY_CLASSES[sizes])
