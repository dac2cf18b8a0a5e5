"""The margin-softmax head against its contenders: gates at every size, the promised ratios at full size."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import pytest

from . import memory, suite
from .contenders import BASELINE, OURS, FusedStep, FusedStepBF16, Native, NativeBF16
from .problems import make_problem
from .protocol import STEPS, one_thread, per_class

# Times faster than eager float32, N=64, C=100k, D=512: the promise of the first native version.
PROMISED = (
    (Native, STEPS[1], 2.2),
    (NativeBF16, STEPS[1], 3.0),
    (FusedStep, STEPS[2], 3.0),
    (FusedStepBF16, STEPS[2], 4.0),
)
MOST_EXTRA = 20.0  # MB beyond W, momentum and dW


def test_gates_and_times(case: suite.Case, results: dict[str, Any]) -> None:
    """Every contender of ours passes its gate in every case; the loss is what the regime was built for."""
    measured = suite.run_case(case)
    results["cases"].append(measured)
    loss = measured["loss"]
    assert abs(loss["float64"] - loss["expected"]) <= loss["tolerance"], loss
    rows = {r["name"]: r for r in measured["rows"]}
    for kind in case.kinds:
        if kind in OURS:
            gate = rows[kind.name]["gate"]
            assert gate["passes"], (kind.name, gate)
            assert rows[kind.name]["same_loss_every_round"], kind.name
    assert "steps" in rows[BASELINE.name], rows[BASELINE.name]


def test_peak_memory(sizes: str, results: dict[str, Any]) -> None:
    """Extra resident memory of ours beyond W, momentum and dW stays below 20 MB whatever C is."""
    rows, classes = {"toy": (32, 20_000), "full": (64, 100_000), "large": (64, 500_000)}[sizes]
    # each is a new process that imports torch; the baseline needs none at toy size
    for kind in (Native, FusedStep) if sizes == "toy" else (BASELINE, Native, FusedStep):
        for peak in memory.measure(kind.name, rows, classes, 512):
            extra = {
                "N": rows,
                "C": classes,
                "dW": peak.gradient,
                "extra": peak.extra,
                "extra_per_cd": peak.extra * 1e6 / (classes * 512),
            }
            results["memory"].append({**asdict(peak), **extra})
            if kind is not BASELINE:
                assert peak.extra < MOST_EXTRA, peak


def test_time_per_class(sizes: str, results: dict[str, Any]) -> None:
    """Time per class as C grows; recorded, and finite."""
    rows, classes, rounds = {
        "toy": (32, (500, 2000), 5),
        "full": (64, (10_000, 30_000, 100_000), 5),
        "large": (64, (100_000, 1_000_000), 5),
    }[sizes]
    with one_thread():
        problems = [make_problem("R0", rows, c, 512, seed=2) for c in classes]
        for kind in (Native, FusedStep):
            for scaling in per_class(kind, problems, rounds, restore=sizes != "large"):
                assert all(math.isfinite(n.median) and n.median > 0 for n in scaling.nanoseconds)
                results["per_class"].append({**asdict(scaling), "N": rows})


def test_promised_ratios(sizes: str, results: dict[str, Any]) -> None:
    """Median paired ratios to eager float32 and the memory bound, at full size."""
    if sizes != "full":
        pytest.skip("ratios are asserted at full size: pytest benchmarks --sizes full")
    case = next((c for c in results["cases"] if (c["regime"], c["N"], c["C"]) == ("R0", 64, 100_000)), None)
    if case is None or not results["memory"]:
        pytest.skip("needs the times of R0-64x100000x512 and the memory of the same session")
    gates = []
    for kind, step, wanted in PROMISED:
        ratio = suite.ratio_of(case, kind.name, step)
        shown = f"{ratio.median:.2f} ({ratio.p10:.2f}-{ratio.p90:.2f})"
        gates.append(
            [f"{kind.name}, {step}", f">= {wanted} x eager float32", shown, "yes" if ratio.median >= wanted else "NO"]
        )
    ours = [p for p in results["memory"] if p["name"] != BASELINE.name]
    most = max(p["extra"] for p in ours)
    gates.append(["extra memory", f"< {MOST_EXTRA:.0f} MB", f"{most:.1f} MB", "yes" if most < MOST_EXTRA else "NO"])
    results["gates"] += gates
    assert all(g[-1] == "yes" for g in gates), gates
