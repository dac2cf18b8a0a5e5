"""MobileFaceNet with the layer names of InsightFace's arcface_torch (its "mbf" and "mbf_large")."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from recog_fast._arguments import are_whole

from .backbone import Backbone, Preprocessing, kaiming_initialise, without_autocast

Blocks = tuple[int, int, int, int]


class _Layers(nn.Module):
    """One `layers` sequence: InsightFace nests every unit under that name, so the keys read layers.N.layers.M."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """The layers in order."""
        return cast(Tensor, self.layers(x))


def _conv_bn(in_channels: int, channels: int, kernel: int | tuple[int, int], stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """3x3 convs are padded to keep the size at stride 1; 1x1 and whole-map kernels are not padded."""
    padding = 1 if kernel == 3 else 0
    conv = nn.Conv2d(in_channels, channels, kernel, stride=stride, padding=padding, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(channels)]


def _linear_unit(in_channels: int, channels: int, kernel: int | tuple[int, int] = 1, groups: int = 1) -> _Layers:
    return _Layers(*_conv_bn(in_channels, channels, kernel, groups=groups))


def _conv_unit(in_channels: int, channels: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> _Layers:
    return _Layers(*_conv_bn(in_channels, channels, kernel, stride, groups), nn.PReLU(channels))


class _Bottleneck(_Layers):
    """1x1 to `hidden` channels, depthwise 3x3, linear 1x1 to `channels`; adds its input when `residual`."""

    def __init__(self, in_channels: int, channels: int, hidden: int, *, stride: int = 1, residual: bool = False) -> None:
        super().__init__(
            _conv_unit(in_channels, hidden),
            _conv_unit(hidden, hidden, 3, stride, groups=hidden),
            _linear_unit(hidden, channels),
        )
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, h, w) -> (B, channels, ceil(h / stride), ceil(w / stride))."""
        y = super().forward(x)
        return x + y if self.residual else y


def _residual_stage(channels: int, hidden: int, count: int) -> _Layers:
    return _Layers(*(_Bottleneck(channels, channels, hidden, residual=True) for _ in range(count)))


class MobileFaceNet(Backbone):
    """MobileFaceNet (Chen et al. 2018) as InsightFace trains it: bottlenecks with PReLU, global depthwise conv, Linear, BatchNorm.

    blocks: residual bottlenecks in the four stages; the first is a depthwise conv when 1. scale: width over the paper's 64 and 128
    channels. InsightFace's mbf is blocks (1, 4, 6, 2), scale 2 (the default), its mbf_large (2, 8, 12, 4), scale 4.
    Under autocast everything up to the last stage runs in half precision; conv_sep and the head in the parameters' own dtype.

    Raises ValueError for blocks that are not four positive counts, or a scale below 1.
    """

    def __init__(
        self,
        *,
        embedding_dim: int = 512,
        input_size: int | tuple[int, int] = 112,
        blocks: Blocks = (1, 4, 6, 2),
        scale: int = 2,
        preprocessing: Preprocessing | None = None,
    ) -> None:
        if not are_whole(blocks, 4, 1):
            raise ValueError(f"MobileFaceNet: expected blocks of four counts of at least 1, got {blocks!r}")
        if not isinstance(scale, int) or scale < 1:
            raise ValueError(f"MobileFaceNet: expected scale as an int of at least 1, got {scale!r}")
        super().__init__(
            embedding_dim=embedding_dim, input_size=input_size, feature_channels=512, preprocessing=preprocessing
        )
        narrow, wide = 64 * scale, 128 * scale
        first = _conv_unit(narrow, narrow, 3, groups=64) if blocks[0] == 1 else _residual_stage(narrow, 128, blocks[0])
        self.layers = nn.ModuleList([
            _conv_unit(3, narrow, 3, stride=2),
            first,
            _Bottleneck(narrow, narrow, 128, stride=2),
            _residual_stage(narrow, 128, blocks[1]),
            _Bottleneck(narrow, wide, 256, stride=2),
            _residual_stage(wide, 256, blocks[2]),
            _Bottleneck(wide, wide, 512, stride=2),
            _residual_stage(wide, 256, blocks[3]),
        ])
        self.conv_sep = _conv_unit(wide, 512)
        _, height, width = self.feature_shape
        self.features = _Layers(
            _linear_unit(512, 512, (height, width), groups=512),
            nn.Flatten(),
            nn.Linear(512, embedding_dim, bias=False),
            nn.BatchNorm1d(embedding_dim),
        )
        kaiming_initialise(self, per_group=False)  # InsightFace's, so that its recipes keep their learning rates

    def forward_features(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) -> the 512-channel map (B, 512, h, w) after conv_sep."""
        x = images
        for layer in self.layers:
            x = layer(x)
        return without_autocast(self.conv_sep, x, self._head_dtype())

    def embed(self, features: Tensor) -> Tensor:
        """Global depthwise conv, Linear, BatchNorm: (B, 512, h, w) -> (B, D) in the parameters' dtype."""
        return without_autocast(self.features, features, self._head_dtype())

    def _head_dtype(self) -> torch.dtype:
        return cast(nn.Linear, self.features.layers[2]).weight.dtype
