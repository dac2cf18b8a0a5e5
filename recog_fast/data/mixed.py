"""Several sources as one: identities side by side, unlabelled images apart, and batches with a fixed share of each."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset, Sampler

from recog_fast._arguments import is_whole

from .images import Image, LabelledImages, checked_index, read_many
from .names import Names, joined_names
from .sampler import ResumableBatches


class MixedDataset(Dataset[tuple[Any, int]]):
    """The images of several datasets one after the other; `.starts` says where each begins.

    share_classes=False: every dataset has people of its own, and its labels come after those of the datasets before it.
    share_classes=True: label k is the same person in all of them. unlabelled: numbers of the datasets whose images are
    of nobody known, whatever they are called there: label -1, no classes. Label -1 stays -1. Items are those of the datasets:
    (image (H, W, 3) uint8 RGB, label int). Raises ValueError for no datasets or a number that is none, TypeError for datasets
    without labels and unlabelled that are no whole numbers.
    """

    def __init__(
        self, datasets: Sequence[LabelledImages], *, share_classes: bool = False, unlabelled: Sequence[int] = ()
    ) -> None:
        if not isinstance(datasets, Sequence) or not all(hasattr(one, "labels") and hasattr(one, "num_classes") for one in datasets):
            raise TypeError(f"MixedDataset: expected datasets as a list of labelled datasets, got {datasets!r:.80}")
        if not isinstance(unlabelled, Collection) or not all(is_whole(one) for one in unlabelled):
            raise TypeError(f"MixedDataset: expected unlabelled as numbers of datasets, got {unlabelled!r:.80}")
        if not len(datasets) or not set(unlabelled) <= set(range(len(datasets))):
            raise ValueError(
                f"MixedDataset: expected datasets, unlabelled ones by their number, got {len(datasets)} of them, "
                f"unlabelled {list(unlabelled)}"
            )
        self.datasets = list(datasets)
        self.starts: NDArray[np.int64] = np.cumsum([0] + [len(dataset) for dataset in datasets]).astype(np.int64)
        known = [0 if k in unlabelled else dataset.num_classes for k, dataset in enumerate(datasets)]
        self.num_classes = max(known) if share_classes else sum(known)
        before = np.zeros(len(known), np.int64) if share_classes else np.cumsum([0, *known[:-1]])
        self._shift = [None if k in unlabelled else int(shift) for k, shift in enumerate(before)]
        self.labels: NDArray[np.int64] = np.concatenate(
            [_shifted(dataset.labels, shift) for dataset, shift in zip(datasets, self._shift, strict=True)]
        )

    @property
    def paths(self) -> Names:
        """Where each image comes from, source after source."""
        return joined_names([dataset.paths for dataset in self.datasets])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: int) -> tuple[Any, int]:
        part, place = self._place(index)
        image, label = self.datasets[part][place]
        return image, self._label(part, label)

    def read_many(self, indices: Sequence[int], rows: Sequence[Image], mirrored: Sequence[bool]) -> list[int]:
        """See `images.read_many`."""
        places = [checked_index(index, len(self)) for index in indices]
        return read_parts(self.datasets, self.starts, self._label, places, rows, mirrored)

    def _place(self, index: int) -> tuple[int, int]:
        place = checked_index(index, len(self))
        part = int(np.searchsorted(self.starts, place, side="right")) - 1
        return part, place - int(self.starts[part])

    def _label(self, part: int, label: int) -> int:
        shift = self._shift[part]
        return -1 if shift is None or label < 0 else label + shift


def read_parts(
    datasets: Sequence[Any],
    starts: NDArray[np.int64],
    relabel: Callable[[int, int], int],
    indices: Sequence[int],
    rows: Sequence[Image],
    mirrored: Sequence[bool],
) -> list[int]:
    """`images.read_many` over datasets that follow one another, dataset by dataset; relabel(dataset, label) is returned.

    starts (S + 1,): where each begins, and the end; every index lies in [0, starts[-1]).
    """
    parts = np.searchsorted(starts, indices, side="right") - 1
    labels = [0] * len(rows)
    for part in np.unique(parts).tolist():
        chosen = np.flatnonzero(parts == part).tolist()
        first = int(starts[part])
        found = read_many(
            datasets[part], [indices[k] - first for k in chosen], [rows[k] for k in chosen], [mirrored[k] for k in chosen]
        )
        for k, label in zip(chosen, found, strict=True):
            labels[k] = relabel(part, label)
    return labels


def _shifted(labels: NDArray[np.int64], shift: int | None) -> NDArray[np.int64]:
    return np.where(labels < 0, -1, labels + shift).astype(np.int64) if shift is not None else np.full_like(labels, -1)


class StreamBatches(Sampler[list[tuple[int, int]]]):
    """Batches of a fixed number of images from each of several streams, e.g. 96 labelled and 32 unlabelled ones.

    lengths (S,): images of each stream, in the order of a `MixedDataset`; counts (S,): how many of a batch come from each,
    per rank. Every stream is shuffled by itself, epoch by epoch, as `ResumableBatches` does with seed + its number (and buffer), and
    starts again when it is through: short streams repeat. Yields `steps` batches of keys (epoch of the stream, index into
    the mixture), without end for steps=None. state_dict counts the batches that `track` handed out. Raises ValueError as
    `ResumableBatches`, and for lengths and counts that do not match.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        counts: Sequence[int],
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        steps: int | None = None,
        buffer: int = 0,
    ) -> None:
        for name, value in (("lengths", lengths), ("counts", counts)):
            if not isinstance(value, Sequence) or isinstance(value, str | bytes) or not all(is_whole(one) for one in value):
                raise ValueError(f"StreamBatches: expected {name} as integers, got {value!r:.80}")
        if not len(lengths) or len(lengths) != len(counts):
            raise ValueError(f"StreamBatches: expected one count per length (lengths, counts), got {list(lengths)}, {list(counts)}")
        if not is_whole(seed, 0):
            raise ValueError(f"StreamBatches: expected seed as an integer >= 0, got {seed!r}")
        if not is_whole(world_size, 1) or not is_whole(rank, 0, world_size - 1):
            raise ValueError(f"StreamBatches: expected world_size >= 1 and rank in [0, world_size), got {world_size!r} and {rank!r}")
        if steps is not None and not is_whole(steps, 0):
            raise ValueError(f"StreamBatches: expected steps as an integer >= 0 or None, got {steps!r}")
        if not is_whole(buffer, 0):
            raise ValueError(f"StreamBatches: expected buffer as an integer >= 0, got {buffer!r}")
        self.steps = steps
        self.starts = np.cumsum([0, *lengths[:-1]]).tolist()
        self.streams = [
            ResumableBatches(length, count, seed + k, rank, world_size, buffer=buffer)
            for k, (length, count) in enumerate(zip(lengths, counts, strict=True))
        ]
        self.done = 0

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """Batches from the saved position on; the position stays."""
        parts = [self._keys(k, self.done) for k in range(len(self.streams))]
        step = self.done
        while self.steps is None or step < self.steps:
            yield [key for part in parts for key in next(part)]
            step += 1

    def _keys(self, stream: int, done: int) -> Iterator[list[tuple[int, int]]]:
        batches, start = self.streams[stream], self.starts[stream]
        epoch, place = divmod(done, batches.batches_per_epoch)
        while True:
            batches.epoch, batches.done = epoch, place * batches.batch_size * batches.world_size
            for keys in batches:  # it reads the position once, when it starts
                yield [(of, start + index) for of, index in keys]
            epoch, place = epoch + 1, 0

    def track(self, loader: Any) -> Iterator[Any]:
        """Iterate over `loader` (a DataLoader of this sampler, or the sampler itself), counting each batch as it is handed out."""
        for batch in loader:
            self.done += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Batches handed out, and what the order depends on."""
        streams = [[s.length, s.batch_size, s.seed, s.world_size] + [s.buffer] * (s.buffer > 0) for s in self.streams]
        return {"done": self.done, "streams": streams}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position; lengths, counts, seed and ranks must be the same: ValueError."""
        own = self.state_dict()["streams"]
        if [list(s) for s in state.get("streams", [])] != own or int(state["done"]) < 0:
            raise ValueError(f"StreamBatches: expected a state of streams {own}, got {state}")
        self.done = int(state["done"])
