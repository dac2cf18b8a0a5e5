"""Labelled images from folders and lists. Classes are detected and sorted, never typed in."""

from __future__ import annotations

import csv
import json
import os
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .images import MAX_ENCODED_BYTES, CorruptImage, EncodedDataset
from .names import Names, Numbering, PackedNames

PathLike = str | os.PathLike[str]
Int64 = NDArray[np.int64]
MAX_LABEL = 1 << 31
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".pgm", ".ppm", ".bmp", ".webp", ".tif", ".tiff", ".gif")


class NamedDataset(EncodedDataset):
    """A dataset whose images have path names and whose labels are known from the start. `.class_names[label]` names
    each class.

    Nothing is kept per image but arrays: `.paths` makes a name when it is asked for one (`names.Names`).
    """

    def __init__(self, paths: Names, labels: Int64, class_names: Sequence[str] | None, decode: bool) -> None:
        """labels (n,) in [0, classes), with class_names=None whole numbers >= -1 that name themselves."""
        self.paths = paths
        self.decode = decode
        self.labels = labels
        self._names = None if class_names is None else PackedNames(class_names)
        self.num_classes = int(labels.max()) + 1 if class_names is None else len(class_names)

    @property
    def class_names(self) -> list[str]:
        """The name of each class; numbers name themselves."""
        # Made when asked for: one wild label in a list must not cost a name for every number below it.
        return [str(label) for label in range(self.num_classes)] if self._names is None else list(self._names)

    def source(self, index: int) -> str:
        return self.paths[index]

    def __len__(self) -> int:
        return len(self.paths)

    def encoded(self, index: int) -> tuple[bytes, int]:
        try:
            data = self._read(index)
        except (OSError, zipfile.BadZipFile, zlib.error, RuntimeError, EOFError, ValueError) as error:
            raise CorruptImage(self.source(index), index, f"{type(error).__name__}: {error}") from error
        return data, int(self.labels[index])

    def _read(self, index: int) -> bytes:
        """The file itself, for sources whose paths are files."""
        path = Path(self.paths[index])
        if path.stat().st_size > MAX_ENCODED_BYTES:
            raise ValueError(f"more than {MAX_ENCODED_BYTES} bytes")
        return path.read_bytes()


def is_image(name: str) -> bool:
    base = name.rsplit("/", 1)[-1]
    return base.lower().endswith(IMAGE_SUFFIXES) and not base.startswith(".") and not name.startswith("__MACOSX/")


def folder_of(name: str) -> str:
    """The class key: the whole path of the innermost folder, so that A/character01 and B/character01 are two
    classes."""
    return name.rpartition("/")[0] or "."


class FolderDataset(NamedDataset):
    """Images below `root`; the folder an image lies in is its class, named by its path relative to `root`; sorted by
    class, then name. Items are (image (H, W, 3) uint8 RGB, label int), with decode=False (the file's bytes, label).

    Raises ValueError where `root` is no folder or holds no image.
    """

    def __init__(self, root: PathLike, decode: bool = True) -> None:
        self.root = os.fspath(root)
        if not os.path.isdir(self.root):
            raise ValueError(f"FolderDataset: expected root to be a folder, got {self.root}")
        # One text for all files of a folder: a name is a Python object no longer than its folder is looked at.
        found: dict[str, str] = {}
        counts: dict[str, int] = {}
        for folder, _, files in os.walk(self.root, followlinks=True):
            relative = os.path.relpath(folder, self.root).replace(os.sep, "/")
            names = sorted(filter(is_image, files if relative == "." else (f"{relative}/{file}" for file in files)))
            if names:
                found[relative], counts[relative] = "\0".join(names), len(names)
        if not found:
            raise ValueError(
                f"FolderDataset: expected images ({', '.join(IMAGE_SUFFIXES)}) below {self.root}, got none"
            )
        classes = sorted(found)
        paths = PackedNames((name for folder in classes for name in found[folder].split("\0")), self.root)
        labels = np.repeat(np.arange(len(classes)), [counts[folder] for folder in classes])
        super().__init__(paths, labels, classes, decode)


def text_of(value: object) -> str:
    """A path or label of a JSON file: text or a whole number."""
    if not isinstance(value, (str, int)):
        raise TypeError(f"expected text or a whole number, got {type(value).__name__}")
    return str(value)


def _list_rows(path: Path) -> Iterator[tuple[int, str, str]]:
    """(line number, path, label) of a .csv (columns path, label; header optional) or .jsonl ({"path": ..., "label":
    ...}) file."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        if path.suffix == ".csv":
            columns = {"path": 0, "label": 1}
            for number, row in enumerate(csv.reader(file), 1):
                if number == 1 and {"path", "label"} <= set(row):
                    columns = {name: place for place, name in enumerate(row)}
                elif row:
                    if len(row) <= max(columns["path"], columns["label"]):
                        raise ValueError(
                            f"ListDataset: expected path and label in line {number} of {path}, got {row!r:.80}"
                        )
                    yield number, row[columns["path"]], row[columns["label"]]
            return
        for number, line in enumerate(file, 1):
            try:
                entry = json.loads(line) if line.strip() else None
                if entry is not None:
                    yield number, text_of(entry["path"]), text_of(entry["label"])
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise ValueError(
                    f'ListDataset: expected {{"path": ..., "label": ...}} in line {number} of {path}, '
                    f"got {line.strip()!r:.80}"
                ) from error


class ListDataset(NamedDataset):
    """Images named by a .csv (path,label; header optional) or .jsonl ({"path", "label"} per line) list, in the list's
    order. Items are (image (H, W, 3) uint8 RGB, label int), with decode=False (the file's bytes, label).

    Relative paths start at `root`, by default the list's folder. Labels that are all whole numbers >= -1 (-1:
    unlabelled) are taken as they are; otherwise they are names, numbered in sorted order. Raises ValueError for a
    missing or empty list, a malformed line or a missing image, naming the line.
    """

    def __init__(self, path: PathLike, root: PathLike | None = None, decode: bool = True) -> None:
        source = Path(path)
        if not source.is_file() or source.suffix not in (".csv", ".jsonl"):
            raise ValueError(f"ListDataset: expected path to be a .csv or .jsonl file, got {source}")
        self.root = os.fspath(source.parent if root is None else Path(root))
        labels = Numbering()

        def images() -> Iterator[str]:
            for number, name, label in _list_rows(source):
                image = os.path.join(self.root, name)
                if not os.path.isfile(image):
                    raise ValueError(
                        f"ListDataset: expected an image in line {number} of {source}, got {image}, which is no file"
                    )
                labels.add(label.strip())
                yield name

        try:
            paths = PackedNames(images(), self.root)
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"ListDataset: expected UTF-8 text in {source}, got {error}") from error
        if not len(paths):
            raise ValueError(f"ListDataset: expected images in {source}, got an empty list")
        places, names = labels.result()
        numbers = whole_numbers(names)
        if numbers and max(numbers) >= MAX_LABEL:
            raise ValueError(f"ListDataset: expected labels below 2^31 in {source}, got {max(numbers)}")
        super().__init__(paths, *numbered(places, names, numbers), decode)


def numbered(places: Int64, names: list[str], numbers: list[int]) -> tuple[Int64, list[str] | None]:
    """Labels (n,) and class names of images of classes names[places]: `numbers` (or none) are what the names say."""
    return (np.array(numbers, np.int64)[places], None) if numbers else (places, names)


def whole_numbers(labels: Sequence[str]) -> list[int]:
    """The labels as numbers if all are whole numbers >= -1, else none."""
    if not all(label == "-1" or (label.isascii() and label.isdigit() and len(label) < 19) for label in labels):
        return []
    return [int(label) for label in labels]
