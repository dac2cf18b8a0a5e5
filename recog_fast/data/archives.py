"""Labelled images from zip files and WebDataset tars, read in place. Only numbers are kept of each image."""

from __future__ import annotations

import io
import json
import mmap
import os
import struct
import tarfile
import threading
import zipfile
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .datasets import MAX_LABEL, Int64, NamedDataset, PathLike, folder_of, is_image, numbered, text_of, whole_numbers
from .images import MAX_ENCODED_BYTES
from .names import Numbering, PackedNames

_MAX_LABEL_BYTES = 1 << 20
_AT_ONCE = 64  # files of a source that stay open
_REFUSED_FLAGS = 1 | 1 << 5 | 1 << 6  # encrypted, patched, strongly encrypted
_BLOCK = tarfile.BLOCKSIZE
_LOCAL = struct.Struct("<4s22xHH")  # a zip's local header: magic, bytes of the name and of the extra field behind it


class _Files:
    """Files read at random, opened on first use in each process: a forked worker must not share the parent's. The last
    `_AT_ONCE` of them stay open, so that any number of shards fits a process's limit."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = list(paths)
        self._open: dict[int, int] = {}  # the latest used last
        self._process, self._lock = os.getpid(), threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"paths": self.paths}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["paths"])  # type: ignore[misc]

    def read(self, file: int, offset: int, size: int) -> bytes:
        """Bytes [offset, offset + size) of a file; ValueError where it ends before."""
        if self._process != os.getpid():  # forked: the parent's are the parent's to close, its lock may be held
            self._open, self._process, self._lock = {}, os.getpid(), threading.Lock()
        with self._lock:
            handle = self._open.pop(file, None)
            if handle is None:
                if len(self._open) >= _AT_ONCE:
                    os.close(self._open.pop(next(iter(self._open))))
                handle = os.open(self.paths[file], os.O_RDONLY)
            self._open[file] = handle
            data = os.pread(handle, size, offset)
        if len(data) != size:
            raise ValueError(f"{len(data)} of {size} bytes")
        return data

    def __del__(self) -> None:
        if getattr(self, "_process", None) == os.getpid():
            for handle in self._open.values():
                os.close(handle)


class ZipDataset(NamedDataset):
    """Images in a zip file, read in place; the folder an image lies in is its class, named by its whole path below
    `prefix`. Items are (image (H, W, 3) uint8 RGB, label int), with decode=False (the file's bytes, label).

    Raises ValueError where `path` is no zip file or holds no image below `prefix`. Each process opens the file for
    itself; of its directory, 48 bytes and the name are kept of each image.
    """

    def __init__(self, path: PathLike, prefix: str | None = None, decode: bool = True) -> None:
        self.path = os.fspath(path)
        self._files = _Files([self.path])
        start = "" if not prefix else prefix.rstrip("/") + "/"
        try:
            with zipfile.ZipFile(self.path) as archive:
                found = [one for one in archive.infolist() if one.filename.startswith(start) and is_image(one.filename)]
            found.sort(key=lambda one: (folder_of(one.filename), one.filename))
            numbers = [(z.header_offset, z.compress_size, z.file_size, z.CRC, z.compress_type, z.flag_bits) for z in found]
            self._entries: Int64 = np.array(numbers, np.int64).reshape(-1, 6)
        except (OSError, zipfile.BadZipFile, NotImplementedError, ValueError, MemoryError, OverflowError) as error:
            raise ValueError(f"ZipDataset: expected path to be a zip file, got {self.path}: {error}") from error
        if not found:
            raise ValueError(f"ZipDataset: expected images below {start or '/'} in {self.path}, got none")
        self._size = os.path.getsize(self.path)
        classes = Numbering()
        for one in found:
            classes.add(folder_of(one.filename[len(start) :]))
        super().__init__(PackedNames(one.filename for one in found), *classes.result(), decode)

    def source(self, index: int) -> str:
        return f"{self.path}:{self.paths[index]}"

    def _read(self, index: int) -> bytes:
        offset, packed, size, crc, method, flags = self._entries[index].tolist()
        if size > MAX_ENCODED_BYTES or packed > self._size:
            raise ValueError(f"an entry of {size} bytes packed in {packed}")
        magic, name, extra = _LOCAL.unpack(self._files.read(0, offset, _LOCAL.size))
        if magic != b"PK\3\4" or flags & _REFUSED_FLAGS:
            refused = "a patched entry" if flags & 1 << 5 else "an encrypted entry"
            raise ValueError(refused if flags & _REFUSED_FLAGS else f"no entry at byte {offset}")
        entry = zipfile.ZipInfo(self.paths[index])
        entry.compress_size, entry.file_size, entry.CRC, entry.compress_type = packed, size, crc, method
        data = io.BytesIO(self._files.read(0, offset + _LOCAL.size + name + extra, packed))
        with zipfile.ZipExtFile(data, "r", entry) as file:
            return file.read()


class TarDataset(NamedDataset):
    """Images in uncompressed WebDataset tars (one path, several, or a folder of them), indexed once, then read at random. Items are
    (image (H, W, 3) uint8 RGB, label int), with decode=False (the file's bytes, label).

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
        self._files = _Files(self.shards)
        labels, folders, places = Numbering(), Numbering(), array("q")
        bare: list[str] = []  # the first without a label

        def names() -> Iterator[str]:
            for shard, file in enumerate(self.shards):
                for name, label, offset, size in _tar_samples(file):
                    places.extend((shard, offset, size))
                    folders.add(folder_of(name))
                    if label is not None:
                        labels.add(label)
                    elif not bare:
                        bare.append(f"{name} in {file}")
                    yield name

        paths = PackedNames(names())
        if not len(paths):
            raise ValueError(f"TarDataset: expected images in {self.shards or path}, got none")
        found, classes = labels.result()
        if bare and len(found):
            raise ValueError(f"TarDataset: expected a .cls or .json label for {bare[0]}, got none")
        if bare:
            found, classes = folders.result()
        self._places: Int64 = np.array(places, np.int64).reshape(-1, 3)
        numbers = whole_numbers(classes)
        super().__init__(paths, *numbered(found, classes, numbers if max(numbers, default=0) < MAX_LABEL else []), decode)

    def source(self, index: int) -> str:
        return f"{self.shards[int(self._places[index, 0])]}:{self.paths[index]}"

    def _read(self, index: int) -> bytes:
        shard, offset, size = self._places[index].tolist()
        return self._files.read(shard, offset, size)


def _tar_members(path: str) -> Iterator[tuple[str, int, int]]:
    """(name, data offset, size) of every file of an uncompressed tar; sizes checked against the file."""
    # tarfile asks for as many bytes as a header says; a memory map never gives more than there are.
    with (
        open(path, "rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as whole,
        tarfile.open(fileobj=whole, mode="r:") as archive,
    ):
        total = len(whole)
        while (member := archive.next()) is not None:
            if member.issparse():
                raise tarfile.ReadError(f"member {member.name} with holes (GNU sparse)")
            archive.members.clear()  # type: ignore[attr-defined]  # it would keep a kilobyte of each
            if member.isreg():
                if member.offset_data + member.size > total or member.size > MAX_ENCODED_BYTES:
                    raise tarfile.ReadError(
                        f"member {member.name} of {member.size} bytes at {member.offset_data}, file of {total}"
                    )
                yield member.name.removeprefix("./"), member.offset_data, member.size
        # tarfile takes a cut or damaged header for the end; the end is a block of zeros.
        end = whole[archive.offset : archive.offset + _BLOCK]
        if len(end) < _BLOCK or any(end):
            raise tarfile.ReadError(f"no header and no end of the archive at byte {archive.offset} of {total}: cut or damaged")


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
                if is_image(name):
                    images[key] = (name, offset, size)
                elif extension in ("cls", "json") and size <= _MAX_LABEL_BYTES:
                    file.seek(offset)
                    text = file.read(size).decode("utf-8").strip()
                    label = text if extension == "cls" else json.loads(text).get("label")
                    if label is not None and (extension == "cls" or key not in labels):
                        labels[key] = text_of(label)
    except (tarfile.TarError, OSError, ValueError, TypeError, AttributeError, EOFError, RecursionError) as error:
        raise ValueError(f"TarDataset: expected an uncompressed, whole tar, got {path}: {error}") from error
    for key, (name, offset, size) in images.items():
        yield name, labels.get(key), offset, size
