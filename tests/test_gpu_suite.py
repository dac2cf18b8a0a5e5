"""`python -m benchmarks.gpu_suite` without a GPU: its dry run in Triton's interpreter, and what it makes of failures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from paths import ROOT
from torch import Tensor

sys.path.insert(0, str(ROOT))  # benchmarks/ is no part of the installed package

import recog_fast as rf
from benchmarks import (
    gpu_contenders,
    gpu_gates,
    gpu_report,
    gpu_suite,
    gpu_targets,
    gpu_times,
    gpu_workers,
)
from benchmarks.gpu_device import Device, is_fatal, is_out_of_memory
from benchmarks.gpu_problems import REGIMES, device_truth, make_device_problem
from benchmarks.peers import Eager, PartialFC
from benchmarks.problems import MARGIN
from benchmarks.protocol import STEPS
from benchmarks.truth import compute_truth

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The whole suite at toy sizes, in a process of its own."""
    pytest.importorskip("triton")
    output = tmp_path_factory.mktemp("gpu")
    command = [sys.executable, "-m", "benchmarks.gpu_suite", "--dry-run", "--output", str(output)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600)
    return output, done


@pytest.mark.slow
def test_a_dry_run_goes_through_every_stage(dry_run: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    output, done = dry_run
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    data = json.loads((output / "gpu.json").read_text())
    assert len(data["gates"]) >= 35 and all(g["passes"] and g["same_bits"] for g in data["gates"])
    assert {g["name"] for g in data["gates"]} >= {*gpu_gates.STEMS, "memory_write", "margin_softmax_loss", gpu_contenders.GpuStepBF16.name}
    assert {t["task"] for t in data["tasks"]} == {t.name for t in gpu_suite.all_tasks(False, True) if t.section != "tools"}
    rows = {r["name"]: r for r in data["cases"][0]["rows"]}
    for kind in (gpu_contenders.GpuStepBF16, gpu_contenders.GpuDense, Eager, gpu_contenders.PartialFCBF16):
        assert rows[kind.name]["rounds"] == 2 and rows[kind.name]["gate"]["passes"], kind.name
    assert rows[gpu_contenders.GpuGraph.name]["skipped"] == "not supported: no CUDA device"
    results = {c["check"]: c["result"] for c in data["checks"]}
    assert results["CUDA graph of head and HeadSGD.step"] == "not supported"
    assert all(r == "ok" for name, r in results.items() if "graph" not in name) and len(results) >= 10
    assert {n["task"] for n in data["not_run"]} == {"golden", "memcheck", "ncu", "racecheck"}


@pytest.mark.slow
def test_the_page_shows_all_of_it(dry_run: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    output, done = dry_run
    page = (output / "gpu.md").read_text()
    data = json.loads((output / "gpu.json").read_text())
    assert page.strip() == gpu_report.markdown(data).strip()
    shown = [*(r["name"] for r in data["cases"][0]["rows"]), *(c["check"] for c in data["checks"]), *(t.name for t in gpu_targets.TARGETS)]
    assert not [name for name in shown if name not in page]
    assert "gates: " in done.stdout and "not run: memcheck" in done.stdout


_UNINSTALLED = """
import importlib.util, sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
sys.path[:] = [sys.argv[1], *(p for p in sys.path if "site-packages" in p or "lib/python" in p)]
import recog_fast
from benchmarks import machine
before = importlib.util.find_spec("recog_fast.triton_kernels")
machine.use_source_tree()
import recog_fast.triton_kernels
print(before is None or before.origin, recog_fast.triton_kernels.__file__)
"""


def test_a_checkout_that_was_never_installed_has_its_kernels(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", _UNINSTALLED, str(ROOT)], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[1] in (str(ROOT / "triton_kernels" / "__init__.py"), done.stdout.split()[0])


# -- gates that can fail -------------------------------------------------------------------------------------------------


def _operations(monkeypatch: pytest.MonkeyPatch, change: Callable[[Tensor], Tensor]) -> None:
    """The operations' results on the path under test changed; the reference is left alone."""
    original = gpu_gates.results

    def results(*arguments: Any, **options: Any) -> tuple[Tensor, ...]:
        found = original(*arguments, **options)
        ours = rf.ops._library.backend() == "auto"
        return tuple(change(t) if ours and t.dtype.is_floating_point else t for t in found)

    monkeypatch.setattr(gpu_gates, "results", results)


def _float32(stem: str) -> dict[str, Any]:
    """The gate of an operation on the CPU's own kernels, float32."""
    line: dict[str, Any] = gpu_gates.gate_operation(Device(), stem, gpu_gates.Shape(20, 300, 64))[0]
    return line


@pytest.mark.parametrize("stem", gpu_gates.STEMS)
@pytest.mark.parametrize(("change", "passes"), [
    (lambda t: t, True), (lambda t: t * 1.001 + 1e-5, False), (lambda t: t + torch.rand(()) * 1e-9, False), (lambda t: t * float("nan"), False),
], ids=["right", "0.1 % off", "other bits", "NaN"])  # fmt: skip
def test_a_wrong_operation_fails_its_gate(stem: str, change: Callable[[Tensor], Tensor], passes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    _operations(monkeypatch, lambda t: change(t.double()))
    line = _float32(stem)
    assert line["passes"] == passes, line


@pytest.mark.parametrize("regime", REGIMES)
def test_truth_on_the_device_is_the_other_truth(regime: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunked twice over against materialised once; a sampled head too. What `refill` draws is what was there."""
    problem = make_device_problem(regime, 24, 900, 64, CPU)
    monkeypatch.setattr("benchmarks.gpu_problems._CHUNK", 250)
    for classes in (None, torch.unique(torch.cat([problem.labels, torch.arange(0, 900, 7)]))):
        ours, other = device_truth(problem, MARGIN, classes), compute_truth(problem, MARGIN, classes)
        assert ours.loss == pytest.approx(other.loss, rel=1e-12)
        assert (ours.d_embeddings - other.d_embeddings).norm() <= 1e-10 * other.d_embeddings.norm()
        assert ours.targets == other.targets and torch.equal(ours.sample[: ours.targets], other.sample[: other.targets])
        rows = torch.zeros(2, 900, 64, dtype=torch.float64)
        rows[0, ours.sample], rows[1, other.sample] = ours.d_weight, other.d_weight
        both = ours.sample[torch.isin(ours.sample, other.sample)]
        assert both.numel() > 24 and (rows[0, both] - rows[1, both]).norm() <= 1e-10 * rows[1, both].norm()
    before = problem.weight.clone()
    problem.weight.zero_()
    problem.refill()
    assert torch.equal(problem.weight, before)


# -- what cannot run -----------------------------------------------------------------------------------------------------


class _Full(Eager):
    """Finds no memory."""

    name = "full"

    def forward(self) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")


class _Broken(Eager):
    """Fails in words of its own."""

    name = "broken"

    def forward(self) -> Tensor:
        raise RuntimeError("expected something else\nand more")


class _Wrong(Eager):
    """dx twice as large."""

    name = "wrong"

    def forward(self) -> Tensor:
        loss = super().forward()
        return 2 * loss - loss.detach()


class _Fatal(Eager):
    """Loses the context."""

    name = "fatal"

    def forward(self) -> Tensor:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


def _case(*kinds: type[Eager]) -> gpu_times.Case:
    return gpu_times.Case(16, 200, kinds, rounds=3, dimension=32)


def test_contenders_that_cannot_run_are_lines_and_the_others_are_timed() -> None:
    result = gpu_times.run_case(Device(), _case(_Full, _Broken, _Wrong, Eager), time.perf_counter() + 100)
    rows = {r["name"]: r for r in result["rows"]}
    assert rows["full"]["skipped"] == "oom" and rows["broken"]["skipped"] == "RuntimeError: expected something else"
    assert rows["wrong"]["skipped"].startswith("gate failed") and "steps" not in rows["wrong"]
    assert rows[Eager.name]["rounds"] == 3 and set(rows[Eager.name]["steps"]) == set(STEPS)
    assert all("\n" not in line for line in gpu_report.case_lines(result))


class _Later(Eager):
    """Finds no memory in the second round (three runs belong to its gate)."""

    name = "later"
    _runs = 0

    def forward(self) -> Tensor:
        self._runs += 1
        if self._runs == 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().forward()


def test_a_contender_that_fails_in_a_round_keeps_the_rounds_before() -> None:
    result = gpu_times.run_case(Device(), _case(_Later, Eager), time.perf_counter() + 100)
    rows = {r["name"]: r for r in result["rows"]}
    assert rows["later"]["skipped"] == "in round 2: oom" and rows["later"]["rounds"] == 1 and rows[Eager.name]["rounds"] == 3
    assert rows[Eager.name]["against"].keys() == {"later"}


def test_no_time_left_is_said() -> None:
    result = gpu_times.run_case(Device(), _case(Eager, PartialFC), time.perf_counter() - 1)  # type: ignore[arg-type]
    assert [r["skipped"] for r in result["rows"]] == ["not run: no time left"] * 2


def test_a_lost_context_ends_the_process_and_not_the_results() -> None:
    result = gpu_times.run_case(Device(), _case(Eager, _Fatal), time.perf_counter() + 100)
    assert "illegal memory access" in result["fatal"] and result["rows"][0]["name"] == Eager.name
    answer = gpu_suite.perform(gpu_suite.Task("t", "cases", 1.0, lambda d, s: [result]), Device(), 9.0)
    assert answer["fatal"] and answer["lines"] == [result]
    assert "illegal memory access" in "\n".join(gpu_report.case_lines(result))


def test_errors_are_told_apart() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("x")) and not is_fatal(torch.OutOfMemoryError("x"))
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"))
    assert is_fatal(RuntimeError("CUDA error: device-side assert triggered")) and not is_fatal(ValueError("expected labels"))
    assert not is_out_of_memory(RuntimeError("out of resource: shared memory, Required: 300000, Hardware limit: 232448"))


@dataclass(frozen=True)
class _Task:
    name: str
    seconds: float = 0.1


_WORKER = """
import json, os, sys, time
for line in sys.stdin:
    name, seconds = json.loads(line)
    if name == "dies": sys.stderr.write("the last words"); sys.stderr.flush(); os._exit(7)
    if name == "hangs": time.sleep(60)
    print("noise without an end", end="")
    print("\\n@@ " + json.dumps({"lines": [name, os.getpid()], "fatal": name == "fatal"}), flush=True)
    if name == "fatal": sys.exit(3)
"""


def test_workers_that_die_or_hang_are_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_workers, "STARTUP", 1.0)
    answers: dict[str, Any] = {}
    pool = gpu_workers.Pool([sys.executable, "-c", _WORKER], dict(os.environ), tmp_path / "log", 1)
    names = ["a", "dies", "b", "fatal", "c", "d"]
    pool.run([_Task(n) for n in names], lambda: 100.0, lambda task, answer, seconds: answers.update({task.name: answer}))
    assert "ended with 7; the last words" in answers["dies"]["died"]
    processes = [answers[n]["lines"][1] for n in ("a", "b", "fatal", "c", "d")]
    assert processes[1] == processes[2] and processes[3] == processes[4] and len(set(processes)) == 3
    worker = gpu_workers.Worker([sys.executable, "-c", _WORKER], dict(os.environ), tmp_path / "log")
    assert worker.ask("a", 1.0, 20.0)["lines"][0] == "a"
    assert "no answer within" in worker.ask("hangs", 1.0, 0.2)["died"]
    assert worker.ask("b", 1.0, 20.0)["lines"][0] == "b"
    worker.close()


def test_tasks_beyond_the_budget_are_named(tmp_path: Path) -> None:
    results = gpu_suite.Results(tmp_path, {"device": "none"}, {})
    task = gpu_suite.Task("times-1x1", "cases", 45.0, lambda d, s: [])
    pool = gpu_workers.Pool(["false"], dict(os.environ), tmp_path / "log", 2)
    pool.run([task, task], lambda: 20.0, results.take)
    assert [n["task"] for n in results.data["not_run"]] == ["times-1x1"] * 2 and not results.failed
    assert "20 s were left" in (tmp_path / "gpu.md").read_text()
    results.take(task, {"died": "the process ended with -11; it said nothing"}, 1.0)
    assert results.failed and "ended with -11" in (tmp_path / "gpu.md").read_text()


def test_a_nan_is_written_read_and_shown(tmp_path: Path) -> None:
    results = gpu_suite.Results(tmp_path, {"device": "none"}, {})
    gate = {"name": "class_step", "case": "1x1", "dtype": "bf16", "errors": [{"output": 0, "error": float("nan"), "budget": float("inf")}],
            "same_bits": True, "passes": False, "first_call_s": 0.1}  # fmt: skip
    results.take(gpu_suite.Task("gate", "gates", 1.0, lambda d, s: []), {"lines": [gate]}, 0.5)
    assert results.failed
    stored = json.loads((tmp_path / "gpu.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert "0: nan / inf" in gpu_report.markdown(stored) and "0 of 1 pass" in gpu_report.markdown(stored)


@pytest.mark.parametrize(("case", "failed"), [
    ({"rows": [], "fatal": "x"}, True), ({"rows": [{"name": "ours, HeadSGD bf16", "gate": {"passes": False}}]}, True),
    ({"rows": [{"name": "eager float32", "gate": {"passes": False}}, {"name": "ours, HeadSGD bf16", "gate": {"passes": True}}]}, False),
])  # fmt: skip
def test_what_fails_a_run(case: dict[str, Any], failed: bool, tmp_path: Path) -> None:
    """A lost device and a gate of ours; a peer's gate is its own affair."""
    results = gpu_suite.Results(tmp_path, {}, {})
    results.data["cases"].append(case)
    assert results.failed == failed


def test_a_tool_beyond_its_limit_is_ended_with_its_children(tmp_path: Path) -> None:
    child = tmp_path / "child"
    command = ["sh", "-c", f"(sleep 1.2; touch {child}) & wait"]
    assert gpu_workers.run_limited(command, dict(os.environ), tmp_path, tmp_path / "log", 0.2) is None
    time.sleep(1.5)
    assert not child.exists()
    assert gpu_workers.run_limited(["sh", "-c", "echo said; exit 4"], dict(os.environ), tmp_path, tmp_path / "log", 9.0) == 4
    assert (tmp_path / "log").read_text() == "said\n"
