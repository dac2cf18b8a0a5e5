"""Stage 5: compute-sanitizer on small gates, and Nsight Compute's reading of the two tile kernels, where the tools are there."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import machine
from .gpu_workers import run_limited

Line = dict[str, Any]
# Small shapes with every kernel in them; the same tasks as stage 1, so that nothing is compiled under the tool.
GATES = ("gate-37x1000x64-memory", "gate-70x901x64-K3-rules-memory")
TILES = "forward_tile|slope_tile"


def _suite(*options: str) -> list[str]:
    return [sys.executable, "-m", "benchmarks.gpu_suite", *options]


def sanitizer(tool: str, log: Path, seconds: float) -> Line:
    """compute-sanitizer --tool `tool` over the gates; its whole output goes to `log`."""
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if tool == "memcheck" else {}  # else one block hides reads beyond a tensor
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--print-limit", "20", *_suite("--one", *GATES)]
    return _run(f"compute-sanitizer {tool}", command, environment, log, seconds)


def profiler(log: Path, seconds: float) -> Line:
    """ncu on some launches of each tile kernel in a bf16 step at 1024 x 20000 x 512: share of peak, occupancy, stalls."""
    sections = [option for name in ("SpeedOfLight", "Occupancy", "LaunchStats", "WarpStateStats", "MemoryWorkloadAnalysis") for option in ("--section", name)]
    chosen = ["--kernel-name", f"regex:{TILES}", "--launch-skip", "2", "--launch-count", "6", "--clock-control", "none"]
    return _run("ncu", ["ncu", *sections, *chosen, *_suite("--one", "profiled-step")], {}, log, seconds)


def _run(name: str, command: list[str], environment: dict[str, str], log: Path, seconds: float) -> Line:
    if shutil.which(command[0]) is None:
        return {"tool": name, "result": "not run", "detail": f"{command[0]} is not on PATH"}
    code = run_limited(command, {**machine.repository_environment(), **environment}, machine.ROOT, log, seconds)
    result = "ok" if code == 0 else f"stopped after {seconds:.0f} s" if code is None else f"exit {code}"
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    shown = _throughputs(lines) if name == "ncu" else [line for line in lines if line.startswith("=====")][-3:]
    return {"tool": name, "result": result, "detail": "; ".join(shown or lines[-3:])[:1500]}


def _throughputs(lines: list[str]) -> list[str]:
    """The kernels' names and the lines of their share of peak."""
    words = ("Compute (SM) Throughput", "Memory Throughput", "Duration", "Registers Per Thread", "Achieved Occupancy")
    return [" ".join(line.split()) for line in lines if any(tile in line for tile in TILES.split("|")) or line.startswith(words)]


def tools(output: Path) -> list[tuple[str, float, Callable[[float], Line]]]:
    """(task, expected seconds, run with a limit)."""
    return [
        ("memcheck", 60.0, lambda s: sanitizer("memcheck", output / "memcheck.txt", s)),
        ("ncu", 45.0, lambda s: profiler(output / "ncu.txt", s)),
        ("racecheck", 60.0, lambda s: sanitizer("racecheck", output / "racecheck.txt", s)),
    ]
