"""Captured loops with a recorder of our own in place of CUDA's: what is eager, captured, replayed, refused, released."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from recorded import Recorded
from torch import Tensor

from recog_fast.ops import _graphs
from recog_fast.ops._graphs import Inputs, LoopGraphs


def body(factor: float, ran: list[float]) -> Callable[[Inputs], tuple[Tensor, ...]]:
    def run(own: Inputs) -> tuple[Tensor, ...]:
        ran.append(factor)
        x = own["x"]
        assert x is not None
        return x * factor, (x * factor).sum().reshape(1)

    return run


def test_the_first_run_is_eager_the_second_captured_the_others_replayed() -> None:
    graphs, ran, made = LoopGraphs(Recorded), [], []
    for step in range(4):
        x = torch.full((3,), float(step))
        made.append(graphs.run("key", {"x": x, "none": None}, body(2.0, ran)))
    assert graphs.captured == 1
    for step, (twice, total) in enumerate(made):  # results are the caller's own: later replays do not touch them
        assert torch.equal(twice, torch.full((3,), 2.0 * step)) and total.item() == 6.0 * step


def test_another_key_is_another_loop() -> None:
    graphs, ran = LoopGraphs(Recorded), []
    for _ in range(3):
        for factor in (2.0, 5.0):
            twice, _ = graphs.run(factor, {"x": torch.ones(2)}, body(factor, ran))
            assert torch.equal(twice, torch.full((2,), factor))
    assert graphs.captured == 2


def test_the_loop_unused_for_longest_is_released() -> None:
    released: list[Recorded] = []

    class Noting(Recorded):
        def release(self) -> None:
            released.append(self)

    graphs = LoopGraphs(Noting, capacity=2)
    for key in (1, 1, 2, 2, 1, 3):
        graphs.run(key, {"x": torch.ones(1)}, body(1.0, []))
    assert len(released) == 1 and graphs.captured == 1  # 2 went; 3 has run once
    graphs.clear()
    assert len(released) == 2 and graphs.captured == 0


def test_what_cannot_be_captured_stays_eager_and_says_why() -> None:
    class Refusing(Recorded):
        def record(self, function: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
            raise RuntimeError("operation not permitted when stream is capturing")

    graphs, ran = LoopGraphs(Refusing), []
    for step in range(3):
        twice, _ = graphs.run("key", {"x": torch.full((1,), float(step))}, body(2.0, ran))
        assert twice.item() == 2.0 * step
    assert len(ran) == 3 and graphs.captured == 0
    assert graphs.failure is not None and "not permitted" in graphs.failure


def test_an_error_of_the_loop_itself_comes_through() -> None:
    def wrong(own: Inputs) -> tuple[Tensor, ...]:
        raise ValueError("bad operand")

    graphs = LoopGraphs(Recorded)
    for _ in range(3):
        with pytest.raises(ValueError, match="bad operand"):
            graphs.run("key", {}, wrong)


def test_cpu_tensors_and_the_switch_keep_loops_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[float] = []
    for wanted in (True, False):
        monkeypatch.setenv("RECOG_FAST_GRAPHS", str(int(wanted)))
        assert ("as CUDA graphs" in _graphs.describe()) == wanted
        for _ in range(3):
            _graphs.run_loop("key", {"x": torch.ones(1)}, body(1.0, ran), torch.ones(1))
    assert len(ran) == 6
