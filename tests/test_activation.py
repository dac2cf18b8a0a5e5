"""Class-activation maps: against the formula, where they must point, and what they leave alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from recog_fast.evaluation import class_activation, overlay
from recog_fast.models import build_model

torch.manual_seed(0)
IMAGES = torch.rand(2, 3, 32, 48)


class Parts(nn.Module):
    """Two 1-channel stages; output 0 looks at channel 0, output 1 at channel 1; a bypass around the first stage."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 2, 3, padding=1, stride=4, bias=False)
        self.norm = nn.BatchNorm2d(2)
        self.idle = nn.Conv2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        maps: Tensor = self.norm(self.first(x))
        return maps.clamp_min(0).mean(dim=(2, 3))


def test_map_is_the_formula() -> None:
    model = build_model("tiny", embedding_dim=16, input_size=(32, 48)).eval()
    directions = torch.randn(2, 16)
    found = class_activation(model, IMAGES, directions)
    features = model.forward_features(IMAGES).detach().requires_grad_()
    score = nn.functional.cosine_similarity(model.embed(features), directions, dim=1).sum()
    (gradient,) = torch.autograd.grad(score, features)
    cam = torch.relu((gradient.mean((2, 3), keepdim=True) * features).sum(1, keepdim=True))
    cam = nn.functional.interpolate(cam, size=(32, 48), mode="bilinear", align_corners=False)[:, 0]
    cam = cam / cam.amax((1, 2), keepdim=True).clamp_min(1e-20)
    np.testing.assert_allclose(found, cam.detach().numpy(), atol=1e-6)
    assert found.shape == (2, 32, 48) and found.dtype == np.float32 and found.min() >= 0 and found.max() <= 1
    found_by_place = class_activation(model, IMAGES, directions, method="hires")
    cam = nn.functional.interpolate(
        torch.relu((gradient * features).sum(1, keepdim=True)), size=(32, 48), mode="bilinear", align_corners=False
    )[:, 0]
    np.testing.assert_allclose(
        found_by_place, (cam / cam.amax((1, 2), keepdim=True).clamp_min(1e-20)).detach().numpy(), atol=1e-6
    )
    # One direction for all rows, and a layer by hand: the same last stage.
    np.testing.assert_allclose(
        class_activation(model, IMAGES, directions[0], layer=model.stages)[0], found[0], atol=1e-6
    )


def test_map_points_at_what_the_score_sees() -> None:
    model = Parts()
    with torch.no_grad():
        model.first.weight.zero_()
        model.first.weight[0, 0] = 1.0  # channel 0: red
        model.first.weight[1, 2] = 1.0  # channel 1: blue
    image = torch.zeros(1, 3, 32, 32)
    image[0, 0, :16, :16] = 1.0
    image[0, 2, 16:, 16:] = 1.0
    red = class_activation(model, image, lambda y: y[:, 0], layer=model.norm)[0]
    blue = class_activation(model, image, lambda y: y[:, 1], layer=model.norm)[0]
    # Away from the border, whose padding is black.
    assert red[4:12, 4:12].min() > 0.7 and red[24:, 24:].max() == 0
    assert blue[20:28, 20:28].min() > 0.7 and blue[:8, :8].max() == 0
    nothing = class_activation(model, image, lambda y: -y[:, 0], layer=model.norm)
    assert np.array_equal(nothing, np.zeros_like(nothing))


def test_model_is_left_alone() -> None:
    model = Parts().train()
    model.idle.eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        class_activation(model, IMAGES, lambda y: y.sum(1), layer=model.first)
    assert model.training and not model.idle.training and model.norm.training
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters()) and not model.first._forward_hooks


def test_bad_input() -> None:
    model = Parts()
    with pytest.raises(ValueError, match="expected layer for a Parts"):
        class_activation(model, IMAGES, torch.ones(2))
    with pytest.raises(ValueError, match="method 'grad-cam' or 'hires', got 'other'"):
        class_activation(model, IMAGES, torch.ones(2), layer=model.norm, method="other")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one that did not"):
        class_activation(model, IMAGES, torch.ones(2), layer=model.idle)
    with pytest.raises(ValueError, match="score directions"):
        class_activation(model, IMAGES, torch.ones(3), layer=model.norm)
    with pytest.raises(ValueError, match=r"score to give shape \(2,\)"):
        class_activation(model, IMAGES, lambda y: y, layer=model.norm)
    with pytest.raises(ValueError, match=r"images of shape"):
        class_activation(model, IMAGES[0], torch.ones(2), layer=model.norm)
    linear = build_model("tiny", embedding_dim=16, input_size=(32, 48))
    with pytest.raises(ValueError, match=r"map \(B, C, h, w\)"):
        class_activation(linear, IMAGES, torch.ones(16), layer=linear.fc)
    assert not linear.fc._forward_hooks


def test_overlay() -> None:
    image = np.full((4, 6, 3), 100, np.uint8)
    cam = np.zeros((4, 6), np.float32)
    cam[0, 0] = 1
    laid = overlay(image, cam, 1.0)
    assert laid[0, 0].tolist() == [253, 231, 37] and laid[1, 1].tolist() == [68, 1, 84]
    assert np.array_equal(overlay(image, cam, 0.0), image)
    with pytest.raises(ValueError, match=r"cam of shape \(4, 6\)"):
        overlay(image, cam[:3])
