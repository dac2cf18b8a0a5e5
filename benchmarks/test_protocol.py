"""The protocol itself: a wrong, slow, failing or irreproducible contender gets no time; ratios are paired."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch import Tensor

from . import report, suite
from .contenders import Arena, Contender, Unsuitable
from .peers import Eager, eager_loss
from .problems import make_problem
from .protocol import STEPS, interleave, paired_ratio, spread


class _WrongGradient(Eager):
    """dW 1 % too large; loss and dx right."""

    name = "wrong dW"

    def forward(self) -> Tensor:
        weight = self.arena.weight
        return eager_loss(self.arena.embeddings, weight * 1.01 - (0.01 * weight).detach(), self.arena.labels)


class _WrongStep(Eager):
    """Right gradients, W left where it was."""

    name = "wrong step"

    def update(self) -> None:
        before = self.arena.weight.detach().clone()
        super().update()
        self.arena.weight.data.copy_(before)


class _NoNumber(Eager):
    """NaN in one element of dx."""

    name = "nan dx"

    def forward(self) -> Tensor:
        loss = super().forward()
        return loss + (self.arena.embeddings[0, 0] * 0).sqrt()


class _Irreproducible(Eager):
    """Promises equal bits between runs and has none."""

    name = "other bits"
    same_bits = True
    _calls: ClassVar[int] = 0

    def forward(self) -> Tensor:
        type(self)._calls += 1
        return super().forward() * (1 + 1e-6 * type(self)._calls)


class _Absent(Contender):
    """Cannot run here."""

    name = "absent"

    def forward(self) -> Tensor:
        raise Unsuitable("this PyTorch has no such function")


class _Slow(Eager):
    """Nothing but eager, in a case that calls everything slow."""

    name = "slow"


def _rows(kinds: tuple[type[Contender], ...], slow: float = 1e9) -> dict[str, dict[str, object]]:
    case = suite.Case("R0", 4, 60, 128, (Eager, *kinds), rounds=5, slow=slow)
    measured = suite.run_case(case)
    assert all(kind.name in report.case_lines(measured)[k + 6] for k, kind in enumerate(case.kinds))
    return {r["name"]: r for r in measured["rows"]}


def test_contenders_that_fail_their_gate_get_no_time() -> None:
    rows = _rows((_WrongGradient, _WrongStep, _NoNumber, _Irreproducible, _Absent))
    assert "steps" in rows[Eager.name]
    for kind in (_WrongGradient, _WrongStep, _NoNumber, _Irreproducible):
        assert "steps" not in rows[kind.name], kind.name
        assert str(rows[kind.name]["skipped"]).startswith("gate failed"), rows[kind.name]
    assert rows[_Absent.name]["skipped"] == "this PyTorch has no such function"


def test_slow_contenders_are_named_and_not_repeated() -> None:
    rows = _rows((_Slow,), slow=0.0)
    assert str(rows[_Slow.name]["skipped"]).startswith("slow: one full step took")


def test_ratios_are_paired_within_rounds() -> None:
    ratio = paired_ratio([1.0, 10.0, 2.0], [0.5, 5.0, 1.0])
    assert (ratio.median, ratio.p10, ratio.p90) == (2.0, 2.0, 2.0)
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0]).p10 == pytest.approx(1.4)


def test_every_round_starts_from_the_same_inputs() -> None:
    problem = make_problem("R0", 4, 60, 32)
    arena = Arena(problem)
    times, _ = interleave([Eager(arena), Eager(arena)], arena, 5)
    assert len({loss for t in times for loss in t.losses}) == 1
    assert all(len(t.cpu[s]) == 5 for t in times for s in STEPS)
    assert torch.equal(arena.weight.detach(), problem.weight)
