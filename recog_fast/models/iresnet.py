"""IResNet, the backbone of ArcFace: pre-activated residual blocks with PReLU, layer names exactly InsightFace's."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from recog_fast._arguments import is_whole

from .backbone import Backbone, Preprocessing, check_dropout, without_autocast

Depth = Literal[18, 34, 50, 100, 200]

BLOCKS: dict[int, tuple[int, int, int, int]] = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 14, 3),
    100: (3, 13, 30, 3),
    200: (6, 26, 60, 6),
}
WIDTHS = (64, 128, 256, 512)


class IResBlock(nn.Module):
    """x -> bn3(conv2(prelu(bn2(conv1(bn1(x)))))) + shortcut(x); the stride sits on conv2 (He et al. put it on conv1)."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.prelu = nn.PReLU(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)
        self.downsample: nn.Module | None = None
        if stride != 1 or in_channels != channels:
            shortcut = nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, h, w) -> (B, channels, ceil(h / stride), ceil(w / stride))."""
        y: Tensor = self.conv1(self.bn1(x))
        y = self.bn3(self.conv2(self.prelu(self.bn2(y))))
        shortcut: Tensor = x if self.downsample is None else self.downsample(x)
        return y + shortcut


def _stage(in_channels: int, channels: int, blocks: int) -> nn.Sequential:
    first = IResBlock(in_channels, channels, stride=2)
    return nn.Sequential(first, *(IResBlock(channels, channels, stride=1) for _ in range(blocks - 1)))


class IResNet(Backbone):
    """IResNet-`depth` (18, 34, 50, 100, 200): 3x3 stem at full resolution, four stages of stride 2, then fc and BatchNorm.

    dropout acts on the flattened feature map during training. The scale of the last BatchNorm, `features.weight`, is fixed at 1
    and takes no gradient, so the embedding's norm is free to carry quality. State-dict keys and shapes are InsightFace's
    (arcface_torch/backbones/iresnet.py): 475 tensors for depth 50, fc.weight (D, 25088) at 112x112.

    Under autocast the convolutions run in half precision and fc and features in the parameters' own dtype.

    Raises ValueError for an unknown depth or a dropout outside [0, 1).
    """

    def __init__(
        self,
        depth: Depth,
        *,
        embedding_dim: int = 512,
        input_size: int | tuple[int, int] = 112,
        dropout: float = 0.0,
        preprocessing: Preprocessing | None = None,
    ) -> None:
        if not is_whole(depth) or depth not in BLOCKS:
            raise ValueError(f"IResNet: expected depth in {sorted(BLOCKS)}, got {depth!r}")
        super().__init__(
            embedding_dim=embedding_dim, input_size=input_size, feature_channels=WIDTHS[-1], preprocessing=preprocessing
        )
        self.conv1 = nn.Conv2d(3, WIDTHS[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        self.prelu = nn.PReLU(WIDTHS[0])
        blocks = BLOCKS[depth]
        self.layer1 = _stage(WIDTHS[0], WIDTHS[0], blocks[0])
        self.layer2 = _stage(WIDTHS[0], WIDTHS[1], blocks[1])
        self.layer3 = _stage(WIDTHS[1], WIDTHS[2], blocks[2])
        self.layer4 = _stage(WIDTHS[2], WIDTHS[3], blocks[3])
        self.bn2 = nn.BatchNorm2d(WIDTHS[3])
        self.dropout = nn.Dropout(check_dropout("IResNet", dropout))
        channels, height, width = self.feature_shape
        self.fc = nn.Linear(channels * height * width, embedding_dim)
        self.features = nn.BatchNorm1d(embedding_dim)
        self.features.weight.requires_grad_(False)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, 0.0, 0.1)  # InsightFace's; the BatchNorm after each conv makes the scale free

    def forward_features(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) -> bn2(layer4), the map (B, 512, h, w) that fc reads."""
        x: Tensor = self.prelu(self.bn1(self.conv1(images)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        x = self.bn2(x)
        return x

    def embed(self, features: Tensor) -> Tensor:
        """features(fc(dropout(flatten(map)))): (B, 512, h, w) -> (B, D) in the dtype of fc.weight."""
        flat: Tensor = self.dropout(torch.flatten(features, 1))
        return without_autocast(lambda x: self.features(self.fc(x)), flat, self.fc.weight.dtype)
