"""Batches on their way from the data workers: shared memory that is filled in turn instead of made anew."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, Sampler, get_worker_info

from recog_fast.sharding import World

Image = NDArray[np.uint8]  # (H, W, 3) RGB
Key = tuple[int, int]  # epoch, sample
Item = tuple[Image, int, int]  # image, label, sample
PREFETCH = 2  # batches a worker has under way


class Batch(NamedTuple):
    """Rows as they leave the loader."""

    images: Tensor  # (B, S, S, 3) uint8
    labels: Tensor  # (B,) int64, -1 = unlabelled
    samples: list[int]  # (B,) which sample of the training set each row is
    parts: tuple[int, ...] = ()  # rows of each micro-batch, where they are this rank's shares of it

    def split(self, size: int) -> list[Batch]:
        """Micro-batches: `parts`, or of `size` rows."""
        parts = self.parts or [size] * -(-len(self.samples) // size)
        found, i = [], 0
        for rows in parts:
            found.append(Batch(self.images[i : i + rows], self.labels[i : i + rows], self.samples[i : i + rows]))
            i += rows
        return found


class Filler(Protocol):
    """What `StepImages` needs of a training set."""

    size: int

    def fill(self, keys: Sequence[Key], out: Image) -> tuple[NDArray[np.int64], NDArray[np.int64]]: ...


class _Sent(NamedTuple):
    """A batch as it leaves a worker: its pixels lie in the pool."""

    slot: tuple[int, int]
    labels: NDArray[np.int64]
    samples: NDArray[np.int64]


class Pool:
    """Memory of a fixed number of batches that workers fill in turn; fresh shared memory for every batch would cost a
    worker half of what decoding does.

    A worker is asked for batch n when batch n - PREFETCH of its own is handed out, so batch n - PREFETCH - 1 has been
    copied by then: one slot more than are under way is enough.
    """

    def __init__(self, workers: int, rows: int, size: int) -> None:
        self.pixels = torch.empty(workers, PREFETCH + 1, rows, size, size, 3, dtype=torch.uint8).share_memory_()
        self.filled = 0  # in this worker

    def fill(self, images: Filler, keys: Sequence[Key], worker: int) -> _Sent:
        """Images decoded into the worker's next slot."""
        slot = (worker, self.filled % (PREFETCH + 1))
        self.filled += 1
        labels, samples = images.fill(keys, self.pixels[slot].numpy()[: len(keys)])
        return _Sent(slot, labels, samples)

    def take(self, sent: _Sent, pin_memory: bool) -> Batch:
        """A batch of its own memory."""
        pixels = self.pixels[sent.slot][: len(sent.labels)]
        images = torch.empty(pixels.shape, dtype=torch.uint8, pin_memory=pin_memory).copy_(pixels)
        return Batch(images, torch.from_numpy(sent.labels), sent.samples.tolist())


class StepImages(Dataset[Any]):
    """The images of a training set a whole batch at a time, decoded into the worker's slot of the pool."""

    def __init__(self, images: Filler, pool: Pool | None) -> None:
        self.images, self.pool = images, pool

    def __getitems__(self, keys: Sequence[Key]) -> Batch | _Sent:
        worker = get_worker_info()
        if worker is not None and self.pool is not None:
            return self.pool.fill(self.images, keys, worker.id)
        size = self.images.size
        pixels = torch.empty(len(keys), size, size, 3, dtype=torch.uint8)
        labels, samples = self.images.fill(keys, pixels.numpy())
        return Batch(pixels, torch.from_numpy(labels), samples.tolist())


def as_it_is(batch: Any) -> Any:
    """The collate function of batches that are made whole."""
    return batch


class Order(Protocol):
    """The keys of one step after another, resumable."""

    @property
    def batches_per_epoch(self) -> int: ...

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[list[Key]]: ...

    def track(self, loader: Iterable[Any]) -> Iterator[Any]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class StepBatches(Sampler[list[tuple[int, int]]]):
    """This rank's share of the keys of `order`, which are those of all ranks: of every micro-batch (`rows` of them) contiguous rows, in
    rank order. `track` hands out a `Batch` for each one that a worker left in the pool.

    So the rows of a step are the same for any number of ranks, and a position fits any.
    """

    def __init__(self, order: Order, rows: int, parts: int, world: World, workers: int, size: int, pin_memory: bool) -> None:
        self.order, self.rows, self.world, self.size, self.pin_memory = order, rows, world, size, pin_memory
        most = world.share(rows)  # of a whole micro-batch, the largest
        self.pool = Pool(workers, parts * max(1, most.stop - most.start), size) if workers else None
        self._parts: deque[tuple[int, ...]] = deque()

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        self._parts.clear()
        for keys in self.order:
            micro = [keys[i : i + self.rows] for i in range(0, len(keys), self.rows)]
            shares = [part[self.world.share(len(part))] for part in micro]
            self._parts.append(tuple(len(share) for share in shares))
            yield [key for share in shares for key in share]

    @property
    def batches_per_epoch(self) -> int:
        """Of the order."""
        return self.order.batches_per_epoch

    def track(self, loader: Iterable[Any]) -> Iterator[Any]:
        """Iterate over `loader`, counting each batch as it is handed out."""
        for batch in self.order.track(loader):
            rows: Batch = self.pool.take(batch, self.pin_memory) if self.pool is not None and isinstance(batch, _Sent) else batch
            if not rows.samples:
                rows = rows._replace(images=torch.empty(0, self.size, self.size, 3, dtype=torch.uint8))
            yield rows._replace(parts=self._parts.popleft())

    def state_dict(self) -> dict[str, Any]:
        """The order's position."""
        return self.order.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to a saved position."""
        self.order.load_state_dict(state)
