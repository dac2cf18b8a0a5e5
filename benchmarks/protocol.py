"""How times are taken: one thread, CPU time, random order in every round, ratios paired within a round."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from recog_fast import native

from .contenders import Arena, Contender
from .problems import Problem
from .truth import Gate, Truth, compute_truth, relative

STEPS = ("forward", "forward+backward", "full step")
# W after the step must be where its optimizer puts it to the rounding of float32, a few units of its largest element
_STEP_LIMIT = 1e-6
_RATE_SECONDS = 0.03  # of the in-cache micro-kernel before each run of a contender that uses it


@dataclass
class Times:
    """CPU and wall seconds from the start of a step to the end of each of STEPS; one entry per round."""

    cpu: dict[str, list[float]] = field(default_factory=lambda: {s: [] for s in STEPS})
    wall: dict[str, list[float]] = field(default_factory=lambda: {s: [] for s in STEPS})
    losses: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)  # micro-kernel just before each round, operations per second


@dataclass(frozen=True)
class Spread:
    """Median and the 10th and 90th percentile."""

    median: float
    p10: float
    p90: float


def spread(values: Sequence[float]) -> Spread:
    """Spread of the rounds."""
    low, middle, high = np.quantile(np.asarray(values, dtype=np.float64), [0.1, 0.5, 0.9])
    return Spread(float(middle), float(low), float(high))


def paired_ratio(base: Sequence[float], other: Sequence[float]) -> Spread:
    """How many times faster `other` is: base_r / other_r, round by round."""
    return spread([b / o for b, o in zip(base, other, strict=True)])


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """torch on one thread inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def kernel_rate(arithmetic: str, seconds: float = _RATE_SECONDS) -> float | None:
    """Operations per second of the active ISA's micro-kernel on in-cache data, now; None where nothing measures it."""
    module, _ = native.load()
    measure = getattr(module, "micro_kernel_rate", None)
    return float(measure(arithmetic, seconds)) if measure is not None and arithmetic else None


def run_once(contender: Contender, into: Times | None = None) -> Tensor:
    """One full step from restored inputs; the loss, detached."""
    contender.restore()
    rate = kernel_rate(contender.arithmetic) if into is not None else None
    marks = [(time.process_time(), time.perf_counter())]
    loss = contender.forward()
    marks.append((time.process_time(), time.perf_counter()))
    torch.autograd.backward(loss)
    marks.append((time.process_time(), time.perf_counter()))
    contender.update()
    marks.append((time.process_time(), time.perf_counter()))
    if into is not None:
        for step, (cpu, wall) in zip(STEPS, marks[1:], strict=True):
            into.cpu[step].append(cpu - marks[0][0])
            into.wall[step].append(wall - marks[0][1])
        into.losses.append(float(loss.detach()))
        if rate is not None:
            into.rates.append(rate)
    return loss.detach()


class TooSlow(Exception):
    """A contender whose full step takes longer than the case allows; `seconds` of CPU time."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"slow: one full step took {seconds:.1f} s of CPU time; not repeated")
        self.seconds = seconds


def _quick(contender: Contender, slow: float, times: Times) -> Tensor:
    """One run, kept in `times`; TooSlow where it took more than `slow` CPU seconds (compilation apart)."""
    loss = run_once(contender, times)
    seconds = times.cpu[STEPS[-1]][-1]
    if seconds > slow and not (contender.compiles and len(times.losses) == 1):
        raise TooSlow(seconds)
    return loss


Errors = tuple[float, float, float, float, float]  # loss, dx, dW, dW of negatives, step; in the order of Gate


def errors(contender: Contender, truth: Truth, loss: Tensor, weight: Tensor, velocity: Tensor) -> Errors:
    """Of a full step just made: loss, dx, dW on the sample, dW on its negatives, the step; relative to float64.

    weight, velocity (S, D) float64: the rows `truth.sample` of W and of the velocity before the step.
    """
    embeddings = contender.arena.embeddings
    assert embeddings.grad is not None
    d_weight = contender.gradient(truth.sample, weight, velocity)
    moved = contender.result()[0][truth.sample].double() - contender.stepped(d_weight, weight, velocity)
    step = float(moved.abs().max()) / float(weight.abs().max())
    at = truth.targets
    return (
        abs(float(loss) - truth.loss) / max(abs(truth.loss), 1e-3),
        relative(embeddings.grad, truth.d_embeddings),
        relative(d_weight, truth.d_weight),
        relative(d_weight[at:], truth.d_weight[at:]),
        step if not step <= _STEP_LIMIT else 0.0,
    )


def check(contender: Contender, truths: dict[str, Truth], slow: float, times: Times) -> Gate:
    """Two runs (the first compiles), kept in `times`; TooSlow where they are. Errors of the first against float64 on a
    sample of classes, and the bits of the second against the first."""
    arena, problem = contender.arena, contender.arena.problem
    loss = _quick(contender, slow, times)
    truth = _truth_of(contender, problem, truths)
    weight, velocity = problem.weight[truth.sample].double(), problem.velocity[truth.sample].double()
    found = errors(contender, truth, loss, weight, velocity)
    assert arena.embeddings.grad is not None
    kept = [loss, arena.embeddings.grad.clone(), *(t.clone() for t in contender.result())]
    again = _quick(contender, slow, times)
    assert arena.embeddings.grad is not None
    same = all(map(torch.equal, kept, [again, arena.embeddings.grad, *contender.result()]))
    return Gate(*found, same, contender.limit, contender.same_bits)


def margin_key(margin: float) -> str:
    """The key of the truth over all classes with this margin."""
    return f"margin {margin}"


def _truth_of(contender: Contender, problem: Problem, truths: dict[str, Truth]) -> Truth:
    key = margin_key(contender.margin) if contender.classes is None else contender.name
    if key not in truths:
        truths[key] = compute_truth(problem, contender.margin, contender.classes)
    return truths[key]


class Yardsticks:
    """A plain GEMM and a plain copy in the same run: shares of them travel between machines."""

    def __init__(self, arena: Arena) -> None:
        rows, classes, dimension = arena.problem.shape
        self._x = torch.randn(rows, dimension)
        self._w = arena.weight.detach()
        self._logits = torch.empty(rows, classes)
        self._flops, self._bytes = 2.0 * rows * classes * dimension, 8.0 * classes * dimension
        self.gemm: list[float] = []  # GFLOP/s of torch.mm (N, D) x (D, C)
        self.copy: list[float] = []  # GB/s, read and written, of a (C, D) copy
        self._mm()

    def _mm(self) -> None:
        torch.mm(self._x, self._w.t(), out=self._logits)

    def run(self, arena: Arena) -> None:
        """One more sample of each."""
        start = time.process_time()
        self._mm()
        self.gemm.append(self._flops / (time.process_time() - start) / 1e9)
        start = time.process_time()
        self._w.copy_(arena.velocity)
        self.copy.append(self._bytes / (time.process_time() - start) / 1e9)


def interleave(
    contenders: Sequence[Contender], arena: Arena, rounds: int, seed: int = 0
) -> tuple[list[Times], Yardsticks]:
    """`rounds` rounds, each with all contenders in a new random order, then the yardsticks."""
    order, shuffler = list(range(len(contenders))), random.Random(seed)
    times, yardsticks = [Times() for _ in contenders], Yardsticks(arena)
    for _ in range(rounds):
        shuffler.shuffle(order)
        for index in order:
            run_once(contenders[index], times[index])
        yardsticks.run(arena)
    arena.reset()
    return times, yardsticks


@dataclass(frozen=True)
class Scaling:
    """Nanoseconds of CPU time per class of one contender at several C, interleaved."""

    name: str
    step: str
    classes: list[int]
    nanoseconds: list[Spread]
    flatness: Spread  # largest C over the smallest: per-class time, paired


def per_class(kind: type[Contender], problems: Sequence[Problem], rounds: int, restore: bool) -> list[Scaling]:
    """Time per class as C grows; the problems, by C, share N and D."""
    running = [kind(Arena(p, restore)) for p in problems]
    times = [Times() for _ in running]
    for contender in running:
        run_once(contender)
    shuffler, order = random.Random(1), list(range(len(running)))
    for _ in range(rounds):
        shuffler.shuffle(order)
        for index in order:
            run_once(running[index], times[index])
    sizes = [p.shape[1] for p in problems]
    result = []
    for step in STEPS[1:]:
        cost = [[1e9 * s / c for s in t.cpu[step]] for t, c in zip(times, sizes, strict=True)]
        result.append(Scaling(kind.name, step, sizes, [spread(c) for c in cost], paired_ratio(cost[-1], cost[0])))
    return result
