"""pytorch-metric-learning's spellings: against the formulas in float64, and against the library where it is installed."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import recog_fast as rf
from recog_fast.compat import pml

C, D, N = 37, 24, 19  # classes below a tile, rows and dimensions that divide nothing


def batch(seed: int = 0, classes: int = C) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(N, D, generator=generator) * 3
    return x, torch.randint(classes, (N,), generator=generator)


def arcface(cosine: Tensor, margin: float) -> Tensor:
    theta = torch.acos(cosine.clamp(-1, 1))
    return torch.where(theta <= math.pi - margin, torch.cos(theta + margin), cosine - margin * math.sin(margin))


def formula(x: Tensor, w: Tensor, y: Tensor, phi: Any, scale: float, sub_centers: int = 1) -> Tensor:
    """The mean cross entropy of margin logits, materialised; W (D, C K)."""
    cosine = (F.normalize(x, dim=1) @ F.normalize(w, dim=0)).unflatten(1, (-1, sub_centers)).amax(2)
    rows = torch.arange(len(x))
    logits = cosine.index_put((rows, y), phi(cosine[rows, y]))
    return F.cross_entropy(scale * logits, y)


CASES: dict[str, Any] = {
    "arc": (pml.ArcFaceLoss, {"margin": 28.6}, lambda c: arcface(c, math.radians(28.6)), 64.0, 1),
    "wide arc": (pml.ArcFaceLoss, {"margin": 120, "scale": 16}, lambda c: arcface(c, math.radians(120)), 16.0, 1),
    "cos": (pml.CosFaceLoss, {}, lambda c: c - 0.35, 64.0, 1),
    "normalized": (pml.NormalizedSoftmaxLoss, {}, lambda c: c, 20.0, 1),
    "subcenter": (pml.SubCenterArcFaceLoss, {"scale": 30}, lambda c: arcface(c, math.radians(28.6)), 30.0, 3),
}


@pytest.mark.parametrize("name", CASES)
def test_formulas(name: str) -> None:
    """Loss and both gradients; error against float64 at most twice PyTorch's in float32, plus 1e-6 of the scale."""
    make, options, phi, scale, sub = CASES[name]
    torch.manual_seed(1)
    loss_func = make(num_classes=C, embedding_size=D, **options)
    assert loss_func.W.shape == (D, C * sub) and [n for n, _ in loss_func.named_parameters()] == ["W"]
    x, y = batch()
    results = {}
    for kind, dtype in (("truth", torch.float64), ("torch", torch.float32)):
        leaf, w = x.to(dtype).clone().requires_grad_(), loss_func.W.detach().to(dtype).clone().requires_grad_()
        value = formula(leaf, w, y, phi, scale, sub)
        value.backward()
        results[kind] = (value.detach(), leaf.grad, w.grad)
    leaf = x.clone().requires_grad_()
    value = loss_func(leaf, y)
    value.backward()
    results["ours"] = (value.detach(), leaf.grad, loss_func.W.grad)
    for truth, theirs, ours in zip(*(results[k] for k in ("truth", "torch", "ours")), strict=True):
        assert ours is not None and ours.shape == truth.shape
        size = float(truth.abs().max())
        assert (ours - truth).abs().max() <= 2 * (theirs - truth).abs().max() + 1e-6 * size
    with torch.no_grad():
        cosine = (F.normalize(x, dim=1) @ F.normalize(loss_func.W, dim=0)).unflatten(1, (-1, sub)).amax(2)
        torch.testing.assert_close(loss_func.get_logits(x), scale * cosine)
        assert loss_func.to_head()(x, y).item() == pytest.approx(value.item(), rel=1e-6)


@pytest.mark.parametrize("name", [name for name in CASES])
def test_the_library_itself(name: str) -> None:
    """The same W by state dict: the same loss and gradients in float32, its rounding apart."""
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    make, options, *_ = CASES[name]
    theirs = getattr(losses, make.__name__)(num_classes=C, embedding_size=D, **options)
    ours = make(num_classes=C, embedding_size=D, **options)
    ours.load_state_dict(theirs.state_dict())
    x, y = batch(3)
    found = []
    for loss_func in (ours, theirs):
        leaf = x.clone().requires_grad_()
        value = loss_func(leaf, y)
        value.backward()
        found.append((value.detach(), leaf.grad, loss_func.W.grad.clone(), loss_func.get_logits(x).detach()))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-5 * float(b.abs().max()))
    theirs.load_state_dict(ours.state_dict())
    if name == "subcenter":
        outliers, centers = ours.get_outliers(x, y, threshold=88)
        expected, dominant = theirs.get_outliers(x, y, threshold=88)
        assert outliers.tolist() == expected.tolist() and len(outliers)
        seen = y.unique()
        torch.testing.assert_close(centers[:, seen], dominant[:, seen])


def test_w_keeps_its_layout_and_trains() -> None:
    """The kernels' rows stay contiguous through copies, loading and an optimizer; the loss falls."""
    torch.manual_seed(0)
    loss_func = pml.ArcFaceLoss(C, D, scale=16)
    loss_func = copy.deepcopy(loss_func)
    loss_func.load_state_dict(pml.ArcFaceLoss(C, D).state_dict())
    x, y = batch()
    optimizer = torch.optim.SGD(loss_func.parameters(), lr=30.0, momentum=0.5)
    values = []
    for _ in range(30):
        optimizer.zero_grad()
        value = loss_func(x, y)
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert loss_func.W.t().is_contiguous() and values[-1] < 0.3 * values[0]


def test_outliers_without_the_library() -> None:
    loss_func = pml.SubCenterArcFaceLoss(num_classes=2, embedding_size=2, sub_centers=2)
    with torch.no_grad():
        loss_func.W.copy_(torch.tensor([[1.0, 0.0, -1.0, 0.0], [0.0, 1.0, 0.0, -1.0]]))
    x = torch.tensor([[1.0, 0.1], [1.0, 0.0], [0.0, 5.0], [-1.0, 0.0]])
    outliers, centers = loss_func.get_outliers(x, torch.tensor([0, 0, 0, 1]))
    assert outliers.tolist() == [2] and centers.tolist() == [[1.0, -1.0], [0.0, 0.0]]
    assert loss_func.get_outliers(x, torch.tensor([0, 0, 0, 1]), return_dominant_centers=False).tolist() == [2]


def test_unlabelled_rows_and_sampling_through_a_head() -> None:
    loss_func = pml.CosFaceLoss(C, D)
    x, y = batch()
    y[::2] = -1
    torch.testing.assert_close(loss_func(x, y), loss_func(x[1::2], y[1::2]))
    head = loss_func.to_head(sample_rate=0.5)
    assert isinstance(head, rf.MarginHead) and head.sample_rate == 0.5


def test_what_is_refused() -> None:
    x, y = batch()
    loss_func = pml.ArcFaceLoss(C, D)
    for arguments in ({"indices_tuple": (y,)}, {"ref_emb": x}):
        with pytest.raises(ValueError, match=f"ArcFaceLoss: expected {next(iter(arguments))}=None"):
            loss_func(x, y, **arguments)
    with pytest.raises(TypeError, match="expected no reducer"):
        pml.ArcFaceLoss(C, D, reducer=object())
    for make, options in (
        (pml.ArcFaceLoss, {"margin": 200}),
        (pml.CosFaceLoss, {"scale": 0}),
        (pml.NormalizedSoftmaxLoss, {"temperature": 0}),
    ):
        with pytest.raises(ValueError, match="expected"):
            make(C, D, **options)
    with pytest.raises(ValueError, match="num_classes >= 1"):
        pml.CosFaceLoss(0, D)
    with pytest.raises(ValueError, match="labels"):
        loss_func(x, torch.full((N,), C))
