"""From settings to batches: open a source, split off held-out identities, resize, augment, and hand out batches by step number."""

from __future__ import annotations

import inspect
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from recog_fast import data as sources
from recog_fast.training.config import AugmentConfig, DataConfig, TrainConfig

Image = NDArray[np.uint8]  # (H, W, 3) RGB
Key = tuple[int, int]  # (epoch, sample): the epoch is part of the augmentation's seed
MAX_REPLACEMENTS = 32

_READERS = {
    "rec": "RecordDataset",
    "folder": "FolderDataset",
    "list": "ListDataset",
    "zip": "ZipDataset",
    "tar": "TarDataset",
    "synthetic": "SyntheticIdentities",
}


class Batch(NamedTuple):
    """One micro-batch as it leaves the loader."""

    images: Tensor  # (B, S, S, 3) uint8
    labels: Tensor  # (B,) int64, -1 = unlabelled
    samples: list[int]  # (B,) which sample of the training set each row is
    corrupt: list[int]  # samples that could not be decoded and were replaced


@dataclass(frozen=True)
class Split:
    """A source cut to the identities it is used for."""

    source: Any
    indices: NDArray[np.int64]  # of the source
    labels: NDArray[np.int64]  # new labels 0 .. num_classes - 1, -1 = unlabelled
    num_classes: int


def open_source(config: DataConfig) -> Any:
    """The dataset of `recog_fast.data` that `config.kind` names.

    Raises FileNotFoundError for a missing path and ValueError for options the dataset does not take.
    """
    reader = getattr(sources, _READERS[config.kind])
    if config.path and not Path(config.path).exists():
        raise FileNotFoundError(f"train: data.path {config.path} does not exist")
    arguments: dict[str, Any] = dict(config.options)
    known = inspect.signature(reader).parameters
    unknown = [name for name in arguments if name not in known]
    if unknown:
        raise ValueError(f"train: unknown key 'data.options.{unknown[0]}' for kind {config.kind}; known keys: {', '.join(known)}")
    if config.kind == "synthetic" and "size" in known:
        arguments.setdefault("size", config.size)
    return reader(config.path, **arguments) if config.path else reader(**arguments)


def split_classes(source: Any, config: DataConfig, seed: int) -> tuple[Split, Split]:
    """(training, held-out) parts of a source: whole identities, drawn by `seed`; each part numbered from 0 in the source's order."""
    labels = np.asarray(source.labels, dtype=np.int64)
    classes, counts = np.unique(labels[labels >= 0], return_counts=True)
    classes = classes[counts >= config.min_images]
    held_count = round(config.holdout_classes * len(classes)) if config.holdout_classes < 1 else int(config.holdout_classes)
    if held_count >= max(len(classes), 1) and held_count:
        raise ValueError(f"train: expected holdout_classes below the number of identities {len(classes)}, got {held_count}")
    shuffled = np.random.default_rng((seed, 0x5917)).permutation(classes)
    held, kept = np.sort(shuffled[:held_count]), np.sort(shuffled[held_count:])
    return _part(source, labels, kept, unlabelled=True), _part(source, labels, held, unlabelled=False)


def _part(source: Any, labels: NDArray[np.int64], classes: NDArray[np.int64], unlabelled: bool) -> Split:
    wanted = np.isin(labels, classes) | (unlabelled & (labels < 0))
    indices = np.flatnonzero(wanted)
    new = np.searchsorted(classes, labels[indices])
    return Split(source, indices, np.where(labels[indices] < 0, -1, new).astype(np.int64), len(classes))


class TrainingImages(Dataset[tuple[Image, int, int, list[int]]]):
    """Labelled (and unlabelled) images, resized and augmented; item (epoch, i) is a pure function of (seed, epoch, i).

    A corrupt image is replaced by the next readable one, deterministically, and reported in the item.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.size = config.data.size
        self.seed = config.seed
        self.train, self.held = split_classes(open_source(config.data), config.data, config.seed)
        parts = [self.train]
        if config.unlabelled is not None:
            extra = open_source(config.unlabelled)
            parts.append(Split(extra, np.arange(len(extra), dtype=np.int64), np.full(len(extra), -1, dtype=np.int64), 0))
        self.parts = parts
        self.starts = np.cumsum([0] + [len(part.indices) for part in parts])
        self.labels: NDArray[np.int64] = np.concatenate([part.labels for part in parts])
        self.num_classes = self.train.num_classes
        self.augment = _augmentation(config.augment)
        self.cached: list[Image | None] | None = None
        if not self.num_classes:
            raise ValueError(f"train: expected at least one identity in {config.data.path or config.data.kind}, got none")
        if config.data.cache:
            self.cached = [self._decode(i) for i in range(len(self))]

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, i: int) -> str:
        """Where sample i comes from, for messages."""
        part, index = self._place(i)
        return str(part.source.paths[index])

    def __getitem__(self, key: Key) -> tuple[Image, int, int, list[int]]:
        epoch, first = key
        corrupt: list[int] = []
        for step in range(min(MAX_REPLACEMENTS, len(self))):
            i = (first + step) % len(self)
            image = self._decode(i) if self.cached is None else self.cached[i]
            if image is not None:
                rng = np.random.default_rng((self.seed, epoch, first))
                return self.augment(image, rng), int(self.labels[i]), i, corrupt
            corrupt.append(i)
        raise ValueError(f"train: {len(corrupt)} corrupt images in a row, the first is {self.path(corrupt[0])}")

    def _place(self, i: int) -> tuple[Split, int]:
        part = int(np.searchsorted(self.starts, i, side="right")) - 1
        return self.parts[part], int(self.parts[part].indices[i - self.starts[part]])

    def _decode(self, i: int) -> Image | None:
        part, index = self._place(i)
        return read_image(part.source, index, self.size)


def read_image(source: Any, index: int, size: int) -> Image | None:
    """Image `index` of a source as (size, size, 3) uint8, None when it is corrupt."""
    try:
        image: Image = source[index][0]
        return sources.resize_image(image, size)
    except sources.CorruptImage:
        return None


class StepBatches(Sampler[list[Key]]):
    """Micro-batches from number `start` on, without end: which samples batch k holds depends on (seed, k) and on nothing else.

    Each epoch is a fresh permutation; its last partial optimizer step is dropped.
    """

    def __init__(self, samples: int, batch_size: int, accumulate: int, seed: int, start: int) -> None:
        if samples < batch_size * accumulate:
            raise ValueError(f"train: expected batch_size * gradient_acc <= the {samples} training images, got {batch_size} * {accumulate}")
        self.samples, self.batch_size, self.seed, self.start = samples, batch_size, seed, start
        self.per_epoch = samples // (batch_size * accumulate) * accumulate

    def __iter__(self) -> Iterator[list[Key]]:
        number, permuted, order = self.start, -1, np.empty(0, dtype=np.int64)
        while True:
            epoch, place = divmod(number, self.per_epoch)
            if epoch != permuted:
                permuted, order = epoch, np.random.default_rng((self.seed, epoch)).permutation(self.samples)
            chosen = order[place * self.batch_size : (place + 1) * self.batch_size]
            yield [(epoch, int(i)) for i in chosen]
            number += 1


def batches(images: TrainingImages, config: TrainConfig, start: int, pin_memory: bool) -> Iterator[Batch]:
    """Endless micro-batches from number `start` on; the global random state is left alone."""
    order = StepBatches(len(images), config.batch_size, config.gradient_acc, config.seed, start)
    loader: DataLoader[Any] = DataLoader(
        images,
        batch_sampler=order,
        num_workers=config.num_workers,
        collate_fn=collate,
        pin_memory=pin_memory,
        worker_init_fn=_leave_signals_to_the_parent,
        generator=torch.Generator(),
    )
    return iter(loader)


def collate(items: list[tuple[Image, int, int, list[int]]]) -> Batch:
    """Items of TrainingImages as one Batch."""
    images = torch.from_numpy(np.stack([item[0] for item in items]))
    labels = torch.tensor([item[1] for item in items], dtype=torch.int64)
    return Batch(images, labels, [item[2] for item in items], [i for item in items for i in item[3]])


def to_input(images: Tensor, device: torch.device) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float32 in [-1, 1], converted on the device: a quarter of the bytes cross the bus."""
    return images.to(device, non_blocking=True).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0).contiguous()


def _leave_signals_to_the_parent(_: int) -> None:
    # A scheduler signals the whole process group; the parent decides when to stop and then ends its workers.
    for name in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(name, signal.SIG_IGN)


def _augmentation(config: AugmentConfig) -> Any:
    arguments = {"flip": config.flip, "crop": config.crop, "low_resolution": config.low_resolution, "blur": config.blur, **config.options}
    return sources.Augmentation(**arguments)
