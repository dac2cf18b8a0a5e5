"""MarginHead and HeadSGD: the same training as dense SGD, and no stale prototype anywhere."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from budgets import relative
from routes import FLOAT64, NATIVE, Route, each
from torch import Tensor

import recog_fast as rf

BOTH = [FLOAT64, NATIVE[0]]
N, C, D = 7, 60, 12


def batch(route: Route, seed: int = 0, n: int = N, unlabelled: bool = True) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(-1 if unlabelled else 0, C, (n,), generator=g)
    return torch.randn(n, D, generator=g).to(route.dtype), labels


def make_head(route: Route, **options: Any) -> rf.MarginHead:
    torch.manual_seed(1)
    return rf.MarginHead(C, D, scale=16.0, **options).to(route.dtype)


def memory(route: Route, policy: Any = None) -> rf.PrototypeMemory:
    return rf.PrototypeMemory(C, D, policy or rf.VPL(lam=0.4, delta=3, start=0), dtype=route.dtype)


MARGINS = {
    "arcface": lambda: rf.ArcFace(),
    "curricular": lambda: rf.CurricularFace(),
    "adaface": lambda: rf.AdaFace(),
    "magface": lambda: rf.MagFace(),
    "filter": lambda: rf.InterclassFilter(rf.CosFace(), 0.2),
}


@each(BOTH)
@pytest.mark.parametrize("options", ["plain", "nesterov", "subcenters", "memory", "unknown"])
@pytest.mark.parametrize("margin", list(MARGINS))
def test_fused_steps_equal_dense_steps(route: Route, margin: str, options: str) -> None:
    """Five optimizer steps of two micro-batches: HeadSGD against torch.optim.SGD on the sum of the dense gradients."""
    extra: dict[str, Any] = {"subcenters": {"subcenters": 3}, "unknown": {"unknown_weight": 0.3}}.get(options, {})
    heads = [make_head(route, margin=MARGINS[margin](), memory=memory(route) if options == "memory" else None, **extra) for _ in range(2)]
    nesterov = options == "nesterov"
    fused = rf.HeadSGD(heads[0], lr=0.5, momentum=0.9, weight_decay=1e-2, nesterov=nesterov)
    dense = torch.optim.SGD([heads[1].weight], lr=0.5, momentum=0.9, weight_decay=1e-2, nesterov=nesterov)
    with route():
        for step in range(5):
            fused.zero_grad()
            dense.zero_grad()
            for micro in range(2):
                x, labels = batch(route, 10 * step + micro)
                # keys once per optimizer step: without HeadSGD a memory moves at every forward
                keys = x if options == "memory" and micro == 1 else None
                heads[0](x.clone().requires_grad_(), labels, keys=keys).backward()
                heads[1](x.clone().requires_grad_(), labels, keys=keys, step=step).backward()
            fused.step()
            dense.step()
            assert heads[0].weight.grad is None
            assert relative(heads[0].weight, heads[1].weight) <= (1e-12 if route.dtype == torch.float64 else 2e-6), step
    buffer = fused.state[heads[0].weight]["momentum_buffer"]
    assert relative(buffer, dense.state[heads[1].weight]["momentum_buffer"]) <= (1e-12 if route.dtype == torch.float64 else 1e-5)


@each(BOTH)
def test_embedding_gradients_do_not_depend_on_the_optimizer(route: Route) -> None:
    x, labels = batch(route)
    grads = []
    for fuse in (False, True):
        head = make_head(route, unknown_weight=0.1)
        if fuse:
            rf.HeadSGD(head, lr=0.1)
        a = x.clone().requires_grad_()
        with route():
            head(a, labels).backward()
        grads.append(a.grad)
    assert torch.equal(grads[0], grads[1])


@each(BOTH)
def test_accumulated_micro_batches_equal_one_batch(route: Route) -> None:
    """Row records of micro-batches with the whole batch's normalizer: the sum of dense gradients, and one big batch."""
    x, labels = batch(route, n=12, unlabelled=False)
    results = []
    for sizes in ([12], [5, 0, 7]):
        head = make_head(route)
        optimizer = rf.HeadSGD(head, lr=1.0)
        with route():
            for part, target in zip(x.split(sizes), labels.split(sizes), strict=True):
                head(part.clone().requires_grad_(), target, normalizer=12).backward()
            assert head.pending_rows == 12
            optimizer.step()
        assert head.pending_rows == 0
        results.append(head.weight.detach().clone())
    assert relative(results[1], results[0]) <= (1e-14 if route.dtype == torch.float64 else 1e-7)


CHANGES = {
    "load_state_dict": lambda head, other: head.load_state_dict(other.state_dict()),
    "ema_copy": lambda head, other: head.weight.detach().lerp_(other.weight.detach(), 0.5),
    "broadcast": lambda head, other: head.weight.detach().copy_(other.weight.detach()),
    "foreign_optimizer": lambda head, other: _foreign_step(head),
    "data_edit": lambda head, other: (head.weight.data.mul_(-1.0), head.invalidate()),
    "new_storage": lambda head, other: setattr(head.weight, "data", other.weight.detach().clone()),
}


def _foreign_step(head: rf.MarginHead) -> None:
    head.weight.grad = torch.ones_like(head.weight)
    torch.optim.AdamW([head.weight], lr=0.1).step()
    head.weight.grad = None


@each(BOTH)
@pytest.mark.parametrize("change", list(CHANGES))
def test_no_stale_prototype(route: Route, change: str) -> None:
    head, other = make_head(route), make_head(route)
    with torch.no_grad():
        other.weight.normal_()
    x, labels = batch(route)
    with route():
        before = head.prototypes()
        assert head.prototypes() is before  # cached while nothing moves
        head(x, labels)
        CHANGES[change](head, other)
        fresh = rf.effective_prototypes(head.weight.detach().clone())
        assert torch.equal(head.prototypes(), fresh)
        assert not torch.equal(before, fresh)
        expected = rf.margin_softmax_loss(x, head.weight.detach().clone(), labels, scale=16.0)
        assert torch.equal(head(x, labels), expected)


@each(BOTH)
def test_stale_rows_are_refused(route: Route) -> None:
    head = make_head(route)
    optimizer = rf.HeadSGD(head, lr=0.1)
    x, labels = batch(route)
    with route():
        head(x.requires_grad_(), labels).backward()
        head.load_state_dict(make_head(route).state_dict())
        weight = head.weight.detach().clone()
        with pytest.raises(RuntimeError, match="pending rows to come from the present prototypes, got 1 of 1"):
            optimizer.step()
        assert torch.equal(head.weight, weight)
        head(x, labels).backward()
        head.invalidate()
        with pytest.raises(RuntimeError, match="pending rows"):
            optimizer.step()
        loss = head(x, labels)
        with torch.no_grad():
            head.weight.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_micro_batches_of_two_scales_are_refused() -> None:
    head = make_head(NATIVE[0])
    optimizer = rf.HeadSGD(head, lr=0.1)
    x, labels = batch(NATIVE[0])
    head(x.requires_grad_(), labels).backward()
    head.scale = 8.0
    head(x, labels).backward()
    with pytest.raises(RuntimeError, match="got 1 of 2"):
        optimizer.step()


def test_a_fused_head_with_memory_has_one_clock() -> None:
    head = make_head(NATIVE[0], memory=memory(NATIVE[0]))
    rf.HeadSGD(head, lr=0.1)
    x, labels = batch(NATIVE[0])
    with pytest.raises(ValueError, match="step None or the head's own count 0 with HeadSGD and a memory, got 7"):
        head(x, labels, step=7)


@pytest.mark.parametrize("method", ["logits", "topk", "cosine"])
def test_use_refuses_bad_input(method: str) -> None:
    head = make_head(NATIVE[0])
    extra = {"logits": (), "topk": (2,), "cosine": (torch.tensor([0, 1]),)}[method]
    with pytest.raises(ValueError, match=f"MarginHead.{method}: expected weight with D = 5"):
        getattr(head, method)(torch.ones(2, 5), *extra)
    with pytest.raises(ValueError, match=r"class_ids in \[0, C\) = \[0, 60\), got -1 in row 1"):
        head.cosine(torch.ones(2, D), torch.tensor([0, -1]))


def test_rows_of_two_memory_states_are_refused() -> None:
    head = make_head(NATIVE[0], memory=memory(NATIVE[0]))
    optimizer = rf.HeadSGD(head, lr=0.1)
    x, labels = batch(NATIVE[0], unlabelled=False)
    head(x.requires_grad_(), labels, keys=x).backward()
    assert head.memory is not None
    head.memory.flush()
    with pytest.raises(RuntimeError, match="pending rows"):
        optimizer.step()


@each(BOTH)
def test_memory_writes_wait_for_the_step(route: Route) -> None:
    head = make_head(route, memory=memory(route, rf.VPL(lam=1.0, delta=2, start=0)))
    optimizer = rf.HeadSGD(head, lr=0.0, weight_decay=0.0)
    x, labels = batch(route, unlabelled=False)
    held = head.memory
    assert held is not None
    with route():
        plain = head.prototypes().clone()
        head(x.requires_grad_(), labels, keys=x.detach()).backward()
        assert held.pending == 1
        assert torch.equal(head.prototypes(), plain)  # queued, not yet in force
        optimizer.step()
        assert held.pending == 0
        injected = head.prototypes()
        assert bool((injected - plain)[labels].abs().sum() > 0)
        others = torch.ones(C, dtype=torch.bool)
        others[labels] = False
        assert torch.equal(injected[others], plain[others])
        for _ in range(2):  # stamp 0, delta 2: valid at steps 1 and 2
            optimizer.step()
        assert torch.equal(head.prototypes(), plain)


@each(BOTH)
def test_memory_without_a_fused_optimizer_moves_at_the_next_training_forward(route: Route) -> None:
    head = make_head(route, memory=memory(route, rf.VPL(lam=1.0, delta=5, start=0)))
    x, labels = batch(route, unlabelled=False)
    with route():
        first = head(x, labels, keys=x)
        head.eval()
        assert torch.equal(head(x, labels), first)  # evaluation moves nothing
        head.train()
        second = head(x, labels)
    assert not torch.equal(first, second)
    assert int(head.steps) == 2


@each(BOTH)
def test_attached_cosine(route: Route) -> None:
    """Value and gradients of head.cosine, dense and as a row record."""
    x, _ = batch(route)
    ids = torch.tensor([0, 5, 5, 59, 7, 1, 2])
    upstream = torch.randn(N, dtype=route.dtype)
    dense = make_head(route, memory=memory(route))
    a = x.clone().requires_grad_()
    with route():
        value = dense.cosine(a, ids)
        (value * upstream).sum().backward()
        w = dense.weight.detach().clone().requires_grad_()
        b = x.clone().requires_grad_()
        truth = (torch.nn.functional.normalize(b, dim=1) * torch.nn.functional.normalize(w, dim=1)[ids]).sum(1)
        (truth * upstream).sum().backward()
        assert (value - truth).abs().max() <= (1e-12 if route.dtype == torch.float64 else 1e-6)
        assert a.grad is not None and b.grad is not None and w.grad is not None and dense.weight.grad is not None
        assert relative(a.grad, b.grad) <= 1e-5
        assert relative(dense.weight.grad, w.grad) <= 1e-5
        fused = make_head(route)
        optimizer = rf.HeadSGD(fused, lr=1.0, momentum=0.0, weight_decay=0.0)
        start = fused.weight.detach().clone()
        (fused.cosine(x.clone().requires_grad_(), ids) * upstream).sum().backward()
        optimizer.step()
        assert relative(start - fused.weight, w.grad) <= (1e-9 if route.dtype == torch.float64 else 1e-4)


@each(BOTH)
def test_topk_and_logits(route: Route) -> None:
    head = make_head(route, subcenters=2)
    x, _ = batch(route)
    with route():
        logits = head.logits(x)
        cosine, ids = head.topk(x, 5)
    best = torch.sort(logits, dim=1, descending=True, stable=True)
    assert torch.equal(ids, best.indices[:, :5])
    assert (16.0 * cosine - best.values[:, :5]).abs().max() <= 1e-4
    with pytest.raises(ValueError, match=r"MarginHead.topk: expected k in \[1, C = 60\], got 61"):
        head.topk(x, 61)


def test_schedulers_state_dict_and_load() -> None:
    head = make_head(NATIVE[0])
    optimizer = rf.HeadSGD(head, lr=0.4)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    x, labels = batch(NATIVE[0])

    def run(h: rf.MarginHead, o: rf.HeadSGD) -> None:
        h(x.clone().requires_grad_(), labels).backward()
        o.step()

    run(head, optimizer)
    schedule.step()
    twin = make_head(NATIVE[0])
    twin.load_state_dict(head.state_dict())
    other = rf.HeadSGD(twin, lr=9.0)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert other.param_groups[0]["lr"] == 0.2
    run(head, optimizer)
    run(twin, other)
    assert torch.equal(head.weight, twin.weight)
    assert int(twin.steps) == int(head.steps) == 2


def test_copies_and_pickles_are_free_of_the_optimizer() -> None:
    head = make_head(NATIVE[0], memory=memory(NATIVE[0]), margin=rf.AdaFace())
    rf.HeadSGD(head, lr=0.1)
    x, labels = batch(NATIVE[0])
    head(x.requires_grad_(), labels).backward()
    for twin in (copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
        assert twin.pending_rows == 0
        assert twin.fused_optimizer is None
        twin(x, labels).backward()
        assert twin.weight.grad is not None
    assert head.pending_rows == N


def test_what_head_sgd_refuses() -> None:
    head = make_head(NATIVE[0])
    with pytest.raises(TypeError, match="HeadSGD: expected head to be a MarginHead, got Linear"):
        rf.HeadSGD(torch.nn.Linear(2, 2), lr=0.1)  # type: ignore[arg-type]
    for change in ({"lr": -1.0}, {"lr": float("nan")}, {"momentum": 1.0}, {"weight_decay": -1}, {"momentum": 0.0, "nesterov": True}):
        with pytest.raises(ValueError, match="HeadSGD: expected"):
            rf.HeadSGD(head, **{"lr": 0.1, **change})  # type: ignore[arg-type]
    first = rf.HeadSGD(head, lr=0.1)
    x, labels = batch(NATIVE[0])
    head(x.requires_grad_(), labels).backward()
    with pytest.raises(RuntimeError, match="no pending rows when an optimizer is attached"):
        rf.HeadSGD(head, lr=0.1)
    first.zero_grad()
    second = rf.HeadSGD(head, lr=0.1)
    with pytest.raises(RuntimeError, match="another HeadSGD was made for"):
        first.step()
    head.weight.square().sum().backward()
    with pytest.raises(RuntimeError, match="weight.grad to be None, got a dense gradient"):
        second.step()


def test_a_step_without_rows_moves_only_the_clock() -> None:
    head = make_head(NATIVE[0])
    optimizer = rf.HeadSGD(head, lr=0.1)
    weight = head.weight.detach().clone()
    optimizer.step()
    assert torch.equal(head.weight, weight)
    assert int(head.steps) == 1


def test_activation_checkpointing_is_refused() -> None:
    head = make_head(NATIVE[0])
    x, labels = batch(NATIVE[0])
    loss = torch.utils.checkpoint.checkpoint(head, x.requires_grad_(), labels, use_reentrant=False)
    with pytest.raises(RuntimeError, match="activation checkpointing"):
        loss.backward()


def test_two_backwards_add_up() -> None:
    head = make_head(NATIVE[0])
    x, labels = batch(NATIVE[0])
    loss = head(x.requires_grad_(), labels)
    loss.backward(retain_graph=True)
    once = head.weight.grad.clone()  # type: ignore[union-attr]
    loss.backward()
    assert relative(head.weight.grad, 2 * once) <= 1e-7  # type: ignore[arg-type]


def test_evaluation_moves_no_state() -> None:
    head = make_head(NATIVE[0], margin=rf.AdaFace(), memory=memory(NATIVE[0])).eval()
    state = {k: v.clone() for k, v in head.state_dict().items()}
    x, labels = batch(NATIVE[0])
    head(x, labels, keys=None)
    assert all(torch.equal(v, state[k]) for k, v in head.state_dict().items())


BAD_HEADS = [
    ({"num_classes": 0}, "num_classes >= 1, got 0"),
    ({"embedding_dim": -1}, "embedding_dim >= 1"),
    ({"subcenters": 0}, "subcenters >= 1"),
    ({"scale": -1.0}, "scale > 0"),
    ({"margin": 3}, "margin to be callable"),
    ({"unknown_weight": -0.1}, "unknown_weight >= 0"),
    ({"memory": rf.PrototypeMemory(C + 1, D, rf.VPL())}, "memory of"),
    ({"memory": rf.PrototypeMemory(C, D, rf.VPL()), "subcenters": 2}, "without sub-centers"),
]


@pytest.mark.parametrize(("change", "message"), BAD_HEADS, ids=lambda v: v if isinstance(v, str) else "")
def test_bad_construction_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"MarginHead: expected .*{message}"):
        rf.MarginHead(**{"num_classes": C, "embedding_dim": D, **change})


def test_a_refused_batch_leaves_all_state_untouched() -> None:
    head = make_head(NATIVE[0], margin=rf.AdaFace(), memory=memory(NATIVE[0]))
    state = {k: v.clone() for k, v in head.state_dict().items()}
    x, labels = batch(NATIVE[0])
    for bad in ({"labels": labels + C}, {"keys": x[:2]}, {"sample_weight": torch.ones(2)}, {"embeddings": x * float("nan")}, {"keys": x * float("nan")}):
        with pytest.raises((ValueError, TypeError)):
            head(**{"embeddings": x, "labels": labels, **bad})
    assert all(torch.equal(v, state[k]) for k, v in head.state_dict().items())
