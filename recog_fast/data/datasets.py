"""Labelled images from folders, lists, zip files and WebDataset tars. Classes are detected and sorted, never typed
in."""

from __future__ import annotations

import csv
import json
import mmap
import os
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .images import MAX_ENCODED_BYTES, CorruptImage, EncodedDataset

PathLike = str | os.PathLike[str]
MAX_LABEL = 1 << 31
_MAX_LABEL_BYTES = 1 << 20
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".pgm", ".ppm", ".bmp", ".webp", ".tif", ".tiff", ".gif")


class NamedDataset(EncodedDataset):
    """A dataset whose images have path names and whose labels are known from the start. `.class_names[label]` names
    each class."""

    def __init__(self, paths: list[str], classes: Sequence[str | int], decode: bool) -> None:
        """`classes`: for each path its class name (numbered in sorted order) or, if all are ints, its label itself."""
        self.paths = paths
        self.decode = decode
        self._names: list[str] | None = None
        if all(isinstance(name, int) for name in classes):
            self.labels: NDArray[np.int64] = np.array(classes, np.int64)
            self.num_classes = int(self.labels.max()) + 1
        else:
            self._names = sorted({str(name) for name in classes})
            number = {name: label for label, name in enumerate(self._names)}
            self.labels = np.array([number[str(name)] for name in classes], np.int64)
            self.num_classes = len(self._names)

    @property
    def class_names(self) -> list[str]:
        """The name of each class; numbers name themselves."""
        # Made when asked for: one wild label in a list must not cost a name for every number below it.
        return [str(label) for label in range(self.num_classes)] if self._names is None else self._names

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
        if os.path.getsize(self.paths[index]) > MAX_ENCODED_BYTES:
            raise ValueError(f"more than {MAX_ENCODED_BYTES} bytes")
        return Path(self.paths[index]).read_bytes()


def _is_image(name: str) -> bool:
    base = name.rsplit("/", 1)[-1]
    return base.lower().endswith(IMAGE_SUFFIXES) and not base.startswith(".") and not name.startswith("__MACOSX/")


def _folder(name: str) -> str:
    """The class key: the whole path of the innermost folder, so that A/character01 and B/character01 are two
    classes."""
    return name.rpartition("/")[0] or "."


class FolderDataset(NamedDataset):
    """Images below `root`; the folder an image lies in is its class, named by its path relative to `root`; sorted by
    class, then name.

    Raises ValueError where `root` is no folder or holds no image.
    """

    def __init__(self, root: PathLike, decode: bool = True) -> None:
        self.root = os.fspath(root)
        if not os.path.isdir(self.root):
            raise ValueError(f"FolderDataset: expected root to be a folder, got {self.root}")
        names = []
        for folder, _, files in os.walk(self.root, followlinks=True):
            relative = os.path.relpath(folder, self.root).replace(os.sep, "/")
            names += [file if relative == "." else f"{relative}/{file}" for file in files]
        names = sorted(filter(_is_image, names), key=lambda name: (_folder(name), name))
        if not names:
            raise ValueError(
                f"FolderDataset: expected images ({', '.join(IMAGE_SUFFIXES)}) below {self.root}, got none"
            )
        super().__init__([os.path.join(self.root, name) for name in names], [_folder(name) for name in names], decode)


def _text(value: object) -> str:
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
                    yield number, _text(entry["path"]), _text(entry["label"])
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise ValueError(
                    f'ListDataset: expected {{"path": ..., "label": ...}} in line {number} of {path}, '
                    f"got {line.strip()!r:.80}"
                ) from error


class ListDataset(NamedDataset):
    """Images named by a .csv (path,label; header optional) or .jsonl ({"path", "label"} per line) list, in the list's
    order.

    Relative paths start at `root`, by default the list's folder. Labels that are all whole numbers >= -1 (-1:
    unlabelled) are taken as they are; otherwise they are names, numbered in sorted order. Raises ValueError for a
    missing or empty list, a malformed line or a missing image, naming the line.
    """

    def __init__(self, path: PathLike, root: PathLike | None = None, decode: bool = True) -> None:
        source = Path(path)
        if not source.is_file() or source.suffix not in (".csv", ".jsonl"):
            raise ValueError(f"ListDataset: expected path to be a .csv or .jsonl file, got {source}")
        base = Path(root) if root is not None else source.parent
        paths: list[str] = []
        labels: list[str] = []
        try:
            for number, name, label in _list_rows(source):
                image = os.path.join(base, name)
                if not os.path.isfile(image):
                    raise ValueError(
                        f"ListDataset: expected an image in line {number} of {source}, got {image}, which is no file"
                    )
                paths.append(image)
                labels.append(label.strip())
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"ListDataset: expected UTF-8 text in {source}, got {error}") from error
        if not paths:
            raise ValueError(f"ListDataset: expected images in {source}, got an empty list")
        numbers = _whole_numbers(labels)
        if numbers and max(numbers) >= MAX_LABEL:
            raise ValueError(f"ListDataset: expected labels below 2^31 in {source}, got {max(numbers)}")
        super().__init__(paths, numbers or labels, decode)


def _whole_numbers(labels: Sequence[str]) -> list[int]:
    """The labels as numbers if all are whole numbers >= -1, else none."""
    if not all(label == "-1" or (label.isascii() and label.isdigit() and len(label) < 19) for label in labels):
        return []
    return [int(label) for label in labels]


class ZipDataset(NamedDataset):
    """Images in a zip file, read in place; the folder an image lies in is its class, named by its whole path below
    `prefix`.

    Raises ValueError where `path` is no zip file or holds no image below `prefix`. Each process opens the file for
    itself.
    """

    def __init__(self, path: PathLike, prefix: str | None = None, decode: bool = True) -> None:
        self.path = os.fspath(path)
        self._zip: zipfile.ZipFile | None = None
        self._pid = -1
        start = "" if not prefix else prefix.rstrip("/") + "/"
        try:
            names = [name for name in self._open().namelist() if name.startswith(start) and _is_image(name)]
        except (OSError, zipfile.BadZipFile, NotImplementedError, ValueError, MemoryError) as error:
            raise ValueError(f"ZipDataset: expected path to be a zip file, got {self.path}: {error}") from error
        if not names:
            raise ValueError(f"ZipDataset: expected images below {start or '/'} in {self.path}, got none")
        names.sort(key=lambda name: (_folder(name), name))
        super().__init__(names, [_folder(name[len(start) :]) for name in names], decode)

    def _open(self) -> zipfile.ZipFile:
        # A forked worker shares the parent's file position: it must open its own.
        if self._zip is None or self._pid != os.getpid():
            self._zip, self._pid = zipfile.ZipFile(self.path), os.getpid()
        return self._zip

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_zip": None}

    def source(self, index: int) -> str:
        return f"{self.path}:{self.paths[index]}"

    def _read(self, index: int) -> bytes:
        archive = self._open()
        info = archive.getinfo(self.paths[index])
        if info.file_size > MAX_ENCODED_BYTES or info.compress_size > os.path.getsize(self.path):
            raise ValueError(f"an entry of {info.file_size} bytes packed in {info.compress_size}")
        return archive.read(info)


class TarDataset(NamedDataset):
    """Images in uncompressed WebDataset tars (one path, several, or a folder of them), indexed once, then read at random.

    A sample is all members of one name up to the first dot of the base name: an image, and a label in `.cls` (text) or
    in the "label" of `.json`. Labels that are all whole numbers >= -1 (-1: unlabelled) are taken as they are, others are
    names, numbered in sorted order. Where no sample has a label the folder is the class. Raises ValueError for compressed or truncated
    tars and for samples without a label.
    """

    def __init__(self, path: PathLike | Sequence[PathLike], decode: bool = True) -> None:
        shards = [path] if isinstance(path, (str, os.PathLike)) else path
        if isinstance(path, (str, os.PathLike)) and os.path.isdir(path):
            shards = sorted(Path(path).glob("*.tar"))
        self.shards = [os.fspath(shard) for shard in shards]
        self._handles: dict[tuple[int, int], int] = {}
        names: list[str] = []
        classes: list[str | None] = []
        self._places: list[tuple[int, int, int]] = []
        for shard, file in enumerate(self.shards):
            for name, label, offset, size in _tar_samples(file):
                names.append(name)
                classes.append(label)
                self._places.append((shard, offset, size))
        if not names:
            raise ValueError(f"TarDataset: expected images in {self.shards or path}, got none")
        if all(label is None for label in classes):
            found: list[str] = [_folder(name) for name in names]
        elif None in classes:
            bare = classes.index(None)
            holder = self.shards[self._places[bare][0]]
            raise ValueError(f"TarDataset: expected a .cls or .json label for {names[bare]} in {holder}, got none")
        else:
            found = [str(label) for label in classes]
        numbers = _whole_numbers(found)
        super().__init__(names, numbers if numbers and max(numbers) < MAX_LABEL else found, decode)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handles": {}}

    def source(self, index: int) -> str:
        return f"{self.shards[self._places[index][0]]}:{self.paths[index]}"

    def _read(self, index: int) -> bytes:
        shard, offset, size = self._places[index]
        handle = self._handles.get((os.getpid(), shard))
        if handle is None:
            handle = self._handles[os.getpid(), shard] = os.open(self.shards[shard], os.O_RDONLY)
        data = os.pread(handle, size, offset)
        if len(data) != size:
            raise ValueError(f"{len(data)} of {size} bytes")
        return data

    def __del__(self) -> None:
        for (process, _), handle in getattr(self, "_handles", {}).items():
            if process == os.getpid():
                os.close(handle)


def _tar_members(path: str) -> Iterable[tuple[str, int, int]]:
    """(name, data offset, size) of every file of an uncompressed tar; sizes checked against the file."""
    # tarfile asks for as many bytes as a header says; a memory map never gives more than there are.
    with (
        open(path, "rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as whole,
        tarfile.open(fileobj=whole, mode="r:") as archive,
    ):
        total = len(whole)
        for member in archive:
            if member.isreg():
                if member.offset_data + member.size > total or member.size > MAX_ENCODED_BYTES:
                    raise tarfile.ReadError(
                        f"member {member.name} of {member.size} bytes at {member.offset_data}, file of {total}"
                    )
                yield member.name.removeprefix("./"), member.offset_data, member.size


def _tar_samples(path: str) -> Iterator[tuple[str, str | None, int, int]]:
    """(image name, label text or None, data offset, size) of every sample, in the tar's order."""
    if not os.path.isfile(path):
        raise ValueError(f"TarDataset: expected path to be a .tar file, got {path}, which is no file")
    images: dict[str, tuple[str, int, int]] = {}
    labels: dict[str, str] = {}
    try:
        with open(path, "rb") as file:
            for name, offset, size in _tar_members(path):
                folder, _, base = name.rpartition("/")
                stem, _, extension = base.partition(".")
                key = f"{folder}/{stem}"
                if _is_image(name):
                    images[key] = (name, offset, size)
                elif extension in ("cls", "json") and size <= _MAX_LABEL_BYTES:
                    file.seek(offset)
                    text = file.read(size).decode("utf-8").strip()
                    label = text if extension == "cls" else json.loads(text).get("label")
                    if label is not None and (extension == "cls" or key not in labels):
                        labels[key] = _text(label)
    except (tarfile.TarError, OSError, ValueError, TypeError, AttributeError, EOFError, RecursionError) as error:
        raise ValueError(f"TarDataset: expected an uncompressed, whole tar, got {path}: {error}") from error
    for key, (name, offset, size) in images.items():
        yield name, labels.get(key), offset, size
