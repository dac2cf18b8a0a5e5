"""memory_write and the norm statistics of csrc/cuda, emulated on the CPU, against what torch does."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from emulated_cuda import ORDERS, Guard, take_over
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import recog_fast as rf
from recog_fast.memory.policies import NormStatistics, QAFace
from recog_fast.ops import _cuda_native, _dispatch
from recog_fast.ops.memory_write import MAX_STEP, reference_memory_write

State = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
Batch = tuple[Tensor, Tensor, Tensor, int]


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    take_over_memory(monkeypatch)


def take_over_memory(patch: pytest.MonkeyPatch, order: str = "forward") -> None:
    """`_cuda_native.memory_write` takes CPU tensors where the table lets it take CUDA ones."""
    take_over(patch, order)
    ours = _dispatch.call_of_device

    def on_cuda(*arguments: object, **options: object) -> _dispatch.Call:
        return dataclasses.replace(ours(*arguments, **options), devices=frozenset({"cuda"}), cuda=True)  # type: ignore[arg-type]

    patch.setattr(_dispatch, "call_of_device", on_cuda)


def empty(size: int, classes: int, columns: int, dtype: torch.dtype = torch.float32) -> State:
    return (
        torch.zeros(size, columns, dtype=dtype), torch.zeros(size), torch.full((size,), -1), torch.full((size,), -1),
        torch.full((classes,), -1, dtype=torch.int32), torch.zeros((), dtype=torch.int64),
    )  # fmt: skip


def batch(n: int, classes: int, columns: int, step: int, seed: int, dtype: torch.dtype = torch.float32) -> Batch:
    """Labels from two below 0 to one past the last class, many of them twice."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(-2, classes + 1, (n,), generator=g)
    return torch.randn(n, columns, generator=g).to(dtype), labels, torch.rand(n, generator=g, dtype=torch.float64), step


def same(ours: State, truth: State) -> None:
    """Bit for bit."""
    for a, b, name in zip(ours, truth, ("rows", "strength", "stamp", "owner", "slot", "cursor"), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b), name


def write_both(state: State, batches: list[Batch]) -> tuple[State, list[int]]:
    """The state after the batches, and how many entries each cost; the kernels' is the reference's."""
    guard = Guard()
    ours, truth = tuple(guard(t) for t in state), tuple(t.clone() for t in state)
    lost = []
    for rows, labels, strengths, step in batches:
        evicted = _cuda_native.memory_write(*ours, guard(rows), guard(labels), guard(strengths), step)
        lost.append(int(reference_memory_write(*truth, rows, labels, strengths, step)))
        assert evicted.dtype == torch.int64 and evicted.shape == () and int(evicted) == lost[-1]
        same(ours, truth)  # type: ignore[arg-type]
    guard.check()
    return truth, lost  # type: ignore[return-value]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data(), size=st.integers(1, 7), classes=st.integers(1, 9))
def test_small_rings_equal_the_reference(data: st.DataObject, size: int, classes: int) -> None:
    """Free slots, evictions, refreshed classes, duplicates, more classes than slots, steps that repeat or go back."""
    with pytest.MonkeyPatch.context() as patch:
        take_over_memory(patch)
        step, batches = 0, []
        for seed in range(data.draw(st.integers(1, 6))):
            step = max(0, step + data.draw(st.integers(-1, 2)))
            batches.append(batch(data.draw(st.integers(0, 10)), classes, 3, step, seed))
        write_both(empty(size, classes, 3), batches)


# several blocks of rows and of slots; a ring that fills within a batch; more classes in the batch than slots
@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize(("size", "classes", "n", "count"), [(20000, 70000, 700, 3), (900, 5000, 600, 4), (300, 5000, 777, 3), (8192, 9000, 256, 2)])
def test_large_rings_equal_the_reference(size: int, classes: int, n: int, count: int) -> None:
    state = empty(size, classes, 4)
    if size > 8192:  # full, with stamps from all of their range, in no order
        g = torch.Generator().manual_seed(1)
        owners = torch.randperm(classes, generator=g)[:size]
        state[2].copy_(torch.randint(0, MAX_STEP, (size,), generator=g))
        state[2][torch.randperm(size, generator=g)[: size // 2]] = torch.randint(5, 9, (size // 2,), generator=g)
        state[3].copy_(owners)
        state[4][owners] = torch.arange(size, dtype=torch.int32)
        state[5].fill_(size)
    _, lost = write_both(state, [batch(n, classes, 4, 100 + i // 2, i) for i in range(count)])
    assert (sum(lost) > 0) == (size != 8192)


@pytest.mark.usefixtures("emulated")
def test_the_largest_step_and_a_ring_of_one_stamp() -> None:
    _, lost = write_both(empty(300, 2000, 2), [batch(290, 2000, 2, MAX_STEP, 0), batch(200, 2000, 2, MAX_STEP, 1), batch(200, 2000, 2, 0, 2)])
    assert lost[1] > 0 and lost[2] > 0


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("columns", [5, 8, 64])
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("target", [torch.float32, torch.bfloat16])
def test_rows_are_converted_as_torch_does(target: torch.dtype, source: torch.dtype, columns: int) -> None:
    write_both(empty(20, 50, columns, target), [batch(30, 50, columns, step, step, source) for step in range(2)])


@pytest.mark.usefixtures("emulated")
def test_no_rows_and_no_labelled_rows() -> None:
    nothing = torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64), torch.zeros(0), 3
    unlabelled = torch.ones(4, 2), torch.full((4,), -1), torch.ones(4), 4
    state, lost = write_both(empty(3, 5, 2), [nothing, unlabelled])
    assert lost == [0, 0] and int(state[5]) == 0


def test_no_order_of_threads_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for order in ORDERS:
        take_over_memory(monkeypatch, order)
        results.append(write_both(empty(9000, 30000, 3), [batch(1300, 30000, 3, step, step) for step in range(9)]))
    assert sum(results[0][1]) > 0
    for state, lost in results[1:]:
        same(state, results[0][0])
        assert lost == results[0][1]


@pytest.mark.usefixtures("emulated")
def test_what_the_kernel_does_not_take_goes_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """float64 and float16 rings, `use_backend("reference")`, a view as state: no launch, which would fail here."""
    monkeypatch.setenv("RECOG_FAST_EMULATED_ERROR", "35")
    x, y, lam, _ = batch(6, 9, 2, 0, 0)
    for dtype in (torch.float64, torch.float16):
        _cuda_native.memory_write(*empty(4, 9, 2, dtype), x, y, lam, 0)
    view = torch.zeros(4, 4)[:, :2]
    _cuda_native.memory_write(view, *empty(4, 9, 2)[1:], x, y, lam, 0)
    with rf.ops.use_backend("reference"):
        _cuda_native.memory_write(*empty(4, 9, 2), x, y, lam, 0)
    with pytest.raises(RuntimeError, match="memory_write: no driver"):
        _cuda_native.memory_write(*empty(4, 9, 2), x, y, lam, 0)


@pytest.mark.usefixtures("emulated")
@pytest.mark.filterwarnings("ignore:PrototypeMemory. the ring of 12 rows is full")
def test_a_memory_lives_through_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """PrototypeMemory with QAFace on the kernels and on torch: the same state."""

    def run() -> rf.PrototypeMemory:
        torch.manual_seed(0)
        memory = rf.PrototypeMemory(50, 6, rf.QAFace(tau=0.5, delta=2, on_reject="skip"), capacity=12)
        for step in range(6):
            memory.write(torch.randn(20, 6) * torch.rand(20, 1), torch.randint(-1, 50, (20,)), step)
        memory.flush()
        return memory

    monkeypatch.setattr("recog_fast.memory.prototypes.memory_write", _cuda_native.memory_write)
    ours = run()
    monkeypatch.undo()
    truth = run()
    for name, value in truth.state_dict().items():
        if name in ("norm_mean", "norm_std", "ring_strength"):
            assert torch.allclose(ours.state_dict()[name], value, rtol=1e-6 if name == "ring_strength" else 1e-13, atol=0.0), name
        else:
            assert torch.equal(ours.state_dict()[name], value), name
    assert int(truth.evicted) > 0 and int(truth.rejected) > 0


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("literal", [False, True])
def test_norm_statistics_are_torchs(order: str, dtype: torch.dtype, literal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of no, one, two and many labelled rows, as the first one and later; sums of doubles in another order."""
    policy, g = QAFace(literal=literal), torch.Generator().manual_seed(2)
    batches = []
    for n, rate in ((0, 1.0), (5, 0.0), (1, 1.0), (2, 1.0), (300, 0.7), (1025, 1.0), (3, 0.0), (1, 1.0)):
        batches.append((20 + 3 * torch.randn(n, generator=g, dtype=dtype), torch.rand(n, generator=g) < rate))
    for first in range(len(batches)):
        zero = torch.zeros((), dtype=torch.float64)
        ours = truth = NormStatistics(zero, zero, torch.zeros((), dtype=torch.int64))
        for norms, labelled in batches[first:]:
            truth = policy.update(norms, labelled, truth)
            with monkeypatch.context() as patch:
                take_over(patch, order)
                guard = Guard()
                ours = policy.update(guard(norms), guard(labelled), NormStatistics(*(guard(t) for t in ours)))
                guard.check()
            assert torch.equal(ours.batches, truth.batches)
            for a, b in ((ours.mean, truth.mean), (ours.std, truth.std)):
                assert a.dtype == torch.float64 and a.shape == () and abs(a.item() - b.item()) <= 1e-13 * abs(b.item())
