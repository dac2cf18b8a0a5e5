"""Margins: gradcheck, plain formulas, the edges (cosine +-1, empty and unlabelled batches), state, bad arguments."""

from __future__ import annotations

import copy
import math
import pickle
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch
from golden import get_state, value_and_slope
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
from recog_fast.rules import NegativeRule

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
# phi' is not the derivative of phi there, by definition (a detached weight, a straight-through gradient).
SURROGATE = {"arcface-straight", "circle"}


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


def plain_arcface(theta: Tensor, m: Tensor, fallback: str) -> Tensor:
    """math.md 1.1 with acos and cos, float64."""
    phi = (theta + m).cos()
    past = {
        "none": phi,
        "keep": torch.where(theta <= math.pi - m, phi, theta.cos()),
        "linear": torch.where(theta <= math.pi - m, phi, theta.cos() - m * m.sin()),
        "easy": torch.where(theta < math.pi / 2, phi, theta.cos()),
        "clip": (theta + m).clamp(1e-4, math.pi - 1e-4).cos(),
    }
    return past[fallback]


@pytest.mark.parametrize("fallback", ["linear", "easy", "keep", "clip", "none"])
@pytest.mark.parametrize("m", [0.0, 1e-5, 0.3, 1.0, 2.5])
def test_additive_angle_against_the_plain_formula(m: float, fallback: Any) -> None:
    # An odd number of angles that meets neither pi/2 nor pi - m, where the value jumps.
    theta = torch.linspace(0.011, 3.13, 1001, dtype=torch.float64)
    norms = torch.linspace(1.0, 120.0, 1001, dtype=torch.float64)
    expected = plain_arcface(theta, torch.tensor(m, dtype=torch.float64), fallback)
    torch.testing.assert_close(ArcFace(m, fallback)(theta.cos(), norms), expected, rtol=0, atol=1e-12)
    mag = MagFace(lm=m, um=m + 0.5, fallback=fallback)
    margin = m + 0.5 * (norms.clamp(10.0, 110.0) - 10.0) / 100.0
    torch.testing.assert_close(mag(theta.cos(), norms), plain_arcface(theta, margin, fallback), rtol=0, atol=1e-12)


@pytest.mark.parametrize("m", [1, 1.2, 2, 2.5, 3, 7])
def test_multiplied_angles_against_the_plain_formula(m: float) -> None:
    theta = torch.linspace(0.011, 3.13, 1001, dtype=torch.float64)
    k = (m * theta / math.pi).floor()
    psi = torch.where(k % 2 == 0, 1.0, -1.0) * (m * theta).cos() - 2.0 * k
    torch.testing.assert_close(
        SphereFace(m, 2.0)(theta.cos(), theta), (2.0 * theta.cos() + psi) / 3.0, rtol=0, atol=1e-11
    )
    combined = (m * theta + 0.2).cos() - 0.1
    torch.testing.assert_close(CombinedMargin(m, 0.2, 0.1)(theta.cos(), theta), combined, rtol=0, atol=1e-11)


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
    exact, slope = value_and_slope(ArcFace(0.5, fallback), cosine, norms)
    straight, ones = value_and_slope(ArcFace(0.5, fallback, "straight_through"), cosine, norms)
    assert torch.equal(exact, straight)
    assert (ones == 1.0).all() and not (slope == 1.0).all()


def test_exact_arcface_slope_at_the_angles_of_the_page() -> None:
    degrees = torch.tensor([1.0, 20.0, 60.0, 90.0, 150.0], dtype=torch.float64)
    _, slope = value_and_slope(ArcFace(fallback="none"), degrees.deg2rad().cos(), torch.ones(5))
    torch.testing.assert_close(slope, torch.tensor([28.35, 2.195, 1.154, 0.878, 0.047]).double(), rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_edges_are_finite_in_value_and_gradient(kind: str, dtype: torch.dtype) -> None:
    # 1 ulp inside, exactly at, and 1e-6 beyond +-1 (what a float32 dot product of unit vectors can give), and 0.
    step = torch.finfo(dtype).eps
    cosine = torch.tensor(
        [1.0, -1.0, 1.0 - step, -1.0 + step, 1.0 + 1e-6, -1.0 - 1e-6, 0.0, -0.0], dtype=dtype, requires_grad=True
    )
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
    value, slope = value_and_slope(margin, cosine, norms)
    assert value[1].isnan()
    assert value[[0, 2]].isfinite().all() and slope[[0, 2]].isfinite().all()
    if kind == "curricular":
        assert torch.equal(margin.t, clean.t)


@pytest.mark.parametrize("m", [2, 3, 4, 5])
def test_sphereface_slope_at_the_ends_is_m_squared(m: int) -> None:
    cosine = torch.tensor([1.0, -1.0], dtype=torch.float64)
    value, slope = value_and_slope(SphereFace(m, 0.0), cosine, torch.ones(2))
    torch.testing.assert_close(slope, torch.full((2,), float(m * m), dtype=torch.float64))
    torch.testing.assert_close(value, torch.tensor([1.0, 1.0 - 2.0 * m], dtype=torch.float64))


@pytest.mark.parametrize("m", [1, 2, 3, 4, 1.7, 3.999999999])
def test_sphereface_falls_monotonically_with_the_angle(m: float) -> None:
    theta = torch.linspace(0.0, math.pi, 1001, dtype=torch.float64)
    value, slope = value_and_slope(SphereFace(m, 0.0), theta.cos(), theta)
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
    assert (ada.m, ada.h, ada.t_alpha, ada.clamp, float(ada.mean), float(ada.std)) == (
        0.4,
        0.333,
        0.01,
        0.999,
        20.0,
        100.0,
    )
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
    inner, alone = AdaFace(), AdaFace()
    ada = InterclassFilter(inner, 0.3)
    assert ada.clamp == 0.999 and set(ada.state_dict()) == {"margin.mean", "margin.std"}
    alone.update(cosine, norms, labelled)
    ada.update(cosine, norms, labelled)
    assert torch.equal(inner.mean, alone.mean) and torch.equal(ada(cosine, norms), alone(cosine, norms))
    ada.eval()
    ada.update(cosine, norms, labelled)
    assert torch.equal(inner.mean, alone.mean) and not inner.training


def test_a_second_derivative_raises_instead_of_being_wrong() -> None:
    cosine = torch.tensor([0.3], requires_grad=True)
    (slope,) = torch.autograd.grad(ArcFace()(cosine, cosine.detach()).square().sum(), cosine, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize(
    "margin", [CurricularFace(), MVSoftmax(), CircleMargin(), InterclassFilter(Softmax())], ids=repr
)
def test_a_filter_around_a_rule_raises(margin: Any) -> None:
    with pytest.raises(ValueError, match="without a rule"):
        InterclassFilter(margin)


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
        if kind in ("adaface", "curricular"):  # a copy has its own state
            twin.update(cosine, norms, torch.ones(3, dtype=torch.bool))
            assert not torch.equal(get_state(twin), get_state(margin)) and torch.equal(margin(cosine, norms), expected)


def test_stateless_margins_are_values() -> None:
    assert ArcFace(0.5) == ArcFace(0.5) and hash(ArcFace(0.5)) == hash(ArcFace(0.5)) and ArcFace(0.4) != ArcFace(0.5)
    with pytest.raises(FrozenInstanceError):
        ArcFace().m = 0.3  # type: ignore[misc]


def test_every_public_margin_is_tested_here() -> None:
    assert set(margins.__all__) - {"MarginFunction"} == {type(build()).__name__ for build in KINDS.values()}
