"""Exponentials kept between the sweeps: the same gradients, within a stated error in 16 bits, and no buffer reused too early."""

from __future__ import annotations

import copy
import gc
import pickle
from typing import Any

import pytest
import torch
from budgets import relative
from routes import HALF, NATIVE, Route, each, pair_format
from torch import Tensor

import recog_fast as rf
from recog_fast import native
from recog_fast.ops import _kept

C, D, N = 2500, 40, 21  # three blocks of classes, an odd depth, lanes to pad
KEEP = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MARGINS = {
    "arcface": lambda: rf.ArcFace(),
    "adaface": lambda: rf.AdaFace(),
    "curricular": lambda: rf.CurricularFace(),
    "mv": lambda: rf.MVSoftmax("am"),
    "circle": lambda: rf.CircleMargin(),
    "filter": lambda: rf.InterclassFilter(rf.CosFace(), 0.2),
}
SETTINGS: dict[str, dict[str, Any]] = {"plain": {}, "subcenters": {"subcenters": 3}, "memory": {}, "unknown": {"unknown_weight": 0.5}}


def make_head(keep: Any = False, setting: str = "plain", margin: str = "arcface", **options: Any) -> rf.MarginHead:
    torch.manual_seed(1)
    memory = rf.PrototypeMemory(C, D, rf.VPL(lam=0.4, delta=9, start=0)) if setting == "memory" else None
    head = rf.MarginHead(
        C, D, margin=MARGINS[margin](), scale=24.0, memory=memory, keep_exponentials=keep, **SETTINGS[setting], **options
    )
    if memory is not None:
        memory.write(torch.randn(30, D), torch.arange(30), 0)
        memory.flush()
        head.steps.fill_(1)  # VPL injects after its start
        assert head.memory is not None and float(head.memory.injection(1)[1].max()) > 0  # type: ignore[union-attr]
    return head


def batch(seed: int = 0, n: int = N, classes: int = C) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, D, generator=g), torch.randint(-1, classes, (n,), generator=g)


def dense(head: rf.MarginHead, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """loss, dx, dW of one training step's backward."""
    x, labels = batch(seed)
    x.requires_grad_()
    head.weight.grad = None
    loss = head(x, labels)
    loss.backward()
    assert x.grad is not None and head.weight.grad is not None
    return loss.detach(), x.grad, head.weight.grad.clone()


def check_half_kept(ours: Tensor, truth: Tensor, labels: Tensor, fixed_point: bool) -> None:
    """dW from exponentials in 16 bits: 4e-3 over all classes and over those that are nobody's target."""
    others = torch.ones(C, dtype=torch.bool)
    others[labels[labels >= 0]] = False
    assert relative(ours, truth) <= 4e-3
    assert relative(ours[others], truth[others]) <= 4e-3
    # class by class: bfloat16 holds each exponential to 2^-9 of itself; int16 to 2^-16 of the largest of its row and tile, so
    # classes of tiny gradient (0.04 of the median) were seen off by 17 % of it, 0.7 % of the median class's
    errors, sizes = (ours - truth).flatten(1).norm(dim=1), truth.flatten(1).norm(dim=1)
    assert bool((errors <= 1e-2 * sizes + (1e-2 * sizes.median() if fixed_point else 1e-6 * sizes.median())).all())


@each([*NATIVE, *HALF])
@pytest.mark.parametrize("kept", list(KEEP))
@pytest.mark.parametrize("setting", list(SETTINGS))
def test_kept_equals_recomputed(route: Route, setting: str, kept: str) -> None:
    """float32: within float32 rounding; 16 bits: within its budget. The forward is the same to the bit."""
    with route():
        plain = dense(make_head(setting=setting, compute_dtype=route.compute_dtype))
        ours = dense(make_head(KEEP[kept], setting=setting, compute_dtype=route.compute_dtype))
    assert torch.equal(plain[0], ours[0])
    # 16-bit sweeps that keep 16 bits read the very operands of the pull
    assert torch.equal(plain[1], ours[1])
    if kept == "float32":
        assert relative(ours[2], plain[2]) <= (5e-7 if not route.half else 2e-6)
    else:
        check_half_kept(ours[2], plain[2], batch()[1], pair_format(route) == "int16")


@pytest.mark.parametrize("kept", list(KEEP))
@pytest.mark.parametrize("setting", ["plain", "subcenters", "unknown"])
@pytest.mark.parametrize("margin", list(MARGINS))
def test_every_rule(margin: str, setting: str, kept: str) -> None:
    with NATIVE[0]():
        plain = dense(make_head(setting=setting, margin=margin))
        ours = dense(make_head(KEEP[kept], setting=setting, margin=margin))
    assert torch.equal(plain[0], ours[0])
    assert torch.equal(plain[1], ours[1])
    assert relative(ours[2], plain[2]) <= (5e-7 if kept == "float32" else 4e-3)


@pytest.mark.parametrize("kept", list(KEEP))
def test_a_small_budget_keeps_whole_blocks_and_recomputes_the_rest(kept: str) -> None:
    """Any budget gives the gradient; the buffer never exceeds it."""
    with NATIVE[0]():
        truth = dense(make_head())[2]
        full = make_head(KEEP[kept])
        dense(full)
        assert full.keep is not None
        whole = buffer(full).numel() * KEEP[kept].itemsize
        for budget in (1, 1000, whole // 3, whole // 2, whole - 1, whole, 4 * whole):
            head = make_head(KEEP[kept], keep_budget=budget)
            ours = dense(head)[2]
            held = buffer(head).numel() * KEEP[kept].itemsize
            assert held <= min(budget, whole)
            assert relative(ours, truth) <= (5e-7 if kept == "float32" else 4e-3), budget
        # 2NC or 4NC bytes of padded lanes and whole blocks, and the scales of tiles
        assert whole <= 1.3 * KEEP[kept].itemsize * 2880 * 32


def buffer(head: rf.MarginHead) -> Tensor:
    assert head.keep is not None and head.keep._buffer is not None
    return head.keep._buffer


@each([NATIVE[0], HALF[0]])
@pytest.mark.parametrize("kept", list(KEEP))
def test_threads_do_not_change_a_bit(route: Route, kept: str) -> None:
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with route():
                results.append(dense(make_head(KEEP[kept], "unknown", compute_dtype=route.compute_dtype)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def fused_steps(keep: Any, micro: int, steps: int = 3) -> Tensor:
    """W after `steps` optimizer steps of `micro` micro-batches."""
    head = make_head(keep)
    optimizer = rf.HeadSGD(head, lr=0.5)
    for step in range(steps):
        for part in range(micro):
            x, labels = batch(10 * step + part)
            head(x.requires_grad_(), labels).backward()
        optimizer.step()
    return head.weight.detach()


@pytest.mark.parametrize("micro", [1, 2, 3])
def test_fused_steps_with_micro_batches(micro: int) -> None:
    """One forward per step reads the kept exponentials; more are computed again: the same steps."""
    with NATIVE[0]():
        truth = fused_steps(False, micro)
        start = make_head().weight.detach()
        kept = fused_steps(torch.float32, micro)
        assert relative(kept - start, truth - start) <= 2e-6
        assert torch.equal(kept, truth) == (micro > 1)  # recomputed exponentials are the same bits
        assert relative(fused_steps(True, micro) - start, truth - start) <= (4e-3 if micro == 1 else 0)


def test_the_buffer_is_recycled_between_steps() -> None:
    head = make_head(True)
    optimizer = rf.HeadSGD(head, lr=0.1)
    addresses = set()
    with NATIVE[0]():
        for step in range(4):
            x, labels = batch(step)
            head(x.requires_grad_(), labels).backward()
            optimizer.step()
            addresses.add(buffer(head).data_ptr())
    assert len(addresses) == 1


def test_overlapping_forwards_do_not_share_a_buffer() -> None:
    """Two forwards, then both backwards in either order: each reads its own exponentials."""
    with NATIVE[0]():
        truth = [dense(make_head(), seed)[2] for seed in (0, 1)]
        for order in ((0, 1), (1, 0)):
            head = make_head(torch.float32)
            losses = [head(x.requires_grad_(), labels) for x, labels in (batch(0), batch(1))]
            for at in order:
                head.weight.grad = None
                losses[at].backward()
                assert relative(head.weight.grad, truth[at]) <= 5e-7  # type: ignore[arg-type]


def test_a_forward_after_backward_waits_for_the_step() -> None:
    """The row record, not the graph, still needs the buffer: forward in between (training or evaluation) must not overwrite it."""
    with NATIVE[0]():
        ends = []
        for between in ("nothing", "eval", "no_grad", "unused forward"):
            head = make_head(torch.float32)
            optimizer = rf.HeadSGD(head, lr=0.5)
            x, labels = batch(0)
            head(x.requires_grad_(), labels).backward()
            other, its_labels = batch(5)
            if between == "eval":
                head.eval()(other, its_labels)
                head.train()
            elif between == "no_grad":
                with torch.no_grad():
                    head(other, its_labels)
            elif between == "unused forward":
                head(other.requires_grad_(), its_labels)
            optimizer.step()
            ends.append(head.weight.detach())
    assert all(torch.equal(ends[0], end) for end in ends[1:])


def test_evaluation_and_no_grad_keep_nothing() -> None:
    head = make_head(True)
    x, labels = batch()
    with NATIVE[0](), torch.no_grad():
        head(x, labels)
        head.eval()(x, labels)
    assert head.keep is not None and head.keep._buffer is None


def test_retained_graphs_read_the_buffer_again() -> None:
    with NATIVE[0]():
        truth = dense(make_head())[2]
        head = make_head(torch.float32)
        x, labels = batch()
        loss = head(x.requires_grad_(), labels)
        for times in (1, 2):
            loss.backward(retain_graph=True)
            dense_other = make_head(torch.float32)
            dense(dense_other, 3)  # another head's pool is another's
            assert relative(head.weight.grad, times * truth) <= 5e-7  # type: ignore[arg-type]


@pytest.mark.parametrize("fused", [False, True])
def test_another_isa_between_the_sweeps(fused: bool) -> None:
    """Its tiles lie otherwise in the buffer: the exponentials are computed again."""
    head, plain = make_head(True), make_head()
    optimizers = [rf.HeadSGD(h, lr=0.5) for h in (head, plain)] if fused else []
    x, labels = batch()
    with NATIVE[0]():
        losses = [h(x.clone().requires_grad_(), labels) for h in (head, plain)]
    with Route("baseline", torch.float32, "auto", "baseline")():
        for loss in losses:
            loss.backward()
        for optimizer in optimizers:
            optimizer.step()
    ours, truth = (h.weight if fused else h.weight.grad for h in (head, plain))
    assert torch.equal(ours, truth)  # type: ignore[arg-type]


def test_a_dropped_graph_frees_the_buffer() -> None:
    head = make_head(True)
    with NATIVE[0]():
        x, labels = batch()
        loss = head(x.requires_grad_(), labels)
        address = buffer(head).data_ptr()
        del loss
        gc.collect()
        second = head(x, labels)
        assert buffer(head).data_ptr() == address
        third = head(x, labels)  # the second is alive: a buffer of its own, not the pool's
        assert buffer(head).data_ptr() == address
        second.backward()
        third.backward()


def test_changing_batch_sizes() -> None:
    """A last, smaller batch fits the buffer; a larger one replaces it."""
    with NATIVE[0]():
        head, plain = make_head(torch.float32), make_head()
        for n in (5, 40, 1, 0, 17):
            x, labels = batch(n, n)
            grads = []
            for h in (head, plain):
                h.weight.grad = None
                h(x.clone().requires_grad_(), labels).backward()
                grads.append(h.weight.grad)
            assert relative(*grads) <= 5e-7  # type: ignore[arg-type]


def test_copies_pickles_and_state_leave_the_buffer_behind() -> None:
    head = make_head(True)
    with NATIVE[0]():
        dense(head)
        size = buffer(head).numel() * 2
        assert len(pickle.dumps(head)) < head.weight.numel() * 4 + size // 2
        assert not any("keep" in key for key in head.state_dict())
        for twin in (copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
            assert twin.keep is not None and twin.keep._buffer is None
            assert twin.keep.budget == _kept.BUDGET and twin.keep.dtype == torch.bfloat16
            assert torch.equal(dense(twin)[2], dense(head)[2])


def test_a_frozen_weight() -> None:
    head = make_head(True)
    head.weight.requires_grad_(False)
    x, labels = batch()
    with NATIVE[0]():
        head(x.requires_grad_(), labels).backward()
        plain = make_head()
        other = x.detach().clone().requires_grad_()
        plain(other, labels).backward()
    assert head.weight.grad is None
    assert torch.equal(x.grad, other.grad)  # type: ignore[arg-type]


def test_nothing_is_kept_where_no_kernel_runs() -> None:
    for route_head in (make_head(True), make_head(True).double()):
        x, labels = batch()
        with rf.ops.use_backend("reference"):
            route_head(x.to(route_head.weight.dtype).requires_grad_(), labels).backward()
        assert route_head.keep is not None and route_head.keep._buffer is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keep_exponentials": torch.float16}, "keep_exponentials False, True, torch.float32 or torch.bfloat16"),
        ({"keep_exponentials": 1}, "keep_exponentials False, True, torch.float32 or torch.bfloat16, got 1"),
        ({"keep_exponentials": True, "keep_budget": 0}, "keep_budget > 0 bytes, got 0"),
        ({"keep_exponentials": True, "keep_budget": 1e9}, "keep_budget > 0 bytes"),
        ({"keep_exponentials": True, "drop_mass": 0.1}, "at most one of keep_exponentials, drop_mass and drop_elements"),
        ({"drop_mass": 1.0}, r"drop_mass in \[0, 1\)"),
        ({"drop_mass": float("nan")}, r"drop_mass in \[0, 1\)"),
    ],
)
def test_bad_options_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"MarginHead: expected {message}"):
        rf.MarginHead(10, 4, **change)


@pytest.mark.parametrize("wrong", [torch.zeros(64, dtype=torch.int16), torch.zeros(8, 8), torch.zeros(128)[::2]])
def test_the_operation_refuses_other_buffers(wrong: Tensor) -> None:
    x, w = torch.randn(3, 8), torch.randn(5, 8)
    with NATIVE[0](), pytest.raises(ValueError, match="kept as a contiguous 1-D float32, bfloat16 or int32 tensor"):
        torch.ops.recog_fast.negative_logsumexp(x, w, torch.arange(3), 8.0, None, None, None, None, False, True, kept=wrong)


@pytest.mark.parametrize("case", ["no pull", "mixed"])
def test_the_operation_refuses_what_it_would_not_write(case: str) -> None:
    """A sweep that leaves `kept` unwritten must not take it: the class sweep would read what was there before."""
    if native.load()[0] is None:
        pytest.skip(f"compiled kernels {native.load()[1]}")
    unit, weight = torch.nn.functional.normalize(torch.randn(4, 8), dim=1), torch.randn(20, 8)
    labels = torch.tensor([1, -1 if case == "mixed" else 2, 3, 4])
    members = torch.arange(10) if case == "mixed" else None
    with pytest.raises(ValueError, match="kept"):
        torch.ops.recog_fast.negative_logsumexp(
            unit, weight, labels, 8.0, None, None, None, None, False, True, False, case == "mixed", torch.empty(10_000), members
        )
