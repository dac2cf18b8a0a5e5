"""Margins against every golden case: values, slopes, state, rules, the gradient through the norm, MagFace's penalty."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from golden import Case, build_margin, cases, get_state, load, value_and_slope
from torch import Tensor

from recog_fast.margins import MagFace
from recog_fast.rules import PLAIN, NegativeRule

CLOSE: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-9}
EPSILON32 = torch.finfo(torch.float32).eps


def inputs_of(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Target cosines, norms, labelled mask (N,) of a margin_softmax case."""
    norms = case["in_norm"] if "in_norm" in case else case["out_xnorm"]
    return case["out_cos_y"], norms, case["in_y"] >= 0


def target_columns(case: Case) -> Tensor:
    """Column of out_cos that holds each row's target class (N,); meaningless for unlabelled rows."""
    if "in_class_index" not in case:
        return case["in_y"].clamp_min(0)
    return torch.searchsorted(case["in_class_index"], case["in_y"]).clamp_max(case["out_cos"].shape[1] - 1)


def updated(case: Case, cosine: Tensor, norms: Tensor, labelled: Tensor) -> Any:
    """The case's margin after the one update of a training forward."""
    margin = build_margin(case.kwargs, case)
    if hasattr(margin, "update"):
        margin.update(cosine, norms, labelled)
    return margin


@pytest.mark.parametrize("name", cases("margin_softmax"))
def test_golden_values_slopes_and_state_in_float64(name: str) -> None:
    case = load(name)
    cosine, norms, labelled = inputs_of(case)
    margin = updated(case, cosine, norms, labelled)
    value, slope = value_and_slope(margin, cosine, norms)
    assert value.isfinite().all() and slope.isfinite().all()
    torch.testing.assert_close(value[labelled], case["out_t"][labelled], **CLOSE)
    # At cosine = +-1 only finiteness is specified.
    inner = labelled & (cosine.abs() < 1.0 - 1e-9)
    torch.testing.assert_close(slope[inner], case["out_dt_dc"][inner], **CLOSE)
    if "out_state" in case:
        state = get_state(margin)
        torch.testing.assert_close(state, case["out_state"].reshape(state.shape), **CLOSE)


@pytest.mark.parametrize("name", cases("margin_softmax"))
def test_golden_values_and_slopes_in_float32(name: str) -> None:
    case = load(name)
    cosine, norms, labelled = inputs_of(case)
    cosine32, norms32 = cosine.float(), norms.float()
    value, slope = value_and_slope(updated(case, cosine32, norms32, labelled), cosine32, norms32)
    assert value.dtype == slope.dtype == torch.float32
    assert value.isfinite().all() and slope.isfinite().all()
    t, dt_dc = case["out_t"], case["out_dt_dc"]
    # Rounding the cosine alone moves phi by eps/2 |phi'|; the margin's own arithmetic may add 8 ulp of its terms.
    # (At cosine +-1 phi' is the floored 1e6 sin m; the smallest sine a float32 cosine can make is 3e-4, hence 3e3.)
    budget = EPSILON32 * (0.5 * dt_dc.abs().clamp_max(3e3) + 8.0 * t.abs().clamp_min(1.0))
    assert ((value - t).abs() <= budget)[labelled].all()
    # phi'' grows as 1/sin^3: near +-1 rounding the cosine alone moves the slope by more (random trials: 0.65 of this).
    tame = labelled & (cosine.abs() < 0.99)
    torch.testing.assert_close(slope[tame].double(), dt_dc[tame], rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", cases("margin_softmax"))
def test_golden_negatives_follow_the_rule(name: str) -> None:
    """lse from f over out_cos, and grad_dcos from g and phi': the rule and the clamp, checked entry by entry."""
    case = load(name)
    cosine, norms, labelled = inputs_of(case)
    margin = updated(case, cosine, norms, labelled)
    s, cos, y = case.kwargs["s"], case["out_cos"], target_columns(case)
    rule, thresholds = NegativeRule(PLAIN), torch.full_like(cosine, 4.0)
    if hasattr(margin, "rule"):
        rule, thresholds = margin.rule(cosine)
    clamp = getattr(margin, "clamp", 1.0)
    used = cos.clamp(-clamp, clamp)
    above = used > thresholds.unsqueeze(1)
    (a2, a1, a0, b1, b0), (e2, e1, e0, h1, h0) = rule.above, rule.below
    f = torch.where(above, a2 * used**2 + a1 * used + a0, e2 * used**2 + e1 * used + e0)
    g = torch.where(above, b1 * used + b0, h1 * used + h0)
    if clamp < 1.0:
        g = torch.where(cos.abs() > clamp, 0.0, g)
    assert (f <= rule.f_max + 1e-12).all()

    is_target = torch.arange(cos.shape[1]) == y.unsqueeze(1)
    lse = (s * f).masked_fill(is_target, -math.inf).logsumexp(1)
    torch.testing.assert_close(lse[labelled], case["out_lse_neg"][labelled], **CLOSE)

    value, slope = value_and_slope(margin, cosine, norms)
    q = torch.sigmoid(lse - s * value)
    p = q.unsqueeze(1) * (s * f - lse.unsqueeze(1)).exp()
    d_cosines = torch.where(is_target, (-s * q * slope).unsqueeze(1), s * p * g)
    weights = case["in_gout"] if "in_gout" in case else torch.full_like(cosine, 1.0 / max(int(labelled.sum()), 1))
    d_cosines = torch.where(labelled.unsqueeze(1), weights.unsqueeze(1) * d_cosines, 0.0)
    d_cosines = torch.nan_to_num(d_cosines) if cos.shape[1] == 1 else d_cosines  # C = 1: lse = -inf, no gradient
    # A zero-norm row is the unit vector 0: its cosines are constant, whatever the derivative with respect to them.
    moved = (case["out_xnorm"] > 1e-12) & (cosine.abs() < 1.0 - 1e-9)
    torch.testing.assert_close(d_cosines[moved], case["grad_dcos"][moved], **CLOSE)


@pytest.mark.parametrize("name", cases("margin_softmax", without=("norm passed separately", "subcenter", "partial_fc")))
def test_golden_gradient_through_the_norm(name: str) -> None:
    """dX = the part through the direction (from grad_dcos) + the margin's own part through |x|, along x^."""
    case = load(name)
    cosine, norms, labelled = inputs_of(case)
    margin = updated(case, cosine, norms, labelled)
    s, x, weight = case.kwargs["s"], case["in_X"], case["in_W"]
    norms.requires_grad_()
    value = margin(cosine, norms)
    d_phi = torch.zeros_like(cosine)
    if value.requires_grad:
        (d_phi,) = torch.autograd.grad(value.sum(), norms)
    q = 1.0 / (1.0 + (s * value.detach() - case["out_lse_neg"]).exp())
    weights = case["in_gout"] if "in_gout" in case else torch.full_like(cosine, 1.0 / max(int(labelled.sum()), 1))
    d_norm = torch.where(labelled, -weights * s * q * d_phi, 0.0)
    unit = torch.nn.functional.normalize(x, dim=1)
    d_unit = case["grad_dcos"] @ torch.nn.functional.normalize(weight, dim=1)
    d_x = (d_unit - (d_unit * unit).sum(1, keepdim=True) * unit) / norms.detach().unsqueeze(1) + d_norm.unsqueeze(
        1
    ) * unit
    checked = (norms > 1e-12) & (cosine.abs() < 1.0 - 1e-9)
    torch.testing.assert_close(d_x[checked], case["grad_dX"][checked], **CLOSE)


@pytest.mark.parametrize("name", cases("margin_softmax", "norm passed separately"))
def test_golden_norm_passed_apart(name: str) -> None:
    """The norms the margin sees are those it is given, not the embeddings'."""
    case = load(name)
    margin = updated(case, *inputs_of(case))
    cosine, norms, labelled = inputs_of(case)
    assert not torch.allclose(margin(cosine, norms)[labelled], margin(cosine, case["out_xnorm"])[labelled])


@pytest.mark.parametrize("name", cases("inject_margin"))
def test_golden_margins_on_injected_prototypes(name: str) -> None:
    case = load(name)
    cosine, norms, labelled = inputs_of(case)
    value, slope = value_and_slope(updated(case, cosine, norms, labelled), cosine, norms)
    torch.testing.assert_close(value[labelled], case["out_t"][labelled], **CLOSE)
    torch.testing.assert_close(slope[labelled], case["out_dt_dc"][labelled], **CLOSE)


@pytest.mark.parametrize("name", cases("mag_reg"))
@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, CLOSE), (torch.float32, {"rtol": 1e-5, "atol": 1e-6})])
def test_golden_magface_penalty(name: str, dtype: torch.dtype, close: dict[str, float]) -> None:
    case = load(name)
    # um stays above lm for any la < ua; only la, ua and lambda_g enter the penalty.
    margin = MagFace(la=case.kwargs["la"], ua=case.kwargs["ua"], lambda_g=35.0)
    norms = case["in_norm"].to(dtype).requires_grad_()
    penalty = margin.penalty(norms)
    (d_norms,) = torch.autograd.grad(penalty.sum(), norms)
    torch.testing.assert_close(penalty.double(), 35.0 * case["out_g"], **close)
    torch.testing.assert_close(d_norms.double(), 35.0 * case["grad_dnorm"], **close)
