"""Schedules: the golden InsightFace curve, continuity of the others, and what they refuse."""

from __future__ import annotations

import json

import numpy as np
import pytest
from paths import golden_dir

from recog_fast.training import schedules


def test_polynomial_is_the_golden_curve() -> None:
    cases = sorted(golden_dir().glob("poly_lr__*.npz"))
    assert cases
    for path in cases:
        with np.load(path) as case:
            kwargs = json.loads(str(case["meta"]))["kwargs"]
            expected = case["out_lr"]
        got = [schedules.polynomial(k, **kwargs) for k in range(len(expected))]
        np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-12)


def test_polynomial_ends() -> None:
    assert schedules.polynomial(0, base=0.1, warmup=5, total=20) == 0.1
    assert schedules.polynomial(20, base=0.1, warmup=5, total=20) == 0.0
    assert schedules.polynomial(25, base=0.1, warmup=5, total=20) == 0.0
    assert schedules.polynomial(0, base=0.1, warmup=0, total=20) == 0.1
    assert schedules.polynomial(10, base=0.1, warmup=0, total=20) == pytest.approx(0.05)


@pytest.mark.parametrize("schedule", [schedules.polynomial_smooth, schedules.cosine])
def test_smooth_schedules_rise_then_fall_without_a_jump(schedule: object) -> None:
    assert callable(schedule)
    rates = [schedule(k, base=0.2, warmup=10, total=100) for k in range(101)]
    assert max(rates) == pytest.approx(0.2)
    assert rates[0] == pytest.approx(0.02)
    assert rates[100] == pytest.approx(0.0)
    assert np.all(np.diff(rates[:10]) > 0)
    assert np.all(np.diff(rates[10:]) <= 0)
    assert np.abs(np.diff(rates)).max() <= 0.0201


def test_multistep() -> None:
    rates = [schedules.multistep(k, base=1.0, warmup=2, total=10, milestones=[4, 7], gamma=0.1) for k in range(9)]
    np.testing.assert_allclose(rates, [0.5, 1, 1, 1, 0.1, 0.1, 0.1, 0.01, 0.01])


def test_ramp() -> None:
    assert [schedules.ramp(k, 4) for k in (0, 1, 4, 9)] == [0, 0.25, 1, 1]
    assert schedules.ramp(0, 0) == 1


def test_refusals() -> None:
    with pytest.raises(ValueError, match="warmup 20, total 20"):
        schedules.polynomial(0, base=0.1, warmup=20, total=20)
    with pytest.raises(ValueError, match="step >= 0"):
        schedules.cosine(-1, base=0.1, warmup=0, total=20)
    with pytest.raises(ValueError, match="ascending"):
        schedules.multistep(0, base=0.1, warmup=0, total=20, milestones=[8, 4])
