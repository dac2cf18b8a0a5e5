"""One case of the head benchmark: gate every contender, time those that pass, return plain data for JSON."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from . import cost_model
from .contenders import (
    ALL,
    BASELINE,
    Arena,
    Compiled,
    Contender,
    EagerAutocast,
    FusedStep,
    FusedStepBF16,
    Native,
    NativeBF16,
    Unsuitable,
)
from .cost_model import PHASES, Cost, least_flops
from .problems import MARGIN, Problem, make_problem
from .protocol import (
    STEPS,
    Spread,
    Times,
    TooSlow,
    Yardsticks,
    check,
    interleave,
    margin_key,
    one_thread,
    paired_ratio,
    spread,
)
from .truth import Truth, compute_truth

_log = logging.getLogger(__name__)

_TIGHT: tuple[type[Contender], ...] = (BASELINE, Native, FusedStep)


@dataclass(frozen=True)
class Case:
    """A size, a regime, who runs and for how many rounds. slow: a first step of more CPU seconds is reported, not repeated."""

    regime: str
    rows: int
    classes: int
    dimension: int
    kinds: tuple[type[Contender], ...]
    rounds: int = 5
    slow: float = 6.0


# torch.compile is left out of the toy cases: its C++ compilation takes longer than all of them together
TOY = (
    Case("R0", 32, 2000, 512, tuple(k for k in ALL if k is not Compiled)),
    Case("R1-0.87", 32, 2000, 512, (*_TIGHT, NativeBF16, FusedStepBF16)),
    Case("R1-0.22", 32, 2000, 512, _TIGHT),
    Case("R1-1.5", 32, 2000, 512, _TIGHT),
    # odd sizes: N, C and D off every tile
    Case("R0", 19, 1111, 515, tuple(k for k in ALL if k not in (Compiled, EagerAutocast))),
)
FULL = (
    Case("R0", 64, 100_000, 512, ALL),
    Case("R1-0.87", 64, 100_000, 512, _TIGHT),
    Case("R0", 64, 10_000, 512, ALL),
)
LARGE = (Case("R0", 256, 100_000, 512, _TIGHT), Case("R0", 64, 500_000, 512, _TIGHT, slow=60.0))

CASES = {"toy": TOY, "full": FULL, "large": LARGE}


def run_case(case: Case, seed: int = 0) -> dict[str, Any]:
    """Gates, times, ratios and shares of one case; contenders that fail, fail to run or are slow appear with the reason."""
    with one_thread():
        problem = make_problem(case.regime, case.rows, case.classes, case.dimension, seed)
        arena = Arena(problem)
        truths = {margin_key(MARGIN): compute_truth(problem, MARGIN)}
        ready: list[Contender] = []
        rows = [_admit(kind, arena, truths, case, ready) for kind in case.kinds]
        times, yardsticks = interleave(ready, arena, case.rounds, seed)
    timed = {c.name: t for c, t in zip(ready, times, strict=True)}
    for row in rows:
        if row["name"] in timed:
            row.update(_measured(problem, row["name"], timed, yardsticks, case.kinds))
    return {
        "regime": case.regime,
        "N": case.rows,
        "C": case.classes,
        "D": case.dimension,
        "rounds": case.rounds,
        "loss": {
            "float64": truths[margin_key(MARGIN)].loss,
            "expected": problem.expected_loss,
            "tolerance": problem.tolerance,
        },
        "gemm_gflops": asdict(spread(yardsticks.gemm)),
        "copy_gbs": asdict(spread(yardsticks.copy)),
        "rows": rows,
    }


def _admit(
    kind: type[Contender], arena: Arena, truths: dict[str, Truth], case: Case, ready: list[Contender]
) -> dict[str, Any]:
    """The gate, its first call compiling; appends to `ready` what may be timed."""
    row: dict[str, Any] = {"name": kind.name, "note": kind.note}
    times = Times()
    try:
        contender = kind(arena)
        gate = check(contender, truths, case.slow, times)
    except (TooSlow, Unsuitable) as error:
        row["skipped"] = str(error)
        return row
    except Exception as error:  # a contender that cannot run here is a line in the table, not the end of the run
        if kind.__name__.startswith(("Native", "Fused", "Eager", "Reference")):
            raise
        row["skipped"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
        return row
    row["gate"] = {**asdict(gate), "passes": gate.passes, "dropped_mass": contender.dropped}
    row["first_call_s"] = times.wall[STEPS[-1]][0]
    _log.info("%s: first call %.1f s, error %.1e", kind.name, row["first_call_s"], gate.error)
    if not gate.passes:
        row["skipped"] = f"gate failed: error {gate.error:.1e} (limit {gate.limit:.0e}), equal bits: {gate.same_bits}"
    else:
        ready.append(contender)
    return row


def _measured(
    problem: Problem, name: str, timed: dict[str, Times], yardsticks: Yardsticks, kinds: Sequence[type[Contender]]
) -> dict[str, Any]:
    kind = next(k for k in kinds if k.name == name)
    shape = problem.shape
    times, base = timed[name], timed.get(BASELINE.name)
    cost: Cost | None = getattr(cost_model, kind.cost)(*shape) if kind.cost else None
    steps: dict[str, Any] = {}
    gemm, copy = spread(yardsticks.gemm).median, spread(yardsticks.copy).median
    for step, phase in zip(STEPS, PHASES, strict=True):
        cpu = spread(times.cpu[step])
        steps[step] = {
            "cpu_s": asdict(cpu),
            "wall_s": asdict(spread(times.wall[step])),
            "ratio": asdict(paired_ratio(base.cpu[step], times.cpu[step]))
            if base and (kind.dense or step != STEPS[1])
            else None,
            "least_gflops": least_flops(*shape, phase) / cpu.median / 1e9,
            **(_rates(cost, phase, cpu.median, gemm, copy) if cost else {}),
        }
    return {"steps": steps, "same_loss_every_round": len(set(times.losses)) == 1}


def _rates(cost: Cost, phase: str, seconds: float, gemm: float, copy: float) -> dict[str, float]:
    gflops, gbs = cost.flops(phase) / seconds / 1e9, cost.bytes(phase) / seconds / 1e9
    return {"gflops": gflops, "gbs": gbs, "share_of_gemm": gflops / gemm, "share_of_copy": gbs / copy}


def ratio_of(case: dict[str, Any], name: str, step: str) -> Spread:
    """Paired ratio to the baseline of a measured row; LookupError where the row has no times."""
    for row in case["rows"]:
        if row["name"] == name and "steps" in row:
            return Spread(**row["steps"][step]["ratio"])
    raise LookupError(f"{name} was not timed at N={case['N']}, C={case['C']}")
