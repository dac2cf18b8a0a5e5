"""What is in a source, and what is wrong with it, before a day of training finds out."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recog_fast.counting import Progress

from .images import CorruptImage, EncodedDataset, decode_image, image_format

_SHOWN = 8


@dataclass
class DataReport:
    """What `check_dataset` found; `text()` is what a person reads, `summary()` goes to JSON.

    images, unlabelled      how many, and how many of them have label -1
    classes, num_classes    labels that occur; what a head would be built for (largest label + 1)
    gaps                    number of labels below num_classes that never occur, `first_gaps` the first few
    off_by_one              labels count from 1: class 0 is empty and nothing else is
    per_class               (classes,) images of each class that occurs
    checked                 images read (all, or a sample); unreadable: (source, reason) of those that do not decode
    repeated, conflicting   groups of images with the same pixels, within one class and across classes: names, (labels)
    sizes, formats          (height, width) and file format of the images that decode, by frequency
    grey                    how many have equal channels; mean, std: per channel RGB, on [0, 1]
    """

    images: int
    unlabelled: int
    classes: int
    num_classes: int
    gaps: int
    first_gaps: list[int]
    off_by_one: bool
    per_class: NDArray[np.int64]
    checked: int = 0
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    repeated: list[list[str]] = field(default_factory=list)
    conflicting: list[list[tuple[str, int]]] = field(default_factory=list)
    sizes: list[tuple[tuple[int, int], int]] = field(default_factory=list)
    formats: list[tuple[str, int]] = field(default_factory=list)
    grey: int = 0
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    @property
    def problems(self) -> list[str]:
        """What a person should look at, one line each; empty when all is well."""
        found = []
        if self.off_by_one:
            found.append("labels begin at 1: class 0 is empty (off by one)")
        elif self.gaps:
            found.append(f"{self.gaps} labels below {self.num_classes} never occur, the first {self.first_gaps}")
        if self.unreadable:
            found.append(
                f"{len(self.unreadable)} unreadable images, e.g. {self.unreadable[0][0]}: {self.unreadable[0][1]}"
            )
        if self.conflicting:
            found.append(f"{len(self.conflicting)} images occur under several labels, e.g. {self.conflicting[0][:2]}")
        if self.repeated:
            found.append(f"{len(self.repeated)} images occur several times in their class, e.g. {self.repeated[0][:2]}")
        if len(self.sizes) > 1:
            found.append(f"{len(self.sizes)} image sizes")
        if not self.classes:
            found.append("no labelled images")
        return found

    def summary(self) -> dict[str, Any]:
        """Everything as plain JSON values; lists of names are cut to the first few."""
        values = asdict(self)
        values["per_class"] = self._spread()
        for name in ("unreadable", "repeated", "conflicting", "sizes"):
            values[name] = {"count": len(values[name]), "first": values[name][:_SHOWN]}
        return {**values, "problems": self.problems}

    def _spread(self) -> dict[str, float]:
        if not len(self.per_class):
            return {}
        counts = self.per_class
        return {
            "min": int(counts.min()), "median": float(np.median(counts)), "mean": round(float(counts.mean()), 3),
            "max": int(counts.max()), "single": int((counts == 1).sum()),
        }  # fmt: skip

    def text(self) -> str:
        """A few lines for a terminal."""
        spread = self._spread()
        lines = [
            f"{self.images} images, {self.classes} classes (num_classes {self.num_classes}), {self.unlabelled} unlabelled"
        ]
        if spread:
            lines.append(
                f"images per class: {spread['min']} to {spread['max']}, median {spread['median']:g}, mean {spread['mean']:.2f}; "
                f"{spread['single']} classes of one image"
            )
        if self.checked:
            sizes = ", ".join(f"{w}x{h} ({n})" for (h, w), n in self.sizes[:4]) + (
                ", ..." if len(self.sizes) > 4 else ""
            )
            formats = ", ".join(f"{name} {n}" for name, n in self.formats)
            lines.append(f"{self.checked} read: " + (f"{formats}; {sizes}; {self.grey} grey" if sizes else "no image in them"))
            if self.mean:
                lines.append(f"mean {_numbers(self.mean)}, std {_numbers(self.std)} (RGB, of 1)")
        return "\n".join(
            [*lines, *(f"! {problem}" for problem in self.problems)] + ([] if self.problems else ["no problems found"])
        )


def _numbers(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:.3f}" for value in values)


def _label_report(labels: NDArray[np.int64]) -> DataReport:
    known = labels[labels >= 0]
    present, counts = np.unique(known, return_counts=True)
    size = int(present[-1]) + 1 if len(present) else 0
    # The first few gaps without an array of every label below a wild one.
    edges = np.concatenate([[-1], present])
    first: list[int] = []
    for place in np.flatnonzero(np.diff(edges) > 1)[:_SHOWN].tolist():
        first += range(int(edges[place]) + 1, min(int(edges[place + 1]), int(edges[place]) + 1 + _SHOWN))
    gaps = size - len(present)
    off = gaps == 1 and first == [0]
    return DataReport(
        len(labels), int((labels < 0).sum()), len(present), size, gaps, first[:_SHOWN], off, counts.astype(np.int64)
    )


class _Pixels:
    """Sums over the images that were read; 24 bytes an image."""

    def __init__(self, total: int) -> None:
        self.sizes: Counter[tuple[int, int]] = Counter()
        self.formats: Counter[str] = Counter()
        self.digests = np.empty((total, 2), np.uint64)
        self.places = np.empty(total, np.int64)
        self.read = 0
        self.sums = np.zeros((2, 3))
        self.count = self.grey = 0

    def add(self, index: int, data: bytes, image: NDArray[np.uint8]) -> None:
        self.sizes[image.shape[0], image.shape[1]] += 1
        self.formats[image_format(data)[0]] += 1
        digest = hashlib.blake2b(np.ascontiguousarray(image).data, digest_size=16, salt=b"%dx%d" % image.shape[:2])
        self.digests[self.read] = np.frombuffer(digest.digest(), np.uint64)
        self.places[self.read] = index
        self.read += 1
        flat = image.reshape(-1, 3)
        histograms = np.stack([np.bincount(flat[:, k], minlength=256) for k in range(3)]).astype(np.float64)
        values = np.arange(256) / 255.0
        self.sums += np.stack([histograms @ values, histograms @ values**2])
        self.count += len(flat)
        self.grey += bool(np.array_equal(flat[:, 0], flat[:, 1]) and np.array_equal(flat[:, 0], flat[:, 2]))

    def into(self, report: DataReport, dataset: EncodedDataset, labels: NDArray[np.int64]) -> None:
        report.sizes, report.formats, report.grey = self.sizes.most_common(), self.formats.most_common(), self.grey
        for group in self._same():
            known = labels[group]
            if len(np.unique(known)) > 1:
                named = [(dataset.source(int(i)), int(label)) for i, label in zip(group, known, strict=True)]
                report.conflicting.append(named)
            else:
                report.repeated.append([dataset.source(int(i)) for i in group])
        if self.count:
            mean = self.sums[0] / self.count
            report.mean = tuple(mean.tolist())
            report.std = tuple(np.sqrt(np.maximum(0, self.sums[1] / self.count - mean**2)).tolist())

    def _same(self) -> list[NDArray[np.int64]]:
        """Groups of places with one digest, in the order of their first image."""
        digests, places = self.digests[: self.read], self.places[: self.read]
        order = np.lexsort((places, digests[:, 1], digests[:, 0]))
        digests, places = digests[order], places[order]
        changes = np.flatnonzero((digests[1:] != digests[:-1]).any(axis=1)) + 1
        edges = np.concatenate([[0], changes, [len(places)]])
        several = np.flatnonzero(np.diff(edges) > 1)
        groups = [places[edges[k] : edges[k + 1]] for k in several]
        return sorted(groups, key=lambda group: int(group[0]))


def check_dataset(
    dataset: EncodedDataset, sample: int | None = None, progress: Progress | None = None
) -> DataReport:
    """Read a source and report counts, label faults, unreadable and repeated images, sizes, colours.

    sample: images that are read, evenly spread over the source (0: labels only; None: all). progress(done, total) is
    called after every image. Images are the same where their decoded pixels are. Raises ValueError where the source itself
    cannot be read, or for a negative sample.
    """
    if sample is not None and sample < 0:
        raise ValueError(f"check_dataset: expected sample >= 0 or None, got {sample}")
    labels: NDArray[np.int64] = np.asarray(dataset.labels, np.int64)  # type: ignore[attr-defined]
    report = _label_report(labels)
    total = len(dataset) if sample is None else min(sample, len(dataset))
    places = np.arange(len(dataset)) if total == len(dataset) else np.linspace(0, len(dataset) - 1, total).astype(int)
    pixels = _Pixels(total)
    for done, index in enumerate(places.tolist(), 1):
        try:
            data, _ = dataset.encoded(index)
            pixels.add(index, data, decode_image(data, dataset.source(index), index))
        except CorruptImage as error:
            report.unreadable.append((error.source, error.reason))
        if progress is not None:
            progress(done, total)
    report.checked = total
    pixels.into(report, dataset, labels)
    return report


def plot_class_sizes(report: DataReport, path: str | os.PathLike[str]) -> None:
    """Histogram of images per class, both axes logarithmic, as the file's suffix says (.svg, .png, .pdf).

    Raises ImportError without matplotlib, ValueError for a suffix it does not write.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.add_subplot()
    largest = int(report.per_class.max()) if len(report.per_class) else 1
    edges = np.unique(np.round(np.geomspace(1, largest + 1, 40)).astype(int)) - 0.5
    axes.hist(report.per_class, bins=edges.tolist(), color="#1f5fbf")
    axes.set_xscale("log")
    axes.set_yscale("log" if len(report.per_class) else "linear")
    axes.set_xlabel("images of a class")
    axes.set_ylabel("classes")
    axes.set_title(f"{report.images} images, {report.classes} classes, {report.unlabelled} unlabelled", fontsize=10)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path)
