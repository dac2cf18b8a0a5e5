"""What a training run holds while it runs."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from recog_fast.recognizability import RecognizabilityBranches
from recog_fast.sharding import World
from recog_fast.training.batches import Image
from recog_fast.training.config import TrainConfig
from recog_fast.training.data import TrainingImages
from recog_fast.training.logs import Meter
from recog_fast.training.model import MarginRamp


class NonFiniteError(ArithmeticError):
    """Embeddings, loss or gradient of a step are not finite; the message names step, rows and images."""

    def __init__(self, message: str, rows: int = 0) -> None:
        super().__init__(message)
        self.rows = rows  # non-finite ones, over all ranks


@dataclass
class Run:
    """Everything a step reads and changes."""

    config: TrainConfig
    images: TrainingImages
    device: torch.device
    autocast: torch.dtype | None  # None: float32
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
    nonfinite_rows: int = 0  # rows that were the reason, over all ranks
    corrupt: int = 0  # unreadable images reported on the console
    world: World = field(default_factory=World)
    wrapped: nn.Module | None = None  # the backbone as it is called over ranks
    scaler: Any = None  # of precision fp16
    rows: int = 0  # of all ranks since the last log line
    stop: threading.Event = field(default_factory=threading.Event)  # a signal came to this rank
    stopping: bool = False  # to any rank, as all agreed
    warnings: list[str] = field(default_factory=list)  # for the log
    saving: Any = None  # future of a checkpoint under way

    @property
    def network(self) -> nn.Module:
        """What to call: the backbone, or what averages its gradient over the ranks."""
        return self.backbone if self.wrapped is None else self.wrapped

    def note(self, values: Mapping[str, tuple[float, float]]) -> None:
        """Adds to the meter what every rank knows: it counts once."""
        if self.world.rank == 0:
            self.meter.add(values)
