"""Small backbones that are not fresh: their normalisation layers have statistics."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from recog_fast.models import Preprocessing, build_model

BGR = Preprocessing(mean=(0.1, 0.4, 0.6), std=(0.3, 0.5, 0.7), color_order="BGR")


def tiny(**options: Any) -> Any:
    torch.manual_seed(0)
    backbone = build_model("tiny", embedding_dim=8, input_size=32, widths=(4, 4, 8, 8), **options)
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):  # statistics that are not those of a fresh layer
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.normal_(module.running_mean, 0.0, 0.1)
    return backbone.eval()
