"""One operation alone: ours, its reference, and plain PyTorch as a reader of math.md writes it, by the protocol of the full step.

The gate comes first: every contender must match the reference run in float64, and two runs of ours bit by bit.
"""

from __future__ import annotations

import functools
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

import recog_fast as rf
from recog_fast import native, reference

from .contenders import BF16_LIMIT, FLOAT32_LIMIT
from .problems import SCALE, Problem, make_problem
from .protocol import kernel_rate, one_thread, paired_ratio, spread
from .truth import relative

Arguments = tuple[Any, ...]
Run = Callable[..., Any]
OURS, HALF, PLAIN, REFERENCE = "ours, float32", "ours, 16-bit operands", "plain PyTorch", "reference"
ARITHMETIC = {OURS: "float32", HALF: "bfloat16"}  # of the micro-kernel
SLOTS = 2048  # of a memory
LIMITS = {HALF: BF16_LIMIT}  # relative to float64; FLOAT32_LIMIT for the others
SIZES = {"toy": ((32, 4000),), "full": ((64, 10_000), (64, 100_000), (256, 100_000))}


@dataclass(frozen=True)
class Operation:
    """stem; arguments of `torch.ops.recog_fast.<stem>` for a problem; plain: the same by plain PyTorch, same arguments.

    written: indices of the arguments it writes; products: how many 2NCD matrix products it makes; streams: how many
    times C x D float32 move.
    """

    stem: str
    arguments: Callable[[Problem], Arguments]
    plain: Run | None
    written: tuple[int, ...] = ()
    products: int = 2
    streams: int = 1


@dataclass
class _Contender:
    name: str
    run: Run
    backend: str
    arguments: Arguments
    start: Arguments
    seconds: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)

    def once(self, written: Sequence[int]) -> list[Tensor]:
        """One timed run from the starting values of what it writes; its outputs."""
        for k in written:
            self.arguments[k].copy_(self.start[k])
        rate = kernel_rate(ARITHMETIC.get(self.name, ""))
        with rf.ops.use_backend(self.backend):
            cpu, wall = time.process_time(), time.perf_counter()
            returned = self.run(*self.arguments)
            self.seconds.append(time.process_time() - cpu)
            self.wall.append(time.perf_counter() - wall)
        if rate is not None:
            self.rates.append(rate)
        return _outputs(returned, self.arguments, written)


def _outputs(returned: Any, arguments: Arguments, written: Sequence[int]) -> list[Tensor]:
    """What an operation returns, or the arguments it wrote."""
    if written:
        return [arguments[k] for k in written]
    return list(returned) if isinstance(returned, tuple) else [returned]


def row_sums(problem: Problem, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Unit embeddings (N, D), and in float64 lse (N,), nearest cosine (N,), nearest class (N,) over all but `labels`."""
    unit, _ = reference.unit_rows(problem.embeddings)
    lse, cosine, index, _ = reference.negative_logsumexp(unit.double(), problem.weight.double(), labels, SCALE)
    return unit, lse, cosine, index


def gradient_terms(rows: int, lse: Tensor) -> Tensor:
    """`terms` (5, N) of a mean over rows whose loss has slope 1."""
    terms = torch.zeros(reference.TERM_ROWS, rows)
    terms[0], terms[1], terms[2] = lse, SCALE / rows, -SCALE / rows
    return terms


def memory(classes: int, dimension: int) -> tuple[Tensor, Tensor, Tensor]:
    """Unit rows (S, D), strengths (S,) and slots (C,) of a memory that holds S random classes."""
    generator = torch.Generator().manual_seed(3)
    slot = torch.full((classes,), -1, dtype=torch.int32)
    slot[torch.randperm(classes, generator=generator)[:SLOTS]] = torch.arange(min(SLOTS, classes), dtype=torch.int32)
    rows, _ = reference.unit_rows(torch.randn(SLOTS, dimension, generator=generator))
    return rows, torch.full((SLOTS,), 0.176), slot


def plain_class_gradient(unit: Tensor, targets: Tensor, terms: Tensor, weight: Tensor, scale: float, *_: Any) -> Tensor:
    """G = dloss/dc stored, dP = G^T x^, through W/|W|."""
    norm = weight.norm(dim=1, keepdim=True)
    prototypes = weight / norm
    d_cosine = terms[1].unsqueeze(1) * torch.exp(scale * (unit @ prototypes.t()) - terms[0].unsqueeze(1))
    d_cosine[torch.arange(targets.numel()), targets] = terms[2]
    d_unit = d_cosine.t() @ unit
    d_weight: Tensor = (d_unit - (d_unit * prototypes).sum(1, keepdim=True) * prototypes) / norm
    return d_weight


def _copies(arguments: Arguments, dtype: torch.dtype) -> Arguments:
    """Clones, floating ones in `dtype`."""
    return tuple((a.to(dtype) if a.is_floating_point() else a).clone() if isinstance(a, Tensor) else a for a in arguments)


def _contenders(operation: Operation, arguments: Arguments) -> list[_Contender]:
    run = getattr(torch.ops.recog_fast, operation.stem)
    wanted: list[tuple[str, Run, str]] = []
    if operation.plain is not None:
        wanted.append((PLAIN, operation.plain, "auto"))
    compiled = torch._C._dispatch_has_kernel_for_dispatch_key(f"recog_fast::{operation.stem}", "CPU")
    if compiled and native.load()[0] is not None:
        wanted.append((OURS, run, "auto"))
        if "bool half" in rf.ops.SCHEMAS[operation.stem]:
            wanted.append((HALF, functools.partial(run, half=True), "auto"))
    wanted.append((REFERENCE, run, "reference"))
    return [_Contender(name, run, backend, _copies(arguments, torch.float32), arguments) for name, run, backend in wanted]


def measure(operation: Operation, rows: int, classes: int, dimension: int = 512, rounds: int = 5) -> dict[str, Any]:
    """Gates, then times of all contenders interleaved; AssertionError where one misses the truth."""
    with one_thread(), torch.no_grad():
        arguments = operation.arguments(make_problem("R0", rows, classes, dimension))
        contenders = _contenders(operation, arguments)
        truth = _truth(operation, arguments)
        gates = [_gate(operation, c, truth) for c in contenders]
        shuffler, order = random.Random(4), list(contenders)
        for _ in range(rounds):
            shuffler.shuffle(order)
            for contender in order:
                contender.once(operation.written)
    flops = 2 * operation.products * rows * classes * dimension
    moved = 4 * operation.streams * classes * dimension
    base = contenders[0].seconds
    return {
        "stem": operation.stem, "N": rows, "C": classes, "D": dimension, "rounds": rounds,
        "rows": [{**g, **_figures(c, base, flops, moved)} for c, g in zip(contenders, gates, strict=True)],
    }  # fmt: skip


def _truth(operation: Operation, arguments: Arguments) -> list[Tensor]:
    """The outputs of the reference in float64."""
    exact = _copies(arguments, torch.float64)
    with rf.ops.use_backend("reference"):
        returned = getattr(torch.ops.recog_fast, operation.stem)(*exact)
    return [t.double() for t in _outputs(returned, exact, operation.written)]


def _gate(operation: Operation, contender: _Contender, truth: Sequence[Tensor]) -> dict[str, Any]:
    """Largest relative error of the outputs, and two runs compared; their times are dropped."""
    got = [t.clone() for t in contender.once(operation.written)]
    error = max(relative(value, exact) for value, exact in zip(got, truth, strict=True))
    limit = LIMITS.get(contender.name, FLOAT32_LIMIT)
    assert error < limit, f"{operation.stem}, {contender.name}: error {error:.1e} against float64, limit {limit:.0e}"
    same = all(map(torch.equal, got, contender.once(operation.written)))
    assert same or contender.name not in ARITHMETIC, f"{operation.stem}: two runs of ours differ"
    contender.seconds, contender.wall, contender.rates = [], [], []
    return {"name": contender.name, "error": error, "same_bits": same}


def _figures(contender: _Contender, base: Sequence[float], flops: int, moved: int) -> dict[str, Any]:
    cpu = spread(contender.seconds)
    figures: dict[str, Any] = {
        "cpu_s": asdict(cpu),
        "wall_s": asdict(spread(contender.wall)),
        "ratio": asdict(paired_ratio(base, contender.seconds)),
        "gflops": flops / cpu.median / 1e9,
        "gbs": moved / cpu.median / 1e9,
    }
    if contender.rates and flops:
        shares = [flops / (s * r) for s, r in zip(contender.seconds, contender.rates, strict=True)]
        figures["share_of_peak"] = asdict(spread(shares))
    return figures
