"""Steps and kernels over sampled classes: what moves the classes left out, any number of members, the same bits."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from golden import cases, load
from hypothesis import given, settings
from hypothesis import strategies as st
from routes import NATIVE, Route, each
from test_margin_softmax import relative
from test_ops import calls, compare, sample
from test_sampling import BOTH, C, D, N, batch, make_head, tolerance
from torch import Tensor

import recog_fast as rf
from recog_fast import reference


@each(BOTH)
@pytest.mark.parametrize("options", ["plain", "nesterov", "subcenters", "memory", "unknown", "cosine", "no momentum"])
@pytest.mark.parametrize("unsampled", ["dense", "sparse"])
def test_fused_steps_equal_dense_steps(route: Route, unsampled: str, options: str) -> None:
    """HeadSGD on a sampled head against torch.optim.SGD on the dense gradients; sparse: SGD on the rows seen alone."""
    extra: dict[str, Any] = {"subcenters": {"subcenters": 3}, "unknown": {"unknown_weight": 0.3}}.get(options, {})
    held = [rf.PrototypeMemory(C, D, rf.VPL(lam=0.4, delta=3, start=0), dtype=route.dtype) if options == "memory" else None for _ in range(2)]
    heads = [make_head(route, memory=memory, **extra) for memory in held]
    settings: dict[str, Any] = {"lr": 0.5, "momentum": 0.0 if options == "no momentum" else 0.9, "weight_decay": 1e-2, "nesterov": options == "nesterov"}
    fused = rf.HeadSGD(heads[0], unsampled=unsampled, **settings)  # type: ignore[arg-type]
    dense = torch.optim.SGD([heads[1].weight], **settings)
    with route():
        for step in range(4):
            fused.zero_grad()
            dense.zero_grad()
            before = copy.deepcopy((heads[1].weight.detach(), dense.state_dict()))
            touched = torch.zeros(C, dtype=torch.bool)
            for micro in range(2):
                x, labels = batch(route, 10 * step + micro)
                labels[0] = -1 if options == "unknown" else labels[0]
                keys = x if options == "memory" and micro == 1 else None
                for head in heads:
                    loss = head(x.clone().requires_grad_(), labels, keys=keys, step=step)
                    loss = loss + head.cosine(x, labels.clamp_min(0)).sum() if options == "cosine" else loss
                    loss.backward()
                touched[heads[0].last_sampled] = touched[labels[labels >= 0]] = True
                assert torch.equal(heads[0].last_sampled, heads[1].last_sampled)  # type: ignore[arg-type]
            fused.step()
            dense.step()
            if unsampled == "sparse" and options != "unknown":
                _undo(heads[1].weight, dense, before, ~touched)
            assert heads[0].weight.grad is None
            assert relative(heads[0].weight, heads[1].weight) <= (1e-12 if route.dtype == torch.float64 else 3e-6), step
            left_out = (heads[0].weight.detach() == before[0].to(route.dtype)).flatten(1).all(1)
            assert bool(left_out.any()) == (unsampled == "sparse" and options != "unknown")


def _undo(weight: Tensor, optimizer: torch.optim.SGD, before: Any, rows: Tensor) -> None:
    """Puts weight and momentum of `rows` back to where they were before the step."""
    with torch.no_grad():
        weight[rows] = before[0][rows]
        buffer = optimizer.state[weight].get("momentum_buffer")
        if buffer is not None:
            old = before[1]["state"].get(0, {}).get("momentum_buffer")
            buffer[rows] = 0 if old is None else old[rows]


@each(BOTH)
def test_attached_cosines_alone_touch_their_own_classes(route: Route) -> None:
    head = make_head(route)
    optimizer = rf.HeadSGD(head, lr=0.1, unsampled="sparse")
    start = head.weight.detach().clone()
    x, labels = batch(route)
    with route():
        head.cosine(x.requires_grad_(), labels).sum().backward()
        optimizer.step()
    moved = (head.weight != start).any(1)
    assert torch.equal(moved.nonzero().squeeze(1), labels.unique())


@each(BOTH)
@pytest.mark.parametrize("unsampled", ["dense", "sparse"])
def test_attached_cosines_of_no_rows_are_a_gradient_of_0(route: Route, unsampled: str) -> None:
    head = make_head(route)
    optimizer = rf.HeadSGD(head, lr=0.1, momentum=0.0, weight_decay=0.5, unsampled=unsampled)  # type: ignore[arg-type]
    start = head.weight.detach().clone()
    x, labels = batch(route, n=0)
    with route():
        head.cosine(x.requires_grad_(), labels).sum().backward()
        assert len(head._pending) == 1  # the case meant
        optimizer.step()
    assert relative(head.weight, start if unsampled == "sparse" else 0.95 * start) <= tolerance(route)


@each(BOTH)
@pytest.mark.parametrize("name", cases("sgd"))
def test_golden_policies(name: str, route: Route) -> None:
    """sgd__sparse and sgd__dense through class_step: rows whose gradient is given by (row, class, coefficient) alone."""
    case = load(name)
    rows = case.get("in_rows")
    w = case["in_w"].to(route.dtype)
    seen = torch.arange(len(w)) if rows is None else rows
    velocity = torch.zeros_like(w)
    for k in range(case.kwargs["steps"]):
        gradient = case[f"in_g{k}"].to(route.dtype)[seen]
        terms = torch.zeros(5, len(seen), dtype=route.dtype)
        terms[0], terms[2] = 1e30, 1.0  # no negatives; the target's gradient is the row itself
        # A gradient with a part along W^ cannot come through the normalisation: compare with the tangent part of it.
        unit = torch.nn.functional.normalize(w[seen], dim=1)
        tangent = (gradient - (gradient * unit).sum(1, keepdim=True) * unit) / w[seen].norm(dim=1, keepdim=True)
        expected, speed = w.clone(), velocity.clone()
        part, part_speed = expected[seen], speed[seen]
        reference.sgd_update(part, part_speed, tangent, case.kwargs["lr"], case.kwargs["momentum"], case.kwargs["wd"])
        expected[seen], speed[seen] = part, part_speed
        with route():
            torch.ops.recog_fast.class_step(
                gradient, seen, terms, w, velocity, 1.0, None, None, None, None, True, case.kwargs["lr"], case.kwargs["momentum"],
                case.kwargs["wd"], False, False, None, None if rows is None else seen[:1], rows is not None,
            )  # fmt: skip
        allowed = 1e-12 if route.dtype == torch.float64 else 1e-6
        assert relative(w, expected) <= allowed
        assert relative(velocity, speed) <= allowed


@each([NATIVE[0]])
@pytest.mark.parametrize("unsampled", ["dense", "sparse"])
@pytest.mark.parametrize("options", [{}, {"subcenters": 2}, {"unknown_weight": 0.1}], ids=["plain", "subcenters", "unknown"])
def test_threads_do_not_change_a_bit(route: Route, unsampled: str, options: dict[str, Any]) -> None:
    """33 x 3000 x 70: enough work for more than one thread to start."""
    before, results = torch.get_num_threads(), []
    x, labels = torch.randn(33, 70), torch.randint(0, 5000, (33,))
    labels[4] = -1
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            torch.manual_seed(0)
            head = rf.MarginHead(5000, 70, sample_rate=0.6, sample_seed=1, **options)
            with route():
                (dense,) = torch.autograd.grad(head(x, labels), head.weight)
                optimizer = rf.HeadSGD(head, lr=0.1, unsampled=unsampled)  # type: ignore[arg-type]
                loss = head(x, labels)
                loss.backward()
                optimizer.step()
            results.append((loss.detach(), dense, head.weight.detach().clone()))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(p, q) for p, q in zip(results[0], other, strict=True))


# Members below, at and across the ends of a tile (48) and a block (960); the first and the last class in and out.
@each(NATIVE)
@pytest.mark.parametrize("count", [1, 47, 48, 49, 960, 961, 1999, 2000])
@pytest.mark.parametrize("ends", [(True, True), (False, False), (True, False)])
def test_any_number_of_members(route: Route, count: int, ends: tuple[bool, bool]) -> None:
    g = torch.Generator().manual_seed(count)
    inner = torch.randperm(1998, generator=g) + 1
    fixed = [c for c, there in ((0, ends[0]), (1999, ends[1])) if there][:count]
    members = torch.cat([torch.tensor(fixed, dtype=torch.int64), inner[: count - len(fixed)]]).sort().values
    w = torch.randn(2000, 9, generator=g)
    unit = torch.nn.functional.normalize(torch.randn(5, 9, generator=g), dim=1)
    labels = torch.randint(0, 2000, (5,), generator=g)
    terms = torch.rand(5, 5, generator=g)
    terms[4] = 0.0
    results = []
    for backend in ("auto", "reference"):
        v, moved = torch.ones_like(w), w.clone()
        with route(), rf.ops.use_backend(backend):
            sums = torch.ops.recog_fast.negative_logsumexp(unit, w, labels, 8.0, None, None, None, None, False, True, members=members)
            gradient = torch.ops.recog_fast.class_gradient(unit, labels, terms, w, 8.0, None, None, None, None, False, True, members=members)
            torch.ops.recog_fast.class_step(
                unit, labels, terms, moved, v, 8.0, None, None, None, None, True, 0.1, 0.9, 1e-2, False, False, None, members, count % 2 == 0
            )
        results.append((*sums, gradient, moved, v))
    assert torch.equal(results[0][2], results[1][2])
    for ours, truth in zip(results[0], results[1], strict=True):
        if bool(torch.isfinite(truth).all()):
            assert relative(ours.double(), truth.double()) <= 2e-5
        else:
            assert torch.equal(ours, truth)


def test_members_that_do_not_fit_are_refused() -> None:
    x, labels = batch(NATIVE[0])
    w = torch.randn(C, D)
    for members in (torch.tensor([3, 2]), torch.tensor([1, 1]), torch.tensor([-1, 2]), torch.tensor([0, C]), torch.tensor([], dtype=torch.int64), torch.ones(2, 2)):
        with NATIVE[0](), pytest.raises(ValueError, match="expected members"):
            torch.ops.recog_fast.negative_logsumexp(x, w, labels, 8.0, None, None, None, None, False, True, members=members)
        with NATIVE[0](), pytest.raises(ValueError, match="expected members"):
            torch.ops.recog_fast.class_gradient(x, labels, torch.zeros(5, N), w, 8.0, None, None, None, None, False, True, members=members)


def test_rows_of_two_class_sets_are_refused() -> None:
    head = make_head(NATIVE[0])
    optimizer = rf.HeadSGD(head, lr=0.1)
    x, labels = batch(NATIVE[0])
    late = head(x.clone().requires_grad_(), labels)
    optimizer.step()  # no rows: W stays, the clock moves
    head(x.clone().requires_grad_(), labels).backward()
    late.backward()
    weight = head.weight.detach().clone()
    with pytest.raises(RuntimeError, match="sampled classes .*got 1 of 2|got 1 of 2 micro-batches"):
        optimizer.step()
    assert torch.equal(head.weight, weight)
    with pytest.raises(ValueError, match="the head's own count 1 with HeadSGD and sampled classes, got 9"):
        head(x, labels, step=9)
    head(x.clone().requires_grad_(), labels).backward()
    head.sample_rate = 1.0
    head(x.clone().requires_grad_(), labels).backward()
    with pytest.raises(RuntimeError, match="got 1 of 2"):
        optimizer.step()


def drawn(s: dict[str, Any], seed: int) -> Tensor:
    """Some classes of a sample, ascending, at least one."""
    classes = s["weight"].shape[0]
    g = torch.Generator().manual_seed(seed)
    return torch.randperm(classes, generator=g)[: max(1, classes // 3)].sort().values


def sampled_calls(s: dict[str, Any], seed: int, sparse: bool) -> dict[str, tuple[Any, ...]]:
    """Arguments of the operations that take members."""
    options = {"negative_logsumexp": (False, True, None), "class_gradient": (False, None), "class_step": (False, None)}
    last = {"class_step": (sparse,)}
    return {stem: (*calls(s)[stem], *its, drawn(s, seed), *last.get(stem, ())) for stem, its in options.items()}


# As test_ops.py's: around a lane panel, a tile and a block; targets in and out of the members; every kind of row.
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    n=st.sampled_from([0, 1, 3, 16, 17, 33]),
    c=st.sampled_from([1, 2, 47, 145, 2000, 3000]),
    d=st.sampled_from([2, 7, 16, 65]),
    k=st.sampled_from([1, 1, 2, 5]),
    rules=st.booleans(),
    memory=st.booleans(),
    unknown=st.booleans(),
    sparse=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_fuzzed_members_agree_with_the_reference(n: int, c: int, d: int, k: int, rules: bool, memory: bool, unknown: bool, sparse: bool, seed: int) -> None:
    s = sample(n, c if k == 1 else max(1, c // k), d, k, seed=seed, rules=rules, memory=memory)
    s["terms"][4] = s["terms"][4] if unknown else 0.0
    compare(s, sampled_calls(s, seed, sparse))


@pytest.mark.parametrize("stem", ["negative_logsumexp", "class_gradient", "class_step"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("kinds", ["margin", "mixed"])
def test_opcheck(stem: str, backend: str, kinds: str) -> None:
    s = sample(k=2)
    s["terms"][4] = 0.0 if kinds == "margin" else s["terms"][4]
    arguments = sampled_calls(s, 0, sparse=True)[stem]
    with rf.ops.use_backend(backend):
        torch.library.opcheck(getattr(torch.ops.recog_fast, stem).default, arguments)


@each(BOTH)
def test_gradients_of_the_operation(route: Route) -> None:
    """lse is differentiable with members too: rows labelled -1 through all classes, the others through the members."""
    s = sample(rules=False)
    members = drawn(s, 1)
    labels = s["labels"].clone()
    labels[0] = -1
    unit, w = (s[k].to(route.dtype).requires_grad_() for k in ("unit", "weight"))
    upstream = torch.randn(len(labels), dtype=torch.float64)
    with route():
        lse, *_ = torch.ops.recog_fast.negative_logsumexp(unit, w, labels, 8.0, None, None, None, None, False, True, members=members)
        ours = torch.autograd.grad((lse * upstream).sum(), (unit, w))
    a, b = s["unit"].double().requires_grad_(), s["weight"].double().requires_grad_()
    cosine = torch.einsum("nd,cd->nc", a, torch.nn.functional.normalize(b, dim=1))
    negative = torch.zeros_like(cosine, dtype=torch.bool).index_fill_(1, members, True)
    negative[labels == -1] = True
    negative &= torch.arange(len(b)) != labels.unsqueeze(1)
    truth = torch.logsumexp((8.0 * cosine).masked_fill(~negative, float("-inf")), dim=1)
    assert relative(lse, truth) <= 2e-6
    for d, exact in zip(ours, torch.autograd.grad((truth * upstream).sum(), (a, b)), strict=True):
        assert relative(d, exact) <= (1e-10 if route.dtype == torch.float64 else 5e-6)
