"""The GPU suite's targets, predictions and tools, and its lines that only run on CUDA, against the signatures of this torch."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import create_autospec

import pytest
import torch
from paths import ROOT
from torch import Tensor
from torch._C._autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent

sys.path.insert(0, str(ROOT))  # benchmarks/ is no part of the installed package

import recog_fast as rf
from benchmarks import gpu_contenders, gpu_model, gpu_problems, gpu_suite, gpu_targets, gpu_times, gpu_tools, gpu_tuning
from benchmarks.contenders import Unsuitable
from benchmarks.gpu_device import Cuda, Device, Profile
from benchmarks.gpu_problems import REGIMES, DeviceArena, make_device_problem
from benchmarks.peers import Eager, EagerAutocast, PartialFC, PartialFCSampled
from benchmarks.problems import target_gaps
from benchmarks.protocol import STEPS
from recog_fast.ops import _cuda, _operands, chunks

CPU = torch.device("cpu")


# -- targets and predictions ---------------------------------------------------------------------------------------------


def _measured(rows: int, classes: int, milliseconds: float, ratio: float) -> dict[str, Any]:
    spread = {"median": milliseconds / 1e3, "p10": milliseconds / 1e3, "p90": milliseconds / 1e3}
    gate = {"d_embeddings": 1e-3, "d_weight": 5e-3, "same_bits": True}
    ours = {"name": gpu_contenders.GpuStepBF16.name, "steps": {STEPS[2]: {"s": spread}}, "gate": gate,
            "against": {PartialFC.name: {"median": ratio, "p10": ratio, "p90": ratio}}, "memory": {"total_gb": 50.0, "backward_per_cd": 0.1, "backward_gb": 0.05}}  # fmt: skip
    return {"N": rows, "C": classes, "label": "", "rows": [ours, {"name": Eager.name, "skipped": "oom"}]}


def test_targets_follow_the_numbers() -> None:
    data = {"cases": [_measured(1024, 100_000, 1.0, 1.0), _measured(1024, 1_000_000, 10.2, 12.0), _measured(512, 10_000_000, 80.0, 1.0)]}
    met = {line[0]: line[5] for line in gpu_targets.table(data)}
    assert met["full step, N=1024, C=1M"] == "must" and met["full step, N=512, C=10M"] == "NOT MET"
    assert met["full step, N=4096, C=10M"] == met["against cut-cross-entropy (fp32 accumulation), N=1024, C=1M"] == "not measured"
    assert met["against Partial FC as shipped (fp32), N=1024, C=1M"] == "must"
    assert met["peak memory with W and momentum, C=10M, N=512"] == "strong"
    assert met["extra memory, forward + backward, C=1M, share of W"] == "must"  # 0.1 B per element of 4 B
    assert met["time per class, C=100k to 1M, N=1024, apart by"] == "stretch" and met["dx and dW, relative error, worst case timed"] == "must"


def test_the_predicted_launches_are_those_of_the_chunk_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launchers counted in place of kernels, GEMMs with them: two chunks, the last ragged."""
    pytest.importorskip("triton")
    from recog_fast.triton_kernels import class_gradient, class_step, effective_prototypes, merge, negative_logsumexp

    launched: list[str] = []

    def counted(name: str, result: Any = None) -> Callable[..., Any]:
        def launch(*_: Any, **__: Any) -> Any:
            launched.append(name)
            return result

        return launch

    for module, name in ((effective_prototypes, "run_prototype_rows"), (merge, "run_merge_tiles"), (merge, "run_add_partials"),
                         (class_gradient, "run_slope_tile"), (class_step, "run_class_epilogue")):  # fmt: skip
        monkeypatch.setattr(module, name, counted(name))
    monkeypatch.setattr(negative_logsumexp, "run_forward_tile", counted("run_forward_tile", 1))
    n, c, d = 64, 70_000, 32
    unit, weight = torch.zeros(n, d), torch.zeros(c, d)

    def slab_products(a: Tensor, b: Tensor, slab: int) -> list[Tensor]:
        count = (a.shape[1] >= slab) + (a.shape[1] % slab > 0)
        launched.extend(["mm"] * count)
        return [torch.zeros(1, n, d)] * count

    def float32_product(a: Tensor, b: Tensor) -> Tensor:
        launched.append("mm")
        return torch.zeros(a.shape[0], d)

    monkeypatch.setattr(chunks, "slab_products", slab_products)
    monkeypatch.setattr(chunks, "float32_product", float32_product)
    _cuda.forward(unit, weight, torch.zeros(n, dtype=torch.int64), 64.0, None, None, None, None, False, True, True)
    terms = torch.zeros(5, n)
    _cuda.step(unit, torch.zeros(n, dtype=torch.int64), terms, weight, None, 64.0, None, None, None, None, True, 0.1, 0.0, 0.0, False, True)
    expected = gpu_model.predict(n, c, d, {"tflops": 1.0, "tbs": 1.0, "l2": _operands._L2, "multiprocessors": _operands._PROCESSORS})
    assert expected.chunks == 2 and expected.kernels == len(launched)
    assert expected.overlapped < expected.serial <= expected.launched


def test_the_page_of_predictions_is_the_models() -> None:
    section = (ROOT / "benchmarks" / "NOTES.md").read_text().split("## GPU: predictions, not yet measured")[1]
    rows = re.findall(r"^\| (\d+) x ([\d,]+) \| (\d+) \((\d+)\) \| (\d+) \| ([\d.]+) \| ([\d.]+) \| \d+ % \| (\d+) \|", section, re.MULTILINE)
    assert len(rows) == 8
    for n, c, chunk, chunks_, kernels, *milliseconds in rows:
        made = gpu_model.predict(int(n), int(c.replace(",", "")), 512, gpu_model.H200)
        assert (made.chunk, made.chunks, made.kernels) == (int(chunk), int(chunks_), int(kernels))
        for shown, seconds in zip(milliseconds, (made.overlapped, made.serial, made.launched), strict=True):
            assert float(shown) == pytest.approx(1e3 * seconds, rel=0.01, abs=0.5 if "." not in shown else 0.051)


def test_bytes_of_the_fused_step_are_those_of_the_design() -> None:
    """W read for both prototypes, W and v read and written: 24 B per element; 8NCD."""
    cost = gpu_model.fused_step(1024, 1000, 512)
    assert cost.bytes() == 24 * 1000 * 512 and cost.flops(matrix_only=True) == 8 * 1024 * 1000 * 512
    assert gpu_model.roofline_seconds(cost, "update", 790e12, 4.3e12) == pytest.approx(max(8 * 1024 / 790e12, 24 / 4.3e12) * 512_000)


def test_equal_bits_have_equal_sums_and_others_do_not() -> None:
    t = torch.randn(300, 16)
    swapped = t.clone()
    swapped[[3, 5]] = swapped[[5, 3]]
    moved = t.clone()
    moved[7, 2] = torch.nextafter(moved[7, 2], torch.tensor(9.0))
    sums = gpu_times.checksums(t)
    assert torch.equal(sums, gpu_times.checksums(t.clone()))
    assert not torch.equal(sums, gpu_times.checksums(swapped)) and not torch.equal(sums, gpu_times.checksums(moved))


def test_an_arena_is_refilled_in_place() -> None:
    problem = make_device_problem("R1-0.87", 16, 200, 32, CPU)
    arena = DeviceArena(problem)
    first = [gpu_times.run_once(Device(), Eager(arena)) for _ in range(2)]
    assert torch.equal(*first) and arena.weight.data_ptr() == problem.weight.data_ptr()


def test_kernels_are_grouped_by_their_names() -> None:
    names = {"forward_tile": (3, 1.0), "slope_tile": (3, 2.0), "nvjet_tst_128x256_64x4_2x1_v_bz_TNT": (2, 4.0), "_prototype_rows": (1, 8.0), "class_epilogue": (1, 16.0),
             "add_partials": (4, 32.0), "void at::native::vectorized_elementwise_kernel<4>": (9, 64.0), "sm90_xmma_gemm_bf16f32": (1, 128.0)}  # fmt: skip
    found = gpu_tuning.groups(Profile(24, 255.0, names))
    assert found == {"tiles": 3.0, "prototypes": 8.0, "epilogue": 16.0, "merges": 32.0, "GEMM": 132.0, "other": 64.0}


@pytest.mark.parametrize("name", gpu_tuning.VARIANTS)
def test_variants_change_the_plan_and_only_within(name: str) -> None:
    pytest.importorskip("triton")
    x = torch.zeros(1024, 512, dtype=torch.bfloat16)
    plain = chunks.plan_for("class_gradient", x, 1)
    with gpu_tuning._planned(gpu_tuning.VARIANTS[name]):
        plan = chunks.plan_for("class_gradient", x, 1)
    assert (plan == plain) == (name == "as planned") and chunks.plan_for("class_gradient", x, 1) == plain
    assert plan.classes % 128 == 0 and plan.slab % 128 == 0 and configs_padding() % plan.tile.rows == 0


def configs_padding() -> int:
    """What vectors over rows are padded to."""
    from recog_fast.triton_kernels import configs

    return int(configs.ROW_PADDING)


def test_tools_are_read_and_their_absence_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_tools.sanitizer("memcheck", tmp_path / "log", 5.0)["detail"] == "compute-sanitizer is not on PATH"
    for name, body in (("compute-sanitizer", "echo noise; echo '========= ERROR SUMMARY: 2 errors'; exit 9"), ("ncu", "echo '  slope_tile (174, 1, 1)'; echo '    Memory Throughput   %   55.1'")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    assert gpu_tools.sanitizer("memcheck", tmp_path / "log", 5.0) == {"tool": "compute-sanitizer memcheck", "result": "exit 9", "detail": "========= ERROR SUMMARY: 2 errors"}
    assert gpu_tools.profiler(tmp_path / "log", 5.0) == {"tool": "ncu", "result": "ok", "detail": "slope_tile (174, 1, 1); Memory Throughput % 55.1"}
    names = {t.name for t in gpu_suite.all_tasks(False, False)}
    assert {*gpu_tools.GATES, "profiled-step"} <= names


# -- the lines that only run on CUDA, against the signatures of this torch ---------------------------------------------------


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Any:
    """torch.cuda with every function and class the suite calls replaced by one that takes the same arguments and does nothing."""
    names = ("current_device", "get_device_name", "synchronize", "reset_peak_memory_stats", "memory_allocated", "max_memory_allocated",
             "empty_cache", "Event", "Stream", "stream", "current_stream", "set_stream", "CUDAGraph", "graph")  # fmt: skip
    fakes = SimpleNamespace(**{name: create_autospec(getattr(torch.cuda, name)) for name in names})
    for name, fake in vars(fakes).items():
        monkeypatch.setattr(torch.cuda, name, fake)
    fakes.current_device.return_value, fakes.get_device_name.return_value = 0, "NVIDIA H200"
    fakes.memory_allocated.return_value, fakes.max_memory_allocated.return_value = 5, 9
    properties = SimpleNamespace(name="NVIDIA H200", major=9, minor=0, multi_processor_count=132, L2_cache_size=62914560, total_memory=150 << 30)
    assert all(f"    {field}: " in _stub() for field in vars(properties))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: properties)
    monkeypatch.setattr(gpu_contenders.Captures, "failed", False)
    monkeypatch.setattr(gpu_contenders.Captures, "refused", "")
    return fakes


def _stub() -> str:
    """torch's own declaration of a device's properties."""
    text = (Path(torch.__file__).parent / "_C" / "__init__.pyi").read_text()
    return text[text.index("class _CudaDeviceProperties") :][:2500]


def test_the_cuda_device_calls_torch_as_torch_is(cuda: Any) -> None:
    device = Cuda()
    assert (device.multiprocessors, device.l2_bytes, device.total_bytes) == (132, 62914560, 150 << 30)
    start, end = device.mark(), device.mark()
    assert cuda.Event.call_args.kwargs == {"enable_timing": True}
    start.elapsed_time.return_value = 2.5
    device.synchronize()
    assert device.seconds(start, end) == 0.0025 and start.record.called
    assert (device.start_peak(), device.peak()) == (5, 9)
    device.clean()
    assert device.slug() == "nvidia-h200" and "sm_90" in device.describe()["device"] and "L2 63 MB" in device.describe()["device"]
    profile = device.profile(lambda: torch.ones(3) + 1)
    assert profile.kernels == 0  # of a device there are none, and the CPU's events are not taken for them


def test_the_profiler_counts_kernels_and_no_marks(cuda: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def event(name: str, kind: Any, microseconds: float, mark: bool = False) -> Any:
        made = FunctionEvent(1, name, 1, 0.0, microseconds, device_type=kind, is_user_annotation=mark)
        return made

    where = DeviceType
    events = [event("k", where.CUDA, 3.0), event("k", where.CUDA, 2.0), event("m", where.CUDA, 9.0, True), event("aten::mm", where.CPU, 50.0)]
    monkeypatch.setattr(torch.profiler.profile, "events", lambda self: events)
    profile = Cuda().profile(lambda: None)
    assert profile.kernels == 2 and profile.busy == pytest.approx(5e-6) and [(n, c) for n, c, _ in profile.top] == [("k", 2)]


def test_a_graph_is_captured_after_warming_up_on_a_side_stream(cuda: Any) -> None:
    calls: list[bool] = []

    def step() -> Tensor:
        calls.append(cuda.graph.return_value.__enter__.called)
        return torch.ones(())

    result, graph = gpu_contenders.captured(step)
    assert calls == [False] * 3 + [True] and result.item() == 1 and cuda.graph.call_args.args == (graph,)
    cuda.Stream.return_value.wait_stream.assert_called_once_with(cuda.current_stream.return_value)
    cuda.current_stream.return_value.wait_stream.assert_called_once_with(cuda.Stream.return_value)
    graph.replay()


def test_a_refused_capture_is_told_in_its_own_words_and_not_tried_again(cuda: Any) -> None:
    def refuse() -> Tensor:
        if cuda.graph.return_value.__enter__.called:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nCompile with TORCH_USE_CUDA_DSA")
        return torch.ones(())

    cuda.graph.return_value.__exit__.side_effect = RuntimeError("CUDA error: operation failed due to a previous error during capture")
    for _ in range(2):
        with pytest.raises(Unsuitable, match="not supported: RuntimeError: CUDA error: operation not permitted when stream is capturing$"):
            gpu_contenders.captured(refuse)
    cuda.set_stream.assert_called_once_with(cuda.current_stream.return_value)
    assert gpu_contenders.Captures.failed and cuda.graph.call_count == 1
    answer = gpu_suite.perform(gpu_suite.Task("t", "checks", 1.0, lambda d, s: []), Device(), 1.0)
    assert answer["restart"]


def test_a_graph_of_a_step_replays_into_its_own_gradient(cuda: Any) -> None:
    """On the CPU nothing is captured; what is around the replay is the real thing."""
    problem = make_device_problem("R0", 8, 60, 32, CPU)
    contender = gpu_contenders.GpuGraph(DeviceArena(problem))
    loss = gpu_times.run_once(Device(), contender)
    assert loss.requires_grad is False and contender.arena.embeddings.grad is contender._gradient
    assert cuda.CUDAGraph.return_value.replay.call_count == 1
    assert torch.equal(contender.arena.weight, make_device_problem("R0", 8, 60, 32, CPU).weight)  # restored after the capture
    gpu_times.run_once(Device(), contender)
    assert cuda.graph.call_count == 1 and cuda.CUDAGraph.return_value.replay.call_count == 2


# -- nothing is made on the wrong device: with `meta` as the default device, what is made without naming one cannot meet the operands -------


@pytest.mark.parametrize("regime", REGIMES)
def test_problems_truth_and_contenders_name_their_device(regime: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def on_the_host(rows: int, wanted: float) -> Tensor:  # so many numbers as rows, moved by the caller
        with CPU:
            return target_gaps(rows, wanted)

    monkeypatch.setattr(gpu_problems, "target_gaps", on_the_host)
    with torch.device("meta"):
        problem = make_device_problem(regime, 24, 900, 64, CPU)
        for classes in (None, torch.unique(problem.labels)):
            truth = gpu_problems.device_truth(problem, 0.5, classes)
            assert truth.d_weight.device == truth.d_embeddings.device == CPU
        arena = DeviceArena(problem)
        for kind in (Eager, EagerAutocast, PartialFC, gpu_contenders.PartialFCBF16, PartialFCSampled, gpu_contenders.GpuReference):
            assert gpu_times.run_once(Device(), kind(arena)).device == CPU


@pytest.mark.parametrize("margin", [rf.ArcFace(), rf.MagFace(), rf.MVSoftmax("arc"), rf.CircleMargin(), rf.InterclassFilter(rf.ArcFace(), 0.1)], ids=repr)
def test_losses_make_nothing_on_the_default_device(margin: Any) -> None:
    g = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, 32, generator=g).requires_grad_() for n in (9, 50))
    labels = torch.arange(9) - 1
    with torch.device("meta"), rf.ops.use_backend("reference"):
        loss, stats = rf.margin_softmax_loss(x, w, labels, margin=margin, unknown_weight=0.1, return_stats=True)
        loss.backward()
    assert x.grad is not None and w.grad is not None and all(t.device == CPU for t in (loss, x.grad, w.grad, *stats))
