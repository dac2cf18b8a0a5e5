"""What a rank does in the tests of the training script over ranks."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import torch.distributed as dist

from recog_fast.sharding import World
from recog_fast.training.config import read_config
from recog_fast.training.loop import train


def train_run(group: dist.ProcessGroup, file: str, changes: dict[str, Any] | None = None) -> tuple[int, str]:
    """(steps, what this rank printed) of a run from a settings file."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        result = train(read_config(file, changes=changes), World(group))
    return result.step, said.getvalue()
