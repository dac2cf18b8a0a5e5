"""MobileNets for small machines: V1 with a global depthwise head, and the V2-style MobileFaceNet of foamliu's published weights."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from recog_fast._arguments import is_number

from .backbone import IMAGENET, Backbone, Preprocessing, check_dropout, kaiming_initialise, without_autocast

# (output channels, stride) of MobileNetV1's thirteen separable convs at width 1 (Howard et al. 2017, table 1). The last stride is
# 1 here, not 2: a 112-pixel face is half of ImageNet's input, and the head wants a 7x7 map.
V1_LAYERS = (
    *((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2)),
    *((512, 1), (512, 1), (512, 1), (512, 1), (512, 1), (1024, 1), (1024, 1)),
)
# (expansion, channels, repeats, first stride)
V2_STAGES = ((2, 64, 5, 2), (4, 128, 1, 2), (2, 128, 6, 1), (4, 128, 1, 2), (2, 128, 2, 1))


def _separable(in_channels: int, channels: int, stride: int) -> nn.Sequential:
    """Depthwise 3x3, BN, ReLU, pointwise 1x1, BN, ReLU."""
    return nn.Sequential(
        nn.Conv2d(in_channels, in_channels, 3, stride=stride, padding=1, groups=in_channels, bias=False),
        nn.BatchNorm2d(in_channels),
        nn.ReLU(inplace=True),
        nn.Conv2d(in_channels, channels, 1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(inplace=True),
    )


class MobileNetV1(Backbone):
    """MobileNetV1 (Howard et al. 2017): separable convs, then a global depthwise conv, Linear and BatchNorm as the face head.

    width: multiplier of all channel counts (rounded to a multiple of 8). dropout acts before the Linear.
    About 3.8 M parameters at width 1 and D = 512, 0.4 M at width 0.25.

    Raises ValueError for a width outside (0, 4] or a dropout outside [0, 1).
    """

    def __init__(
        self,
        *,
        embedding_dim: int = 512,
        input_size: int | tuple[int, int] = 112,
        width: float = 1.0,
        dropout: float = 0.0,
        preprocessing: Preprocessing | None = None,
    ) -> None:
        if not is_number(width, 0, 4, above=True):
            raise ValueError(f"MobileNetV1: expected width in (0, 4], got {width!r}")
        channels = [max(8, 8 * round(c * width / 8)) for c in (32, *(c for c, _ in V1_LAYERS))]
        super().__init__(
            embedding_dim=embedding_dim, input_size=input_size, feature_channels=channels[-1], preprocessing=preprocessing
        )
        stem = nn.Sequential(
            nn.Conv2d(3, channels[0], 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(channels[0]),
            nn.ReLU(inplace=True),
        )
        strides = (stride for _, stride in V1_LAYERS)
        units = (_separable(a, b, s) for a, b, s in zip(channels[:-1], channels[1:], strides, strict=True))
        self.layers = nn.Sequential(stem, *units)
        last, height, wide = self.feature_shape
        self.pool = nn.Conv2d(last, last, (height, wide), groups=last, bias=False)
        self.pool_bn = nn.BatchNorm2d(last)
        self.dropout = nn.Dropout(check_dropout("MobileNetV1", dropout))
        self.fc = nn.Linear(last, embedding_dim, bias=False)
        self.features = nn.BatchNorm1d(embedding_dim)
        kaiming_initialise(self)

    def forward_features(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) -> the map (B, 1024 * width, h, w)."""
        return cast(Tensor, self.layers(images))

    def embed(self, features: Tensor) -> Tensor:
        """Global depthwise conv, BN, dropout, Linear, BN: (B, C, h, w) -> (B, D) in the dtype of fc.weight."""
        pooled: Tensor = self.dropout(torch.flatten(self.pool_bn(self.pool(features)), 1))
        return without_autocast(lambda x: self.features(self.fc(x)), pooled, self.fc.weight.dtype)


def _conv_relu6(in_channels: int, channels: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, channels, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(channels), nn.ReLU6(inplace=True))


class _InvertedResidual(nn.Module):
    """1x1 expansion, depthwise 3x3, linear 1x1; adds its input when the shape allows (Sandler et al. 2018)."""

    def __init__(self, in_channels: int, channels: int, expansion: int, stride: int) -> None:
        super().__init__()
        hidden = in_channels * expansion
        self.residual = stride == 1 and in_channels == channels
        self.conv = nn.Sequential(
            _conv_relu6(in_channels, hidden, 1),
            _conv_relu6(hidden, hidden, 3, stride, groups=hidden),
            nn.Conv2d(hidden, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, h, w) -> (B, channels, ceil(h / stride), ceil(w / stride))."""
        y = cast(Tensor, self.conv(x))
        return x + y if self.residual else y


class _SeparableStem(nn.Module):
    """Depthwise 3x3 and pointwise 1x1, each with BN and ReLU, under the names of the published weights."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.pointwise = nn.Conv2d(channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, h, w) -> the same shape."""
        x = torch.relu(self.bn1(self.depthwise(x)))
        return torch.relu(self.bn2(self.pointwise(x)))


class _GlobalDepthwise(nn.Module):
    """One depthwise kernel over the whole map, and its BN."""

    def __init__(self, channels: int, kernel: tuple[int, int]) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, kernel, groups=channels, bias=False)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, h, w) -> (B, channels, 1, 1)."""
        return cast(Tensor, self.bn(self.depthwise(x)))


class MobileNetV2(Backbone):
    """MobileFaceNet out of MobileNetV2 blocks, layer names of github.com/foamliu/MobileFaceNet (307 tensors; weights D = 128).

    Input: RGB over 255, ImageNet mean and std (`preprocessing`), because the published weights were trained so.
    Under autocast conv3 and bn, the last projection, run in the parameters' own dtype.

    Raises TypeError or ValueError as `Backbone`. Sources: Chen et al., MobileFaceNets, 2018; Sandler et al., MobileNetV2, 2018.
    """

    def __init__(
        self,
        *,
        embedding_dim: int = 512,
        input_size: int | tuple[int, int] = 112,
        preprocessing: Preprocessing | None = None,
    ) -> None:
        super().__init__(
            embedding_dim=embedding_dim,
            input_size=input_size,
            feature_channels=512,
            preprocessing=IMAGENET if preprocessing is None else preprocessing,
        )
        self.conv1 = _conv_relu6(3, 64, 3, stride=2)
        self.dw_conv = _SeparableStem(64)
        blocks: list[nn.Module] = []
        previous = 64
        for expansion, channels, repeats, stride in V2_STAGES:
            for i in range(repeats):
                blocks.append(_InvertedResidual(previous, channels, expansion, stride if i == 0 else 1))
                previous = channels
        self.features = nn.Sequential(*blocks)
        self.conv2 = _conv_relu6(previous, 512, 1)
        _, height, width = self.feature_shape
        self.gdconv = _GlobalDepthwise(512, (height, width))
        self.conv3 = nn.Conv2d(512, embedding_dim, 1)
        self.bn = nn.BatchNorm2d(embedding_dim)
        kaiming_initialise(self)

    def forward_features(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) -> the map (B, 512, h, w) after conv2."""
        return cast(Tensor, self.conv2(self.features(self.dw_conv(self.conv1(images)))))

    def embed(self, features: Tensor) -> Tensor:
        """Global depthwise conv, 1x1 conv, BN, flatten: (B, 512, h, w) -> (B, D) in the dtype of conv3.weight."""
        pooled: Tensor = self.gdconv(features)
        return without_autocast(lambda x: torch.flatten(self.bn(self.conv3(x)), 1), pooled, self.conv3.weight.dtype)
