"""Times and memory of a full step of the class head on this machine: what `recog-fast bench` measures.

A full step is forward, backward and SGD with momentum of the class weight. Everyone gets the same numbers; contenders take turns,
so that a busy moment hits all of them. The repository's benchmarks/ measure more: every peer, float64 gates, accuracy, operations.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import recog_fast as rf
from recog_fast.counting import Progress

MARGIN, SCALE = 0.5, 64.0
EAGER = "eager PyTorch, float32"
# name -> how its head computes
OURS: dict[str, dict[str, Any]] = {
    "recog_fast, float32": {},
    "recog_fast, bfloat16 operands": {"compute_dtype": torch.bfloat16},
}
# Loss of a contender against eager's, relative: what float32 sums and 16-bit operands may differ by.
_LIMIT = {EAGER: 0.0, "recog_fast, float32": 1e-4, "recog_fast, bfloat16 operands": 2e-2}


@dataclass
class Measured:
    """A contender at one size; seconds of wall time, megabytes (1e6 bytes) beyond W and momentum; skipped: why it did not run."""

    name: str
    rows: int
    classes: int
    dimension: int
    median: float = math.nan
    low: float = math.nan  # fastest round
    high: float = math.nan  # slowest round
    extra_mb: float = math.nan  # nan: this system does not say
    share_of_gemm: float = math.nan  # 8NCD per second, of torch.mm's rate in the same run
    loss: float = math.nan
    skipped: str = ""

    def as_json(self) -> dict[str, Any]:
        """Plain values, None for what was not measured."""
        return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in asdict(self).items()}


def bench(
    rows: int, classes: int, dimension: int, rounds: int, device: torch.device, progress: Progress | None = None
) -> list[Measured]:
    """Every contender at one size; progress(done, total) is called between steps. Raises RuntimeError where one's loss is not eager's."""
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(classes, dimension, generator=generator) * 0.01).to(device)
    x = torch.randn(rows, dimension, generator=generator).to(device)
    labels = torch.randint(classes, (rows,), generator=generator).to(device)
    made: dict[str, Callable[[], float]] = {}
    found = {name: Measured(name, rows, classes, dimension) for name in (EAGER, *OURS)}
    needed = 4 * (4 * rows * classes + 4 * classes * dimension)
    room = _room(device)
    if needed > 0.8 * room:
        found[EAGER].skipped = f"needs about {needed / 1e9:.1f} GB, {room / 1e9:.1f} GB are free"
    else:
        made[EAGER] = _eager(weight, x, labels)
    for name, options in OURS.items():
        made[name] = _ours(weight, x, labels, options)
    tell = _counter(progress, len(made) * (1 + rounds))
    for name, step in made.items():
        tell()
        found[name].loss = step()  # makes the momentum, and whatever is compiled or kept
        before = _mark(device)
        step()
        found[name].extra_mb = (_peak(device) - before) / 1e6 if before >= 0 else math.nan
        reference = found[EAGER].loss
        if not math.isnan(reference) and not abs(found[name].loss - reference) <= _LIMIT[name] * abs(reference):
            raise RuntimeError(f"bench: expected {name} to give eager's loss {reference:.6g}, got {found[name].loss:.6g}")
    times: dict[str, list[float]] = {name: [] for name in made}
    for turn in range(rounds):
        order = list(made.items())
        for name, step in order[turn % len(order) :] + order[: turn % len(order)]:
            tell()
            _wait(device)
            start = time.perf_counter()
            step()
            _wait(device)
            times[name].append(time.perf_counter() - start)
    rate = _gemm_rate(x, weight, rounds)
    for name, seconds in times.items():
        one = found[name]
        one.median, one.low, one.high = statistics.median(seconds), min(seconds), max(seconds)
        one.share_of_gemm = 8 * rows * classes * dimension / one.median / rate
    return list(found.values())


def _counter(progress: Progress | None, total: int) -> Callable[[], None]:
    """Tells how much is done when called before each step."""
    done = itertools.count()
    return lambda: None if progress is None else progress(next(done), total)


def _eager(start: Tensor, x: Tensor, labels: Tensor) -> Callable[[], float]:
    """ArcFace as it is usually written: the N x C cosines, a gather, cross-entropy, autograd, SGD."""
    weight = nn.Parameter(start.clone())
    optimizer = torch.optim.SGD([weight], lr=1e-3, momentum=0.9, weight_decay=5e-4, fused=True)
    inputs = x.clone().requires_grad_()

    def step() -> float:
        inputs.grad = None
        cosine = F.linear(F.normalize(inputs), F.normalize(weight))
        target = cosine.gather(1, labels[:, None])
        angle = torch.acos(target.clamp(-1 + 1e-7, 1 - 1e-7))
        moved = torch.where(angle + MARGIN < math.pi, torch.cos(angle + MARGIN), target - MARGIN * math.sin(MARGIN))
        loss = F.cross_entropy(SCALE * cosine.scatter(1, labels[:, None], moved), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)  # nothing is held between steps, so that the peak of one holds dW
        return float(loss.detach())

    return step


def _ours(start: Tensor, x: Tensor, labels: Tensor, options: dict[str, Any]) -> Callable[[], float]:
    head = rf.MarginHead(start.shape[0], start.shape[1], margin=rf.ArcFace(MARGIN), scale=SCALE, **options).to(start.device)
    with torch.no_grad():
        head.weight.copy_(start)
    optimizer = rf.HeadSGD(head, lr=1e-3, momentum=0.9, weight_decay=5e-4)
    inputs = x.clone().requires_grad_()

    def step() -> float:
        optimizer.zero_grad()
        inputs.grad = None
        loss: Tensor = head(inputs, labels)
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


def _gemm_rate(x: Tensor, weight: Tensor, rounds: int) -> float:
    """Flops per second of torch.mm of these rows with at most 32768 classes, the best round."""
    part = weight[: 1 << 15].t().contiguous()
    best = math.inf
    for _ in range(max(3, rounds)):
        _wait(x.device)
        start = time.perf_counter()
        torch.mm(x, part)
        _wait(x.device)
        best = min(best, time.perf_counter() - start)
    return 2 * x.shape[0] * part.numel() / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _status(field: str) -> float:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return 1024.0 * int(line.split()[1])
    except OSError:
        pass
    return -1.0


def _mark(device: torch.device) -> float:
    """Bytes in use now, with the high-water mark put back to them; -1 where this system has no such mark."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return float(torch.cuda.memory_allocated(device))
    with contextlib.suppress(OSError, AttributeError):  # glibc alone: freed memory it keeps would hide what a step allocates
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return -1.0
    return _status("VmRSS")


def _peak(device: torch.device) -> float:
    return float(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else _status("VmHWM")


def _room(device: torch.device) -> float:
    """Bytes that are free; infinite where this system does not say."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return math.inf
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), math.inf)
