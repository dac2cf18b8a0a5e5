"""Sampled classes together with what else the sweeps can do: 16-bit operands, kept exponentials, memory, dropped rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from budgets import relative
from routes import HALF, NATIVE, Route, each, pair_format
from test_sampling import materialised
from torch import Tensor

import recog_fast as rf
from recog_fast import reference

N, C, D, RATE = 21, 3000, 64, 0.4  # two blocks of sampled classes, the second not full


def make_head(route: Route, memory: bool, **options: Any) -> rf.MarginHead:
    torch.manual_seed(1)
    held = rf.PrototypeMemory(C, D, rf.VPL(lam=0.5, delta=50, start=0)) if memory else None
    head = rf.MarginHead(
        C, D, scale=16.0, sample_rate=RATE, sample_seed=5, memory=held, compute_dtype=route.compute_dtype, **options
    )
    if held is not None:
        held.write(torch.randn(400, D), torch.arange(400) * 7, 0)
        held.flush()
        head.steps.fill_(1)  # VPL injects after its start
    return head


def batch() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(3)
    return torch.randn(N, D, generator=g), torch.randint(0, C, (N,), generator=g)


def limit(route: Route, keep: Any) -> float:
    """Of dx and dW: float32 3e-5, int16 1e-3, bfloat16 operands 5e-3 sqrt(512/D); bfloat16 exponentials 4e-3 of dW."""
    if not route.half:
        return 4e-3 if keep is torch.bfloat16 else 3e-5
    return 1e-3 if pair_format(route) == "int16" else 5e-3 * (512 / D) ** 0.5


def exact(head: rf.MarginHead, x: Tensor, labels: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Losses of all rows, dx of their mean and dW of the mean over the batch of `rows` alone, in float64."""
    ids = head.last_sampled
    assert ids is not None and ids.numel() == int(RATE * C)
    memory = (None, None, None) if head.memory is None else head.memory.injection(1)
    a, w = x.double().requires_grad_(), head.weight.detach().double().requires_grad_()
    prototypes = reference.effective_prototypes(w, *(None if t is None else t.double() if t.is_floating_point() else t for t in memory))
    loss = materialised(a, prototypes, labels, ids, head.margin)
    (d_x,) = torch.autograd.grad(loss.mean(), a, retain_graph=True)
    (d_w,) = torch.autograd.grad(loss[rows].sum() / len(loss), w)
    return loss.detach(), d_x, d_w


@each([NATIVE[0], *HALF])
@pytest.mark.parametrize("keep", [False, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("memory", [False, True], ids=["plain", "memory"])
@pytest.mark.parametrize("fused", [False, True], ids=["dense", "fused"])
def test_all_at_once_against_float64(route: Route, keep: Any, memory: bool, fused: bool) -> None:
    head = make_head(route, memory, keep_exponentials=keep)
    start = head.weight.detach().clone()
    optimizer = rf.HeadSGD(head, lr=1.0, momentum=0.0, weight_decay=0.0) if fused else None
    x, labels = batch()
    a = x.clone().requires_grad_()
    with route():
        loss = head(a, labels)
        loss.backward()
        truth, d_x, d_w = exact(head, x, labels, torch.arange(N))
        if optimizer is not None:
            optimizer.step()
        elif keep:
            assert head.keep is not None and head.keep._buffer is not None  # the case meant
            # two bytes (or four) for each of the padded rows and sampled classes of whole blocks, and the scales of tiles
            assert head.keep._buffer.numel() <= 1.3 * 32 * 1920
    ours = start - head.weight.detach() if fused else head.weight.grad
    assert a.grad is not None and ours is not None
    assert abs(loss.item() - truth.mean().item()) <= (3e-2 if route.half else 1e-5) * 16 / 64
    assert relative(a.grad, d_x) <= limit(route, False)
    assert relative(ours, d_w) <= limit(route, keep)
    left_out = torch.ones(C, dtype=torch.bool)
    left_out[head.last_sampled] = False
    assert not bool(ours[left_out].any())


@each([NATIVE[0], *HALF])
def test_dropped_rows_of_a_sampled_head(route: Route) -> None:
    head = make_head(route, True, drop_mass=0.3)
    x, labels = batch()
    x = torch.nn.functional.normalize(head.weight.detach()[labels], dim=1) * torch.linspace(0, 1, N).unsqueeze(1) + 0.1 * x / D**0.5
    a = x.clone().requires_grad_()
    with route():
        loss, stats = head(a, labels, return_stats=True)
        loss.backward()
        _, d_x, d_w = exact(head, x, labels, (stats.dropped_mass == 0).nonzero().squeeze(1))
    assert 0 < int((stats.dropped_mass > 0).sum()) < N
    assert a.grad is not None and head.weight.grad is not None
    assert relative(a.grad, d_x) <= limit(route, False)
    assert relative(head.weight.grad, d_w) <= limit(route, False)


@each([NATIVE[0], *HALF])
@pytest.mark.parametrize("keep", [False, torch.bfloat16], ids=str)
def test_unlabelled_rows_of_a_sampled_head(route: Route, keep: Any) -> None:
    """They see all classes, the others the sampled ones: two forward sweeps, so nothing is kept, and one class sweep."""
    head = make_head(route, False, keep_exponentials=keep, unknown_weight=0.3)
    x, labels = batch()
    labels[::5] = -1
    some, apart = labels >= 0, labels < 0
    a = x.clone().requires_grad_()
    with route():
        loss = head(a, labels)
        loss.backward()
    assert keep is False or (head.keep is not None and head.keep._buffer is None)
    b, w = x.double().requires_grad_(), head.weight.detach().double().requires_grad_()
    assert head.last_sampled is not None
    rows = materialised(b[some], w, labels[some], head.last_sampled, head.margin)
    truth = rows.mean() + 0.3 * rf.unknown_rejection_loss(b[apart], w, scale=16.0)  # type: ignore[operator]
    truth.backward()
    assert a.grad is not None and b.grad is not None and w.grad is not None
    assert abs(loss.item() - truth.item()) <= (3e-2 if route.half else 1e-5) * 16 / 64
    assert relative(a.grad[some], b.grad[some]) <= limit(route, False)
    assert relative(a.grad[apart], b.grad[apart]) <= (4 if route.half else 1) * limit(route, False)  # UIR: 2e-2 to 5e-3
    assert relative(head.weight.grad, w.grad) <= limit(route, False)  # type: ignore[arg-type]
