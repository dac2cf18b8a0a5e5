"""Datasets around datasets: survive corrupt images, resize, keep some classes."""

from __future__ import annotations

import json
import os
import tempfile
import weakref
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from recog_fast._arguments import are_whole, is_whole

from .images import CorruptImage, Image, LabelledImages, checked_index, read_many, resize_image
from .names import Names, chosen_names

T = TypeVar("T")


class Wrapper(Dataset[tuple[Any, int]]):
    """Same length, labels and names as the dataset inside."""

    def __init__(self, dataset: LabelledImages) -> None:
        missing = [name for name in ("__len__", "__getitem__", "labels", "num_classes") if not hasattr(dataset, name)]
        if missing or isinstance(dataset, str):
            raise TypeError(f"{type(self).__name__}: expected dataset with {', '.join(missing) or 'images'}, got {type(dataset).__name__}")
        self.dataset = dataset

    @property
    def num_classes(self) -> int:
        return self.dataset.num_classes

    @property
    def paths(self) -> Sequence[str]:
        return self.dataset.paths

    @property
    def labels(self) -> NDArray[np.int64]:
        return self.dataset.labels

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.dataset[checked_index(index, len(self))]


class SkipCorrupt(Wrapper):
    """A corrupt image is replaced by the next readable one (its image (H, W, 3) and label), written down once and counted;
    too many raise.

    quarantine  a JSON-lines file {"source", "index", "error"}; None keeps it in a temporary file. All DataLoader
                workers append to it and count in it, and a resumed run counts on; delete it to start afresh
    budget      how many different corrupt images are endured; one more raises RuntimeError with both numbers
    The replacement depends on the index alone, so every worker, epoch and resumed run sees the same one.
    Raises ValueError for a budget below 0, TypeError for a dataset without images and labels or a quarantine that is no path.
    """

    def __init__(self, dataset: LabelledImages, quarantine: Path | str | None = None, budget: int = 100) -> None:
        super().__init__(dataset)
        if not is_whole(budget, 0):
            raise ValueError(f"SkipCorrupt: expected budget >= 0, an integer, got {budget!r}")
        if quarantine is not None and not isinstance(quarantine, str | os.PathLike):
            raise TypeError(f"SkipCorrupt: expected quarantine as a path or None, got {quarantine!r}")
        self.budget = budget
        self._noted: set[str] = set()  # written down by this process, within the budget
        if quarantine is None:
            handle, name = tempfile.mkstemp(prefix="quarantine", suffix=".jsonl")
            os.close(handle)
            self._forget = weakref.finalize(self, _remove, name, os.getpid())
            quarantine = name
        self.quarantine = Path(quarantine)
        self.quarantine.parent.mkdir(parents=True, exist_ok=True)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_forget"}

    def corrupt(self) -> list[dict[str, Any]]:
        """What was found corrupt so far, by any process: one {"source", "index", "error"} per image."""
        found: dict[str, dict[str, Any]] = {}
        if self.quarantine.is_file():
            for line in self.quarantine.read_text(encoding="utf-8").splitlines():
                try:
                    entry = json.loads(line)
                    found.setdefault(entry["source"], entry)
                except (ValueError, KeyError, TypeError):
                    continue  # the torn last line of a killed run
        return list(found.values())

    def _note(self, error: CorruptImage) -> None:
        if error.source in self._noted:
            return  # met again in a later epoch
        known = self.corrupt()
        if all(entry["source"] != error.source for entry in known):
            line = json.dumps({"source": error.source, "index": error.index, "error": error.reason}) + "\n"
            # One write of one line to a file opened for appending: workers' lines do not mix.
            handle = os.open(self.quarantine, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                os.write(handle, line.encode())
            finally:
                os.close(handle)
            known = self.corrupt()
        if len(known) > self.budget:
            raise RuntimeError(
                f"SkipCorrupt: expected at most {self.budget} corrupt images (budget), got {len(known)}, "
                f"the last {error.source}: {error.reason}; the list is in {self.quarantine}"
            ) from error
        self._noted.add(error.source)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self._readable(index, self.dataset.__getitem__)

    def read_many(self, indices: Sequence[int], rows: Sequence[Image], mirrored: Sequence[bool]) -> list[int]:
        """See `images.read_many`; a batch with a corrupt image is read again image by image."""
        try:
            return read_many(self.dataset, indices, rows, mirrored)
        except CorruptImage:
            return [self._read_one(*one) for one in zip(indices, rows, mirrored, strict=True)]

    def _read_one(self, index: int, row: Image, mirror: bool) -> int:
        return self._readable(index, lambda place: read_many(self.dataset, [place], [row], [mirror])[0])

    def _readable(self, index: int, read: Callable[[int], T]) -> T:
        """What `read` gives for the first place from `index` on where it can."""
        place = checked_index(index, len(self))
        for _ in range(len(self)):
            try:
                return read(place)
            except CorruptImage as error:
                self._note(error)
                place = (place + 1) % len(self)
        raise RuntimeError(
            f"SkipCorrupt: expected a readable image, got {len(self)} corrupt ones; the list is in {self.quarantine}"
        )


def _remove(name: str, process: int) -> None:
    """Remove the temporary quarantine, in the process that made it only."""
    if os.getpid() == process:
        Path(name).unlink(missing_ok=True)


class Resized(Wrapper):
    """Images brought to (size, size) or size = (height, width) by `resize_image`; items are (image (H, W, 3) uint8, label int).

    Raises ValueError for a size below 1, TypeError for a dataset without images and labels.
    """

    def __init__(self, dataset: LabelledImages, size: int | tuple[int, int]) -> None:
        super().__init__(dataset)
        self.size = checked_sides("Resized", size)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, label = super().__getitem__(index)
        return resize_image(image, self.size), label


def checked_sides(where: str, size: int | tuple[int, int]) -> tuple[int, int]:
    """(height, width) of a size; ValueError unless both are integers >= 1."""
    sides: tuple[int, int] = (size, size) if isinstance(size, int) else size
    if not are_whole(sides, 2, 1):
        raise ValueError(f"{where}: expected size >= 1 as one integer or (height, width), got {size!r}")
    return sides


class ClassSubset(Dataset[tuple[Any, int]]):
    """The images of some classes, relabelled; made by `class_subset`."""

    def __init__(self, dataset: LabelledImages, class_ids: NDArray[np.int64]) -> None:
        self.dataset = dataset
        self.class_ids = class_ids
        self.num_classes = len(class_ids)
        place = np.full(max(dataset.num_classes, int(class_ids.max()) + 1), -1, np.int64)
        place[class_ids] = np.arange(len(class_ids))
        labels = dataset.labels
        new = np.where(labels >= 0, place[labels], -1)
        self.indices: NDArray[np.int64] = np.flatnonzero(new >= 0)
        self.labels: NDArray[np.int64] = new[self.indices]
        self._new_label = {int(old): label for label, old in enumerate(class_ids)}

    @property
    def paths(self) -> Names:
        return chosen_names(self.dataset.paths, self.indices)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, label = self.dataset[int(self.indices[checked_index(index, len(self))])]
        if label not in self._new_label:
            # A SkipCorrupt inside replaced the image by one of a class outside the subset.
            raise ValueError(
                f"class_subset: expected an image of one of {self.num_classes} classes, got class {label}; "
                "wrap the subset in SkipCorrupt, not the dataset inside"
            )
        return image, self._new_label[label]


def class_subset(dataset: LabelledImages, classes: Iterable[int]) -> ClassSubset:
    """The images of `classes`, relabelled 0 .. n-1 in the order given; the original ids stay in `.class_ids` (n,)
    int64.

    Raises ValueError for no classes, repeated ones, or one outside [0, num_classes).
    """
    ids = np.array(list(classes), np.int64)
    if not len(ids) or len(np.unique(ids)) != len(ids) or ids.min() < 0 or ids.max() >= dataset.num_classes:
        raise ValueError(
            f"class_subset: expected distinct classes in [0, {dataset.num_classes}), got {ids.tolist()!r:.80}"
        )
    return ClassSubset(dataset, ids)
