"""Training steps on the chunk loop in Triton's interpreter: as captured graphs, and without anything a device would be waited for.

`test_triton_interpreter.py` runs this file beside `interpreted.py`.
"""

from __future__ import annotations

import triton_interpreter  # isort: skip  # first: it sets TRITON_INTERPRET and mends the interpreter

from collections.abc import Callable
from typing import Any

import pytest
import torch
from interpreted import PLAN, taken_over
from recorded import Recorded
from test_ops import calls, sample
from torch import Tensor
from waiting import no_waiting

import recog_fast as rf
from recog_fast.ops import _cuda, _flags, chunks
from recog_fast.ops._graphs import LoopGraphs

assert triton_interpreter.interpreter
FIXTURES = (taken_over,)

N, C, D = 20, 150, 32
HEADS: dict[str, Callable[[], rf.MarginHead]] = {
    "arcface": lambda: rf.MarginHead(C, D),
    "adaface, bfloat16": lambda: rf.MarginHead(C, D, margin=rf.AdaFace(), compute_dtype=torch.bfloat16),
    "curricular": lambda: rf.MarginHead(C, D, margin=rf.CurricularFace()),
    "sub-centers": lambda: rf.MarginHead(C, D, subcenters=3),
    "memory": lambda: rf.MarginHead(C, D, memory=rf.PrototypeMemory(C, D, rf.QAFace(delta=2, inject_scale=0.3), dtype=torch.float32)),
    "split": lambda: rf.MarginHead(C, D, weight_format="split"),
    "split, bfloat16 momentum": lambda: rf.MarginHead(C, D, weight_format="split", subcenters=2),
}


@pytest.fixture
def graphs(taken_over: None, monkeypatch: pytest.MonkeyPatch) -> LoopGraphs:
    """Every loop that comes back is captured and replayed, as on CUDA."""
    held = LoopGraphs(Recorded)

    def run(key: Any, inputs: Any, body: Any, like: Tensor) -> tuple[Tensor, ...]:
        return held.run(key, inputs, body)

    monkeypatch.setattr(chunks, "run_loop", run)
    monkeypatch.setattr(_cuda, "run_loop", run)
    return held


def optimizer_of(name: str, head: rf.MarginHead) -> rf.HeadSGD:
    return rf.HeadSGD(head, lr=0.1, momentum_dtype=torch.bfloat16 if "bfloat16 momentum" in name else torch.float32)


def train(name: str, steps: int = 4) -> list[Tensor]:
    """Losses, dx, W and velocity of steps whose rows, learning rate, memory and rounding change."""
    torch.manual_seed(1)
    head = HEADS[name]()
    head.copy_weight(torch.randn(head.weight.shape) * 0.1)
    optimizer = optimizer_of(name, head)
    found = []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
        x = torch.randn(N, D, requires_grad=True)
        labels = torch.randint(0, C, (N,))
        loss = head(x, labels, keys=x.detach() if head.memory is not None else None)
        loss.backward()
        optimizer.step()
        assert x.grad is not None
        found += [loss.detach(), x.grad, head.full_weight(), optimizer.state[head.weight]["momentum_buffer"].clone()]
    return found


@pytest.mark.parametrize("name", HEADS)
def test_replayed_steps_equal_eager_ones(name: str, graphs: LoopGraphs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever changes from step to step is an input of the captured loop: same bits."""
    replayed = train(name)
    assert graphs.captured == 2
    monkeypatch.setattr(chunks, "run_loop", lambda key, inputs, body, like: body(inputs))
    monkeypatch.setattr(_cuda, "run_loop", lambda key, inputs, body, like: body(inputs))
    eager = train(name)
    assert all(torch.equal(a, b) for a, b in zip(replayed, eager, strict=True))


def test_a_split_head_trains_as_a_float32_one(graphs: LoopGraphs) -> None:
    """The kernels see the same W: the same bits of losses, dx, W and velocity over replayed steps."""
    for a, b in zip(train("arcface", 6), train("split", 6), strict=True):
        assert torch.equal(a, b)


def test_replayed_unknown_rejection_equals_the_eager_one(graphs: LoopGraphs) -> None:
    rest = calls(sample(n=20, c=130, d=32))["unknown_rejection"][1:]
    made = []
    for seed in (0, 1, 2):
        unit = torch.nn.functional.normalize(torch.randn(20, 32, generator=torch.Generator().manual_seed(seed)), dim=1)
        made.append((unit, _cuda.unknown(unit, *rest, plan=PLAN)))
    assert graphs.captured == 1
    graphs.clear()
    for unit, found in made:
        graphs.clear()
        assert all(torch.equal(a, b) for a, b in zip(found, _cuda.unknown(unit, *rest, plan=PLAN), strict=True))


@pytest.mark.parametrize("name", ["arcface", "adaface, bfloat16", "sub-centers", "split, bfloat16 momentum"])
def test_a_training_step_waits_for_no_device(name: str, taken_over: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a first step, which may: with the checks deferred as on CUDA, nothing reads a value on the host."""
    monkeypatch.setattr(_flags, "defers", lambda tensor: True)
    monkeypatch.setattr("recog_fast.losses.defers", lambda tensor: True)
    head = HEADS[name]()
    optimizer = optimizer_of(name, head)
    for step in range(2):
        x, labels = torch.randn(N, D, requires_grad=True), torch.randint(0, C, (N,))
        with no_waiting(step > 0):
            head(x, labels).backward()
            optimizer.step()


def test_the_loops_themselves_wait_for_no_device(taken_over: None) -> None:
    for rules in (False, True):
        s = calls(sample(n=20, c=130, d=32, rules=rules))
        with no_waiting():
            _cuda.forward(*s["negative_logsumexp"], bounded=True, plan=PLAN)
            _cuda.unknown(*s["unknown_rejection"], plan=PLAN)
            _cuda.gradient(*s["class_gradient"], plan=PLAN)
            _cuda.step(*s["class_step"], plan=PLAN, rate=torch.tensor(0.1))
