"""margin_softmax_loss: gradients, reductions, edges and refusals (test_margin_softmax_golden.py has the golden cases)."""

from __future__ import annotations

import pytest
import torch
from budgets import budget, relative
from routes import FLOAT64, HALF, NATIVE, Route, each
from torch import Tensor

import recog_fast as rf

GRADCHECKED = {
    "arcface": rf.ArcFace(), "cosface": rf.CosFace(), "softmax": rf.Softmax(), "magface": rf.MagFace(), "mv": rf.MVSoftmax("am"),
    "sphereface": rf.SphereFace(), "curricular": rf.CurricularFace().eval(),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["plain", "subcenters", "memory"])
@pytest.mark.parametrize("margin", list(GRADCHECKED))
def test_gradcheck(margin: str, kind: str) -> None:
    """Circle and AdaFace are left out: their weights or norms are detached, which finite differences cannot see; golden has them."""
    torch.manual_seed(0)
    shape = (6, 2, 5) if kind == "subcenters" else (6, 5)
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    w = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    memory = {"memory_rows": torch.randn(6, 5, dtype=torch.float64), "strength": torch.rand(6, dtype=torch.float64)}
    labels = torch.tensor([0, 5, -1, 2])
    assert torch.autograd.gradcheck(
        lambda a, b: rf.margin_softmax_loss(
            a, b, labels, margin=GRADCHECKED[margin], scale=4.0, unknown_weight=0.3, **(memory if kind == "memory" else {})
        ),
        (x, w),
        atol=1e-6,
    )


def materialised(x: Tensor, w: Tensor, labels: Tensor, margin: object, scale: float) -> Tensor:
    """Cross entropy of explicit margin logits: an independent way to write the same loss."""
    cosine = torch.nn.functional.normalize(x, dim=1) @ torch.nn.functional.normalize(w, dim=1).t()
    rows = torch.arange(len(labels))
    logits = scale * cosine
    target = scale * margin(cosine[rows, labels], x.norm(dim=1))  # type: ignore[operator]
    return torch.nn.functional.cross_entropy(logits.index_put((rows, labels), target), labels)


@pytest.mark.parametrize("margin", [rf.ArcFace(), rf.ArcFace(gradient="straight_through"), rf.CosFace(), lambda c, n: c - 0.2], ids=["arc", "ste", "cos", "user"])
def test_equals_cross_entropy(margin: object) -> None:
    torch.manual_seed(1)
    x, w = torch.randn(9, 12, dtype=torch.float64, requires_grad=True), torch.randn(30, 12, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 30, (9,))
    ours, theirs = rf.margin_softmax_loss(x, w, labels, margin=margin), materialised(x, w, labels, margin, 64.0)
    assert torch.allclose(ours, theirs, rtol=1e-9)
    for a, b in zip(torch.autograd.grad(ours, (x, w)), torch.autograd.grad(theirs, (x, w)), strict=True):
        assert torch.allclose(a, b, rtol=1e-7, atol=1e-9)


class Learned(torch.nn.Module):
    """A user's margin with a learnable amount, a penalty and a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.m = torch.nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def forward(self, cosine: Tensor, norms: Tensor) -> Tensor:
        return cosine - self.m * norms / (1 + norms)

    def penalty(self, norms: Tensor) -> Tensor:
        return 0.1 * norms.square() + self.m.square()


def test_margin_parameters_get_their_gradient() -> None:
    torch.manual_seed(2)
    margin = Learned()
    x, w = torch.randn(5, 4, dtype=torch.float64, requires_grad=True), torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 1, -1, 6, 1])

    rf.margin_softmax_loss(x, w, labels, margin=margin, scale=3.0).backward()
    step = 1e-6
    with torch.no_grad():
        margin.m += step
        up = rf.margin_softmax_loss(x, w, labels, margin=margin, scale=3.0)
        margin.m -= 2 * step
        down = rf.margin_softmax_loss(x, w, labels, margin=margin, scale=3.0)
        margin.m += step
    assert margin.m.grad is not None
    assert margin.m.grad.item() == pytest.approx((up - down).item() / (2 * step), rel=1e-6)
    assert torch.autograd.gradcheck(lambda a, b: rf.margin_softmax_loss(a, b, labels, margin=margin, scale=3.0), (x, w))


@each([FLOAT64, NATIVE[0]])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reductions_and_sample_weights(route: Route, reduction: str) -> None:
    torch.manual_seed(3)
    x, w = torch.randn(8, 16, dtype=route.dtype, requires_grad=True), torch.randn(40, 16, dtype=route.dtype, requires_grad=True)
    labels = torch.tensor([0, 1, -1, 39, 5, -1, 7, 1])
    weights = torch.rand(8, dtype=route.dtype)
    labelled = labels >= 0
    with route():
        rows = rf.margin_softmax_loss(x, w, labels, scale=8.0, reduction="none", unknown_weight=0.5)
        excess = rf.unknown_rejection_loss(x[~labelled], w, scale=8.0, reduction="none")
        loss = rf.margin_softmax_loss(x, w, labels, scale=8.0, reduction=reduction, sample_weight=weights, unknown_weight=0.5)  # type: ignore[arg-type]
    assert torch.allclose(rows[~labelled], 0.5 * excess, rtol=1e-5)
    weighted = torch.where(labelled, rows * weights, rows)
    expected = {"none": weighted, "sum": weighted.sum(), "mean": weighted[labelled].sum() / 6 + weighted[~labelled].mean()}[reduction]
    assert torch.allclose(loss, expected, rtol=1e-5)
    direction = torch.randn_like(loss)
    g1 = torch.autograd.grad((loss * direction).sum(), (x, w), retain_graph=True)
    g2 = torch.autograd.grad((expected * direction).sum(), (x, w))
    for a, b in zip(g1, g2, strict=True):
        assert relative(a, b) <= 1e-5


def test_normalizer_replaces_the_count() -> None:
    torch.manual_seed(4)
    x, w, labels = torch.randn(6, 8), torch.randn(10, 8), torch.tensor([1, -1, 3, 4, 5, 6])
    mean = rf.margin_softmax_loss(x, w, labels)
    assert rf.margin_softmax_loss(x, w, labels, normalizer=10).item() == pytest.approx(mean.item() * 5 / 10)
    assert rf.margin_softmax_loss(x, w, labels, normalizer=torch.tensor(10.0)).item() == pytest.approx(mean.item() * 5 / 10)


@each([FLOAT64, NATIVE[0]])
def test_tiny_losses_keep_their_gradient(route: Route) -> None:
    """z = (40, 5, 4): float32 cross entropy gives loss 0 and no gradient at the target; this form 8.6e-16."""
    x = torch.tensor([[1.0, 0.0, 0.0]], dtype=route.dtype, requires_grad=True)
    angles = torch.tensor([40.0, 5.0, 4.0], dtype=route.dtype) / 40
    w = torch.stack([angles, (1 - angles.square()).sqrt(), torch.zeros(3, dtype=route.dtype)], dim=1).requires_grad_()
    with route():
        loss = rf.margin_softmax_loss(x, w, torch.tensor([0]), margin=rf.Softmax(), scale=40.0)
        loss.backward()
    truth = torch.logsumexp(torch.tensor([5.0, 4.0], dtype=torch.float64), 0) - 40
    assert loss.item() == pytest.approx(torch.exp(truth).item(), rel=1e-4)
    assert x.grad is not None
    assert x.grad.abs().max() > 1e-15


@each([FLOAT64, *NATIVE[:1], *HALF])
def test_edges(route: Route) -> None:
    w = torch.randn(5, 4, dtype=route.dtype, requires_grad=True)
    with route(), torch.autocast("cpu", torch.bfloat16, enabled=route.half):
        empty = rf.margin_softmax_loss(torch.empty(0, 4, dtype=route.dtype, requires_grad=True), w, torch.empty(0, dtype=torch.int64))
        empty.backward()
        assert empty.item() == 0
        assert w.grad is not None
        assert float(w.grad.abs().max()) == 0
        x = torch.randn(3, 4, dtype=route.dtype, requires_grad=True)
        unlabelled = rf.margin_softmax_loss(x, w, torch.full((3,), -1))
        unlabelled.backward()
        assert unlabelled.item() == 0
        assert x.grad is not None
        assert float(x.grad.abs().max()) == 0
        one = torch.randn(1, 4, dtype=route.dtype, requires_grad=True)
        loss, stats = rf.margin_softmax_loss(x, one, torch.zeros(3, dtype=torch.int64), return_stats=True)
        loss.backward()
        assert loss.item() == 0
        assert one.grad is not None
        assert float(one.grad.abs().max()) == 0
        assert stats.nearest_index.tolist() == [-1] * 3
        assert stats.nearest_cosine.tolist() == [-2] * 3
        assert bool(torch.isneginf(stats.lse).all())


@each([*NATIVE, *HALF])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("subcenters", [1, 2])
def test_a_diverged_weight_reaches_the_loss(route: Route, subcenters: int, value: float) -> None:
    """A NaN class centre is nobody's target and nobody's nearest: the loss must not hide it, nor an infinite one."""
    torch.manual_seed(8)
    w = torch.randn(100, 8) if subcenters == 1 else torch.randn(100, subcenters, 8)
    w[70] = value
    with route(), torch.autocast("cpu", torch.bfloat16, enabled=route.half):
        loss = rf.margin_softmax_loss(torch.randn(3, 8), w, torch.tensor([0, 1, -1]), reduction="none")
        excess = rf.unknown_rejection_loss(torch.randn(2, 8), w, reduction="none")
    assert bool(torch.isnan(loss[:2]).all())
    assert bool(torch.isnan(excess).all())


GOOD = {"embeddings": torch.ones(2, 3), "weight": torch.ones(4, 3), "labels": torch.tensor([0, 3])}
BAD = [
    ({"labels": torch.tensor([0, 4])}, r"labels in \[-1, C\) = \[-1, 4\), got 4 in row 1"),
    ({"labels": torch.tensor([-2, 0])}, r"got -2 in row 0"),
    ({"labels": torch.tensor([[0], [1]])}, r"labels of shape \(N,\) = \(2,\), got shape \(2, 1\)"),
    ({"labels": torch.tensor([0.0, 1.0])}, "labels of an integer dtype"),
    ({"embeddings": torch.tensor([[1.0, 2, 3], [1, float("nan"), 0]])}, "finite embeddings, got a non-finite value in row 1"),
    ({"embeddings": torch.ones(2, 3).int()}, "embeddings of a floating point dtype"),
    ({"embeddings": torch.ones(2, 3, 1)}, r"embeddings of shape \(N, D\)"),
    ({"weight": torch.ones(4, 5)}, "weight with D = 3"),
    ({"weight": torch.ones(4, 3).half()}, "weight of dtype float32 or float64"),
    ({"weight": torch.ones(0, 3)}, "weight with C, K, D >= 1"),
    ({"scale": 0.0}, "scale > 0"),
    ({"scale": float("nan")}, "scale > 0"),
    ({"reduction": "average"}, "reduction"),
    ({"unknown_weight": -1.0}, "unknown_weight >= 0"),
    ({"sample_weight": torch.ones(3)}, r"sample_weight of shape \(N,\) = \(2,\)"),
    ({"margin": "arc"}, "margin to be callable"),
    ({"margin": rf.ArcFace}, "margin to be a margin, not its class, got the class ArcFace"),
    ({"margin": lambda c, n: c.sum()}, r"margin to return a tensor of shape \(N,\)"),
    ({"memory_rows": torch.ones(4, 3)}, "memory_rows and strength together"),
    ({"memory_rows": torch.ones(3, 3), "strength": torch.ones(3)}, "S = C = 4 rows"),
    ({"memory_rows": torch.ones(3, 3), "strength": torch.ones(3), "slot": torch.tensor([0, 1, 2, 3])}, r"slot in \[-1, S\)"),
    ({"compute_dtype": torch.float16}, "compute_dtype"),
    ({"normalizer": 0}, "normalizer > 0"),
    ({"normalizer": torch.tensor(0.0)}, "normalizer > 0"),
    ({"normalizer": torch.ones(2)}, "normalizer of one element"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=lambda v: v if isinstance(v, str) else "")
def test_bad_input_is_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"margin_softmax_loss: expected .*{message}"):
        rf.margin_softmax_loss(**{**GOOD, **change})  # type: ignore[arg-type]


def test_no_double_backward() -> None:
    x, w = torch.randn(2, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    (d_x,) = torch.autograd.grad(rf.margin_softmax_loss(x, w, torch.tensor([0, 1])), x, create_graph=True)
    with pytest.raises(RuntimeError):
        d_x.sum().backward()


@each(HALF)
def test_half_precision_embeddings_and_autocast(route: Route) -> None:
    """bfloat16 embeddings under autocast: the 16-bit sweeps, the loss in float32, the gradient in the embeddings' dtype."""
    torch.manual_seed(7)
    x, w, labels = torch.randn(6, 32), torch.randn(50, 32, requires_grad=True), torch.randint(0, 50, (6,))
    embeddings = x.bfloat16().requires_grad_()
    with route(), torch.autocast("cpu", dtype=torch.bfloat16):
        loss = rf.margin_softmax_loss(embeddings, w, labels)
        loss.backward()
    exact = embeddings.detach().float().requires_grad_()
    truth = rf.margin_softmax_loss(exact, w, labels)
    truth.backward()
    assert loss.dtype == torch.float32
    assert embeddings.grad is not None
    assert embeddings.grad.dtype == torch.bfloat16
    limits = budget(route, 64.0, 32)
    assert abs(loss.item() - truth.item()) <= limits.loss_absolute
    assert exact.grad is not None
    # and half an ulp of the bfloat16 that dx is returned in
    assert relative(embeddings.grad, exact.grad) <= limits.gradient + 2**-9
    with route():
        asked = rf.margin_softmax_loss(exact.detach(), w, labels, compute_dtype=torch.bfloat16)
        assert torch.equal(loss.detach(), asked.detach())  # autocast and compute_dtype ask for the same thing
        assert torch.equal(rf.margin_softmax_loss(embeddings.detach(), w, labels, compute_dtype=torch.float32), truth)


def test_unknown_rows_without_gradients() -> None:
    """The sweep makes no pull where nothing is recorded: the loss is the same."""
    torch.manual_seed(8)
    x, w, labels = torch.randn(5, 16), torch.randn(40, 16, requires_grad=True), torch.tensor([3, -1, 7, -1, 0])
    recorded = rf.margin_softmax_loss(x, w, labels, unknown_weight=0.1)
    with torch.no_grad():
        assert torch.equal(rf.margin_softmax_loss(x, w, labels, unknown_weight=0.1), recorded.detach())
