"""Ours against what people use, at one size: `python -m benchmarks.against [--quick]` stores `peers.json` beside this machine's results.

Times and gates are those of one case of the suite, memory is of a process for each contender. `benchmarks.readme` makes the README's
table from it. What is not installed (pytorch-metric-learning) is said in its row.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from . import machine, memory, suite
from .ours import FusedStep, FusedStepBF16, FusedStepBF16Kept, FusedStepKeptExact, Native
from .peers import Eager, LinearCrossEntropy, MetricLearning, PartialFC, PartialFCSampled

KINDS = (
    Eager, PartialFC, PartialFCSampled, MetricLearning, LinearCrossEntropy, Native, FusedStep, FusedStepKeptExact, FusedStepBF16, FusedStepBF16Kept,
)  # fmt: skip
CASE = suite.Case("R0", 64, 100_000, 512, KINDS, slow=60.0)
QUICK = suite.Case("R0", 16, 2000, 64, (Eager, PartialFC, LinearCrossEntropy, FusedStep), rounds=2)
FILE = "peers.json"


def measured(case: suite.Case) -> dict[str, Any]:
    """The case's times and the extra memory of a full step of every contender that ran, as plain data."""
    times = suite.run_case(case)
    peaks = []
    for row in times["rows"]:
        if "steps" in row:
            (peak,) = [p for p in memory.measure(row["name"], case.rows, case.classes, case.dimension) if p.phase == "full step"]
            peaks.append({**asdict(peak), "extra": peak.extra})
    return {"environment": machine.describe(), "case": times, "memory": peaks}


def main(arguments: list[str]) -> int:
    machine.commit()  # of the code that runs, whatever is edited meanwhile
    quick = "--quick" in arguments
    result = measured(QUICK if quick else CASE)
    if quick:
        print(json.dumps(result, indent=1))
        return 0
    path = Path(machine.RESULTS / machine.slug() / FILE)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(path.relative_to(machine.ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
