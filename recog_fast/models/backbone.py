"""What every backbone shares: the split into feature map and embedding, its checks, and how its input is prepared."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, overload

import torch
from torch import Tensor, nn

from recog_fast._arguments import are_numbers, is_choice, is_number

Triple = tuple[float, float, float]

# All networks here halve the image four times with padded convs: a side of n pixels becomes ceil(n / 16).
TOTAL_STRIDE = 16
MIN_SIDE = 16


@dataclass(frozen=True)
class Preprocessing:
    """How 8-bit pixels become the network's input: x = (pixel / 255 - mean) / std, per channel in `color_order`.

    mean, std: three floats on the [0, 1] scale, listed in `color_order`; the default maps pixels to [-1, 1] as InsightFace does.
    color_order: channel order the network expects, "RGB" or "BGR".

    Raises ValueError for a std that is not positive, a wrong number of channels or an unknown colour order.
    """

    mean: Triple = (0.5, 0.5, 0.5)
    std: Triple = (0.5, 0.5, 0.5)
    color_order: Literal["RGB", "BGR"] = "RGB"

    def __post_init__(self) -> None:
        if not are_numbers(self.mean, 3):
            raise ValueError(f"Preprocessing: expected mean of three finite numbers, got {self.mean}")
        if not are_numbers(self.std, 3, 0, above=True):
            raise ValueError(f"Preprocessing: expected std of three positive numbers, got {self.std}")
        if not is_choice(self.color_order, ("RGB", "BGR")):
            raise ValueError(f"Preprocessing: expected color_order 'RGB' or 'BGR', got {self.color_order!r}")

    def __call__(self, images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """images (B, H, W, 3) or (H, W, 3) uint8 in RGB order -> (B, 3, H, W) of `dtype` on the same device.

        Raises TypeError for a dtype other than uint8 (scaled floats would be divided by 255 twice), ValueError for another shape.
        """
        if images.dtype != torch.uint8:
            raise TypeError(f"Preprocessing: expected images of dtype uint8 (0..255), got {images.dtype}")
        if images.ndim not in (3, 4) or images.shape[-1] != 3:
            raise ValueError(f"Preprocessing: expected images of shape (B, H, W, 3) or (H, W, 3), got {tuple(images.shape)}")
        batch = images if images.ndim == 4 else images.unsqueeze(0)
        x = batch.permute(0, 3, 1, 2).to(dtype)
        if self.color_order == "BGR":
            x = x.flip(1)
        mean = torch.tensor(self.mean, dtype=dtype, device=x.device).view(3, 1, 1)
        std = torch.tensor(self.std, dtype=dtype, device=x.device).view(3, 1, 1)
        return ((x / 255 - mean) / std).contiguous()


IMAGENET = Preprocessing(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


def image_shape(name: str, input_size: int | tuple[int, int]) -> tuple[int, int]:
    """(height, width) of a model's input; one number means a square. Raises TypeError or ValueError in the name of the model."""
    sides: object = (input_size, input_size) if isinstance(input_size, int) else input_size
    whole = isinstance(sides, tuple | list) and all(isinstance(n, int) and not isinstance(n, bool) for n in sides)
    if not isinstance(sides, tuple | list) or not whole or len(sides) != 2:
        raise TypeError(f"{name}: expected input_size as one int or (height, width), got {input_size!r}")
    if min(sides) < MIN_SIDE:
        raise ValueError(f"{name}: expected input_size of at least {MIN_SIDE} pixels a side, got {input_size!r}")
    return sides[0], sides[1]


def check_dropout(name: str, dropout: float) -> float:
    """The drop probability in [0, 1), or a ValueError in the name of the model."""
    if not is_number(dropout, 0, 1, below=True):
        raise ValueError(f"{name}: expected dropout in [0, 1), got {dropout!r}")
    return float(dropout)


class Backbone(nn.Module):
    """Base of all backbones: images (B, 3, H, W) -> embeddings (B, D), not normalised (their norms carry image quality).

    Attributes:
        embedding_dim: D.
        input_size: (H, W) the network was built for; other sizes are refused.
        feature_shape: (C, h, w) of the last feature map, what `forward_features` returns per image.
        preprocessing: how 8-bit pixels become the input.

    Raises TypeError or ValueError for an embedding_dim or input_size it cannot build.
    """

    def __init__(
        self,
        *,
        embedding_dim: int,
        input_size: int | tuple[int, int],
        feature_channels: int,
        preprocessing: Preprocessing | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if not isinstance(embedding_dim, int) or isinstance(embedding_dim, bool):
            raise TypeError(f"{name}: expected embedding_dim as an int, got {embedding_dim!r}")
        if embedding_dim < 1:
            raise ValueError(f"{name}: expected embedding_dim of at least 1, got {embedding_dim}")
        self.embedding_dim = embedding_dim
        self.input_size = image_shape(name, input_size)
        height, width = (-(-side // TOTAL_STRIDE) for side in self.input_size)
        self.feature_shape = (feature_channels, height, width)
        if preprocessing is not None and not isinstance(preprocessing, Preprocessing):
            raise TypeError(f"{name}: expected preprocessing as a Preprocessing or None, got {type(preprocessing).__name__}")
        self.preprocessing = preprocessing if preprocessing is not None else Preprocessing()

    @overload
    def forward(self, images: Tensor, return_features: Literal[False] = ...) -> Tensor: ...
    @overload
    def forward(self, images: Tensor, return_features: Literal[True]) -> tuple[Tensor, Tensor]: ...
    def forward(self, images: Tensor, return_features: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """images (B, 3, H, W) float -> embeddings (B, D), with return_features also the last feature map (B, C, h, w) they come
        from. Raises ValueError for a shape other than the one built for."""
        if images.ndim != 4 or tuple(images.shape[1:]) != (3, *self.input_size):
            expected = f"(B, 3, {self.input_size[0]}, {self.input_size[1]})"
            raise ValueError(f"{type(self).__name__}: expected images of shape {expected}, got {tuple(images.shape)}")
        if not images.is_floating_point():
            raise TypeError(f"{type(self).__name__}: expected floating images (see .preprocessing), got {images.dtype}")
        features = self.forward_features(images)
        return (self.embed(features), features) if return_features else self.embed(features)

    def forward_features(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) -> last feature map (B, C, h, w), C, h, w = `feature_shape`."""
        raise TypeError(f"{type(self).__name__}: expected a subclass that defines forward_features")

    def embed(self, features: Tensor) -> Tensor:
        """Feature map (B, C, h, w) -> embeddings (B, D)."""
        raise TypeError(f"{type(self).__name__}: expected a subclass that defines embed")


def without_autocast(layers: Callable[[Tensor], Tensor], x: Tensor, dtype: torch.dtype) -> Tensor:
    """layers(x) in `dtype` whatever autocast says: the last projection decides cosines, so it stays in full precision."""
    if not torch.amp.is_autocast_available(x.device.type):  # the meta device, where shapes alone are computed
        return layers(x.to(dtype))
    with torch.autocast(x.device.type, enabled=False):
        return layers(x.to(dtype))


def kaiming_initialise(module: nn.Module, *, per_group: bool = True) -> None:
    """Normal(0, sqrt(2 / fan_out)) for conv and linear weights, zero biases; norm layers keep torch's 1 and 0 (He et al. 2015).

    per_group: count the fan of a grouped conv inside one group. torch counts it over all groups, which makes depthwise weights
    too small by sqrt(groups): BatchNorm hides it while training, but an untrained network then maps everything to about 0.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            groups = layer.groups if per_group and isinstance(layer, nn.Conv2d) else 1
            fan_out = layer.weight[:, :1].numel() / groups
            nn.init.normal_(layer.weight, 0.0, math.sqrt(2.0 / fan_out))
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
