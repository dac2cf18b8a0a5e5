"""W in two planes and a velocity in bfloat16 through the Triton kernels in the interpreter: the same bits as of a float32 W, and as
`ops/_planes.py` and `ops/_stochastic.py` make. `test_triton_interpreter.py` runs this file beside `interpreted.py`.
"""

from __future__ import annotations

import triton_interpreter  # isort: skip  # first: it sets TRITON_INTERPRET and mends the interpreter

from typing import Any

import pytest
import torch
from interpreted import MEMBERS, OPERATIONS, PLAN
from recog_fast.triton_kernels.class_step import Sgd, run_class_epilogue
from recog_fast.triton_kernels.effective_prototypes import run_prototype_rows
from test_ops import calls, sample
from test_planes import AWKWARD, planes_of
from torch import Tensor

from recog_fast.ops import _cuda, _planes, _stochastic, chunks

assert triton_interpreter.interpreter

WAYS: list[tuple[int, dict[str, Any]]] = [(1, {}), (1, {"members": MEMBERS}), (1, {"members": MEMBERS, "sparse": True}), (2, {"members": MEMBERS})]
ROUNDING = torch.tensor([2**40 + 7, 11, 2**33 + 5])


def options_of(stem: str, half: bool) -> dict[str, Any]:
    return {} if stem == "effective_prototypes" else {"plan": PLAN, "half": half}


# C: three chunks of PLAN, the last ragged, and sub-centers
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("stem", ["effective_prototypes", "negative_logsumexp", "unknown_rejection"])
def test_every_sweep_sees_the_same_weight(stem: str, k: int, half: bool) -> None:
    arguments = calls(sample(20, 210, 24, k, memory=k == 1))[stem]
    at = 0 if stem == "effective_prototypes" else 1
    high, low = planes_of(arguments[at])
    one = OPERATIONS[stem](*arguments, **options_of(stem, half))
    two = OPERATIONS[stem](*arguments[:at], high, *arguments[at + 1 :], **options_of(stem, half), residual=low)
    pairs = [(one, two)] if isinstance(one, Tensor) else zip(one, two, strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def step(velocity: Tensor, split: bool, rounding: Tensor | None, k: int = 1, **options: Any) -> tuple[Tensor, Tensor]:
    """W and velocity after one step."""
    arguments = list(calls(sample(20, 210, 24, k, memory=k == 1, rules=False, seed=4))["class_step"])
    low = None
    if split:
        arguments[3], low = planes_of(arguments[3])
    arguments[4] = velocity.clone()
    _cuda.step(*arguments, **{"plan": PLAN, **options}, residual=low, rounding=rounding)
    return arguments[3] if low is None else _planes.join(arguments[3], low), arguments[4]


@pytest.mark.parametrize(("k", "options"), WAYS)
def test_a_step_in_planes_is_the_step_in_float32(k: int, options: dict[str, Any]) -> None:
    velocity = torch.randn(210, 24) if k == 1 else torch.randn(210, k, 24)
    for a, b in zip(step(velocity, False, None, k, **options), step(velocity, True, None, k, **options), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("k", "options"), WAYS)
def test_a_velocity_in_bfloat16_is_rounded_by_the_same_chance(k: int, options: dict[str, Any]) -> None:
    """The float32 step's velocity, rounded by `_stochastic`; W as in float32; the same bits as planes. Chunks may sum in another order."""
    start = (torch.randn(210, 24) if k == 1 else torch.randn(210, k, 24)).bfloat16()
    expected = torch.empty_like(start)
    for plan in (PLAN, chunks.Plan(50, 64, PLAN.tile)):
        weight, exact = step(start.float(), False, None, k, **{**options, "plan": plan})
        _stochastic.round_into(exact, expected, ROUNDING)
        assert not torch.equal(expected, exact.bfloat16())
        for split in (False, True):
            found = step(start, split, ROUNDING, k, **{**options, "plan": plan})
            assert torch.equal(found[0], weight) and torch.equal(found[1], expected), (split, plan)


def test_values_that_are_awkward_to_split_and_round() -> None:
    """Ties, denormals, the largest, Inf and NaN through load, store and rounding of the kernel: v <- W, W stays."""
    values = AWKWARD.unsqueeze(1).repeat(1, 16)
    high, low = planes_of(values)
    made = torch.empty_like(values)
    run_prototype_rows(values, None, made, renormalize=True)
    again = torch.empty_like(values)
    run_prototype_rows(high, None, again, renormalize=True, residual=low)
    assert torch.equal(made.nan_to_num(5.0), again.nan_to_num(5.0))
    velocity = torch.zeros_like(values).bfloat16()
    run_class_epilogue(
        torch.zeros_like(values), high, None, renormalize=True, velocity=velocity, rates=Sgd(0.0, 0.0, 1.0, False).packed(values.device),
        residual=low, rounding=ROUNDING,
    )  # fmt: skip
    expected = torch.empty_like(velocity)
    finite = torch.isfinite(values)
    with_decay = torch.where(finite, values + 0.0, torch.nan)  # of an Inf in W the chain makes NaN, of -0 with its sum 0
    _stochastic.round_into(with_decay, expected, ROUNDING)
    assert torch.equal(velocity.view(torch.int16), expected.view(torch.int16))
    back = _planes.join(high, low)
    assert torch.equal(back[finite], values[finite]) and bool(torch.isnan(back[~finite]).all()) and bool(torch.isnan(high[~finite]).all())
