"""The protocol itself: a wrong, slow, failing or irreproducible contender gets no time; ratios are paired."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch import Tensor

from . import protocol, report, suite
from .contenders import Arena, Contender, Unsuitable
from .ours import FusedStep
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


def test_shares_are_of_the_rate_measured_before_each_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """3 GFLOP/s invented: the share of a recomputing step is 8NCD over its seconds times that, 4NCD for its forward."""
    monkeypatch.setattr(protocol, "kernel_rate", lambda arithmetic: 3e9 if arithmetic else None)
    measured = suite.run_case(suite.Case("R0", 4, 60, 128, (Eager, FusedStep), rounds=5))
    eager, ours = measured["rows"]
    assert "share_of_peak" not in eager["steps"]["full step"]
    for step, products, least in (("forward", 4, 2), ("full step", 8, 6)):
        got = ours["steps"][step]
        own = products * 4 * 60 * 128 / (got["cpu_s"]["median"] * 3e9)
        assert got["share_of_peak"]["median"] == pytest.approx(own, rel=1e-9)
        assert got["least_share_of_peak"]["median"] == pytest.approx(own * least / products, rel=1e-9)


def test_a_missing_option_is_a_reason_and_not_a_time() -> None:
    class Imaginary(FusedStep):
        """Asks MarginHead for what it does not have."""

        name = "imaginary"
        options: ClassVar[dict[str, object]] = {"no_such_option": True}

    row = _rows((Imaginary,))["imaginary"]
    assert "no option no_such_option" in str(row["skipped"]) and "steps" not in row
