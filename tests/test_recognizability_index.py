"""The recognizability index: golden cases, the attention branch, the branches' total loss and gradients (math.md 4)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden import cases, load
from torch import Tensor, nn

import recog_fast as rf
from recog_fast import recognizability as rec
from recog_fast.models import build_model

F64 = torch.float64
SHAPE = (32, 3, 3)


def close(value: Tensor, truth: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(value, truth, rtol=tolerance, atol=tolerance, check_dtype=False)


@pytest.mark.parametrize("name", cases("ri_index"))
def test_golden_index(name: str) -> None:
    """Value and gradient (detach off) through cosines of unit vectors; row 0 of the edge case has d_P = 0."""
    case = load(name)
    x, w = case["in_X"].requires_grad_(), case["in_W"].requires_grad_()
    unit = nn.functional.normalize(x, dim=1)
    cosine = unit @ nn.functional.normalize(w, dim=1).t()
    rows = torch.arange(len(x))
    u = case["in_u"] / case["in_u"].norm()
    kept = slice(1 if "edge" in name else 0, None)
    ui = unit @ u
    xi = rec.recognizability_index(cosine[rows, case["in_y"]], cosine[rows, case["out_nn_idx"]], ui, detach=False)
    close(xi[kept], case["out_xi"][kept])
    if "edge" in name:
        return  # a tied nearest negative: its gradient is anybody's, and row 0's is forward rounding
    (xi * case["in_gxi"]).sum().backward()
    assert x.grad is not None and w.grad is not None
    close(x.grad, case["grad_dX"])
    close(w.grad, case["grad_dW"])


@pytest.mark.parametrize("name", cases("ri_index", without=("row1 tied nn",)))
def test_index_from_the_sweep(name: str) -> None:
    """The cosines a float32 sweep reports give the same index, within what a float32 cosine is worth: 1e-7 / d_P."""
    case = load(name)
    x, w = case["in_X"].float(), case["in_W"].float()
    _, stats = rf.margin_softmax_loss(x, w, case["in_y"], return_stats=True)
    assert torch.equal(stats.nearest_index, case["out_nn_idx"])
    u = case["in_u"].float()
    ui = nn.functional.normalize(x, dim=1) @ (u / u.norm())
    xi = rec.recognizability_index(stats.target_cosine, stats.nearest_cosine, ui)
    error = (xi.double() - case["out_xi"]).abs() / case["out_xi"]
    assert bool((error < 5e-7 * (1 / case["out_d_p"] + 1 / case["out_d_n"] + 1 / case["out_d_ui"])).all())


@pytest.mark.parametrize("name", cases("index_diversion"))
def test_golden_index_diversion(name: str) -> None:
    case = load(name)
    loss = rec.IndexDiversionLoss(tau=case.kwargs["tau"])
    loss.fit(case["in_samples"])
    close(loss.mu, case["out_mu"])
    close(loss.sigma, case["out_sigma"])
    predicted = case["in_pred"].requires_grad_()
    each = loss(predicted, "none")
    close(each, case["out_loss"])
    each.sum().backward()
    assert predicted.grad is not None
    close(predicted.grad, case["grad_dpred"])
    close(loss(predicted), case["out_loss"].mean())


def test_index_diversion_draws_once() -> None:
    one, two, other = rec.IndexDiversionLoss(), rec.IndexDiversionLoss(), rec.IndexDiversionLoss(seed=1)
    assert torch.equal(one.mu, two.mu) and torch.equal(one.sigma, two.sigma) and not torch.equal(one.mu, other.mu)
    # 5000 draws of N(0, 1): four standard errors.
    assert abs(float(one.mu)) < 4 / 5000**0.5 and abs(float(one.sigma) - 1) < 4 / (2 * 5000) ** 0.5
    other.load_state_dict(one.state_dict())
    assert torch.equal(other.mu, one.mu)
    for arguments in ({"tau": -1.0}, {"k": 1}):
        with pytest.raises(ValueError, match=f"IndexDiversionLoss: expected {next(iter(arguments))} >="):
            rec.IndexDiversionLoss(**arguments)  # type: ignore[arg-type]
    for values in (torch.zeros(1), torch.tensor([0.0, float("nan")])):
        with pytest.raises(ValueError, match="IndexDiversionLoss.fit"):
            other.fit(values)
    other.fit(torch.ones(3))  # a head that says one thing of all: no division by zero
    assert torch.isfinite(other(torch.ones(2)))


@pytest.mark.parametrize("name", cases("smooth_l1"))
def test_golden_smooth_l1(name: str) -> None:
    case = load(name)
    predicted = case["in_pred"].requires_grad_()
    each = rec.regression_loss(predicted, case["in_target"], case.kwargs.get("beta", 0.75), reduction="none")
    close(each, case["out_loss"])
    each.sum().backward()
    assert predicted.grad is not None
    close(predicted.grad, case["grad_dpred"])
    close(rec.regression_loss(predicted, case["in_target"]), case["out_loss"].mean())


@pytest.mark.parametrize("name", cases("attn_mse"))
def test_golden_attention_loss(name: str) -> None:
    case = load(name)
    attended = case["in_Va"].requires_grad_()
    each = rec.attention_loss(attended, case["in_Vp"], case.kwargs["reduction"], reduction="none")
    close(each, case["out_loss"])
    each.sum().backward()
    assert attended.grad is not None
    close(attended.grad, case["grad_dVa"])


@pytest.mark.parametrize("name", cases("ui_project"))
def test_golden_projection(name: str) -> None:
    case = load(name)
    v = case["in_V"].requires_grad_()
    away = rec.project_away(v, case["in_u"])
    close(away, case["out_P"])
    (away * case["in_g"]).sum().backward()
    assert v.grad is not None
    close(v.grad, case["grad_dV"])
    assert float((away @ case["in_u"]).detach().abs().max()) < 1e-9


def test_index_has_no_gradient_and_no_surprise_at_the_bounds() -> None:
    above, none = torch.tensor([1.0000001], requires_grad=True), torch.tensor([-2.0])
    xi = rec.recognizability_index(above, none, torch.tensor([0.0]))
    assert not xi.requires_grad
    # d_P = 0 and d_N = 2 (a head of one class has no nearest): finite, (1 * 2) / 1e-7.
    assert float(xi) == pytest.approx(2e7, rel=1e-5)
    with pytest.raises(ValueError, match=r"recognizability_index: expected ui_cosine of shape \(N,\) = \(1,\)"):
        rec.recognizability_index(above, none, torch.zeros(2))


def test_attention_is_cbam() -> None:
    """Against the formulas written out, in float64."""
    torch.manual_seed(0)
    branch = rec.PerceptibilityAttention(32, (3, 2), 5).double()
    assert branch.mlp[0].out_features == 2  # C / r
    x = torch.randn(4, 32, 3, 2, dtype=F64)

    def mlp(v: Tensor) -> Tensor:
        hidden = torch.relu(v @ branch.mlp[0].weight.t() + branch.mlp[0].bias)
        return hidden @ branch.mlp[2].weight.t() + branch.mlp[2].bias

    channel = 1 / (1 + torch.exp(-(mlp(x.mean((2, 3))) + mlp(x.amax((2, 3))))))
    gated = x * channel[:, :, None, None]
    pooled = torch.stack([gated.mean(1), gated.amax(1)], dim=1)
    padded = nn.functional.pad(pooled, (3, 3, 3, 3))
    spatial = torch.zeros(4, 3, 2, dtype=F64)
    for row in range(3):
        for column in range(2):
            spatial[:, row, column] = (padded[:, :, row : row + 7, column : column + 7] * branch.conv.weight[0]).sum(
                (1, 2, 3)
            )
    spatial = torch.sigmoid(spatial)
    expected = (gated * spatial[:, None]).flatten(1) @ branch.fc.weight.t() + branch.fc.bias
    torch.testing.assert_close(branch(x), expected)
    torch.testing.assert_close(branch.gates(x), (channel, spatial))
    assert torch.autograd.gradcheck(branch, (x[:1].requires_grad_(),))
    with pytest.raises(ValueError, match=r"features of shape \(N, 32, 3, 2\)"):
        branch(x.transpose(2, 3))
    assert rec.PerceptibilityAttention(8, 7, 4).shape == (8, 7, 7)
    with pytest.raises(ValueError, match=r"spatial >= 1, got \(0, 7\)"):
        rec.PerceptibilityAttention(8, (0, 7), 4)


def test_branches_keep_float32_under_autocast() -> None:
    torch.manual_seed(0)
    branches = rec.RecognizabilityBranches(SHAPE, 8)
    features = torch.randn(3, *SHAPE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        quality, attended = branches(features), branches.attend(features)  # type: ignore[misc]
    assert quality.dtype == attended.dtype == torch.float32
    assert torch.equal(quality, branches(features))


def _batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(6, 8, generator=generator),
        torch.randn(6, *SHAPE, generator=generator).requires_grad_(),
        torch.rand(6, generator=generator),
        torch.rand(6, generator=generator) * 0.5,
    )


def _branches(**options: Any) -> rec.RecognizabilityBranches:
    torch.manual_seed(2)
    made = rec.RecognizabilityBranches(SHAPE, 8, **options)
    made.refresh(torch.randn(20, 8, generator=torch.Generator().manual_seed(4)) + 2)
    return made


def test_total_is_the_papers_sum_and_every_term_switches_off() -> None:
    embeddings, features, target, nearest = _batch()
    terms = _branches().losses(embeddings, features, target, nearest)
    total = 5 * terms.regression + 2 * terms.diversion + terms.attention
    torch.testing.assert_close(terms.total.detach(), total)
    assert min(float(terms.regression), float(terms.diversion), float(terms.attention)) > 0
    for switch in ("regression", "diversion", "attention"):
        one = _branches(**{switch: 0.0}).losses(embeddings, features, target, nearest)
        assert float(getattr(one, switch)) == 0
        kept = [name for name in ("regression", "diversion", "attention") if name != switch]
        for name in kept:
            torch.testing.assert_close(getattr(one, name), getattr(terms, name))
    assert _branches(attention=0.0).attend is None
    printed = _branches(elements="sum").losses(embeddings, features, target, nearest)
    torch.testing.assert_close(printed.attention, 8 * terms.attention)
    off = _branches(regression=0.0, diversion=0.0, attention=0.0).losses(embeddings, features, target, nearest)
    assert float(off.total.detach()) == 0


def test_gradients_reach_the_map_and_not_the_targets() -> None:
    embeddings, features, target, nearest = _batch()
    embeddings.requires_grad_()
    target.requires_grad_()
    branches = _branches()
    branches.losses(embeddings, features, target, nearest).total.backward()
    assert features.grad is not None and bool(features.grad.any())
    assert embeddings.grad is None and target.grad is None
    assert all(p.grad is not None for p in branches.parameters())


def test_center_and_statistics_from_ui_images() -> None:
    branches = _branches(dropout=0.5)
    generator = torch.Generator().manual_seed(3)
    x, maps = torch.randn(30, 8, generator=generator), torch.randn(30, *SHAPE, generator=generator)
    drawn = branches.diversion_loss.mu.clone()
    branches.refresh(x)
    close(branches.center, rec.unrecognizable_center(x)[0], 1e-6)
    assert torch.equal(branches.diversion_loss.mu, drawn)
    branches.refresh(x, maps)
    assert branches.regressor.training
    said = branches.eval()(maps).detach()
    close(branches.diversion_loss.mu, said.mean(), 1e-6)
    close(branches.diversion_loss.sigma, said.std(), 1e-6)
    fresh = rec.RecognizabilityBranches(SHAPE, 8)
    assert not fresh.ready
    with pytest.raises(RuntimeError, match="expected a UI centre, got none: call refresh"):
        fresh.losses(x, maps, torch.zeros(30), torch.zeros(30))
    fresh.load_state_dict(branches.state_dict())
    assert fresh.ready


def test_no_labelled_row_gives_zero() -> None:
    embeddings, features, target, nearest = (t[:0] for t in _batch())
    assert float(_branches().losses(embeddings, features, target, nearest).total.detach()) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [({"regression": -1.0}, "regression >= 0"), ({"elements": "max"}, "elements"), ({"beta": 0.0}, "beta > 0")],
)
def test_branches_name_what_they_refuse(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^RecognizabilityBranches: expected {message}"):
        rec.RecognizabilityBranches(SHAPE, 8, **options)


def test_model_gives_embedding_and_quality_in_one_pass() -> None:
    torch.manual_seed(0)
    backbone = build_model("tiny", embedding_dim=8, input_size=32, widths=(4, 8, 8, 32)).eval()
    branches = rec.RecognizabilityBranches(backbone.feature_shape, 8).eval()
    images = torch.randn(3, 3, 32, 32)
    embeddings, quality = rec.RecognizabilityModel(backbone, branches)(images)
    assert torch.equal(embeddings, backbone(images))
    assert torch.equal(quality, branches(backbone.forward_features(images)))
