"""Checks, then times everything on one CUDA device, in one command and within a budget of minutes: `python -m benchmarks.gpu_suite`.

    --minutes 8      the budget; stages come by value, and what did not fit is listed as not run
    --output DIR     where gpu.json, gpu.md and the tools' logs go (default: benchmarks/results/<device>), written after each task
    --only WORD...   tasks whose name holds one of the words; --list shows the names
    --small          a quick look: few sizes
    --golden DIR     the golden cases on the device too (tests/, marker gpu; the folder that holds cases/)
    --dry-run        the same code on CPU tensors in Triton's interpreter, at toy sizes: it tries the suite, its times mean nothing

Builds nothing: CUDA tensors need torch, triton and this checkout alone. Exit status 1 where a gate or a check failed. RECOG_FAST_COMMIT
names the commit where the files came without their history.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .gpu_device import Device

# section of the results -> lines; a task adds to one of them
SECTIONS = ("gates", "checks", "launches", "tuning", "cases", "tools")
_GATE_WORKERS = 6
_GOLDEN_SECONDS = 240.0
_LOSS_GROUP = 4  # variants of the loss to one task


@dataclass(frozen=True)
class Task:
    """name; the section its lines go to; seconds it is expected to take on an H200 with its compilation; run(device, deadline) -> lines."""

    name: str
    section: str
    seconds: float
    run: Callable[[Device, float], list[dict[str, Any]]]


def gate_tasks(small: bool, dry: bool) -> list[Task]:
    """Stage 1; run by several workers at once."""
    from . import gpu_gates as g

    def operations(shape: g.Shape) -> Callable[[Device, float], list[dict[str, Any]]]:
        return lambda device, _: [line for stem in g.STEMS for line in g.gate_operation(device, stem, shape)]

    def losses(names: list[str]) -> Callable[[Device, float], list[dict[str, Any]]]:
        return lambda device, _: [line for name in names for line in g.gate_loss(device, name, dry)]

    def regime(name: str) -> Callable[[Device, float], list[dict[str, Any]]]:
        return lambda device, _: g.gate_regime(device, name, dry)

    shapes = g.DRY_SHAPES if dry else g.SHAPES[:4] if small else g.SHAPES
    tasks = [Task(f"gate-{shape.name}", "gates", 30.0, operations(shape)) for shape in shapes]
    tasks += [Task(f"gate-{name}", "gates", 15.0, regime(name)) for name in (g.REGIMES[2:3] if dry else g.REGIMES[::5] if small else g.REGIMES)]
    names = list(g.VARIANTS)[::6] if dry else list(g.VARIANTS)
    for start in range(0, len(names), _LOSS_GROUP):
        tasks.append(Task(f"gate-losses-{start // _LOSS_GROUP}", "gates", 25.0, losses(names[start : start + _LOSS_GROUP])))
    return [*tasks, Task("gate-memory_write", "gates", 5.0, lambda device, _: g.gate_memory_write(device))]


def timing_tasks(small: bool, dry: bool) -> list[Task]:
    """Stages 2 to 4, one at a time, by value: the sizes the targets are stated for, the checks, the rest of the table."""
    from . import gpu_checks as c
    from . import gpu_times as t
    from . import gpu_tuning as u

    def case(of: t.Case) -> Task:
        return Task(of.name, "cases", of.seconds, lambda device, deadline: [t.run_case(device, of, deadline)])

    def check(name: str) -> Task:
        return Task(f"check-{name}", "checks", 30.0 if name == "compile" else 15.0, lambda device, _: c.CHECKS[name](device, dry))

    launches = Task("launches", "launches", 25.0, lambda device, _: c.launches(device, dry))
    tuning = Task("tuning", "tuning", 40.0, lambda device, _: u.tuning(device, dry))
    if dry:
        return [*map(case, t.DRY), *(check(name) for name in c.CHECKS if name != "compile"), launches, tuning]
    if small:
        return [*map(case, t.SMALL), *map(check, c.CHECKS)]
    return [*map(case, t.CASES), *map(check, c.CHECKS), launches, tuning, *map(case, t.LATER), *map(case, t.LAST)]


def _profiled_step(device: Device, _: float) -> list[dict[str, Any]]:
    """What ncu looks at: two bf16 steps."""
    from .gpu_contenders import GpuStepBF16
    from .gpu_problems import DeviceArena, make_device_problem
    from .gpu_times import run_once

    contender = GpuStepBF16(DeviceArena(make_device_problem("R0", 1024, 20_000, 512, device.where)))
    for _number in range(2):
        run_once(device, contender)
    return []


def all_tasks(small: bool, dry: bool) -> list[Task]:
    """Every task by name, those of the tools too."""
    return [*gate_tasks(small, dry), *timing_tasks(small, dry), Task("profiled-step", "tools", 20.0, _profiled_step)]


def perform(task: Task, device: Device, seconds: float) -> dict[str, Any]:
    """{"lines"} of a task, or {"error"}, with "fatal" where the process can do nothing more."""
    from .gpu_contenders import Captures
    from .gpu_device import first_line, is_fatal

    failure: dict[str, Any] | None = None
    try:
        lines = task.run(device, time.perf_counter() + seconds)
        device.synchronize()
    except Exception as error:  # any failure is a line of the report, and the suite goes on
        failure = {"error": first_line(error, 500), "fatal": is_fatal(error)}
    if failure is None or not failure["fatal"]:
        device.clean()  # outside the handler: the traceback held the task's tensors
    answer = failure or {"lines": lines, "fatal": any("fatal" in line for line in lines)}
    return {**answer, "restart": Captures.failed}


class Results:
    """What was found so far; both files are written after every task."""

    def __init__(self, output: Path, environment: dict[str, str], options: dict[str, Any]) -> None:
        self.output = output
        self.data: dict[str, Any] = {"environment": environment, "options": options, "not_run": [], "tasks": [], **{s: [] for s in SECTIONS}}
        output.mkdir(parents=True, exist_ok=True)

    def take(self, task: Task, answer: dict[str, Any], seconds: float) -> None:
        """An answer of a worker."""
        if "no_time" in answer:
            self.data["not_run"].append({"task": task.name, "why": answer["no_time"]})
        else:
            self.data["tasks"].append({"task": task.name, "seconds": seconds})
        failure = answer.get("died") or answer.get("error")
        if failure:
            self.data["not_run"].append({"task": task.name, "why": failure})
            self.data["checks"].append({"check": f"task {task.name}", "result": "error", "detail": failure})
        self.data[task.section] += answer.get("lines", [])
        state = "no time" if "no_time" in answer else "FAILED: " + failure[:200] if failure else "done"
        print(f"{seconds:6.1f} s  {task.name:36} {state}", flush=True)
        self.write()

    def write(self) -> None:
        """gpu.json and gpu.md."""
        from .gpu_report import markdown

        (self.output / "gpu.json").write_text(json.dumps(_plain(self.data), indent=1) + "\n")
        (self.output / "gpu.md").write_text(markdown(self.data) + "\n")

    @property
    def failed(self) -> bool:
        """Whether a gate or a check says so, or a case lost the device."""
        wrong = any(c["result"] in ("WRONG", "error") for c in self.data["checks"]) or any("fatal" in case for case in self.data["cases"])
        ours = [row["gate"] for case in self.data["cases"] for row in case["rows"] if "gate" in row and row["name"].startswith("ours")]
        return wrong or not all(gate["passes"] for gate in (*self.data["gates"], *ours))


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity: their names instead."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, float) and not abs(value) < float("inf") else value


def golden_task(folder: str, seconds: float, log: Path) -> dict[str, Any]:
    """The golden cases on CUDA are routes of their own tests: pytest, marker gpu."""
    from . import machine
    from .gpu_workers import run_limited

    several = ["-n", str(_GATE_WORKERS)] if importlib.util.find_spec("xdist") is not None else []  # most of the time compiles kernels
    files = [f"tests/{name}" for name in ("test_ops.py", "test_margin_softmax_golden.py")]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", *files, *several, "-p", "no:cacheprovider"]
    environment = {**machine.repository_environment(), "RECOG_FAST_GOLDEN": str(Path(folder).resolve())}
    code = run_limited(command, environment, machine.ROOT, log, seconds)
    last = f"stopped after {seconds:.0f} s" if code is None else (log.read_text(errors="replace").strip().splitlines() or ["nothing"])[-1]
    result = "error" if code is None else "ok" if code == 0 and " passed" in last else "WRONG"
    return {"check": "golden cases (pytest -m gpu)", "result": result, "detail": last}


def run_all(options: argparse.Namespace, device: Device, results: Results, left: Callable[[], float]) -> None:
    """Every stage within the budget."""
    from . import machine
    from .gpu_tools import tools
    from .gpu_workers import Pool

    wanted = [t for t in all_tasks(options.small, options.dry_run) if _chosen(t.name, options.only)]
    gates = [t for t in wanted if t.section == "gates"]
    others = [t for t in wanted if t.section not in ("gates", "tools")]
    if options.dry_run and not options.processes:  # here, one after the other: a process takes longer to start than a task
        for task in [*gates, *others]:
            began = time.perf_counter()
            results.take(task, perform(task, device, left()), time.perf_counter() - began)
        results.data["not_run"] += [{"task": name, "why": "a dry run"} for name in ("golden", *(t[0] for t in tools(results.output)))]
        results.write()
        return
    command = [sys.executable, "-m", "benchmarks.gpu_suite", "--work", *(f"--{word}" for word in ("small", "dry-run") if getattr(options, word.replace("-", "_")))]
    log = results.output / "workers.log"
    log.unlink(missing_ok=True)
    count = max(min(_GATE_WORKERS, (os.cpu_count() or 2) // 2), 1)
    graph = [t for t in others if t.name == "check-graph"]
    if options.golden and _chosen("golden", options.only):
        results.data["checks"].append(golden_task(options.golden, min(max(left(), 60.0), _GOLDEN_SECONDS), results.output / "golden.txt"))
    elif not options.golden:
        results.data["not_run"].append({"task": "golden", "why": "no --golden folder"})
    for tasks, workers in ((gates, count), (graph, 1), ([t for t in others if t not in graph], 1)):
        Pool(command, machine.repository_environment(), log, min(workers, max(len(tasks), 1))).run(tasks, left, results.take)
        refused = [line["detail"] for line in results.data["checks"] if line["result"] == "not supported"]
        if refused and "--no-graph" not in command:  # a failed capture is not tried again in every case
            command += ["--no-graph", refused[0]]
    for name, seconds, run in tools(results.output):
        if _chosen(name, options.only):
            if left() < 0.5 * seconds:
                results.data["not_run"].append({"task": name, "why": f"{left():.0f} s were left of the budget"})
            else:
                results.data["tools"].append(run(left()))
    results.write()


def _chosen(name: str, only: list[str]) -> bool:
    return not only or any(word in name for word in only)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_suite", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help=argparse.SUPPRESS)
    parser.add_argument("--golden", metavar="DIR", help=argparse.SUPPRESS)
    for flag in ("--small", "--dry-run", "--list", "--processes"):  # the last: a dry run's tasks in workers too
        parser.add_argument(flag, action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)  # a worker: names come from standard input
    parser.add_argument("--no-graph", default="", help=argparse.SUPPRESS)  # why no graph is to be captured
    parser.add_argument("--one", nargs="+", metavar="TASK", help=argparse.SUPPRESS)  # these tasks in this process: for tools
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    options, began = _options(arguments), time.perf_counter()
    if options.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton
    from .gpu_device import describe, open_device

    if options.list:
        print("\n".join(f"{t.section:9} {t.seconds:5.0f} s  {t.name}" for t in all_tasks(options.small, options.dry_run)))
        return 0
    from .gpu_contenders import Captures

    device, Captures.refused = open_device(options.dry_run), options.no_graph
    by_name = {t.name: t for t in all_tasks(options.small, options.dry_run)}
    if options.work:
        from .gpu_workers import serve

        return serve(lambda name, seconds: perform(by_name[name], device, seconds), sys.stdin)
    if options.one:
        answers = [perform(by_name[name], device, 600.0) for name in options.one]
        print(json.dumps(_plain(answers)))
        return int(any("error" in a or not all(line.get("passes", True) for line in a["lines"]) for a in answers))
    from . import machine
    from .gpu_report import summary

    place = machine.ROOT / "runs" / "benchmarks" if options.dry_run else machine.RESULTS
    results = Results(options.output or place / device.slug(), describe(device), {k: str(v) for k, v in vars(options).items()})
    print("\n".join(f"{key}: {value}" for key, value in results.data["environment"].items()), flush=True)
    results.write()
    run_all(options, device, results, lambda: 60 * options.minutes - (time.perf_counter() - began))
    print(summary(results.data), f"results: {results.output} ({time.perf_counter() - began:.0f} s)", sep="\n", flush=True)
    return int(results.failed)


if __name__ == "__main__":
    sys.exit(main())
