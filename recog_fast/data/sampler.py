"""Shuffled batches that can stop and go on anywhere: the order is a pure function of (seed, epoch), the position one
number."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from recog_fast._arguments import is_whole

T = TypeVar("T")


def shuffled(length: int, seed: int | tuple[int, ...], buffer: int = 0) -> NDArray[np.int64]:
    """(length,) int64: default_rng(seed)'s permutation of 0 ... length - 1, or with buffer > 0 an order that reads files nearly in
    sequence, as a shuffle buffer over shuffled shards does.

    Blocks of `buffer` consecutive places come in random order; then every place moves by less than `buffer` places (sorted by
    position + uniform(0, buffer)). Unlike a real buffer it is known without reading anything.
    """
    rng = np.random.default_rng(seed)
    if buffer <= 0 or buffer >= length:
        return rng.permutation(length)
    starts = rng.permutation(-(-length // buffer)) * buffer
    blocks = (starts[:, None] + np.arange(buffer)).ravel()
    order = blocks[blocks < length]
    moved: NDArray[np.int64] = order[np.argsort(np.arange(length) + rng.random(length) * buffer, kind="stable")]
    return moved


class ResumableBatches(Sampler[list[tuple[int, int]]]):
    """Batch sampler over `length` images (a number or anything with a length) for one rank of `world_size`.

    Yields lists of (epoch, index) keys, which `Augmented` understands: so the epoch reaches persistent workers. Epoch e
    visits default_rng((seed, e)).permutation(length), or `shuffled` with a buffer, in global batches of batch_size * world_size, cut into ranks.
    drop_last=False keeps the last, shorter global batch, wrapping around to the epoch's start where it does not divide
    by world_size, so that all ranks make the same number of steps.

    Iterating starts at the saved position and does not move it (a DataLoader runs ahead of what was trained on);
    `track(loader)` moves it:

        batches = ResumableBatches(dataset, 64, seed=1)
        loader = DataLoader(Augmented(dataset, ...), batch_sampler=batches, num_workers=2, persistent_workers=True)
        while batches.epoch < epochs:
            for images, labels in batches.track(loader):
                ...                                  # batches.state_dict() here counts this batch as done

    The state is (seed, epoch, images done in it) and fits any later batch size and number of ranks. Raises ValueError
    for sizes below 1, a rank outside [0, world_size), and drop_last with fewer images than one global batch; TypeError for a
    length that is no number and has none.
    """

    def __init__(
        self,
        length: int | Sized,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = True,
        buffer: int = 0,
    ) -> None:
        if not is_whole(length) and not isinstance(length, Sized):
            raise TypeError(f"ResumableBatches: expected length as an integer or anything with one, got {length!r}")
        self.length = len(length) if isinstance(length, Sized) else length
        for name, value, low in (
            ("length", self.length, 1),
            ("batch_size", batch_size, 1),
            ("world_size", world_size, 1),
            ("seed", seed, 0),
            ("buffer", buffer, 0),
        ):
            if not is_whole(value, low):
                raise ValueError(f"ResumableBatches: expected {name} >= {low}, got {value!r}")
        if not is_whole(rank, 0, world_size - 1):
            raise ValueError(f"ResumableBatches: expected rank in [0, world_size) = [0, {world_size}), got {rank!r}")
        if drop_last and self.length < batch_size * world_size:
            raise ValueError(
                "ResumableBatches: expected length >= batch_size * world_size with drop_last, "
                f"got {self.length} < {batch_size * world_size}"
            )
        self.batch_size, self.seed, self.drop_last = batch_size, seed, drop_last
        self.rank, self.world_size, self.buffer = rank, world_size, buffer
        self.epoch = 0
        self.done = 0

    @property
    def batches_per_epoch(self) -> int:
        """Batches of a whole epoch."""
        return self._batches(self.length)

    def _batches(self, images: int) -> int:
        whole, rest = divmod(images, self.batch_size * self.world_size)
        return whole + (rest > 0 and not self.drop_last)

    def __len__(self) -> int:
        """Batches the next iteration yields: those left in this epoch."""
        return self._batches(self.length - self.done)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, step = self.epoch, self.batch_size * self.world_size
        order = shuffled(self.length, (self.seed, epoch), self.buffer)
        for start in range(self.done, self.done + len(self) * step, step):
            whole = order[start : start + step]
            short = -len(whole) % self.world_size
            if short:
                whole = np.concatenate([whole, np.resize(order, short)])
            share = len(whole) // self.world_size
            yield [(epoch, index) for index in whole[self.rank * share : (self.rank + 1) * share].tolist()]

    def track(self, loader: Iterable[T]) -> Iterator[T]:
        """Iterate over `loader` (a DataLoader of this sampler, or the sampler itself) and count each batch as it is
        handed out.

        At the end of the epoch the state moves to the start of the next one.
        """
        step = self.batch_size * self.world_size
        left = len(self)
        for batch in loader:
            self.done += step
            left -= 1
            if left == 0:
                self.epoch, self.done = self.epoch + 1, 0
            yield batch
        if left:
            raise ValueError(
                f"ResumableBatches.track: expected a loader of this sampler, got one that ended {left} batches early"
            )

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of `epoch`."""
        if epoch < 0:
            raise ValueError(f"ResumableBatches: expected epoch >= 0, got {epoch}")
        self.epoch, self.done = epoch, 0

    def state_dict(self) -> dict[str, int]:
        """Seed, length, epoch and the number of its images that were handed out, over all ranks."""
        place = {"seed": self.seed, "length": self.length, "epoch": self.epoch, "done": self.done}
        return {**place, "buffer": self.buffer} if self.buffer else place

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position; seed, length and buffer must be the same, else the order is another: ValueError."""
        for name in ("seed", "length", "buffer"):
            if state.get(name, 0 if name == "buffer" else None) != getattr(self, name):
                raise ValueError(
                    f"ResumableBatches: expected a state of {name} {getattr(self, name)}, got {state.get(name)}"
                )
        epoch, done = int(state["epoch"]), int(state["done"])
        if epoch < 0 or not 0 <= done <= self.length:
            raise ValueError(
                f"ResumableBatches: expected epoch >= 0 and done in [0, {self.length}], got {epoch}, {done}"
            )
        self.epoch, self.done = epoch, done
        if not len(self):
            # Fewer images are left than the present global batch: the epoch is over.
            self.set_epoch(epoch + 1)
