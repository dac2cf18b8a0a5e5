"""From settings to batches: open a source, split off held-out identities, resize, augment, and hand out whole steps."""

from __future__ import annotations

import difflib
import inspect
import multiprocessing
import os
import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from recog_fast import data as sources
from recog_fast.data.formats import DRAWN, MIXED, SOURCES
from recog_fast.data.images import read_many
from recog_fast.data.mixed import read_parts
from recog_fast.data.names import Names, chosen_names
from recog_fast.data.opening import KINDS, refuse_unfinished
from recog_fast.sharding import World
from recog_fast.training.batches import PREFETCH, Image, Item, StepBatches, StepImages, as_it_is
from recog_fast.training.config import DataConfig, TrainConfig
from recog_fast.training.kept import read_kept
from recog_fast.training.mixing import MixedBatches, StreamEpochs

Indices = NDArray[np.int64]


class Split(Dataset[tuple[Image, int]]):
    """The images of some identities of a source, labelled 0 .. num_classes - 1, with or without its unlabelled (-1) images."""

    def __init__(self, source: Any, classes: NDArray[np.int64], unlabelled: bool) -> None:
        labels = np.asarray(source.labels, dtype=np.int64)
        self.source = source
        self.num_classes = len(classes)
        self.indices = np.flatnonzero(np.isin(labels, classes) | (unlabelled & (labels < 0)))
        kept = labels[self.indices]
        self.labels: NDArray[np.int64] = np.where(kept < 0, -1, np.searchsorted(classes, kept)).astype(np.int64)

    @property
    def paths(self) -> Names:
        """Where each image comes from."""
        return chosen_names(self.source.paths, self.indices)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Image, int]:
        return self.source[int(self.indices[index])][0], int(self.labels[index])

    def read_many(self, indices: Sequence[int], rows: Sequence[Image], mirrored: Sequence[bool]) -> list[int]:
        """As the source's, with the labels here."""
        places = np.asarray(indices, np.int64)
        read_many(self.source, self.indices[places].tolist(), rows, mirrored)
        labels: list[int] = self.labels[places].tolist()
        return labels


def open_source(config: DataConfig, label: str = "data") -> Any:
    """The dataset of `recog_fast.data` that `config.kind` names, restricted to `config.keep`; `label` names it in errors.

    Raises FileNotFoundError for a missing path and ValueError for options the dataset does not take.
    """
    if config.kind == MIXED:
        return _mixed(config)
    reader: Any = sources.SyntheticIdentities if config.kind == DRAWN else KINDS[config.kind]
    if config.path and not Path(config.path).exists():
        raise FileNotFoundError(f"train: {label}.path {config.path} does not exist")
    if config.path:
        refuse_unfinished(config.path)
    arguments: dict[str, Any] = dict(config.options)
    known = list(inspect.signature(reader).parameters)
    for name in arguments:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"{config.kind} takes: {', '.join(known)}"
            raise ValueError(f"train: unknown key '{label}.options.{name}'; {hint}")
    if config.kind != DRAWN:
        source = reader(config.path, **arguments)
    else:
        source = reader(**{"size": config.size, **arguments})
        # Drawing costs more than decoding: whole batches at once, before the workers start.
        source = source.cache() if config.cache else source
    return read_kept(config.keep, source) if config.keep else source


def _mixed(config: DataConfig) -> Any:
    """Several sources as one, each with a kind, path and options of its own."""
    options = dict(config.options)
    fields = {"kind", "path", "options"}
    listed = options.pop("sources", None)
    if not isinstance(listed, list) or not listed or not all(isinstance(one, dict) and set(one) <= fields for one in listed):
        raise ValueError(f"train: expected data.options.sources as a list of kind, path and options with kind mixed, got {listed!r}")
    options.pop("rows", None)  # `_streams` takes them
    unknown = sorted(set(options) - {"share_classes", "unlabelled"})
    if unknown:
        raise ValueError(f"train: unknown key 'data.options.{unknown[0]}'; mixed takes: sources, share_classes, unlabelled, rows")
    parts = [DataConfig(size=config.size, cache=config.cache, **one) for one in listed]
    for part in parts:
        if part.kind not in (*SOURCES, DRAWN):
            raise ValueError(f"train: expected kind of a source in {', '.join((*SOURCES, DRAWN))}, got {part.kind!r}")
    return sources.MixedDataset([open_source(part) for part in parts], **options)


def split_classes(source: Any, config: DataConfig, seed: int) -> tuple[Split, Split]:
    """(training, held-out) parts of a source: whole identities, drawn by `seed`; each part numbered from 0 in the source's order.

    Identities with fewer than `min_images` images are in neither. Raises ValueError when nothing is left to train on.
    """
    labels = np.asarray(source.labels, dtype=np.int64)
    classes, counts = np.unique(labels[labels >= 0], return_counts=True)
    classes = classes[counts >= config.min_images]
    if not len(classes):
        raise ValueError(
            f"train: expected an identity with {config.min_images} or more images in {config.path or config.kind}, got none"
        )
    held = round(config.holdout_classes * len(classes)) if config.holdout_classes < 1 else int(config.holdout_classes)
    if held >= len(classes):
        raise ValueError(f"train: expected holdout_classes below the number of identities {len(classes)}, got {held}")
    shuffled = np.random.default_rng((seed, 0x5917)).permutation(classes)
    return Split(source, np.sort(shuffled[held:]), unlabelled=True), Split(
        source, np.sort(shuffled[:held]), unlabelled=False
    )


class TrainingImages(Dataset[Item]):
    """Labelled (and unlabelled) images, resized and augmented; item (epoch, i) is a pure function of (seed, epoch, i).

    A corrupt image is replaced by the next readable one of its source, listed in output/quarantine.jsonl (of the unlabelled
    source: quarantine_unlabelled.jsonl) and counted; more than `max_corrupt` of them raise.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.size, self.seed = config.data.size, config.seed
        self.augment = config.augment
        labelled, self.held = split_classes(open_source(config.data), config.data, config.seed)
        self.num_classes = labelled.num_classes
        parts = [(labelled, config.data, "quarantine")]
        if config.unlabelled is not None:
            # Every image of it counts as unlabelled, whatever its source calls it.
            nobody = Split(_Unlabelled(open_source(config.unlabelled, "unlabelled")), np.empty(0, dtype=np.int64), unlabelled=True)
            parts.append((nobody, config.unlabelled, "quarantine_unlabelled"))
        self.splits = [part for part, _, _ in parts]
        self.parts = [
            sources.SkipCorrupt(part, Path(config.output) / f"{name}.jsonl", data.max_corrupt)
            for part, data, name in parts
        ]
        self.starts = np.cumsum([0] + [len(part) for part in self.parts])
        self.labels: NDArray[np.int64] = np.concatenate([part.labels for part in self.splits])
        self.cached: list[tuple[Image, int]] | None = None
        if config.data.cache:
            self.cached = [self._decode(i) for i in range(len(self))]

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, key: tuple[int, int]) -> Item:
        out = np.empty((1, self.size, self.size, 3), np.uint8)
        labels, samples = self.fill([key], out)
        return out[0], labels.item(0), samples.item(0)

    def fill(self, keys: Sequence[tuple[int, int]], out: Image) -> tuple[Indices, Indices]:
        """Images of keys (epoch, i), decoded and augmented in `out` (N, S, S, 3); their labels and samples, both (N,)."""
        epochs, samples = np.array(keys, np.int64).reshape(-1, 2).T
        coins = self.augment.draw(self.seed, epochs, samples)
        labels = self._read(samples.tolist(), list(out), (coins[:, 0] < self.augment.flip).tolist())
        for row in np.flatnonzero(self.augment.goes_on(coins)).tolist():
            rng = np.random.default_rng((self.seed, int(epochs[row]), int(samples[row])))
            out[row] = self.augment.after_flip(out[row], rng, coins[row])
        return np.array(labels, np.int64), samples

    def _read(self, samples: list[int], rows: list[Image], mirrored: list[bool]) -> list[int]:
        if self.cached is not None:
            return read_many(self.cached, samples, rows, mirrored)
        if len(self.parts) == 1:
            return self.parts[0].read_many(samples, rows, mirrored)
        return read_parts(self.parts, self.starts, lambda _, label: label, samples, rows, mirrored)

    def clean(self, i: int) -> Image:
        """Sample i resized, without augmentation."""
        return (self._decode(i) if self.cached is None else self.cached[i])[0]

    def path(self, i: int) -> str:
        """Where sample i comes from, for messages."""
        part = self._part(i)
        split = self.splits[part]
        return str(split.source.paths[int(split.indices[i - self.starts[part]])])

    def corrupt(self) -> int:
        """How many corrupt images were met so far, by any worker."""
        return sum(len(part.corrupt()) for part in self.parts)

    def _part(self, i: int) -> int:
        return int(np.searchsorted(self.starts, i, side="right")) - 1

    def _decode(self, i: int) -> tuple[Image, int]:
        part = self._part(i)
        image, label = self.parts[part][i - int(self.starts[part])]
        return sources.resize_image(image, self.size), label


class _Unlabelled(Dataset[tuple[Image, int]]):
    """A source with every label -1."""

    def __init__(self, source: Any) -> None:
        self.source, self.num_classes, self.paths = source, 0, source.paths
        self.labels = np.full(len(source), -1, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image, int]:
        return self.source[index][0], -1

    def read_many(self, indices: Sequence[int], rows: Sequence[Image], mirrored: Sequence[bool]) -> list[int]:
        """As the source's, with label -1."""
        read_many(self.source, indices, rows, mirrored)
        return [-1] * len(rows)


def read_image(source: Any, index: int, size: int) -> Image | None:
    """Image `index` of a source as (size, size, 3) uint8, None when it is corrupt."""
    try:
        image: Image = sources.resize_image(source[index][0], size)
        return image
    except sources.CorruptImage:
        return None


def _streams(images: TrainingImages, config: TrainConfig) -> StreamEpochs:
    """The order of a mixture with `rows`: so many rows of each of its sources in every micro-batch."""
    rows = config.data.options["rows"]
    mixed = images.splits[0].source
    count = len(mixed.datasets)
    if not isinstance(rows, list) or len(rows) != count or min(rows) < 1 or sum(rows) != config.batch_size:
        raise ValueError(
            f"train: expected data.options.rows as {count} numbers >= 1 that add up to batch_size {config.batch_size}, got {rows!r}"
        )
    if not config.drop_last:
        raise ValueError("train: expected drop_last with data.options.rows (whole shares of every source), got false")
    if config.unlabelled is not None:
        raise ValueError("train: expected unlabelled images among data.options.sources with data.options.rows, got unlabelled")
    # Identities that are left out leave gaps; what stays of a source is one stretch all the same.
    lengths = np.diff(np.searchsorted(images.splits[0].indices, mixed.starts)).tolist()
    streams = sources.StreamBatches(lengths, rows, config.seed, buffer=config.data.shuffle_buffer)
    return StreamEpochs(streams, config.gradient_acc)


def step_batches(images: TrainingImages, config: TrainConfig) -> sources.ResumableBatches | StreamEpochs:
    """The order of images: one pool, the streams of a mixture with `rows`, or with `unlabelled_share` so many labelled and
    unlabelled rows in every micro-batch.

    Raises ValueError for fewer images than a step takes, and where unlabelled rows are wanted and there are none.
    """
    unlabelled = np.flatnonzero(images.labels < 0)
    if (config.unlabelled_share or config.unknown_weight) and not len(unlabelled):
        raise ValueError(
            "train: expected images of unknown people for unknown identity rejection (unlabelled: {kind: ..., path: ...}, or "
            f"labels of -1 in data), got none with method {config.method!r}, unknown_weight {config.unknown_weight}"
        )
    per_step = config.batch_size * config.gradient_acc
    buffer = config.data.shuffle_buffer
    if config.data.kind == MIXED and config.data.options.get("rows") is not None:
        return _streams(images, config)
    if not config.unlabelled_share:
        if len(images) < per_step:
            raise ValueError(
                f"train: expected batch_size * gradient_acc <= the {len(images)} training images, got {per_step}"
            )
        return sources.ResumableBatches(len(images), per_step, seed=config.seed, drop_last=config.drop_last, buffer=buffer)
    if not config.drop_last:
        raise ValueError(f"train: expected drop_last with unlabelled_share = {config.unlabelled_share} (whole shares of both kinds), got false")
    labelled = np.flatnonzero(images.labels >= 0)
    others = round(config.unlabelled_share * config.batch_size)
    rows = config.batch_size - others
    if min(others, rows) < 1 or len(labelled) < rows * config.gradient_acc:
        raise ValueError(
            f"train: expected unlabelled_share * batch_size to leave rows of both kinds and at most {len(labelled)} labelled ones a "
            f"step, got {rows} labelled and {others} unlabelled, {config.gradient_acc} times a step"
        )
    return MixedBatches(labelled, unlabelled, rows, others, config.gradient_acc, config.seed, buffer)


def step_loader(images: TrainingImages, config: TrainConfig, pin_memory: bool, world: World | None = None) -> tuple[StepBatches, DataLoader[Any]]:
    """(position, loader): each batch holds this rank's rows of one optimizer step; iterate with `position.track(loader)`.

    The global random state is left alone.
    """
    position = StepBatches(
        step_batches(images, config), config.batch_size, config.gradient_acc, world or World(), config.num_workers, images.size, pin_memory
    )
    loader: DataLoader[Any] = DataLoader(
        StepImages(images, position.pool),
        batch_sampler=position,
        num_workers=config.num_workers,
        prefetch_factor=PREFETCH if config.num_workers else None,
        collate_fn=as_it_is,
        pin_memory=pin_memory and not config.num_workers,
        persistent_workers=config.num_workers > 0,
        worker_init_fn=_leave_signals_to_the_parent,
        generator=torch.Generator(),
    )
    return position, loader


def _leave_signals_to_the_parent(_: int) -> None:
    # A scheduler signals the whole process group; the parent decides when to stop and then ends its workers. At its own exit
    # it terminates those still there and waits for them without end: SIGTERM from the parent, and from nobody else, counts.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_with_the_parent, daemon=True).start()


def _end_with_the_parent() -> None:
    parent = multiprocessing.parent_process()  # not os.getppid(): a fork server's children have the server there
    while True:
        sender = signal.sigwaitinfo({signal.SIGTERM}).si_pid
        if parent is not None and sender == parent.pid:
            os._exit(0)
