"""What a rank does in the tests of the training script over ranks."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import io
import os
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

from recog_fast.models.backbone import Backbone
from recog_fast.sharding import World, backbone
from recog_fast.training import data, loop
from recog_fast.training.config import read_config


class Plain(Backbone):
    """Two layers without batch normalisation, for any number of rows; NaN in the last row of call `poisoned`, `signal` to itself in the third."""

    def __init__(self, poisoned: int = -1, signal: int = 0) -> None:
        super().__init__(embedding_dim=16, input_size=32, feature_channels=16)
        self.conv = nn.Conv2d(3, 16, 16, stride=16)
        self.fc = nn.Linear(64, 16)
        self.calls, self.poisoned, self.signal = 0, poisoned, signal

    def forward_features(self, images: Tensor) -> Tensor:
        return torch.tanh(self.conv(images))

    def embed(self, features: Tensor) -> Tensor:
        embeddings = 10 * self.fc(torch.flatten(features, 1))
        self.calls += 1
        if self.calls - 1 == self.poisoned:
            embeddings = torch.cat([embeddings[:-1], embeddings[-1:] * torch.nan])
        if self.calls == 3 and self.signal:
            os.kill(os.getpid(), self.signal)
        return embeddings


@contextlib.contextmanager
def full_disk(times: int) -> Iterator[None]:
    """The first `times` checkpoints find no room for their second file."""
    from torch.distributed.checkpoint.filesystem import FileSystemWriter

    original, left = FileSystemWriter.write_data, [times]

    def write_data(self: Any, *arguments: Any) -> Any:
        done = original(self, *arguments)
        if left[0]:
            left[0] -= 1
            raise OSError(errno.ENOSPC, "No space left on device")
        return done

    with mock.patch.object(FileSystemWriter, "write_data", write_data):
        yield


def train_run(
    group: dist.ProcessGroup | None, file: str, changes: dict[str, Any] | None = None, per_rank: list[dict[str, Any]] | None = None,
    plain: bool = False, poisoned: int = -1, disk: int = 0, signal: int = 0,
) -> tuple[int, str]:  # fmt: skip
    """(steps, what this rank printed, or the error) of a run; poisoned: the call of the last rank whose last row is NaN, disk: of
    its saves that fail; signal: to it in its third step; per_rank: settings of each rank alone."""
    rank, size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    config = read_config(file, changes={**(changes or {}), **(per_rank[rank] if per_rank else {})})
    last = rank == size - 1
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.ExitStack() as stack:
        # every part of a backbone is gathered by itself, however small
        stack.enter_context(mock.patch.object(backbone, "_SHARDED", 1))
        if plain:
            stack.enter_context(mock.patch.object(loop, "build_backbone", side_effect=lambda _: Plain(poisoned, signal) if last else Plain()))
        if last:
            stack.enter_context(full_disk(disk))
        try:
            result = loop.train(config, World(group))
        except (ValueError, ArithmeticError, RuntimeError) as error:
            return -1, f"{type(error).__name__}: {error}"
        return result.step, said.getvalue()


def on_another_machine(group: dist.ProcessGroup, file: str, folders: list[str]) -> tuple[int, str]:
    """A run whose data path leads to another folder on each rank."""
    rank, original = dist.get_rank(group), data.open_source

    def opened(config: data.DataConfig, label: str = "data") -> Any:
        return original(dataclasses.replace(config, path=folders[rank]), label)

    with mock.patch.object(data, "open_source", opened):
        return train_run(group, file)
