"""Margins against the golden cases, gradcheck, the edges (cosine +-1, empty and unlabelled batches), state and bad arguments."""

from __future__ import annotations

import copy
import io
import math
import pickle
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch
from golden import Case, build_margin, cases, get_state, load
from torch import Tensor

from recog_fast import margins
from recog_fast.margins import (
    AdaFace,
    ArcFace,
    CircleMargin,
    CombinedMargin,
    CosFace,
    CurricularFace,
    InterclassFilter,
    MagFace,
    MVSoftmax,
    Softmax,
    SphereFace,
)
from recog_fast.rules import PLAIN, NegativeRule

CLOSE = {"rtol": 1e-9, "atol": 1e-9}
EPSILON32 = torch.finfo(torch.float32).eps

# One of each kind and fallback; a fresh object per test, since some hold state.
KINDS: dict[str, Any] = {
    "softmax": lambda: Softmax(),
    "cosface": lambda: CosFace(),
    "sphereface-4": lambda: SphereFace(4, 0.0),
    "sphereface-1": lambda: SphereFace(1, 0.0),
    "sphereface-3-annealed": lambda: SphereFace(3, 5.0),
    "sphereface-1.7": lambda: SphereFace(1.7, 0.0),
    "arcface-linear": lambda: ArcFace(),
    "arcface-easy": lambda: ArcFace(fallback="easy"),
    "arcface-keep": lambda: ArcFace(fallback="keep"),
    "arcface-clip": lambda: ArcFace(fallback="clip"),
    "arcface-none": lambda: ArcFace(fallback="none"),
    "arcface-straight": lambda: ArcFace(fallback="easy", gradient="straight_through"),
    "combined-unit": lambda: CombinedMargin(1.0, 0.3, 0.2),
    "combined": lambda: CombinedMargin(0.9, 0.4, 0.15),
    "combined-multiple": lambda: CombinedMargin(1.35, 0.0, 0.0),
    "magface-easy": lambda: MagFace(),
    "magface-linear": lambda: MagFace(fallback="linear"),
    "magface-clip": lambda: MagFace(fallback="clip"),
    "adaface": lambda: AdaFace(),
    "curricular": lambda: CurricularFace(),
    "mv-arc": lambda: MVSoftmax(),
    "mv-arc-hard": lambda: MVSoftmax(easy=False),
    "mv-am": lambda: MVSoftmax("am", 0.35),
    "circle": lambda: CircleMargin(),
    "filter": lambda: InterclassFilter(CosFace(0.4)),
}
STATEFUL = ["adaface", "curricular"]
# phi' is not the derivative of phi there, by definition (a detached weight, a straight-through gradient).
SURROGATE = {"arcface-straight", "circle"}


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


def slope_of(margin: Any, cosine: Tensor, norms: Tensor) -> tuple[Tensor, Tensor]:
    """(phi, d phi / d c), (N,) each."""
    cosine = cosine.clone().requires_grad_()
    value = margin(cosine, norms)
    (slope,) = torch.autograd.grad(value.sum(), cosine)
    return value.detach(), slope


@pytest.mark.parametrize("name", cases("margin_softmax"))
def test_golden_values_and_slopes_in_float64(name: str) -> None:
    case = load(name)
    cosine, norms, labelled = inputs_of(case)
    value, slope = slope_of(updated(case, cosine, norms, labelled), cosine, norms)
    assert value.isfinite().all() and slope.isfinite().all()
    torch.testing.assert_close(value[labelled], case["out_t"][labelled], **CLOSE)
    torch.testing.assert_close(slope[labelled], case["out_dt_dc"][labelled], **CLOSE)


@pytest.mark.parametrize("name", cases("margin_softmax"))
def test_golden_values_and_slopes_in_float32(name: str) -> None:
    case = load(name)
    cosine, norms, labelled = inputs_of(case)
    cosine32, norms32 = cosine.float(), norms.float()
    value, slope = slope_of(updated(case, cosine32, norms32, labelled), cosine32, norms32)
    assert value.dtype == slope.dtype == torch.float32
    assert value.isfinite().all() and slope.isfinite().all()
    t, dt_dc = case["out_t"], case["out_dt_dc"]
    # Rounding the cosine alone moves phi by eps/2 |phi'|; the margin's own arithmetic may add a few ulp of its terms (<= 8).
    # (At cosine +-1 phi' is the floored 1e6 sin m, which no rounding of the cosine can realise: 3e-4 is the sine it can make.)
    budget = EPSILON32 * (0.5 * dt_dc.abs().clamp_max(3e3) + 8.0 * t.abs().clamp_min(1.0))
    assert ((value - t).abs() <= budget)[labelled].all()
    # phi'' grows as 1/sin^3: the slope is compared where one float32 step of the cosine does not change it.
    tame = labelled & (cosine.abs() < 0.999)
    torch.testing.assert_close(slope[tame].double(), dt_dc[tame], rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", cases("margin_softmax"))
def test_golden_state_after_one_update(name: str) -> None:
    case = load(name)
    if "out_state" not in case:
        pytest.skip("this margin has no state")
    margin = updated(case, *inputs_of(case))
    torch.testing.assert_close(get_state(margin), case["out_state"].reshape(get_state(margin).shape), **CLOSE)


@pytest.mark.parametrize("name", cases("margin_softmax"))
def test_golden_negatives_follow_the_rule(name: str) -> None:
    """lse from f over out_cos, and grad_dcos from g and phi': the rule and the clamp, checked entry by entry."""
    case = load(name)
    cosine, norms, labelled = inputs_of(case)
    margin = updated(case, cosine, norms, labelled)
    s, cos, y = case.kwargs["s"], case["out_cos"], target_columns(case)
    rule, thresholds = margin.rule(cosine) if hasattr(margin, "rule") else (NegativeRule(PLAIN), torch.full_like(cosine, 4.0))
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

    value, slope = slope_of(margin, cosine, norms)
    q = torch.sigmoid(lse - s * value)
    p = q.unsqueeze(1) * (s * f - lse.unsqueeze(1)).exp()
    d_cosines = torch.where(is_target, (-s * q * slope).unsqueeze(1), s * p * g)
    weights = case["in_gout"] if "in_gout" in case else torch.full_like(cosine, 1.0 / max(int(labelled.sum()), 1))
    d_cosines = torch.where(labelled.unsqueeze(1), weights.unsqueeze(1) * d_cosines, 0.0)
    d_cosines = torch.nan_to_num(d_cosines) if cos.shape[1] == 1 else d_cosines  # C = 1: lse = -inf, no gradient
    # A zero-norm row is the unit vector 0: its cosines are constant, whatever the derivative with respect to them.
    moved = case["out_xnorm"] > 1e-12
    torch.testing.assert_close(d_cosines[moved], case["grad_dcos"][moved], rtol=1e-9, atol=1e-9)


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
    value, slope = slope_of(updated(case, cosine, norms, labelled), cosine, norms)
    torch.testing.assert_close(value[labelled], case["out_t"][labelled], **CLOSE)
    torch.testing.assert_close(slope[labelled], case["out_dt_dc"][labelled], **CLOSE)


@pytest.mark.parametrize("name", cases("mag_reg"))
def test_golden_magface_penalty(name: str) -> None:
    case = load(name)
    # um stays above lm for any la < ua; only la, ua and lambda_g enter the penalty.
    margin = MagFace(la=case.kwargs["la"], ua=case.kwargs["ua"], lambda_g=35.0)
    norms = case["in_norm"].requires_grad_()
    penalty = margin.penalty(norms)
    (d_norms,) = torch.autograd.grad(penalty.sum(), norms)
    torch.testing.assert_close(penalty, 35.0 * case["out_g"], **CLOSE)
    torch.testing.assert_close(d_norms, 35.0 * case["grad_dnorm"], **CLOSE)


def interior_points() -> tuple[Tensor, Tensor]:
    """Cosines away from +-1 and from every border a fallback can have, and norms inside and outside every clip."""
    cosine = torch.linspace(-0.96, 0.97, 41, dtype=torch.float64)
    norms = torch.linspace(3.0, 130.0, 41, dtype=torch.float64)
    inside = (cosine.abs() > 1e-3) & ((cosine + math.cos(0.5)).abs() > 1e-3)
    return cosine[inside], norms[inside]


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in SURROGATE])
def test_gradcheck_in_both_arguments(kind: str) -> None:
    cosine, norms = interior_points()
    margin = KINDS[kind]()
    assert torch.autograd.gradcheck(lambda c: margin(c, norms), (cosine.clone().requires_grad_(),))
    if isinstance(margin, MagFace):  # the only margin whose gradient flows through the norm
        pair = (cosine.clone().requires_grad_(), norms.clone().requires_grad_())
        assert torch.autograd.gradcheck(margin, pair)
        assert torch.autograd.gradcheck(margin.penalty, (norms.clone().requires_grad_(),))


def test_magface_gradient_through_the_norm_is_zero_where_clipped() -> None:
    cosine = torch.full((3,), 0.5, dtype=torch.float64)
    norms = torch.tensor([5.0, 50.0, 500.0], dtype=torch.float64, requires_grad=True)
    (d_norms,) = torch.autograd.grad(MagFace()(cosine, norms).sum(), norms)
    expected = -math.sin(math.acos(0.5) + 0.45 + 0.0035 * 40.0) * 0.0035
    torch.testing.assert_close(d_norms, torch.tensor([0.0, expected, 0.0], dtype=torch.float64))


def test_adaface_gradient_does_not_reach_the_norm() -> None:
    norms = torch.tensor([15.0, 30.0], requires_grad=True)
    cosine = torch.tensor([0.2, 0.6], requires_grad=True)
    AdaFace()(cosine, norms).sum().backward()
    assert norms.grad is None and cosine.grad is not None


@pytest.mark.parametrize("fallback", ["linear", "easy", "keep", "clip", "none"])
def test_both_arcface_gradients_share_the_value(fallback: Any) -> None:
    cosine, norms = torch.linspace(-1.0, 1.0, 101, dtype=torch.float64), torch.ones(101, dtype=torch.float64)
    exact, slope = slope_of(ArcFace(0.5, fallback), cosine, norms)
    straight, ones = slope_of(ArcFace(0.5, fallback, "straight_through"), cosine, norms)
    assert torch.equal(exact, straight)
    assert (ones == 1.0).all() and not (slope == 1.0).all()


def test_exact_arcface_slope_at_the_angles_of_the_page() -> None:
    degrees = torch.tensor([1.0, 20.0, 60.0, 90.0, 150.0], dtype=torch.float64)
    _, slope = slope_of(ArcFace(fallback="none"), degrees.deg2rad().cos(), torch.ones(5))
    torch.testing.assert_close(slope, torch.tensor([28.35, 2.195, 1.154, 0.878, 0.047]).double(), rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_edges_are_finite_in_value_and_gradient(kind: str, dtype: torch.dtype) -> None:
    # 1 ulp inside, exactly at, and 1e-6 beyond +-1 (what a float32 dot product of unit vectors can give), and 0.
    step = torch.finfo(dtype).eps
    cosine = torch.tensor([1.0, -1.0, 1.0 - step, -1.0 + step, 1.0 + 1e-6, -1.0 - 1e-6, 0.0, -0.0], dtype=dtype, requires_grad=True)
    norms = torch.tensor([0.0, 1e-30, 1.0, 10.0, 100.0, 110.0, 1e6, 1e30], dtype=dtype, requires_grad=True)
    margin = KINDS[kind]()
    value = margin(cosine, norms)
    gradients = torch.autograd.grad(value.sum(), (cosine, norms), allow_unused=True)
    assert value.dtype == dtype and value.shape == (8,) and value.isfinite().all()
    assert all(g is None or (g.dtype == dtype and g.isfinite().all()) for g in gradients)
    if hasattr(margin, "rule"):
        rule, thresholds = margin.rule(cosine)
        assert thresholds.dtype == dtype and thresholds.shape == (8,)
        assert thresholds.isfinite().all() and not thresholds.requires_grad
        assert rule.f_max >= 1.0
    if hasattr(margin, "penalty"):
        penalty = margin.penalty(norms)
        assert penalty.shape == (8,) and penalty.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_that_is_not_a_number_stays_alone(kind: str) -> None:
    cosine, norms = torch.tensor([0.3, math.nan, 0.7]), torch.tensor([20.0, 30.0, 40.0])
    margin, clean = KINDS[kind](), KINDS[kind]()
    if hasattr(margin, "update"):
        margin.update(cosine, norms, torch.ones(3, dtype=torch.bool))
        clean.update(cosine, norms, cosine.isfinite())
    value, slope = slope_of(margin, cosine, norms)
    assert value[1].isnan()
    assert value[[0, 2]].isfinite().all() and slope[[0, 2]].isfinite().all()
    if kind == "curricular":
        assert torch.equal(margin.t, clean.t)


@pytest.mark.parametrize("m", [2, 3, 4, 5])
def test_sphereface_slope_at_the_ends_is_m_squared(m: int) -> None:
    cosine = torch.tensor([1.0, -1.0], dtype=torch.float64)
    value, slope = slope_of(SphereFace(m, 0.0), cosine, torch.ones(2))
    torch.testing.assert_close(slope, torch.full((2,), float(m * m), dtype=torch.float64))
    torch.testing.assert_close(value, torch.tensor([1.0, 1.0 - 2.0 * m], dtype=torch.float64))


@pytest.mark.parametrize("m", [1, 2, 3, 4, 1.7, 3.999999999])
def test_sphereface_falls_monotonically_with_the_angle(m: float) -> None:
    theta = torch.linspace(0.0, math.pi, 1001, dtype=torch.float64)
    value, slope = slope_of(SphereFace(m, 0.0), theta.cos(), theta)
    assert (value.diff() <= 1e-12).all() and (slope >= -1e-6).all()


def test_sphereface_annealing() -> None:
    assert SphereFace.annealed(0) == 1500.0
    assert SphereFace.annealed(100) == pytest.approx(1500.0 / 11.0)
    assert SphereFace.annealed(10**6) == 5.0
    with pytest.raises(ValueError, match="it >= 0"):
        SphereFace.annealed(-1)


def test_defaults_are_those_of_the_page() -> None:
    assert (SphereFace(), CosFace(), ArcFace()) == (SphereFace(4, 5.0), CosFace(0.35), ArcFace(0.5, "linear", "exact"))
    assert MagFace() == MagFace(10, 110, 0.45, 0.8, 35, "easy")
    ada, curricular = AdaFace(), CurricularFace()
    assert (ada.m, ada.h, ada.t_alpha, ada.clamp, float(ada.mean), float(ada.std)) == (0.4, 0.333, 0.01, 0.999, 20.0, 100.0)
    assert (curricular.m, curricular.momentum, float(curricular.t)) == (0.5, 0.99, 0.0)
    assert MVSoftmax() == MVSoftmax("arc", 0.5, 0.2, True) and CircleMargin() == CircleMargin(0.25)
    assert InterclassFilter(CosFace()).threshold == 0.4


def test_rules_are_those_of_the_page() -> None:
    cosine = torch.tensor([0.6, -0.2], dtype=torch.float64)
    curricular = CurricularFace()
    curricular.t.fill_(0.25)
    rule, thresholds = curricular.rule(cosine)
    assert rule == NegativeRule(above=(1.0, 0.25, 0.0, 2.0, 0.25), f_max=1.25)
    torch.testing.assert_close(thresholds, (cosine.acos() + 0.5).cos())
    rule, thresholds = MVSoftmax("am", 0.35).rule(cosine)
    assert rule == NegativeRule(above=(0.0, 1.2, 0.2, 0.0, 1.2), f_max=1.4)
    torch.testing.assert_close(thresholds, cosine - 0.35)
    rule, thresholds = CircleMargin().rule(cosine)
    assert rule == NegativeRule(above=(1.0, 0.0, -0.0625, 1.0, 0.25), below=(0.0,) * 5)
    assert (thresholds == -0.25).all()
    rule, thresholds = InterclassFilter(Softmax(), 0.3).rule(cosine)
    assert rule == NegativeRule(above=(0.0,) * 5) and (thresholds == 0.3).all()


@pytest.mark.parametrize("t", [-0.9, 0.0, 0.9])
def test_f_max_bounds_the_curricular_rule_for_every_sign_of_t(t: float) -> None:
    margin = CurricularFace()
    margin.t.fill_(t)
    rule, _ = margin.rule(torch.zeros(1))
    c = torch.linspace(-1.0, 1.0, 201, dtype=torch.float64)
    assert rule.f_max >= float((c**2 + t * c).max()) and rule.f_max >= 1.0


class HardHalf:
    """A user's own margin with a rule, written with nothing of this package but NegativeRule."""

    clamp = 0.9

    def __call__(self, cosine: Tensor, norms: Tensor) -> Tensor:
        return cosine - 0.1 * norms / (1.0 + norms)

    def rule(self, cosine: Tensor) -> tuple[NegativeRule, Tensor]:
        return NegativeRule(above=(0.0, 2.0, 0.0, 0.0, 2.0), f_max=2.0), cosine.detach() * 0.5

    def penalty(self, norms: Tensor) -> Tensor:
        return 0.5 * norms


def test_user_written_callables_can_be_wrapped() -> None:
    cosine, norms = torch.tensor([0.5, -0.5], requires_grad=True), torch.tensor([1.0, 3.0])
    wrapped = InterclassFilter(lambda c, n: c * c, 0.2)
    assert torch.equal(wrapped(cosine, norms), cosine * cosine)
    assert torch.equal(wrapped.penalty(norms), torch.zeros(2)) and wrapped.clamp == 1.0
    wrapped.update(cosine, norms, torch.ones(2, dtype=torch.bool))
    assert not wrapped.state_dict()
    with pytest.raises(ValueError, match="expected a margin without a rule for the negatives, got HardHalf"):
        InterclassFilter(HardHalf())


def test_interclass_filter_passes_everything_on() -> None:
    norms, labelled = torch.tensor([12.0, 50.0]), torch.tensor([True, True])
    cosine = torch.tensor([0.5, 0.1])
    mag = InterclassFilter(MagFace(), 0.3)
    assert torch.equal(mag.penalty(norms), MagFace().penalty(norms))
    ada = InterclassFilter(AdaFace(), 0.3)
    assert ada.clamp == 0.999 and set(ada.state_dict()) == {"margin.mean", "margin.std"}
    alone = AdaFace()
    alone.update(cosine, norms, labelled)
    ada.update(cosine, norms, labelled)
    assert torch.equal(ada.margin.mean, alone.mean) and torch.equal(ada(cosine, norms), alone(cosine, norms))
    ada.eval()
    ada.update(cosine, norms, labelled)
    assert torch.equal(ada.margin.mean, alone.mean) and not alone.training is ada.margin.training


@pytest.mark.parametrize("margin", [CurricularFace(), MVSoftmax(), CircleMargin(), InterclassFilter(Softmax())], ids=repr)
def test_a_filter_around_a_rule_raises(margin: Any) -> None:
    with pytest.raises(ValueError, match="without a rule"):
        InterclassFilter(margin)


def state_of(kind: str) -> tuple[Any, Tensor]:
    margin = KINDS[kind]()
    return margin, get_state(margin)  # type: ignore[return-value]


@pytest.mark.parametrize("kind", STATEFUL)
def test_state_moves_only_by_labelled_rows_in_training_mode(kind: str) -> None:
    cosine, norms = torch.tensor([0.5, 0.1, -0.9]), torch.tensor([30.0, 60.0, 90.0])
    margin, before = state_of(kind)
    margin.update(cosine, norms, torch.zeros(3, dtype=torch.bool))  # nobody labelled
    margin.update(cosine[:0], norms[:0], torch.zeros(0, dtype=torch.bool))  # empty batch
    margin(cosine, norms)  # a call never moves the state
    margin.eval()
    margin.update(cosine, norms, torch.ones(3, dtype=torch.bool))
    assert torch.equal(get_state(margin), before)
    margin.train()
    margin.update(cosine, norms, torch.tensor([True, True, False]))
    alone, _ = state_of(kind)
    alone.update(cosine[:2], norms[:2], torch.ones(2, dtype=torch.bool))
    torch.testing.assert_close(get_state(margin), get_state(alone), rtol=0, atol=1e-15)
    assert not torch.equal(get_state(margin), before)


def test_adaface_statistics_by_hand() -> None:
    margin = AdaFace(t_alpha=0.5)
    margin.update(torch.zeros(3), torch.tensor([10.0, 30.0, 1e9]), torch.tensor([True, True, True]))
    clipped = torch.tensor([10.0, 30.0, 100.0], dtype=torch.float64)
    torch.testing.assert_close(margin.mean, 0.5 * clipped.mean() + 10.0)
    torch.testing.assert_close(margin.std, 0.5 * clipped.std() + 50.0)
    std = margin.std.clone()
    margin.update(torch.zeros(2), torch.tensor([10.0, 30.0]), torch.tensor([True, False]))
    assert torch.equal(margin.std, std) and float(margin.mean) == pytest.approx(0.5 * (0.5 * clipped.mean() + 10.0) + 5.0)


def test_adaface_leaves_a_non_finite_norm_out() -> None:
    margin, clean = AdaFace(), AdaFace()
    norms, everyone = torch.tensor([10.0, math.nan, 30.0, math.inf]), torch.ones(4, dtype=torch.bool)
    margin.update(torch.zeros(4), norms, everyone)
    clean.update(torch.zeros(2), torch.tensor([10.0, 30.0]), everyone[:2])
    torch.testing.assert_close(get_state(margin), get_state(clean))


def test_adaface_clamps_the_target_cosine_with_gradient_zero_beyond() -> None:
    cosine = torch.tensor([0.9995, 0.9985, -0.9995], dtype=torch.float64)
    norms = torch.full((3,), 20.0, dtype=torch.float64)
    value, slope = slope_of(AdaFace(), cosine, norms)
    assert slope[0] == 0.0 and slope[1] != 0.0 and slope[2] == 0.0
    torch.testing.assert_close(value[[0, 2]], torch.tensor([0.999 - 0.4, -0.999 - 0.4], dtype=torch.float64))


@pytest.mark.parametrize("kind", STATEFUL)
def test_backward_survives_a_later_update(kind: str) -> None:
    """Two micro-batches: the second one's update must not disturb the first one's graph."""
    margin = KINDS[kind]()
    cosine = torch.tensor([0.5, 0.1], requires_grad=True)
    norms, everyone = torch.tensor([30.0, 60.0]), torch.ones(2, dtype=torch.bool)
    _, expected = slope_of(margin, cosine.detach(), norms)
    value = margin(cosine, norms)
    margin.update(cosine.detach(), norms, everyone)
    value.sum().backward()
    assert torch.equal(cosine.grad, expected)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_empty_batch(kind: str) -> None:
    cosine, norms = torch.zeros(0, requires_grad=True), torch.zeros(0)
    margin = KINDS[kind]()
    value = margin(cosine, norms)
    value.sum().backward()
    assert value.shape == (0,) and cosine.grad is not None and cosine.grad.shape == (0,)
    if hasattr(margin, "rule"):
        assert margin.rule(cosine)[1].shape == (0,)


@pytest.mark.parametrize("kind", KINDS)
def test_deepcopy_and_pickle_keep_margin_and_state(kind: str) -> None:
    cosine, norms = torch.tensor([0.5, -0.3, 0.9]), torch.tensor([15.0, 40.0, 80.0])
    margin = KINDS[kind]()
    if hasattr(margin, "update"):
        margin.update(cosine, norms, torch.ones(3, dtype=torch.bool))
    expected = margin(cosine, norms)
    for twin in (copy.deepcopy(margin), pickle.loads(pickle.dumps(margin))):
        assert torch.equal(twin(cosine, norms), expected) and repr(twin) == repr(margin)
        if kind in STATEFUL:  # a copy has its own state
            twin.update(cosine, norms, torch.ones(3, dtype=torch.bool))
            assert not torch.equal(get_state(twin), get_state(margin)) and torch.equal(margin(cosine, norms), expected)


@pytest.mark.parametrize("wrap", [False, True], ids=["alone", "filtered"])
@pytest.mark.parametrize("kind", STATEFUL)
def test_state_dict_round_trip(kind: str, wrap: bool) -> None:
    if wrap and kind == "curricular":
        pytest.skip("curricular has a rule, so no filter goes around it")
    margin, fresh = ((InterclassFilter(KINDS[kind]()) if wrap else KINDS[kind]()) for _ in range(2))
    margin.update(torch.tensor([0.5, 0.1]), torch.tensor([30.0, 60.0]), torch.ones(2, dtype=torch.bool))
    file = io.BytesIO()
    torch.save(margin.state_dict(), file)
    file.seek(0)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(get_state(fresh), get_state(margin))
    assert all(buffer.dim() == 0 for buffer in fresh.buffers())


def test_stateless_margins_are_values() -> None:
    assert ArcFace(0.5) == ArcFace(0.5) and hash(ArcFace(0.5)) == hash(ArcFace(0.5)) and ArcFace(0.4) != ArcFace(0.5)
    with pytest.raises(FrozenInstanceError):
        ArcFace().m = 0.3  # type: ignore[misc]


BAD: list[tuple[Any, str]] = [
    (lambda: CosFace(3.0), r"CosFace: expected m in \[-2, 2\], got 3.0"),
    (lambda: SphereFace(0.5), r"SphereFace: expected m in \[1, 64\], got 0.5"),
    (lambda: SphereFace(4, -1.0), r"SphereFace: expected lam in \[0, inf\), got -1.0"),
    (lambda: ArcFace(28.6), r"ArcFace: expected m in \[0, 3.14159\], got 28.6"),
    (lambda: ArcFace(math.nan), "ArcFace: expected m in .*, got nan"),
    (lambda: ArcFace(fallback="hard"), "ArcFace: expected fallback one of linear, easy, keep, clip, none, got 'hard'"),
    (lambda: ArcFace(gradient="ste"), "ArcFace: expected gradient one of exact, straight_through, got 'ste'"),
    (lambda: CombinedMargin(0.0, 0.1, 0.1), r"CombinedMargin: expected m1 in \(0, 64\], got 0.0"),
    (lambda: CombinedMargin(1.0, 9.0, 0.1), "CombinedMargin: expected m2 in .*, got 9.0"),
    (lambda: CombinedMargin(1.0, 0.1, math.inf), "CombinedMargin: expected m3 in .*, got inf"),
    (lambda: MagFace(la=0.0), r"MagFace: expected la in \(0, inf\), got 0.0"),
    (lambda: MagFace(la=110.0), r"MagFace: expected ua in \(110, inf\), got 110.0"),
    (lambda: MagFace(um=0.1), "MagFace: expected um in .*, got 0.1"),
    (lambda: MagFace(lambda_g=-1.0), "MagFace: expected lambda_g in .*, got -1.0"),
    (lambda: MagFace(fallback="x"), "MagFace: expected fallback one of"),
    (lambda: AdaFace(m=-0.1), "AdaFace: expected m in .*, got -0.1"),
    (lambda: AdaFace(h=-0.1), "AdaFace: expected h in .*, got -0.1"),
    (lambda: AdaFace(t_alpha=1.5), r"AdaFace: expected t_alpha in \[0, 1\], got 1.5"),
    (lambda: AdaFace(eps=0.0), r"AdaFace: expected eps in \(0, 0.5\], got 0.0"),
    (lambda: CurricularFace(m=4.0), "CurricularFace: expected m in .*, got 4.0"),
    (lambda: CurricularFace(momentum=-0.5), "CurricularFace: expected momentum in .*, got -0.5"),
    (lambda: MVSoftmax("arcface"), "MVSoftmax: expected kind one of arc, am, got 'arcface'"),
    (lambda: MVSoftmax("am", 2.5), r"MVSoftmax: expected m in \[0, 2\], got 2.5"),
    (lambda: MVSoftmax(t=-0.2), "MVSoftmax: expected t in .*, got -0.2"),
    (lambda: CircleMargin(1.5), r"CircleMargin: expected m in \[0, 1\], got 1.5"),
    (lambda: InterclassFilter(CosFace(), 1.5), r"InterclassFilter: expected threshold in \[-1, 1\], got 1.5"),
]


@pytest.mark.parametrize(("build", "message"), BAD, ids=[message.split(",")[0] for _, message in BAD])
def test_bad_values_are_named(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_wrong_types_are_named() -> None:
    with pytest.raises(TypeError, match="ArcFace: expected m to be a number"):
        ArcFace("0.5")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="CosFace: expected m to be a number"):
        CosFace(True)
    with pytest.raises(TypeError, match="InterclassFilter: expected margin callable"):
        InterclassFilter(0.4)  # type: ignore[arg-type]


def test_every_public_margin_is_tested_here() -> None:
    assert set(margins.__all__) == {type(build()).__name__ for build in KINDS.values()}
