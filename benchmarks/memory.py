"""Peak resident memory of one head step, measured in a process of its own: `python -m benchmarks.memory NAME N C D`.

Extra = growth of the resident set above W, momentum and inputs (all touched before), less dW where a dense gradient exists.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import resource
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from .machine import ROOT, repository_environment


@dataclass(frozen=True)
class Peak:
    """Megabytes (1e6 bytes) of growth, of dW within it, and what is left; `method` names the counter read."""

    name: str
    phase: str
    rows: int
    classes: int
    dimension: int
    growth: float
    gradient: float
    method: str

    @property
    def extra(self) -> float:
        """Beyond W, momentum and dW."""
        return self.growth - self.gradient


def _status(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def _start() -> tuple[int, str]:
    """Resets the high-water mark where the kernel lets us; the resident set (or the mark so far) in bytes."""
    with contextlib.suppress(OSError, AttributeError):  # glibc alone: freed memory it keeps would hide what we allocate
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS"), "VmHWM"
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "ru_maxrss"


def _peak(method: str) -> int:
    return _status("VmHWM") if method == "VmHWM" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure_here(name: str, rows: int, classes: int, dimension: int) -> list[Peak]:
    """Peaks of forward+backward and of the full step of the contender `name`, in this process."""
    import torch

    from .contenders import Arena
    from .problems import make_problem
    from .protocol import run_once
    from .suite import kind_named

    torch.set_num_threads(1)
    kind = kind_named(name)
    # loads code and starts libraries; so small that no buffer of the real size is left behind by it
    small = kind(Arena(make_problem("R0", 2, 16, 8)))
    run_once(small)
    contender = kind(Arena(make_problem("R0", rows, classes, dimension), restore=False))
    if kind.compiles or kind.adam:  # the compiler's own memory and the optimizer's first allocation are no part of a step
        run_once(contender)
        contender.restore()
    peaks = []
    before, method = _start()
    torch.autograd.backward(contender.forward())
    for phase in ("forward+backward", "full step"):
        if phase == "full step":
            contender.update()
        gradient = contender.trained().grad
        held = 0 if gradient is None else gradient.numel() * gradient.element_size()
        peaks.append(Peak(name, phase, rows, classes, dimension, (_peak(method) - before) / 1e6, held / 1e6, method))
    return peaks


def fits(name: str, classes: int, dimension: int) -> bool:
    """Whether a step is likely to fit into free memory: W, velocity, dW and, for those that materialise, 20 B per element of W."""
    needed = classes * dimension * (12.0 if name.startswith("ours") else 30.0) * 1.1
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return True
    return any(int(line.split()[1]) * 1024 > needed for line in lines if line.startswith("MemAvailable:"))


def measure(name: str, rows: int, classes: int, dimension: int) -> list[Peak]:
    """The same in a fresh process; RuntimeError with its last words if it fails."""
    command = [sys.executable, "-m", "benchmarks.memory", name, str(rows), str(classes), str(dimension)]
    done = subprocess.run(command, cwd=ROOT, env=repository_environment(), capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"benchmarks.memory {name}: exit {done.returncode}: {done.stderr.strip()[-500:]}")
    return [Peak(**p) for p in json.loads(done.stdout.splitlines()[-1])]


if __name__ == "__main__":
    print(json.dumps([asdict(p) for p in measure_here(sys.argv[1], *map(int, sys.argv[2:5]))]))
