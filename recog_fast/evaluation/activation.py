"""Class-activation maps (Grad-CAM): where in the image a score comes from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

Maps = NDArray[np.float32]
Image = NDArray[np.uint8]

# Dark blue to yellow in five steps (viridis), so that an overlay needs no plotting library.
_COLOURS = np.array([[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]], np.float32)


def class_activation(
    model: nn.Module,  # a Backbone (forward_features and embed), or any module with `layer`
    images: Tensor,  # (B, 3, H, W) the model's input
    score: Callable[[Tensor], Tensor]
    | Tensor,  # model output -> (B,); or (B, D) / (D,): the cosine to these directions
    layer: nn.Module | None = None,
    method: Literal["grad-cam", "hires"] = "grad-cam",
) -> Maps:
    """(B, H, W) float32 in [0, 1]: Grad-CAM of `score` at a feature map, resized to the image.

    cam = relu(sum_c w_c A_c), w_c = mean over space of d score / d A_c; each map divided by its maximum (all zeros where
    nothing speaks for the score). method "hires" (HiResCAM) takes d score / d A itself instead of its mean: faithful
    where the layers above weigh places differently, as the global depthwise convolution of face networks does.
    layer: the module whose output (B, C, h, w) is A: an attention gate, any stage; None: the last feature map of a
    `recog_fast.models.Backbone` (what `forward_features` gives). score: a prototype, the embedding of another image of
    the person (a tensor of directions), or any function, e.g. a quality head.
    The model runs in eval mode; its modes, gradients and weights are left as they were.
    Raises ValueError for a layer that gives no (B, C, h, w) map, a model without forward_features where layer is None, or
    a score that is not (B,), or another method.
    Sources: Selvaraju et al., Grad-CAM, 2017; Draelos and Carin, Use HiResCAM instead of Grad-CAM, 2020.
    """
    where = "class_activation"
    if images.ndim != 4:
        raise ValueError(f"{where}: expected images of shape (B, 3, H, W), got {tuple(images.shape)}")
    if layer is None and not (hasattr(model, "forward_features") and hasattr(model, "embed")):
        raise ValueError(
            f"{where}: expected layer for a {type(model).__name__}, which has no forward_features, got None"
        )
    if method not in ("grad-cam", "hires"):
        raise ValueError(f"{where}: expected method 'grad-cam' or 'hires', got {method!r}")
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.enable_grad():
            features, output = _forward(where, model, images, layer)
            value = _score(where, output, score)
            (gradient,) = torch.autograd.grad(value.sum(), features)
    finally:
        for module, training in modes:
            module.training = training
    weights = gradient.float()
    if method == "grad-cam":
        weights = weights.mean(dim=(2, 3), keepdim=True)
    cam = F.relu((weights * features.detach().float()).sum(dim=1, keepdim=True))
    cam = F.interpolate(cam, size=images.shape[2:], mode="bilinear", align_corners=False)[:, 0]
    highest = cam.amax(dim=(1, 2), keepdim=True)
    maps: Maps = (cam / highest.clamp_min(1e-20)).cpu().numpy()
    return maps


def _forward(where: str, model: nn.Module, images: Tensor, layer: nn.Module | None) -> tuple[Tensor, Tensor]:
    """(feature map, output), the map in the graph of the output and needing a gradient."""
    if layer is None:
        features = model.forward_features(images).detach().requires_grad_()  # type: ignore[operator]
        if features.ndim != 4:
            raise ValueError(f"{where}: expected a feature map (B, C, h, w), got {tuple(features.shape)}")
        output: Tensor = model.embed(features)  # type: ignore[operator]
        return features, output
    caught: list[Tensor] = []

    def keep(_: nn.Module, __: object, made: Tensor) -> Tensor:
        if not isinstance(made, Tensor) or made.ndim != 4:
            raise ValueError(
                f"{where}: expected layer to give a map (B, C, h, w), got {getattr(made, 'shape', type(made))}"
            )
        # A leaf: the score's gradient ends here and no weight below is touched.
        caught.append(made.detach().requires_grad_())
        return caught[-1]

    handle = layer.register_forward_hook(keep)
    try:
        output = model(images)
    finally:
        handle.remove()
    if not caught:
        raise ValueError(f"{where}: expected layer to run inside the model, got one that did not")
    return caught[-1], output


def _score(where: str, output: Tensor, score: Callable[[Tensor], Tensor] | Tensor) -> Tensor:
    if isinstance(score, Tensor):
        if score.shape[-1] != output.shape[-1] or score.ndim > 2 or (score.ndim == 2 and len(score) != len(output)):
            raise ValueError(
                f"{where}: expected score directions of shape {tuple(output.shape)} or ({output.shape[-1]},), got {tuple(score.shape)}"
            )
        return F.cosine_similarity(output, score.to(output).expand_as(output), dim=1)
    value = score(output)
    if value.shape != (len(output),):
        raise ValueError(f"{where}: expected score to give shape ({len(output)},), got {tuple(value.shape)}")
    return value


def overlay(image: Image, cam: Maps, opacity: float = 0.5) -> Image:
    """(H, W, 3) uint8 with the map (H, W) laid over it, dark blue to yellow.

    Raises ValueError for shapes that differ.
    """
    if image.shape[:2] != cam.shape or image.ndim != 3:
        raise ValueError(f"overlay: expected cam of shape {image.shape[:2]}, got {cam.shape}")
    place = np.clip(cam, 0, 1) * (len(_COLOURS) - 1)
    low = np.minimum(place.astype(np.int64), len(_COLOURS) - 2)
    share = (place - low)[..., None]
    colour = _COLOURS[low] * (1 - share) + _COLOURS[low + 1] * share
    laid: Image = np.rint((1 - opacity) * image + opacity * colour).astype(np.uint8)
    return laid
