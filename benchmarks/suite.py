"""The cases of the full step: gate every contender, time those that pass, return plain data for JSON."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from . import cost_model, machine
from .contenders import Arena, Contender, Unsuitable
from .cost_model import PHASES, Cost, least_flops
from .ours import (
    DROPPED,
    FUSED,
    LISTED,
    OURS,
    FusedStep,
    FusedStepBF16,
    FusedStepBF16Kept,
    Native,
    NativeAdamW,
    NativeBF16,
    NativeBF16Kept,
)
from .peers import PEERS, Compiled, CompiledBF16, Eager, EagerAutocast, PartialFC, PartialFCSampled
from .problems import MARGIN, Problem, make_problem
from .protocol import (
    STEPS,
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

BASELINE = Eager
ALL: tuple[type[Contender], ...] = (*PEERS, *OURS)
_TIGHT: tuple[type[Contender], ...] = (BASELINE, Native, FusedStep)
_COMPILED: tuple[type[Contender], ...] = (Compiled, CompiledBF16)
_MAIN: tuple[type[Contender], ...] = (BASELINE, *_COMPILED, PartialFC, PartialFCSampled, Native, NativeBF16Kept, *FUSED, *LISTED)
_LARGEST: tuple[type[Contender], ...] = (BASELINE, *_COMPILED, PartialFCSampled, FusedStep, FusedStepBF16, FusedStepBF16Kept, *LISTED)
_CONVERGED: tuple[type[Contender], ...] = (BASELINE, PartialFCSampled, Native, *FUSED, *DROPPED, *LISTED)


@dataclass(frozen=True)
class Case:
    """A size, a regime, who runs and for how many rounds. slow: a first step of more CPU seconds is reported, not repeated."""

    regime: str
    rows: int
    classes: int
    dimension: int
    kinds: tuple[type[Contender], ...]
    rounds: int = 5
    slow: float = 8.0

    @property
    def name(self) -> str:
        """Such as R0-64x100000x512."""
        return f"{self.regime}-{self.rows}x{self.classes}x{self.dimension}"


# torch.compile is left out of the toy cases but one: its C++ compilation takes longer than all of them together
_TOY_KINDS = tuple(k for k in ALL if k not in _COMPILED)
TOY = (
    Case("R0", 32, 2000, 512, (*_TOY_KINDS, Compiled)),
    Case("R1-0.87", 32, 2000, 512, (BASELINE, Native, NativeBF16, *FUSED, *DROPPED, *LISTED)),
    Case("R1-0.22", 32, 2000, 512, (*_TIGHT, *DROPPED)),
    Case("R1-1.5", 32, 2000, 512, (*_TIGHT, *DROPPED)),
    # odd sizes: N, C and D off every tile
    Case("R0", 19, 1111, 515, tuple(k for k in _TOY_KINDS if k is not EagerAutocast)),
)
FULL = (
    Case("R0", 64, 100_000, 512, ALL),
    Case("R0", 64, 10_000, 512, ALL),
    Case("R0", 64, 500_000, 512, _MAIN, slow=60.0),
    Case("R0", 256, 10_000, 512, ALL),
    Case("R0", 256, 100_000, 512, _MAIN, slow=60.0),
    Case("R0", 256, 500_000, 512, _LARGEST, slow=60.0),
    Case("R1-0.22", 64, 100_000, 512, _CONVERGED),
    Case("R1-0.87", 64, 100_000, 512, _CONVERGED),
    Case("R1-1.5", 64, 100_000, 512, _CONVERGED),
)

CASES = {"toy": TOY, "full": FULL}

_MEASURED_MEMORY: tuple[type[Contender], ...] = (Eager, Compiled, PartialFC, PartialFCSampled, Native, NativeAdamW, *FUSED, *LISTED)
# (contender, N, C) whose memory is measured, each in a process of its own
MEMORY = {
    "toy": [(FusedStep.name, 32, 20_000), (Native.name, 32, 20_000)],
    "full": [
        (kind.name, 64, classes)
        for classes in (10_000, 100_000, 1_000_000)
        for kind in _MEASURED_MEMORY
    ],
}
SCALING = {"toy": (32, (500, 2000), 5), "full": (64, (100_000, 300_000, 1_000_000), 5)}  # N, all C, rounds
ACCURACY_CLASSES = {"toy": [2000], "full": [10_000, 100_000, 1_000_000]}


def kind_named(name: str) -> type[Contender]:
    """The contender of that name; LookupError for any other."""
    for kind in ALL:
        if kind.name == name:
            return kind
    raise LookupError(f"no contender is named {name!r}; there are {', '.join(repr(k.name) for k in ALL)}")


def run_case(case: Case, seed: int = 0) -> dict[str, Any]:
    """Gates, times, ratios and shares of one case; contenders that fail, fail to run or are slow appear with the reason."""
    torch.compiler.reset()  # the next case has other shapes; no code of the last one may count against its limit
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
        "commit": machine.commit(),
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
    except TooSlow as error:
        return {**row, "skipped": str(error), "slow_s": error.seconds}
    except Unsuitable as error:
        return {**row, "skipped": str(error)}
    except Exception as error:  # a contender that cannot run here is a line in the table, not the end of the run
        if kind in OURS or issubclass(kind, Eager):
            raise
        return {**row, "skipped": f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"}
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
    times = timed[name]
    cost: Cost | None = getattr(cost_model, kind.cost)(*shape) if kind.cost else None
    steps: dict[str, Any] = {}
    for step, phase in zip(STEPS, PHASES, strict=True):
        cpu = spread(times.cpu[step])
        comparable = kind.dense or step != STEPS[1]
        steps[step] = {
            "cpu_s": asdict(cpu),
            "wall_s": asdict(spread(times.wall[step])),
            "ratio": _ratio_to(BASELINE, step, times, timed) if comparable else None,
            "least_gflops": least_flops(*shape, phase) / cpu.median / 1e9,
            **(_rates(cost, phase, cpu.median, yardsticks) if cost else {}),
            **(_peak_shares(cost, shape, step, phase, times) if cost and times.rates else {}),
        }
    full = STEPS[-1]
    strong: tuple[type[Contender], ...] = (*_COMPILED, PartialFCSampled)
    against = {k.name: _ratio_to(k, full, times, timed) for k in strong if k.name in timed}
    return {"steps": steps, "against": against, "same_loss_every_round": len(set(times.losses)) == 1}


def _ratio_to(base: type[Contender], step: str, times: Times, timed: dict[str, Times]) -> dict[str, float] | None:
    """How many times faster than `base`, paired within rounds; None where it was not timed."""
    other = timed.get(base.name)
    return asdict(paired_ratio(other.cpu[step], times.cpu[step])) if other else None


def _rates(cost: Cost, phase: str, seconds: float, yardsticks: Yardsticks) -> dict[str, float]:
    gemm, copy = spread(yardsticks.gemm).median, spread(yardsticks.copy).median
    gflops, gbs = cost.flops(phase) / seconds / 1e9, cost.bytes(phase) / seconds / 1e9
    return {"gflops": gflops, "gbs": gbs, "share_of_gemm": gflops / gemm, "share_of_copy": gbs / copy}


def _peak_shares(cost: Cost, shape: tuple[int, int, int], step: str, phase: str, times: Times) -> dict[str, Any]:
    """Matrix operations per second over the micro-kernel's rate just before: own ones (8NCD recomputing) and 6NCD."""
    available = [seconds * rate for seconds, rate in zip(times.cpu[step], times.rates, strict=True)]
    own, least = cost.flops(phase, matrix_only=True), least_flops(*shape, phase)
    return {
        "kernel_gflops": spread(times.rates).median / 1e9,
        "share_of_peak": asdict(spread([own / a for a in available])),
        "least_share_of_peak": asdict(spread([least / a for a in available])),
    }


def row_of(case: dict[str, Any], name: str) -> dict[str, Any]:
    """The measured row of a contender; LookupError, with its reason, where it has no times."""
    for row in case["rows"]:
        if row["name"] == name:
            if "steps" in row:
                return dict(row)
            raise LookupError(f"{name}: {row['skipped']}")
    raise LookupError(f"{name} did not run at N={case['N']}, C={case['C']}")
