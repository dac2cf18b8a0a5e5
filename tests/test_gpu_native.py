"""The CUDA C++ kernels on a GPU: against float64, their Triton and torch fallbacks, and themselves; marker `gpu`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from test_cuda_memory import Batch, State, batch, empty, same
from test_cuda_rows import (
    SIZES,
    Sgd,
    after,
    by_row,
    epilogue,
    exact_prototypes,
    injection,
    problem,
    prototypes,
    rates_of,
)
from torch import Tensor

import recog_fast as rf
from recog_fast import native
from recog_fast.memory.policies import NormStatistics, QAFace
from recog_fast.ops import _cuda_native, _dispatch
from recog_fast.ops.memory_write import MAX_STEP, memory_write, reference_memory_write

DEVICE = "cuda"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")]


@pytest.fixture(autouse=True)
def _takes_the_kernels() -> None:
    missing = native.cuda_missing(0)
    if missing is not None:
        pytest.skip(f"Triton and torch run here: {missing}")


def there(t: Tensor) -> Tensor:
    return t.to(DEVICE, copy=True)


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """Whatever waits for the device raises."""
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


STEPS: list[tuple[bool, Any, bool]] = [
    (True, None, False), (True, Sgd(), True), (True, Sgd(nesterov=True), True), (True, Sgd(momentum=0.0), False), (False, Sgd(), True),
]  # fmt: skip


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("memory", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", SIZES)
def test_epilogue_agrees_with_float64(columns: int, memory: torch.dtype | None, shift: int) -> None:
    p = problem(columns, memory, columns)
    for arguments in STEPS:
        ours = epilogue(p, *arguments, shift, DEVICE)
        by_row(ours, after(p, *arguments, False), after(p, *arguments, True), arguments)
        again = epilogue(p, *arguments, shift, DEVICE)
        assert all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(ours, again, strict=True))


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("memory", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", SIZES)
def test_prototypes_agree_with_float64(columns: int, memory: torch.dtype | None, shift: int) -> None:
    p = problem(columns, memory, columns)
    for renormalize in (True, False):
        ours = prototypes(p, renormalize, torch.float32, shift, DEVICE)
        by_row([ours], [exact_prototypes(p, renormalize, False)], [exact_prototypes(p, renormalize, True)], renormalize)
        half, rounded = prototypes(p, renormalize, torch.bfloat16, shift, DEVICE), ours.bfloat16()
        assert torch.equal(torch.isnan(half), torch.isnan(rounded)) and torch.equal(half.nan_to_num(7.0), rounded.nan_to_num(7.0))


@pytest.mark.skipif(_dispatch.triton_missing() is not None, reason="no Triton for this device")
@pytest.mark.parametrize("rows", [1, 5000])
@pytest.mark.parametrize("columns", [128, 500, 512, 1024])
def test_epilogue_and_prototypes_agree_with_triton(columns: int, rows: int) -> None:
    """Many rows, ordinary ones: both within the same budget of float64."""
    from recog_fast.triton_kernels.class_step import Sgd as TritonSgd
    from recog_fast.triton_kernels.class_step import run_class_epilogue
    from recog_fast.triton_kernels.effective_prototypes import run_prototype_rows

    p = problem(columns, torch.bfloat16, 3, max(rows, 14))
    p = {name: t[12 : 12 + rows] if name in ("weight", "d", "velocity", "slot") else t for name, t in p.items()}
    sgd: Any = TritonSgd(0.1, 0.9, 5e-4, True)
    truth, plain = after(p, True, sgd, True, True), after(p, True, sgd, True, False)
    for run in (_cuda_native.run_class_epilogue, run_class_epilogue):
        by_row_of_all(epilogue(p, True, sgd, True, 0, DEVICE, run), plain, truth)
    for run in (_cuda_native.run_prototype_rows, run_prototype_rows):
        by_row_of_all([prototypes(p, True, torch.float32, 0, DEVICE, run)], [exact_prototypes(p, True, False)], [exact_prototypes(p, True, True)])


def by_row_of_all(ours: list[Tensor], plain: list[Tensor], truth: list[Tensor]) -> None:
    """`by_row`'s budget for all rows at once."""
    for a, b, c in zip(ours, plain, truth, strict=True):
        error, own = (a.double() - c).abs().amax(1), (b.double() - c).abs().amax(1)
        assert bool((error <= 2 * own + 2e-6 * (c.abs().amax(1) + 1)).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [33, 512, 1024])
def test_the_next_prototypes_are_those_of_the_new_weight(columns: int, dtype: torch.dtype) -> None:
    p, later = ({name: there(t) for name, t in problem(columns, torch.bfloat16, seed, 3000).items()} for seed in (0, 5))
    out, again = torch.empty(2, 3000, columns, dtype=dtype, device=DEVICE)
    _cuda_native.run_class_epilogue(
        p["d"], p["weight"], injection(p), renormalize=True, velocity=p["velocity"], **rates_of(Sgd(), DEVICE), prototypes=out, next_injection=injection(later)
    )  # fmt: skip
    _cuda_native.run_prototype_rows(p["weight"], injection(later), again, renormalize=True)
    assert torch.equal(out.nan_to_num(7.0), again.nan_to_num(7.0)) and bool(torch.isfinite(out).any())


def test_more_than_2_31_elements() -> None:
    rows, columns = 2**22 + 40000, 512
    if torch.cuda.mem_get_info()[0] < 30 << 30:
        pytest.skip("needs 30 GB of free device memory")
    weight = torch.zeros(rows, columns, device=DEVICE)
    d = torch.zeros(rows, columns, device=DEVICE)
    weight[-3:], d[-3:] = torch.randn(3, columns, device=DEVICE), torch.randn(3, columns, device=DEVICE)
    before, out = weight[-3:].cpu(), torch.empty(rows, columns, dtype=torch.bfloat16, device=DEVICE)
    _cuda_native.run_class_epilogue(d, weight, None, renormalize=True, **rates_of(Sgd(momentum=0.0), DEVICE), prototypes=out)
    p = {"weight": before, "d": d[-3:].cpu(), "velocity": before}
    by_row([weight[-3:].cpu()], *([after(p, True, Sgd(momentum=0.0), False, wide)[0]] for wide in (False, True)), "end")
    assert not bool(weight[:-3].any()) and not bool(out[:-3].any())
    assert (out[-3:].float().cpu() - torch.nn.functional.normalize(weight[-3:].cpu(), dim=1)).abs().max() <= 2**-9


def write_both(state: State, batches: list[Batch]) -> list[int]:
    """The device's state is the CPU reference's, bit for bit, after every batch; nothing waits for the device."""
    ours, truth, lost = tuple(there(t) for t in state), tuple(t.clone() for t in state), []
    for rows, labels, strengths, step in batches:
        taken = there(rows), there(labels), there(strengths)
        with no_synchronisation():
            evicted = memory_write(*ours, *taken, step)
        lost.append(int(reference_memory_write(*truth, rows, labels, strengths, step)))
        assert evicted.device.type == DEVICE and int(evicted) == lost[-1]
        same(tuple(t.cpu() for t in ours), truth)  # type: ignore[arg-type]
    return lost


@pytest.mark.parametrize(("size", "classes", "n", "count"), [
    (1, 3, 7, 3), (20000, 70000, 700, 4), (900, 5000, 600, 6), (300, 5000, 777, 3), (8192, 9000, 256, 2), (100_000, 400_000, 4096, 30), (65536, 200_000, 65536, 3),
])  # fmt: skip
def test_memory_write_is_torchs(size: int, classes: int, n: int, count: int) -> None:
    lost = write_both(empty(size, classes, 8), [batch(n, classes, 8, 100 + i // 2, i) for i in range(count)])
    assert sum(lost) > 0 or size == 8192


@pytest.mark.parametrize("columns", [5, 8, 512])
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("target", [torch.float32, torch.bfloat16])
def test_memory_rows_are_converted_as_torch_does(target: torch.dtype, source: torch.dtype, columns: int) -> None:
    write_both(empty(200, 500, columns, target), [batch(300, 500, columns, step, step, source) for step in (0, 1, MAX_STEP)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_norm_statistics_are_torchs(dtype: torch.dtype) -> None:
    policy, g = QAFace(), torch.Generator().manual_seed(2)
    zero = torch.zeros((), dtype=torch.float64)
    truth = NormStatistics(zero, zero, torch.zeros((), dtype=torch.int64))
    ours = NormStatistics(*(there(t) for t in truth))
    for n, rate in ((5, 0.0), (1, 1.0), (2, 1.0), (300, 0.7), (5000, 1.0), (0, 1.0), (1, 1.0)):
        norms, labelled = 20 + 3 * torch.randn(n, generator=g, dtype=dtype), torch.rand(n, generator=g) < rate
        truth = policy.update(norms, labelled, truth)
        taken = there(norms), there(labelled)
        with no_synchronisation():
            ours = policy.update(*taken, ours)
        for a, b in zip(ours, truth, strict=True):
            assert a.device.type == DEVICE and abs(a.item() - b.item()) <= 1e-13 * abs(b.item())


def test_everything_follows_torchs_stream_and_can_be_captured() -> None:
    """A step, P and a memory write in a CUDA graph, replayed: what the same calls do one by one."""
    p = {name: there(t) for name, t in problem(512, torch.bfloat16, 1, 600).items()}
    rows, labels, strengths, _ = (there(t) if isinstance(t, Tensor) else t for t in batch(300, 5000, 512, 0, 1, torch.bfloat16))
    out = torch.empty(600, 512, dtype=torch.bfloat16, device=DEVICE)
    ring = tuple(there(t) for t in empty(400, 5000, 512, torch.bfloat16))
    start = [t.clone() for t in (p["weight"], p["velocity"], *ring)]

    def calls() -> Tensor:
        _cuda_native.run_class_epilogue(p["d"], p["weight"], injection(p), renormalize=True, velocity=p["velocity"], **rates_of(Sgd(), DEVICE))
        _cuda_native.run_prototype_rows(p["weight"], injection(p), out, renormalize=True)
        return memory_write(*ring, rows, labels, strengths, 3)

    lost = int(calls())
    expected = [t.clone() for t in (p["weight"], p["velocity"], *ring, out)]
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        captured = calls()
    for t, before in zip((p["weight"], p["velocity"], *ring), start, strict=True):
        t.copy_(before)
    graph.replay()
    for t, truth in zip((p["weight"], p["velocity"], *ring, out), expected, strict=True):
        assert torch.equal(t.nan_to_num(7.0) if t.is_floating_point() else t, truth.nan_to_num(7.0) if t.is_floating_point() else truth)
    assert int(captured) == lost


def test_a_head_with_memory_runs_on_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """`HeadSGD` with VPL on the kernels and with the extension's CUDA kernels hidden: the same training, within rounding."""
    if _dispatch.triton_missing() is not None:
        pytest.skip("no Triton for this device")

    def train() -> Tensor:
        torch.manual_seed(0)
        memory = rf.PrototypeMemory(700, 64, rf.VPL(start=1), capacity=60)
        head = rf.MarginHead(700, 64, margin=rf.ArcFace(), memory=memory).to(DEVICE)
        optimizer = rf.HeadSGD(head, lr=0.1)
        for step in range(5):
            g = torch.Generator().manual_seed(step)
            x = torch.randn(48, 64, generator=g).to(DEVICE).requires_grad_()
            labels = torch.randint(0, 700, (48,), generator=g).to(DEVICE)
            head(x, labels, keys=x.detach()).backward()
            optimizer.step()
        return head.weight.detach().cpu()

    assert _dispatch.CUDA_NATIVE in rf.backends()["dispatch"] and "CUDA 1" in rf.backends()["cuda"]
    ours = train()
    monkeypatch.setattr(native, "cuda_missing", lambda index=0: "hidden (test)")
    truth = train()
    assert (ours - truth).norm() <= 1e-4 * truth.norm()
