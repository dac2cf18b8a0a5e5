"""The attention branch of the recognizability index: CBAM over the last feature map (math.md 4)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .._arguments import are_whole, is_whole
from ..ops import _checks


class PerceptibilityAttention(nn.Module):
    """Feature map (N, C, h, w) -> v_attn (N, D): channel gate, spatial gate, flatten, Linear.

    channel gate: sigmoid(MLP(average pool) + MLP(max pool)), one MLP C -> C/r -> C with ReLU;
    spatial gate: sigmoid(7x7 convolution over [mean, max] across channels), applied to the gated map.

    Args: channels C; spatial: h = w as one int, or (h, w); embedding_dim D; reduction r (C/r is at least 1).
    Computed in the parameters' dtype whatever autocast says. Raises ValueError naming the argument.
    Source: CBAM (Woo 2018) eq. 1-3; Recognizability Index, section 3.4.
    """

    def __init__(self, channels: int, spatial: int | tuple[int, int], embedding_dim: int, reduction: int = 16) -> None:
        super().__init__()
        where = "PerceptibilityAttention"
        sides: Any = (spatial, spatial) if is_whole(spatial) else spatial
        _checks.expect(are_whole(sides, 2, 1), where, "one integer or (h, w) with spatial >= 1", repr(spatial))
        height, width = sides
        for name, value in (
            ("channels", channels),
            ("embedding_dim", embedding_dim),
            ("reduction", reduction),
        ):
            _checks.expect(is_whole(value, 1), where, f"{name} >= 1, an integer", repr(value))
        self.shape = (channels, height, width)
        hidden = max(1, channels // reduction)
        self.mlp = nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels))
        self.conv = nn.Conv2d(2, 1, 7, padding=3, bias=False)
        self.fc = nn.Linear(channels * height * width, embedding_dim)

    def gates(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """(channel gate (N, C), spatial gate (N, h, w)) in (0, 1); the second is what an activation map shows."""
        x = self._checked(features)
        channel = torch.sigmoid(self.mlp(x.mean(dim=(2, 3))) + self.mlp(x.amax(dim=(2, 3))))
        x = x * channel[:, :, None, None]
        spatial = torch.sigmoid(self.conv(torch.stack([x.mean(dim=1), x.amax(dim=1)], dim=1))).squeeze(1)
        return channel, spatial

    def attend(self, features: Tensor) -> Tensor:
        """The gated map (N, C, h, w)."""
        with torch.autocast(features.device.type, enabled=False):
            channel, spatial = self.gates(features)
            return self._checked(features) * channel[:, :, None, None] * spatial[:, None]

    def forward(self, features: Tensor) -> Tensor:
        """(N, C, h, w) -> (N, D)."""
        with torch.autocast(features.device.type, enabled=False):
            attended: Tensor = self.fc(torch.flatten(self.attend(features), 1))
            return attended

    def _checked(self, features: Tensor) -> Tensor:
        fits = features.dim() == 4 and tuple(features.shape[1:]) == self.shape
        _checks.expect(
            fits,
            "PerceptibilityAttention",
            f"features of shape (N, {', '.join(map(str, self.shape))})",
            tuple(features.shape),
        )
        return features.to(self.fc.weight.dtype)
