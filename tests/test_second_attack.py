"""What tried to break sampling, kept exponentials and dropped mass: each of these crashed, or was silently wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from budgets import relative
from routes import FLOAT64, HALF, NATIVE, Route, each, pair_format
from torch import Tensor

import recog_fast as rf

C, D, N = 40, 16, 9


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(N, D, generator=g), torch.randint(0, C, (N,), generator=g)


def head_with_memory() -> rf.MarginHead:
    torch.manual_seed(1)
    memory = rf.PrototypeMemory(C, D, rf.VPL(lam=0.4, delta=90, start=0))
    memory.write(torch.randn(C, D), torch.arange(C), 0)
    memory.flush()
    head = rf.MarginHead(C, D, scale=16.0, memory=memory)
    head.steps.fill_(1)
    return head


@pytest.mark.parametrize("loss", ["margin", "cosine"])
def test_a_memory_written_before_backward_is_no_silent_wrong_gradient(loss: str) -> None:
    """The next training forward flushes the queue into the rows that the first graph's class sweep reads."""
    head = head_with_memory()
    x, labels = batch()
    first = head.cosine(x, labels).sum() if loss == "cosine" else head(x, labels)
    head(x, labels, keys=x.flip(0)).backward()
    head(x, labels)
    with pytest.raises(RuntimeError, match="backward before the memory changes"):
        first.backward()
    head(x, labels, keys=x).backward()
    head(x, labels).backward()


def test_gradients_of_the_embeddings_need_no_memory() -> None:
    head = head_with_memory()
    x, labels = batch()
    x.requires_grad_()
    (expected,) = torch.autograd.grad(head(x, labels, keys=x.detach().flip(0), step=1), x)
    head = head_with_memory()
    loss = head(x, labels, keys=x.detach().flip(0), step=1)
    head(x, labels)
    assert torch.equal(torch.autograd.grad(loss, x)[0], expected)


@each([FLOAT64, NATIVE[0]])
def test_buffers_used_again_before_backward(route: Route) -> None:
    """Labels and sample weights belong to the caller: what is written there after forward changes no gradient."""
    x, labels = batch()
    w = torch.randn(C, D, dtype=route.dtype).requires_grad_()
    weights = torch.rand(N, dtype=route.dtype)
    with route():
        (expected,) = torch.autograd.grad(rf.margin_softmax_loss(x.to(route.dtype), w, labels, sample_weight=weights, scale=8.0), w)
        loss = rf.margin_softmax_loss(x.to(route.dtype), w, labels, sample_weight=weights, scale=8.0)
        weights.fill_(5.0)
        labels.fill_(-1)
        assert torch.equal(torch.autograd.grad(loss, w)[0], expected)


@pytest.mark.parametrize("loss", ["margin", "cosine"])
def test_a_gradient_asked_for_under_the_fused_optimizer_leaves_no_rows(loss: str) -> None:
    head = rf.MarginHead(C, D)
    rf.HeadSGD(head, lr=0.1)
    x, labels = batch()
    value = head.cosine(x, labels).sum() if loss == "cosine" else head(x, labels)
    with pytest.raises(RuntimeError, match=r"expected backward\(\) with HeadSGD"):
        torch.autograd.grad(value, head.weight, allow_unused=True)
    assert head.pending_rows == 0


def dropped(weights: Tensor, labels: Tensor) -> tuple[int, Tensor]:
    torch.manual_seed(3)
    head = rf.MarginHead(C, D, drop_mass=0.5, scale=8.0)
    loss, stats = head(batch()[0], labels, sample_weight=weights, return_stats=True)
    loss.backward()
    assert head.weight.grad is not None
    return int((stats.dropped_mass > 0).sum()), head.weight.grad


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_of_unlabelled_rows_drop_and_keep_nothing(value: float) -> None:
    labels, weights = batch()[1], torch.ones(N)
    labels[3] = -1
    count, expected = dropped(weights, labels)
    weights[3] = value
    assert count > 0
    assert dropped(weights, labels)[0] == count
    assert torch.equal(dropped(weights, labels)[1], expected)


def test_an_infinite_weight_is_not_dropped() -> None:
    labels, weights = batch()[1], torch.ones(N)
    weights[2] = float("inf")
    count, gradient = dropped(weights, labels)
    assert count == 0
    assert not bool(torch.isfinite(gradient).all())


BAD: list[dict[str, Any]] = [
    {"keep_exponentials": 1}, {"keep_exponentials": 0}, {"keep_exponentials": torch.float16}, {"sample_rate": "0.5"},
    {"sample_rate": None}, {"drop_mass": None}, {"drop_mass": "0"}, {"sample_seed": 1.5},
]  # fmt: skip


@pytest.mark.parametrize("option", BAD, ids=str)
def test_options_of_the_wrong_kind_are_named(option: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"MarginHead: expected {next(iter(option))}"):
        rf.MarginHead(C, D, **option)


@pytest.mark.parametrize("operation", ["negative_logsumexp", "class_gradient", "unknown_rejection"])
def test_a_weight_without_subcenters_is_refused(operation: str) -> None:
    """It divided by zero: the process ended."""
    x, labels = batch()
    w, rest = torch.zeros(C, 0, D), (None, None, None, None, False, True)
    calls = {
        "negative_logsumexp": (x, w, labels, 8.0, *rest),
        "class_gradient": (x, labels, torch.zeros(5, N), w, 8.0, *rest),
        "unknown_rejection": (x, w, labels, torch.zeros(N, dtype=torch.float64), torch.zeros(N), 8.0, *rest[1:]),
    }
    with NATIVE[0](), pytest.raises(ValueError, match="K >= 1"):
        getattr(torch.ops.recog_fast, operation)(*calls[operation])


@each(HALF)
def test_many_rows_cost_the_class_gradient_no_bits(route: Route) -> None:
    """int16 slopes shared one step that grew with the sum over all rows: 2 % of dW at N = 20000, 16 % at 100000."""
    g = torch.Generator().manual_seed(0)
    x, labels, w = torch.randn(20000, D, generator=g), torch.randint(0, 10, (20000,), generator=g), torch.randn(10, D, generator=g)
    gradients = []
    with route():
        for dtype in (torch.float32, torch.bfloat16):
            centres = w.clone().requires_grad_()
            rf.margin_softmax_loss(x, centres, labels, scale=2.0, compute_dtype=dtype).backward()
            gradients.append(centres.grad)
    assert relative(gradients[1], gradients[0]) <= (2e-3 if pair_format(route) == "int16" else 6e-3)  # type: ignore[arg-type]
