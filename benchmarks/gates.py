"""The numbers this project promised for the CPU, computed from stored results and from nothing else.

Each is stated for one thread, CPU time, R0, D=512, 64 x 100k unless its name says otherwise. None is loosened for a
machine: where one lacks bf16 instructions the number is shown all the same, with that remark.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .ours import FusedStep, FusedStepBF16, FusedStepBF16Kept, FusedStepKeptExact, Native, NativeBF16
from .peers import Compiled, CompiledBF16, PartialFCSampled
from .protocol import STEPS
from .suite import row_of

Data = dict[str, Any]
_ROWS, _CLASSES, _MANY = 64, 100_000, 1_000_000
_BF16 = (FusedStepBF16Kept.name, FusedStepBF16.name)  # keeping the exponentials is allowed; the better one counts
_FLOAT32 = (FusedStep.name, FusedStepKeptExact.name)  # nothing is stored below float32 in either
_BF16_FORWARD = (NativeBF16.name, FusedStepBF16.name)
_FLOAT32_FORWARD = (Native.name, FusedStep.name)


@dataclass(frozen=True)
class Measured:
    """A gate's number, how it is shown, and why it decides nothing here (empty: it decides)."""

    value: float
    shown: str
    undecided: str = ""


@dataclass(frozen=True)
class Gate:
    """name; the number required (at least, or at most); a further aim; how it is measured: None where results lack it."""

    name: str
    required: float
    measure: Callable[[Data], Measured | None]
    at_least: bool = True
    stretch: float | None = None
    unit: str = "x"
    needs_bf16: bool = False

    def wanted(self) -> str:
        """Such as ">= 13x (stretch 18x)"."""
        more = "" if self.stretch is None else f" (stretch {self.stretch:g}{self.unit})"
        return f"{'>=' if self.at_least else '<='} {self.required:g}{self.unit}{more}"

    def verdict(self, data: Data) -> tuple[str, str]:
        """What was measured; "yes", "NO", "undecided: why" or "not measured"."""
        found = self.measure(data)
        if found is None:
            return "-", "not measured"
        if found.undecided:
            return found.shown, f"undecided: {found.undecided}"
        if (found.value >= self.required) if self.at_least else (found.value <= self.required):
            return found.shown, "yes"
        emulated = self.needs_bf16 and data["environment"].get("bf16_instructions") != "yes"
        return found.shown, "NO" + (" (this CPU has no bf16 instructions)" if emulated else "")


def _case(data: Data, rows: int = _ROWS, classes: int = _CLASSES) -> Data | None:
    return next((c for c in data["cases"] if (c["regime"], c["N"], c["C"]) == ("R0", rows, classes)), None)


def _rows(data: Data, names: Sequence[str]) -> list[Data]:
    """The timed rows of these contenders in the case of the gates."""
    case, found = _case(data), []
    for name in names if case else ():
        try:
            found.append(row_of(case or {}, name))
        except LookupError:
            continue
    return found


def _shown(spread: dict[str, float], unit: str = "", factor: float = 1.0) -> str:
    low, middle, high = (f"{factor * spread[k]:.3g}" for k in ("p10", "median", "p90"))
    return f"{middle}{unit} ({low}-{high})"


def _best(found: Sequence[tuple[str, dict[str, float] | None]], unit: str = "x", factor: float = 1.0) -> Measured | None:
    """The largest median of these spreads, named."""
    there = [(name, s) for name, s in found if s is not None]
    if not there:
        return None
    name, best = max(there, key=lambda pair: pair[1]["median"])
    return Measured(factor * best["median"], f"{_shown(best, unit, factor)}, {name}")


def _against_eager(names: Sequence[str]) -> Callable[[Data], Measured | None]:
    return lambda data: _best([(r["name"], r["steps"][STEPS[-1]]["ratio"]) for r in _rows(data, names)])


def _against(names: Sequence[str], peer: str) -> Callable[[Data], Measured | None]:
    return lambda data: _best([(r["name"], r["against"].get(peer)) for r in _rows(data, names)])


def _against_compiled_bf16(data: Data) -> Measured | None:
    """Where the peer is emulated it is no strong peer: the ratio to the float32 one is shown beside, and nothing is decided."""
    timed = _against(_BF16, CompiledBF16.name)(data)
    if data["environment"].get("bf16_instructions") == "yes":
        return timed
    float32 = _against(_BF16, Compiled.name)(data)
    if float32 is None:
        return None
    rows = (_case(data) or {"rows": []})["rows"]
    reason = next((r.get("skipped", "timed") for r in rows if r["name"] == CompiledBF16.name), "not run")
    emulated = f"{timed.shown} against its emulation" if timed else f"bf16 operands: {reason}"
    return Measured(
        float32.value, f"{float32.shown} against torch.compile in float32; {emulated}", "no bf16 instructions on this CPU"
    )


def _forward_share(names: Sequence[str]) -> Callable[[Data], Measured | None]:
    def measure(data: Data) -> Measured | None:
        found = [(r["name"], r["steps"][STEPS[0]].get("share_of_peak")) for r in _rows(data, names)]
        return _best(found, " %", 100.0)

    return measure


def _extra_memory(classes: int) -> Callable[[Data], Measured | None]:
    def measure(data: Data) -> Measured | None:
        names = (FusedStep.name, FusedStepBF16.name)
        found = [p for p in data["memory"] if p["name"] in names and p["C"] == classes and p["phase"] == STEPS[-1]]
        if not found:
            return None
        most = max(found, key=lambda p: p["extra"])
        return Measured(most["extra"], f"{most['extra']:.1f} MB, {most['name']}")

    return measure


def _flatness(name: str) -> Callable[[Data], Measured | None]:
    def measure(data: Data) -> Measured | None:
        for s in data["per_class"]:
            span = (min(s["classes"]), max(s["classes"]))
            if s["name"] == name and s["step"] == STEPS[-1] and span == (_CLASSES, _MANY):
                percent = 100 * abs(s["flatness"]["median"] - 1)
                return Measured(percent, f"{percent:.1f} %: 1M takes {_shown(s['flatness'])} of the time per class at 100k")
        return None

    return measure


def _threads(load: str) -> Callable[[Data], Measured | None]:
    def measure(data: Data) -> Measured | None:
        for t in data["threads"]:
            if (t["name"], t["load"], t["C"]) == (FusedStep.name, load, _CLASSES):
                share = t["one_thread_cpu_over_wall"]
                shown = f"{_shown(t['ratio'], 'x')}, {t['name']}, one thread had {100 * share:.0f} % of a core"
                noisy = load == "quiet" and share < 0.95
                return Measured(t["ratio"]["median"], shown, "the machine was not quiet" if noisy else "")
        return None

    return measure


def _error(name: str, field: str, classes: int) -> Callable[[Data], Measured | None]:
    def measure(data: Data) -> Measured | None:
        found = [a[field] for a in data["accuracy"] if a["name"] == name and a["C"] <= classes and field in a]
        largest = [a for a in data["accuracy"] if a["name"] == name and a["C"] == classes]
        by_size = ", ".join(f"{a[field]:.1e} at C={a['C']}" for a in data["accuracy"] if a["name"] == name and field in a)
        return Measured(max(found), f"{max(found):.1e} ({by_size})") if largest else None

    return measure


GATES: tuple[Gate, ...] = (
    Gate("bf16 full step against eager + SGD(fused)", 13, _against_eager(_BF16), stretch=18, needs_bf16=True),
    Gate("bf16 full step against torch.compile, bf16 operands + SGD(fused)", 4, _against_compiled_bf16, stretch=5.5),
    Gate("bf16 full step against Partial FC r=0.1", 1.9, _against(_BF16, PartialFCSampled.name), needs_bf16=True),
    Gate("float32 exact full step against eager + SGD(fused)", 6.5, _against_eager(_FLOAT32), stretch=9),
    Gate("float32 forward with gradient, share of the micro-kernel's rate", 80, _forward_share(_FLOAT32_FORWARD),
         stretch=93, unit=" %"),
    Gate("bf16 forward with gradient, share of the micro-kernel's rate", 65, _forward_share(_BF16_FORWARD),
         stretch=85, unit=" %", needs_bf16=True),
    Gate("extra memory with HeadSGD, C=100k", 15, _extra_memory(_CLASSES), at_least=False, unit=" MB"),
    Gate("extra memory with HeadSGD, C=1M", 15, _extra_memory(_MANY), at_least=False, unit=" MB"),
    Gate("time per class 100k to 1M, float32", 15, _flatness(FusedStep.name), at_least=False, unit=" % apart"),
    Gate("time per class 100k to 1M, bf16", 15, _flatness(FusedStepBF16.name), at_least=False, unit=" % apart"),
    Gate("two threads against one, quiet machine, wall", 1.7, _threads("quiet")),
    Gate("two threads against one, busy machine, wall", 1.0, _threads("busy")),
    Gate("float32 loss, relative error, C=1M", 1e-6, _error(FusedStep.name, "loss", _MANY), at_least=False, unit=""),
    Gate("float32 dx, relative error, C=1M", 5e-5, _error(FusedStep.name, "d_embeddings", _MANY), at_least=False, unit=""),
    Gate("float32 dW, relative error, C=1M", 5e-5, _error(FusedStep.name, "d_weight", _MANY), at_least=False, unit=""),
    Gate("bf16 dx, relative error, up to C=1M", 1.5e-3, _error(FusedStepBF16.name, "d_embeddings", _MANY),
         at_least=False, unit=""),
    Gate("bf16 dW, relative error, up to C=1M", 4e-3, _error(FusedStepBF16.name, "d_weight", _MANY), at_least=False, unit=""),
    Gate("UIR excess, mean over the rows, absolute error, up to C=1M", 1e-8, _error("UIR excess", "absolute_of_mean", _MANY),
         at_least=False, unit=""),
    Gate("UIR excess, worst row, absolute error, up to C=1M", 1e-8, _error("UIR excess", "absolute", _MANY),
         at_least=False, unit=""),
)  # fmt: skip


def table(data: Data) -> list[list[str]]:
    """[name, required, measured, verdict] of every gate; [] where nothing of it was measured (toy sizes)."""
    lines = [[g.name, g.wanted(), *g.verdict(data)] for g in GATES]
    return lines if data["sizes"] == "full" else []
