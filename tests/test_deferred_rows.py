"""Bad rows on a device that is not waited for, tried on CPU tensors taken for such: left out, counted, reported at the next call."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from waiting import no_waiting

import recog_fast as rf
from recog_fast.ops import _flags
from recog_fast.rules import pack_rules

N, C, D = 8, 30, 16


@pytest.fixture(autouse=True)
def _deferring(monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("recog_fast.ops._flags.defers", "recog_fast.losses.defers"):
        monkeypatch.setattr(place, lambda tensor: True)
    monkeypatch.setattr(_flags, "_FUNCTIONAL", {})


def batch() -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(N, D, generator=g), torch.randn(C, D, generator=g), torch.randint(0, C, (N,), generator=g)


def spoil(labels: Tensor) -> Tensor:
    bad = labels.clone()
    bad[2], bad[5] = C + 7, -3
    return bad


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_bad_label_takes_no_part_and_the_next_call_says_so(reduction: str) -> None:
    x, weight, labels = batch()
    kept = torch.tensor([0, 1, 3, 4, 6, 7])
    a, w = x.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = rf.margin_softmax_loss(a, w, spoil(labels), reduction=reduction)  # type: ignore[call-overload]
    loss.sum().backward()
    b, v = x[kept].clone().requires_grad_(), weight.clone().requires_grad_()
    with pytest.raises(ValueError, match=r"margin_softmax_loss: in an earlier call: expected labels in \[-1, C\) = \[-1, 30\), got 37 in row 2 \(2 bad rows"):
        rf.margin_softmax_loss(b, v, labels[kept], reduction=reduction)  # type: ignore[call-overload]
    expected = rf.margin_softmax_loss(b, v, labels[kept], reduction=reduction)  # type: ignore[call-overload]  # said once
    expected.sum().backward()
    assert torch.allclose(loss[kept] if reduction == "none" else loss, expected, rtol=1e-6)
    if reduction == "none":
        assert not loss[torch.tensor([2, 5])].any()
    assert a.grad is not None and b.grad is not None and w.grad is not None and v.grad is not None
    assert torch.allclose(a.grad[kept], b.grad, rtol=1e-5, atol=1e-7) and not a.grad[torch.tensor([2, 5])].any()
    assert torch.allclose(w.grad, v.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_row_has_a_nan_loss_alone(value: float) -> None:
    x, weight, labels = batch()
    clean = rf.margin_softmax_loss(x, weight, labels, reduction="none")
    x[3, 5] = value
    a, w = x.requires_grad_(), weight.requires_grad_()
    loss = rf.margin_softmax_loss(a, w, labels, reduction="none")
    loss.nansum().backward()
    others = torch.arange(N) != 3
    assert bool(loss[3].isnan()) and torch.equal(loss[others], clean[others])
    assert a.grad is not None and w.grad is not None
    assert not a.grad[3].any() and bool(a.grad[others].any(dim=1).all()) and bool(w.grad.isfinite().all())
    with pytest.raises(ValueError, match=r"expected finite embeddings, got a non-finite value in row 3 \(1 bad rows"):
        rf.margin_softmax_loss(a, w, labels)


def test_unknown_rows_and_the_unknown_loss() -> None:
    x, weight, labels = batch()
    labels[1] = -1
    whole = rf.margin_softmax_loss(x, weight, labels, unknown_weight=0.5, reduction="none")
    bad = rf.margin_softmax_loss(x, weight, spoil(labels), unknown_weight=0.5, reduction="none")
    kept = torch.tensor([0, 1, 3, 4, 6, 7])
    assert torch.equal(bad[kept], whole[kept])
    with pytest.raises(ValueError, match="got 37 in row 2"):
        rf.margin_softmax_loss(x, weight, labels)
    alone = rf.unknown_rejection_loss(x, weight, reduction="none")
    x[0, 0] = float("nan")
    spoiled = rf.unknown_rejection_loss(x, weight, reduction="none")
    assert isinstance(alone, Tensor) and isinstance(spoiled, Tensor)
    assert bool(spoiled[0].isnan()) and torch.equal(spoiled[1:], alone[1:])
    with pytest.raises(ValueError, match="non-finite value in row 0"):
        rf.unknown_rejection_loss(x, weight)


def test_check_labels_looks_at_once() -> None:
    x, weight, labels = batch()
    with pytest.raises(ValueError, match="got 37 in row 2"):
        rf.margin_softmax_loss(x, weight, spoil(labels), check_labels=True)
    head = rf.MarginHead(C, D)
    with pytest.raises(ValueError, match="got 37 in row 2"):
        head(x, spoil(labels), check_labels=True)
    assert head.steps == 0
    head(x, labels)  # nothing was left behind


def head_step(head: rf.MarginHead, optimizer: rf.HeadSGD, labels: Tensor) -> None:
    head(batch()[0].requires_grad_(), labels).backward()
    optimizer.step()


@pytest.mark.parametrize("meet", [
    lambda head, optimizer: optimizer.step(),
    lambda head, optimizer: head.check_rows(),
    lambda head, optimizer: head(batch()[0], batch()[2]),
])  # fmt: skip
def test_a_head_raises_at_step_check_or_its_next_forward(meet: Callable[[rf.MarginHead, rf.HeadSGD], object]) -> None:
    head = rf.MarginHead(C, D)
    optimizer = rf.HeadSGD(head, lr=0.1)
    before = head.weight.detach().clone()
    head(batch()[0].requires_grad_(), spoil(batch()[2])).backward()
    with pytest.raises(ValueError, match="MarginHead: in an earlier call: expected labels"):
        meet(head, optimizer)
    assert torch.equal(head.weight, before) and head.pending_rows == N
    optimizer.step()  # the good rows
    assert bool(head.weight.isfinite().all()) and not torch.equal(head.weight, before)
    head_step(head, optimizer, batch()[2])


def test_counts_add_up_over_calls_nobody_looked_at() -> None:
    flags = _flags.RowFlags("here")
    x, _, labels = batch()
    for _ in range(3):
        flags.screen(x, spoil(labels), C)
    with pytest.raises(ValueError, match=r"got 37 in row 2 \(6 bad rows"):
        flags.raise_noted()
    flags.raise_noted(fresh=True)  # nothing is left


def test_copies_start_with_nothing_noted() -> None:
    head = rf.MarginHead(C, D)
    head(batch()[0], spoil(batch()[2]))
    for twin in (copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
        twin.check_rows()
    with pytest.raises(ValueError):
        head.check_rows()


def test_the_clock_is_read_once_and_after_foreign_writes() -> None:
    head = rf.MarginHead(C, D)
    optimizer = rf.HeadSGD(head, lr=0.1)
    head_step(head, optimizer, batch()[2])
    x, _, labels = batch()
    x.requires_grad_()
    for _ in range(2):
        with no_waiting():
            head(x, labels).backward()
            optimizer.step()
    assert head.steps == 3 and head._count.of(head.steps) == 3
    head.load_state_dict({**head.state_dict(), "steps": torch.tensor(41)})
    assert head._count.of(head.steps) == 41
    head.steps.data.fill_(50)  # as a replayed graph: no version moves
    head.invalidate()
    assert head._count.of(head.steps) == 50


def test_a_rule_with_tensors_packs_as_one_with_numbers() -> None:
    labels, thresholds = torch.tensor([0, -1, 2]), torch.tensor([0.1, 0.2, 0.3])
    t = torch.tensor(0.25)
    numbers = rf.NegativeRule(above=(1.0, 0.25, 0.0, 2.0, 0.25), f_max=2.0)
    tensors = rf.NegativeRule(above=(1.0, t, 0.0, 2.0, t), f_max=2.0)
    with no_waiting():
        found = pack_rules(labels, tensors, thresholds, 0.9, torch.float32)
    expected = pack_rules(labels, numbers, thresholds, 0.9, torch.float32)
    assert found is not None and expected is not None and torch.equal(found, expected)
    assert torch.equal(expected[:2], torch.tensor([[0.9, 4.0, 0.9], [0.1, 4.0, 0.3]]))


def test_the_span_of_a_rule_bounds_its_exponents() -> None:
    from recog_fast.rules import exponent_span

    assert exponent_span(None, 1.0) == 2.0 and exponent_span(None, 0.9) == 2.0  # rows without a label are not clamped
    assert exponent_span(rf.CircleMargin().rule(torch.zeros(1))[0], 1.0) == pytest.approx(2.0)
    assert exponent_span(rf.MVSoftmax().rule(torch.zeros(1))[0], 1.0) == pytest.approx(2.4)
    vertex = rf.NegativeRule(above=(-1.0, 1.0, 1.0, 0.0, 0.0), f_max=1.25)
    assert exponent_span(vertex, 1.0) == pytest.approx(2.25)
    assert exponent_span(rf.NegativeRule(above=(1.0, torch.tensor(0.5), 0.0, 2.0, 0.5)), 1.0) == float("inf")
