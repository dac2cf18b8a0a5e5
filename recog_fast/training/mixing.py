"""Batches of two data sets: so many labelled rows, so many unlabelled ones, in every step (UIR: 3/4 and 1/4)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from recog_fast.data import ResumableBatches, StreamBatches
from recog_fast.data.sampler import shuffled

Indices = NDArray[np.int64]
T = TypeVar("T")


class MixedBatches(ResumableBatches):
    """One epoch is one pass over the labelled images, each batch `labelled_rows` of them and `unlabelled_rows` others.

    The unlabelled images are shuffled anew each epoch and start over where an epoch needs more than there are; where it needs
    fewer, other epochs take others. A step is `parts` micro-batches, each with its own share of both. The order is a pure
    function of (seed, epoch), the state that of `ResumableBatches` over the labelled images.
    """

    def __init__(
        self,
        labelled: Indices,
        unlabelled: Indices,
        labelled_rows: int,
        unlabelled_rows: int,
        parts: int = 1,
        seed: int = 0,
        buffer: int = 0,
    ) -> None:
        for name, found, rows in (("labelled", labelled, labelled_rows), ("unlabelled", unlabelled, unlabelled_rows)):
            if len(found) < 1 or rows < 1:
                raise ValueError(
                    f"MixedBatches: expected {name} images and rows, got {len(found)} images, {rows} rows a batch"
                )
        self.labelled, self.unlabelled = labelled, unlabelled
        self.rows, self.unlabelled_rows, self.parts = labelled_rows, unlabelled_rows, parts
        super().__init__(len(labelled), labelled_rows * parts, seed=seed, buffer=buffer)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, step = self.epoch, self.batch_size
        order = self.labelled[shuffled(self.length, (self.seed, epoch), self.buffer)]
        others = self._others(epoch)
        for start in range(self.done, self.done + len(self) * step, step):
            keys: list[int] = []
            for part in range(self.parts):
                first = start + part * self.rows
                second = first // self.rows * self.unlabelled_rows
                keys += (
                    order[first : first + self.rows].tolist() + others[second : second + self.unlabelled_rows].tolist()
                )
            yield [(epoch, index) for index in keys]

    def _others(self, epoch: int) -> Indices:
        """The unlabelled images of an epoch, in order."""
        count = len(self.unlabelled)
        others = np.empty(self.batches_per_epoch * self.parts * self.unlabelled_rows, np.int64)
        for turn, start in enumerate(range(0, len(others), count)):
            places = shuffled(count, (self.seed, epoch, turn, 0x0B5E), self.buffer)
            others[start : start + count] = self.unlabelled[places[: len(others) - start]]
        return others

    def state_dict(self) -> dict[str, int]:
        """That of `ResumableBatches`, and the number of unlabelled images."""
        return {**super().state_dict(), "unlabelled": len(self.unlabelled)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to a saved position; another number of unlabelled images would give another order: ValueError."""
        if state.get("unlabelled") != len(self.unlabelled):
            raise ValueError(
                f"MixedBatches: expected a state of {len(self.unlabelled)} unlabelled images, got {state.get('unlabelled')}"
            )
        super().load_state_dict(state)


class StreamEpochs(Sampler[list[tuple[int, int]]]):
    """`StreamBatches` as the training loop takes it: a step is `parts` micro-batches, an epoch one pass over the first stream."""

    def __init__(self, streams: StreamBatches, parts: int = 1) -> None:
        self.streams, self.parts = streams, parts
        self.batches_per_epoch = streams.streams[0].batches_per_epoch // parts
        if not self.batches_per_epoch:
            raise ValueError(
                f"train: expected as many images in the first stream as a step takes of it, got {streams.streams[0].length} images"
            )

    @property
    def _steps(self) -> int:
        return self.streams.done // self.parts

    def __len__(self) -> int:
        return self.batches_per_epoch - self._steps % self.batches_per_epoch

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """The steps left in this epoch; the position stays."""
        batches = iter(self.streams)
        for _ in range(len(self)):
            yield [key for _ in range(self.parts) for key in next(batches)]

    def track(self, loader: Iterable[T]) -> Iterator[T]:
        """Iterate over `loader`, counting each step as it is handed out."""
        for batch in loader:
            self.streams.done += self.parts
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """That of the streams."""
        return self.streams.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to a saved position of the same streams."""
        self.streams.load_state_dict(state)
