"""HeadSGD as an optimizer: torch.optim.SGD on the dense gradients is the truth; what needs a dense gradient is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from budgets import relative
from routes import FLOAT64, NATIVE, Route, each
from test_heads import C, D, N, batch, make_head, memory
from torch import Tensor
from torch.optim import lr_scheduler

import recog_fast as rf

BOTH = [FLOAT64, NATIVE[0]]


def budget(route: Route) -> float:
    return 1e-12 if route.dtype == torch.float64 else 2e-6


def pair(route: Route, lr: float = 0.5, **options: Any) -> tuple[list[rf.MarginHead], rf.HeadSGD, torch.optim.SGD]:
    """Two equal heads, one with HeadSGD and one with SGD."""
    heads = [make_head(route) for _ in range(2)]
    settings = {"momentum": 0.9, "weight_decay": 1e-2, **options}
    return heads, rf.HeadSGD(heads[0], lr, **settings), torch.optim.SGD([heads[1].weight], lr, **settings)


def train(heads: list[rf.MarginHead], optimizers: Any, route: Route, steps: range, after: Any = ()) -> None:
    """Steps of both on the same batches; `after` are stepped after them (schedulers)."""
    with route():
        for step in steps:
            x, labels = batch(route, step)
            for head, optimizer in zip(heads, optimizers, strict=True):
                optimizer.zero_grad()
                head(x.clone().requires_grad_(), labels).backward()
                optimizer.step()
            for schedule in after:
                schedule.step()
            assert relative(heads[0].weight, heads[1].weight) <= budget(route), step


# -- pending rows ------------------------------------------------------------------------------------------------------


@each(BOTH)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_any_loss_of_any_micro_batches(route: Route, reduction: str, weighted: bool) -> None:
    """Two forwards, then both backwards in the other order, sizes 7, 0 and 3; per-row upstream gradients, signs included."""
    heads, fused, dense = pair(route, lr=0.05)
    for head in heads:
        head.unknown_weight = 0.2
    g = torch.Generator().manual_seed(3)
    with route():
        for step in range(3):
            fused.zero_grad()
            dense.zero_grad()
            upstream, weights = torch.randn(N, generator=g).to(route.dtype), torch.rand(N, generator=g).to(route.dtype)
            for head in heads:
                losses = []
                for micro, rows in enumerate((N, 0, 3)):
                    x, labels = batch(route, 10 * step + micro)
                    loss = head(
                        x[:rows].clone().requires_grad_(), labels[:rows], reduction=reduction,
                        sample_weight=weights[:rows] if weighted else None, normalizer=5.0 if reduction == "mean" else None,
                    )  # fmt: skip
                    losses.append((loss * (upstream[:rows] if reduction == "none" else upstream[0])).sum())
                for loss in reversed(losses):
                    loss.backward()
            assert heads[0].pending_rows == N + 3
            fused.step()
            dense.step()
            assert relative(heads[0].weight, heads[1].weight) <= budget(route)


@each(BOTH)
def test_zero_grad_between_forward_and_backward_loses_nothing(route: Route) -> None:
    heads, fused, dense = pair(route)
    x, labels = batch(route)
    with route():
        losses = [head(x.clone().requires_grad_(), labels) for head in heads]
        fused.zero_grad()
        dense.zero_grad()
        for loss in losses:
            loss.backward()
        assert heads[0].pending_rows == N
        fused.step()
        dense.step()
    assert relative(heads[0].weight, heads[1].weight) <= budget(route)


def test_a_backward_from_before_the_last_step_is_refused_and_not_lost() -> None:
    heads, fused, _ = pair(NATIVE[0])
    x, labels = batch(NATIVE[0])
    late = heads[0](x.clone().requires_grad_(), labels)
    fused.param_groups[0]["lr"] = 0.0
    heads[0].memory = None
    fused.step()
    late.backward()
    assert heads[0].pending_rows == N  # a step without rows left W alone: they still fit it
    fused.step()
    late = heads[0](x.clone().requires_grad_(), labels)
    heads[0](x.clone().requires_grad_(), labels).backward()
    fused.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        late.backward()


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_drops_the_rows(set_to_none: bool) -> None:
    heads, fused, _ = pair(NATIVE[0])
    x, labels = batch(NATIVE[0])
    start = heads[0].weight.detach().clone()
    heads[0](x, labels).backward()
    fused.zero_grad(set_to_none=set_to_none)
    assert heads[0].pending_rows == 0 and heads[0].weight.grad is None
    fused.step()
    assert torch.equal(heads[0].weight, start)


# -- an optimizer of torch ---------------------------------------------------------------------------------------------

SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.3),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.7, total_steps=9),  # moves momentum too
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(o, [lr_scheduler.LinearLR(o, 0.1, 1.0, 3), lr_scheduler.ExponentialLR(o, 0.5)], [3]),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 6, 2.0),
}


@each(BOTH)
@pytest.mark.parametrize("name", list(SCHEDULES))
@pytest.mark.filterwarnings("ignore:The epoch parameter")
def test_schedulers(route: Route, name: str) -> None:
    heads, fused, dense = pair(route)
    schedules = [SCHEDULES[name](o) for o in (fused, dense)]
    assert fused.param_groups[0]["initial_lr"] == dense.param_groups[0]["initial_lr"]
    rates = []
    for step in range(6):
        train(heads, (fused, dense), route, range(step, step + 1), schedules)
        assert fused.param_groups[0]["lr"] == dense.param_groups[0]["lr"]
        rates.append(fused.param_groups[0]["lr"])
    assert len(set(rates)) > 1


def test_a_plateau_scheduler_and_a_rate_that_is_a_tensor() -> None:
    heads = [make_head(NATIVE[0]) for _ in range(2)]
    fused, dense = rf.HeadSGD(heads[0], torch.tensor(0.5), 0.9, 1e-2), torch.optim.SGD([heads[1].weight], 0.5, 0.9, weight_decay=1e-2)
    train(heads, (fused, dense), NATIVE[0], range(1))
    schedule = lr_scheduler.ReduceLROnPlateau(fused, patience=0, factor=0.1)
    for loss in (1.0, 2.0, 3.0):
        schedule.step(loss)
    assert float(fused.param_groups[0]["lr"]) == pytest.approx(0.005)


def test_hooks_and_closures() -> None:
    heads, fused, _ = pair(NATIVE[0])
    x, labels = batch(NATIVE[0])
    order: list[str] = []
    fused.register_step_pre_hook(lambda o, a, k: order.append(f"before {heads[0].pending_rows}"))
    fused.register_step_post_hook(lambda o, a, k: order.append(f"after {heads[0].pending_rows}"))
    fused.register_state_dict_post_hook(lambda o, state: order.append("saved"))

    def closure() -> Tensor:
        fused.zero_grad()
        loss = heads[0](x.clone().requires_grad_(), labels)
        loss.backward()
        return loss

    start = heads[0].weight.detach().clone()
    loss = fused.step(closure)
    assert torch.equal(loss, rf.margin_softmax_loss(x, start, labels, scale=16.0))
    assert not torch.equal(heads[0].weight, start)
    fused.state_dict()
    assert order == ["before 0", "after 0", "saved"]
    assert isinstance(fused, torch.optim.Optimizer)
    assert fused.defaults["momentum"] == 0.9


@each(BOTH)
@pytest.mark.parametrize("options", [{}, {"nesterov": True}, {"momentum": 0.0}], ids=str)
def test_state_goes_to_sgd_and_back(route: Route, options: dict[str, Any]) -> None:
    """Each loads the other's state_dict and both go on alike; neither touches the buffers it was loaded from."""
    heads, fused, dense = pair(route, **options)
    train(heads, (fused, dense), route, range(2))
    swapped = [make_head(route) for _ in range(2)]
    for head, source in zip(swapped, heads, strict=True):
        head.load_state_dict(source.state_dict())
    to_fused, to_dense = rf.HeadSGD(swapped[0], 9.0, 0.1), torch.optim.SGD([swapped[1].weight], 9.0)
    saved = dense.state_dict()
    frozen = copy.deepcopy(saved)
    to_fused.load_state_dict(saved)
    to_dense.load_state_dict(copy.deepcopy(fused.state_dict()))  # torch's own loading shares the buffers
    train(swapped, (to_fused, to_dense), route, range(2, 5))
    train(heads, (fused, dense), route, range(2, 5))
    assert relative(swapped[0].weight, heads[1].weight) <= budget(route)
    assert relative(swapped[1].weight, heads[0].weight) <= budget(route)
    for name in ("lr", "momentum", "weight_decay", "nesterov"):
        assert to_fused.param_groups[0][name] == to_dense.param_groups[0][name] == fused.param_groups[0][name]
    if options.get("momentum") == 0.0:
        assert not fused.state and not to_fused.state
        return
    again = rf.HeadSGD(swapped[0], 9.0)
    again.load_state_dict(frozen)
    assert torch.equal(again.state[swapped[0].weight]["momentum_buffer"], frozen["state"][0]["momentum_buffer"])
    again.state[swapped[0].weight]["momentum_buffer"].zero_()
    assert bool(frozen["state"][0]["momentum_buffer"].any())


@each(BOTH)
def test_momentum_may_be_switched_off_and_on(route: Route) -> None:
    """As SGD: with momentum 0 the buffer is neither read nor moved, and it goes on from there afterwards."""
    heads, fused, dense = pair(route)
    for step, momentum in enumerate((0.9, 0.9, 0.0, 0.0, 0.9)):
        fused.param_groups[0]["momentum"] = dense.param_groups[0]["momentum"] = momentum
        train(heads, (fused, dense), route, range(step, step + 1))


def test_no_momentum_makes_no_buffer(tmp_path: Path) -> None:
    heads, fused, dense = pair(NATIVE[0], momentum=0.0, weight_decay=0.0)
    train(heads, (fused, dense), NATIVE[0], range(2))
    assert not fused.state
    rf.save_checkpoint(tmp_path / "c", head=heads[0], optimizer=fused, step=2)
    other = rf.HeadSGD(make_head(NATIVE[0]), 0.3)
    rf.load_checkpoint(tmp_path / "c", head=other.head, optimizer=other)
    assert other.param_groups[0]["momentum"] == 0.0
    assert torch.equal(other.head.weight, heads[0].weight)


# -- what it refuses ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "value"), [("dampening", 0.1), ("maximize", True), ("unsampled", "lazy"), ("momentum", -0.1), ("differentiable", True)])
def test_options_it_does_not_have(name: str, value: Any) -> None:
    head = make_head(NATIVE[0])
    if name != "differentiable":
        with pytest.raises(ValueError, match=f"HeadSGD: expected .*{name}"):
            rf.HeadSGD(head, 0.1, **{name: value})
    optimizer = rf.HeadSGD(head, 0.1, dampening=0.0, maximize=False)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0][name] = value
    with pytest.raises(ValueError, match=f"HeadSGD: expected .*{name}"):
        optimizer.load_state_dict(saved)
    x, labels = batch(NATIVE[0])
    start = head.weight.detach().clone()
    head(x, labels).backward()
    optimizer.param_groups[0][name] = value
    with pytest.raises(ValueError, match=f"HeadSGD: expected .*{name}"):
        optimizer.step()
    assert torch.equal(head.weight, start)
    assert head.pending_rows == N
    optimizer.param_groups[0][name] = rf.HeadSGD(make_head(NATIVE[0]), 0.1).defaults.get(name)
    optimizer.step()
    assert not torch.equal(head.weight, start)


@pytest.mark.parametrize("unscale", [False, True])
def test_grad_scaler_is_refused(unscale: bool) -> None:
    heads, fused, _ = pair(NATIVE[0])
    x, labels = batch(NATIVE[0])
    start = heads[0].weight.detach().clone()
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(heads[0](x, labels)).backward()
    if unscale:
        scaler.unscale_(fused)
    with pytest.raises(RuntimeError, match="HeadSGD: expected no GradScaler, .*bf16"):
        scaler.step(fused)
    assert torch.equal(heads[0].weight, start)
    fused.zero_grad()
    off = torch.amp.GradScaler("cpu", enabled=False)
    off.scale(heads[0](x, labels)).backward()
    off.unscale_(fused)
    off.step(fused)
    assert not torch.equal(heads[0].weight, start)


def test_clipping_the_head_does_nothing() -> None:
    """weight.grad stays None, so torch's clipping passes the head by; the docstring says to clip the backbone."""
    moved = []
    for clipped in (False, True):
        heads, fused, _ = pair(NATIVE[0])
        x, labels = batch(NATIVE[0])
        heads[0](x, labels).backward()
        if clipped:
            assert float(torch.nn.utils.clip_grad_norm_(heads[0].parameters(), 1e-6)) == 0
        fused.step()
        moved.append(heads[0].weight.detach().clone())
    assert torch.equal(*moved)


def _replace_data(head: rf.MarginHead) -> None:
    head.weight.data = head.weight.detach().clone()


def _replace_parameter(head: rf.MarginHead) -> None:
    head.weight = torch.nn.Parameter(head.weight.detach().clone())


REPLACED: dict[str, Callable[[rf.MarginHead], Any]] = {
    "data": _replace_data,
    "parameter": _replace_parameter,
    "device": lambda head: head.to("meta"),
    "dtype": lambda head: head.double(),
    "scale": lambda head: setattr(head, "scale", 9.0),
    "invalidate": lambda head: head.invalidate(),
    "state": lambda head: head.load_state_dict(head.state_dict()),
}


@pytest.mark.parametrize("change", list(REPLACED))
def test_a_weight_replaced_before_the_step(change: str) -> None:
    heads, fused, _ = pair(NATIVE[0])
    x, labels = batch(NATIVE[0])
    heads[0](x, labels).backward()
    REPLACED[change](heads[0])
    with pytest.raises(RuntimeError, match="HeadSGD: expected (all pending rows to come from the present|the head to keep the weight)"):
        fused.step()


def test_a_buffer_that_no_longer_fits_is_named() -> None:
    heads, fused, _ = pair(NATIVE[0])
    x, labels = batch(NATIVE[0])
    heads[0](x, labels).backward()
    fused.step()
    heads[0].double()
    heads[0](x, labels).backward()
    with pytest.raises(ValueError, match="HeadSGD: expected momentum_buffer on cpu as torch.float64 like the weight"):
        fused.step()
    fused.load_state_dict(fused.state_dict())  # torch moves the state to the weight's type
    heads[0](x, labels).backward()
    fused.step()
    assert fused.state[heads[0].weight]["momentum_buffer"].dtype == torch.float64


def test_rows_of_two_clocks_are_refused() -> None:
    head = make_head(NATIVE[0], memory=memory(NATIVE[0]))
    optimizer = rf.HeadSGD(head, 0.1)
    x, labels = batch(NATIVE[0])
    late = head(x.clone().requires_grad_(), labels)
    optimizer.step()
    late.backward()
    head(x.clone().requires_grad_(), labels).backward()
    with pytest.raises(RuntimeError, match="got 1 of 2 micro-batches"):
        optimizer.step()
    assert head.pending_rows == 0


def test_another_optimizer_on_the_head_finds_no_gradient() -> None:
    """Two HeadSGDs: the first refuses (test_heads.py). An ordinary optimizer beside HeadSGD sees None and moves nothing."""
    heads, fused, _ = pair(NATIVE[0])
    other = torch.optim.SGD([heads[0].weight], lr=1.0, weight_decay=0.5)
    x, labels = batch(NATIVE[0])
    heads[0](x, labels).backward()
    start = heads[0].weight.detach().clone()
    other.step()
    assert torch.equal(heads[0].weight, start)
    heads[0].weight.grad = torch.zeros(C, D)
    with pytest.raises(RuntimeError, match="weight.grad to be None"):
        fused.step()
    assert heads[0].pending_rows == N
