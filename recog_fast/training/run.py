"""What a training run holds while it runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from recog_fast.recognizability import RecognizabilityBranches
from recog_fast.training.batches import Image
from recog_fast.training.config import TrainConfig
from recog_fast.training.data import TrainingImages
from recog_fast.training.logs import Meter
from recog_fast.training.model import MarginRamp


class NonFiniteError(ArithmeticError):
    """Embeddings, loss or gradient of a step are not finite; the message names step, rows and images."""


@dataclass
class Run:
    """Everything a step reads and changes."""

    config: TrainConfig
    images: TrainingImages
    device: torch.device
    autocast: bool
    backbone: nn.Module
    prepare: Any  # the network's own pixel convention: (B, H, W, 3) uint8 -> (B, 3, H, W) float32
    head: Any
    optimizer: torch.optim.Optimizer
    head_optimizer: Any
    encoder: Any  # momentum encoder of the memory, or None
    branches: RecognizabilityBranches | None  # of the recognizability index
    ui: list[Image]  # unrecognizable faces its centre comes from
    ramp: MarginRamp
    meter: Meter
    position: Any  # ResumableBatches: where in the data the run is
    loader: Any
    steps_per_epoch: int
    total: int
    step: int = 0  # optimizer steps done
    skipped: int = 0  # steps left out for non-finite values
    corrupt: int = 0  # unreadable images reported on the console
