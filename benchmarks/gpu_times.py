"""Stage 2: the full step of every contender, gated, then timed with device events, interleaved; memory above the inputs."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from .contenders import Contender, Unsuitable
from .cost_model import PHASES
from .gpu_contenders import COMPILED, EVERY, MAIN, GpuDense, GpuStepBF16
from .gpu_device import Device, first_line, is_fatal, is_out_of_memory
from .gpu_model import cost_of, roofline_seconds
from .gpu_problems import DeviceArena, DeviceProblem, device_truth, make_device_problem
from .protocol import STEPS, errors, margin_key, paired_ratio, spread
from .truth import Gate, Truth

SLOW = 1.5  # seconds of a step after which a contender gets one round: the other rounds' time is worth more elsewhere
_YARDSTICK = 8192  # rows, columns and depth of the yardstick GEMM in bf16; half of it in float32
_COPY = 1 << 28  # elements of the yardstick copy


@dataclass(frozen=True)
class Case:
    """One size: who runs, how many rounds, and how many seconds it is expected to take."""

    rows: int
    classes: int
    kinds: tuple[type[Contender], ...]
    rounds: int = 5
    seconds: float = 25.0
    dimension: int = 512
    regime: str = "R0"
    label: str = ""

    @property
    def name(self) -> str:
        """Such as times-1024x1000000."""
        return f"times-{self.rows}x{self.classes}" + (f"-{self.label}" if self.label else "")


_FIRST = Case(1024, 1_000_000, MAIN, rounds=7, seconds=45)
_LARGE = tuple(kind for kind in MAIN if kind is not GpuDense)  # float32 without tensor cores takes seconds a step there: once is enough
# by value: what the targets are stated for, then the rest of the table, then the contenders that take long to compile
CASES = (
    _FIRST, Case(1024, 10_000_000, _LARGE, seconds=45), Case(512, 10_000_000, _LARGE, seconds=40),
    Case(1024, 100_000, MAIN, seconds=15),
)  # fmt: skip
LATER = (
    Case(128, 1_000_000, MAIN, seconds=20), Case(4096, 1_000_000, MAIN, seconds=45), Case(1024, 360_232, MAIN),
    Case(4096, 10_000_000, _LARGE, seconds=60), Case(512, 1_000_000, MAIN), Case(128, 100_000, MAIN, seconds=12),
    Case(1024, 2_059_906, MAIN, seconds=40), Case(128, 10_000_000, _LARGE, seconds=35), Case(4096, 100_000, MAIN, seconds=15),
    Case(512, 100_000, MAIN, seconds=12), Case(128, 360_232, MAIN, seconds=15), Case(512, 360_232, MAIN, seconds=18),
    Case(4096, 360_232, MAIN, seconds=25), Case(128, 2_059_906, MAIN), Case(512, 2_059_906, MAIN, seconds=30),
    Case(4096, 2_059_906, MAIN, seconds=50),
)  # fmt: skip
LAST = (Case(1024, 1_000_000, (GpuStepBF16, *(k for k in EVERY if k not in MAIN)), seconds=90, label="compiled"),)
SMALL = (Case(128, 20_000, MAIN, seconds=15), Case(1024, 100_000, MAIN, seconds=20))
DRY = (Case(6, 90, tuple(k for k in EVERY if k not in COMPILED), rounds=2, dimension=32),)


@dataclass
class DeviceTimes:
    """Seconds of the rounds: on the device to the end of each of STEPS, until the host had issued all, until all was done."""

    device: dict[str, list[float]] = field(default_factory=lambda: {s: [] for s in STEPS})
    issued: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    failure: str = ""  # in a round; the rounds before it count


def run_once(device: Device, contender: Contender, into: DeviceTimes | None = None) -> Tensor:
    """One full step from restored inputs, finished; the loss, detached."""
    contender.restore()
    device.synchronize()
    began = time.perf_counter()
    marks = [device.mark()]
    loss = contender.forward()
    marks.append(device.mark())
    if loss.requires_grad:
        torch.autograd.backward(loss)
    marks.append(device.mark())
    contender.update()
    marks.append(device.mark())
    issued = time.perf_counter() - began
    device.synchronize()
    if into is not None:
        into.wall.append(time.perf_counter() - began)
        into.issued.append(issued)
        for step, mark in zip(STEPS, marks[1:], strict=True):
            into.device[step].append(device.seconds(marks[0], mark))
        into.losses.append(loss.detach().clone())  # a graph writes its loss to the same place every time
    return loss.detach()


class GpuYardsticks:
    """A plain GEMM in bf16 and in float32, and a plain copy, in the same run: shares of them travel between machines."""

    def __init__(self, device: Device) -> None:
        small = device.name == "interpreter"
        self._device, size, copied = device, 64 if small else _YARDSTICK, 1 << 12 if small else _COPY
        self._half = [torch.randn(size, size, device=device.where).bfloat16() for _ in range(2)]
        self._single = [t[: size // 2, : size // 2].float().contiguous() for t in self._half]
        self._from = torch.randn(copied, device=device.where)
        self._to = torch.empty_like(self._from)
        self.rates: dict[str, list[float]] = {"bf16": [], "float32": [], "copy": []}
        self.run()
        self.rates = {name: [] for name in self.rates}

    def run(self) -> None:
        """One more sample of each: operations or bytes per second."""
        self._time("bf16", 2.0 * self._half[0].shape[0] ** 3, lambda: torch.mm(*self._half))
        self._time("float32", 2.0 * self._single[0].shape[0] ** 3, lambda: torch.mm(*self._single))
        self._time("copy", 8.0 * self._from.numel(), lambda: self._to.copy_(self._from))

    def _time(self, name: str, work: float, call: Callable[[], object]) -> None:
        start = self._device.mark()
        call()
        end = self._device.mark()
        self._device.synchronize()
        self.rates[name].append(work / max(self._device.seconds(start, end), 1e-9))

    def rate(self, name: str) -> float:
        """Median of the samples."""
        return spread(self.rates[name]).median

    def summary(self) -> dict[str, float]:
        """TFLOP/s and TB/s."""
        return {"bf16_tflops": self.rate("bf16") / 1e12, "float32_tflops": self.rate("float32") / 1e12, "copy_tbs": self.rate("copy") / 1e12}


def checksums(t: Tensor) -> Tensor:
    """Exact sums of the bits of (C, D) along both dimensions, int64: equal bits have equal sums, and no copy of t is made."""
    rows, columns = [], torch.zeros(t.shape[-1], dtype=torch.int64, device=t.device)
    for part in t.detach().view(torch.int32).split(1 << 17):
        wide = part.long()
        rows.append(wide.sum(1))
        columns += wide.sum(0)
    return torch.cat([columns, *rows])


@dataclass(frozen=True)
class Peak:
    """Bytes above the inputs at the highest point of forward and backward, and of the whole step; of them the gradient of W."""

    backward: int
    step: int
    gradient: int


def peak_of(device: Device, contender: Contender) -> tuple[Tensor, Peak]:
    """One full step, unhurried; its loss."""
    contender.restore()
    before = device.start_peak()
    loss = contender.forward()
    if loss.requires_grad:
        torch.autograd.backward(loss)
    backward = device.peak()
    held = contender.arena.weight.grad
    contender.update()
    step = device.peak()
    return loss.detach(), Peak(backward - before, step - before, 0 if held is None else held.numel() * held.element_size())


def gate_step(device: Device, contender: Contender, problem: DeviceProblem, truths: dict[str, Truth], times: DeviceTimes) -> tuple[Gate, Peak]:
    """Three full steps from the same inputs: the first compiles, the second is held against float64, the third against the second."""
    arena = contender.arena
    run_once(device, contender, times)
    key = margin_key(contender.margin) if contender.classes is None else contender.name
    arena.reset()
    if key not in truths:
        truths[key] = device_truth(problem, contender.margin, contender.classes)
    truth = truths[key]
    weight, velocity = (t[truth.sample].double() for t in (problem.weight, problem.velocity))
    loss = run_once(device, contender, times)
    found = errors(contender, truth, loss, weight, velocity)
    assert arena.embeddings.grad is not None
    kept = [loss.clone(), arena.embeddings.grad.clone(), *map(checksums, contender.result())]
    again, peak = peak_of(device, contender)
    same = all(map(torch.equal, kept, [again, arena.embeddings.grad, *map(checksums, contender.result())]))
    return Gate(*found, same, contender.limit, contender.same_bits), peak


def admit(device: Device, kind: type[Contender], arena: DeviceArena, problem: DeviceProblem, truths: dict[str, Truth], ready: list[Contender]) -> dict[str, Any]:
    """A contender's row with its gate; appends to `ready` what may be timed. A fatal error of the device is raised on."""
    row: dict[str, Any] = {"name": kind.name, "note": kind.note}
    times = DeviceTimes()
    failure = None
    try:
        contender = kind(arena)
        gate, peak = gate_step(device, contender, problem, truths, times)
    except Unsuitable as error:
        failure = str(error)
    except Exception as error:  # what cannot run here is a line of the table
        if is_fatal(error):
            raise
        failure = "oom" if is_out_of_memory(error) else first_line(error)
    if failure is not None:  # outside the handler: the traceback held the tensors
        contender = None  # type: ignore[assignment]
        arena.reset()
        device.clean()
        return {**row, "skipped": failure}
    row["gate"] = {**asdict(gate), "passes": gate.passes}
    row["first_call_s"] = times.wall[0] - times.wall[1]
    row["slow"] = times.device[STEPS[2]][1] > SLOW
    if not getattr(kind, "whole", False):
        row["memory"] = _memory(peak, problem.weight.numel())
    if gate.passes:
        ready.append(contender)
    else:
        row["skipped"] = f"gate failed: error {gate.error:.1e} (limit {gate.limit:.0e}), equal bits: {gate.same_bits}"
    return row


def _memory(peak: Peak, elements: int) -> dict[str, float]:
    """In GB and in bytes per element of W: above W, momentum and dW; and the whole step's peak with them (8 bytes an element)."""
    above = {"backward": peak.backward - peak.gradient, "step": peak.step - peak.gradient}
    result = {f"{name}_gb": value / 1e9 for name, value in above.items()}
    result.update({f"{name}_per_cd": value / elements for name, value in above.items()})
    return {**result, "gradient_gb": peak.gradient / 1e9, "total_gb": (8 * elements + peak.step) / 1e9}


def run_case(device: Device, case: Case, deadline: float) -> dict[str, Any]:
    """Gates, then interleaved rounds, of one size; what no longer fits before `deadline` (perf_counter) is named."""
    result: dict[str, Any] = {"regime": case.regime, "N": case.rows, "C": case.classes, "D": case.dimension, "label": case.label, "rows": []}
    torch.compiler.reset()
    try:
        problem = make_device_problem(case.regime, case.rows, case.classes, case.dimension, device.where)
        truths = {margin_key(Contender.margin): device_truth(problem, Contender.margin)}
        arena, yardsticks = DeviceArena(problem), GpuYardsticks(device)
    except torch.OutOfMemoryError:
        return {**result, "skipped": "the inputs alone (W, momentum, a chunk of the truth) do not fit into memory"}
    loss = truths[margin_key(Contender.margin)].loss
    result["loss"] = {"float64": loss, "expected": problem.expected_loss, "within": abs(loss - problem.expected_loss) <= problem.tolerance}
    ready: list[Contender] = []
    rows = result["rows"]
    try:
        for kind in case.kinds:
            if time.perf_counter() > deadline:
                rows.append({"name": kind.name, "note": kind.note, "skipped": "not run: no time left"})
            else:
                rows.append(admit(device, kind, arena, problem, truths, ready))
        slow = {row["name"] for row in rows if row.get("slow")}
        times = interleave(device, ready, yardsticks, case.rounds, slow, deadline)
    except Exception as error:
        if not is_fatal(error):
            raise
        return {**result, "fatal": first_line(error)}
    result["yardsticks"] = yardsticks.summary()
    for row in rows:
        taken = times.get(row["name"], DeviceTimes())
        if taken.failure:
            row["skipped"] = f"in round {len(taken.wall) + 1}: {taken.failure}"
        if taken.wall:
            row.update(_measured(problem, row["name"], times, yardsticks, case.kinds))
    return result


def interleave(
    device: Device, contenders: Sequence[Contender], yardsticks: GpuYardsticks, rounds: int, slow: set[str], deadline: float
) -> dict[str, DeviceTimes]:
    """`rounds` rounds in a new random order each; slow contenders take part in the first alone; the last ends after `deadline`."""
    shuffler, times = random.Random(0), {c.name: DeviceTimes() for c in contenders}
    for number in range(rounds):
        if number and time.perf_counter() > deadline:
            break
        order = [c for c in contenders if number == 0 or c.name not in slow]
        shuffler.shuffle(order)
        for contender in order:
            try:
                run_once(device, contender, times[contender.name])
            except Exception as error:  # it passed its gate alone; memory in pieces, most likely
                if is_fatal(error):
                    raise
                times[contender.name].failure = "oom" if is_out_of_memory(error) else first_line(error)
                slow.add(contender.name)
            if contender.name in slow:
                contender.arena.reset()
                device.clean()
        yardsticks.run()
    return times


def _measured(
    problem: DeviceProblem, name: str, times: dict[str, DeviceTimes], yardsticks: GpuYardsticks, kinds: Sequence[type[Contender]]
) -> dict[str, Any]:
    kind, taken = next(k for k in kinds if k.name == name), times[name]
    cost = cost_of(kind.cost, *problem.shape)
    arithmetic = "bf16" if "bf16" in name else "float32"
    steps: dict[str, Any] = {}
    for step, phase in zip(STEPS, PHASES, strict=True):
        seconds = spread(taken.device[step])
        steps[step] = {"s": asdict(seconds)}
        if cost is not None and (kind.dense or step != STEPS[1]):
            limit = roofline_seconds(cost, phase, yardsticks.rate(arithmetic), yardsticks.rate("copy"))
            steps[step]["roofline"] = limit / seconds.median
            steps[step]["of_gemm"] = cost.flops(phase, matrix_only=True) / seconds.median / yardsticks.rate(arithmetic)
            steps[step]["of_copy"] = cost.bytes(phase) / seconds.median / yardsticks.rate("copy")
    if getattr(kind, "whole", False):
        steps = {STEPS[2]: steps[STEPS[2]]}
    full = {n: t.device[STEPS[2]] for n, t in times.items() if t.wall}
    against = {n: asdict(paired_ratio(f[: len(full[name])], full[name][: len(f)])) for n, f in full.items() if n != name}
    same_loss = len({float(v) for v in taken.losses}) == 1
    return {
        "steps": steps, "rounds": len(taken.wall), "against": against, "same_loss_every_round": same_loss,
        "wall_s": spread(taken.wall).median, "issued_s": spread(taken.issued).median,
    }  # fmt: skip
