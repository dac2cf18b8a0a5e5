"""The device a GPU suite runs on: its clock, memory, errors and profiler. `Cuda` is the real one; `Interpreter` runs the same chunk
loop on CPU tensors in Triton's interpreter, so that everything else of the suite can be tried without a GPU.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._C._autograd import DeviceType

import recog_fast as rf
from recog_fast import native

from . import machine


@dataclass(frozen=True)
class Profile:
    """One call under the profiler: kernels launched, seconds the device was busy, kernel -> (count, seconds)."""

    kernels: int
    busy: float
    by_name: dict[str, tuple[int, float]]

    @property
    def top(self) -> list[tuple[str, int, float]]:
        """(name, count, seconds) of the costliest."""
        return sorted(((n, *found) for n, found in self.by_name.items()), key=lambda line: -line[2])[:12]


class Device:
    """What the suite asks of a device; the bodies here are those of CPU tensors."""

    name = "interpreter"
    where = torch.device("cpu")
    multiprocessors = 1
    l2_bytes = 32 << 20
    total_bytes = 1 << 30

    def mark(self) -> Any:
        """A point in time on the device's own clock."""
        return time.perf_counter()

    def seconds(self, start: Any, end: Any) -> float:
        """Between two marks; after `synchronize`."""
        return float(end - start)

    def synchronize(self) -> None:
        """Waits for all work; an error of an earlier kernel is raised here."""

    def start_peak(self) -> int:
        """Forgets the highest number of allocated bytes; the number now."""
        return 0

    def peak(self) -> int:
        """The highest number of allocated bytes since."""
        return 0

    def clean(self) -> None:
        """Frees what nothing refers to, the allocator's blocks too."""
        gc.collect()

    def generator(self, seed: int) -> torch.Generator:
        """A generator of this device."""
        return torch.Generator(self.where).manual_seed(seed)

    def to(self, t: Tensor) -> Tensor:
        """A copy on the device."""
        return t.to(self.where, copy=True)

    def allocate_too_much(self) -> None:
        """Raises torch.OutOfMemoryError as an allocation beyond the device does."""
        raise torch.OutOfMemoryError("dry run: no memory of this size")

    def profile(self, call: Callable[[], object]) -> Profile:
        """One call under torch.profiler."""
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
            call()
        return _summary([(e.name, e.time_range.elapsed_us()) for e in seen.events() if e.cpu_parent is None])

    def describe(self) -> dict[str, str]:
        """What a reader of the tables needs to judge them."""
        return {"device": "Triton's interpreter on CPU tensors: a dry run, none of its times means anything"}

    def slug(self) -> str:
        """Folder name of its results."""
        return "gpu-dry-run"


class Cuda(Device):
    """The current CUDA device. Everything that only runs there is in this class, and in `gpu_checks` (streams, graphs)."""

    name = "cuda"

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise RuntimeError("gpu_suite: torch sees no CUDA device (--dry-run tries the suite without one)")
        self.where = torch.device("cuda", torch.cuda.current_device())
        properties = torch.cuda.get_device_properties(self.where)
        self.multiprocessors, self.l2_bytes = properties.multi_processor_count, properties.L2_cache_size
        self.total_bytes = properties.total_memory

    def mark(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: Any, end: Any) -> float:
        return float(start.elapsed_time(end)) / 1e3

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def start_peak(self) -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return int(torch.cuda.memory_allocated())

    def peak(self) -> int:
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated())

    def clean(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()

    def allocate_too_much(self) -> None:
        torch.empty(2 * self.total_bytes, dtype=torch.uint8, device=self.where)

    def profile(self, call: Callable[[], object]) -> Profile:
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=activities) as seen:
            call()
            torch.cuda.synchronize()
        # torch.optim.Optimizer marks its step, and such a mark has a span on the device that is no kernel
        there = [e for e in seen.events() if e.device_type == DeviceType.CUDA and not getattr(e, "is_user_annotation", False)]
        return _summary([(e.name, e.time_range.elapsed_us()) for e in there])

    def describe(self) -> dict[str, str]:
        properties = torch.cuda.get_device_properties(self.where)
        return {
            "device": f"{properties.name}, sm_{properties.major}{properties.minor}, {self.multiprocessors} multiprocessors, "
            f"{self.total_bytes / 1e9:.1f} GB, L2 {self.l2_bytes / 1e6:.0f} MB",
            "driver": _command("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()[0],
            "clocks": _command("nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,power.limit", "--format=csv,noheader").splitlines()[0],
            "cuda": str(torch.version.cuda),
        }

    def slug(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(self.where).lower()).strip("-")


def _summary(events: list[tuple[str, float]]) -> Profile:
    """events: (name, microseconds)."""
    by_name: dict[str, list[float]] = {}
    for name, microseconds in events:
        by_name.setdefault(name[:80], []).append(microseconds)
    return Profile(len(events), sum(m for _, m in events) / 1e6, {n: (len(v), sum(v) / 1e6) for n, v in by_name.items()})


def _command(*command: str) -> str:
    """What it prints; "unknown" where it cannot run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 and done.stdout.strip() else "unknown"


def describe(device: Device) -> dict[str, str]:
    """Device, versions, commit, and which code runs (`recog_fast.backends()`)."""
    running = rf.backends()
    compiled = native.load()
    return {
        **device.describe(),
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "recog_fast": rf.__version__,
        "commit": machine.commit(),
        "backend cuda": running["cuda"],
        "backend triton": running["triton"],
        "backend cpu": running["cpu"],
        "build": "the extension (csrc/) is there" if compiled[0] is not None else
        f"the extension (csrc/) is not there: {compiled[1]}. CUDA tensors do not need it; to have it: "
        "python -m pip install --no-build-isolation -e . (cmake, ninja, pybind11, a C++ compiler; nvcc for csrc/cuda where there is one)",
    }  # fmt: skip


def is_out_of_memory(error: BaseException) -> bool:
    """Of the allocator, or of cuBLAS for its workspace."""
    return isinstance(error, torch.OutOfMemoryError) or "CUBLAS_STATUS_ALLOC_FAILED" in str(error) or "out of memory" in str(error)


def is_fatal(error: BaseException) -> bool:
    """Whether the process's CUDA context is lost with it: every later call would fail alike."""
    text = str(error)
    words = ("illegal memory access", "device-side assert", "unspecified launch failure", "misaligned address", "illegal instruction", "CUDA error: an illegal")
    return not is_out_of_memory(error) and any(word in text for word in words)


def first_line(error: BaseException, length: int = 240) -> str:
    """Type and first line of an error, for a table."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:length]


@functools.cache
def open_device(dry_run: bool) -> Device:
    """The device, ready: kernels importable, and in a dry run the operations of CPU tensors taken over by those of CUDA."""
    machine.use_source_tree()
    if not dry_run:
        return Cuda()
    _keep.enter_context(_interpreted())
    return Device()


_keep = contextlib.ExitStack()


@contextlib.contextmanager
def _interpreted() -> Iterator[None]:
    """torch.ops.recog_fast.* on CPU tensors run the chunk loop in Triton's interpreter, as tests/interpreted.py has it."""
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("gpu_suite: a dry run needs a process of its own: triton was imported before TRITON_INTERPRET=1")
    sys.path.insert(0, str(machine.ROOT / "tests"))
    import triton_interpreter  # sets TRITON_INTERPRET and mends the interpreter

    from recog_fast.ops import _cuda, _library

    assert triton_interpreter._patched is not None

    def runs(operation: str, *operands: Tensor | None, kept: Tensor | None = None) -> bool:
        return _library.backend() == "auto" and kept is None and all(t is None or t.dtype != torch.float64 for t in operands)

    before, library = _cuda._runs, torch.library.Library("recog_fast", "IMPL")
    _cuda._runs = runs
    for stem, kernel in _cuda.KERNELS.items():
        library.impl(stem, kernel, "CPU", allow_override=True)
    try:
        yield
    finally:
        _cuda._runs = before
        library._destroy()
