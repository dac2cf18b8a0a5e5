"""Rows of a checkpoint's tensors read and written through the file system's cache: a head of any size, a block at a time."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import CheckpointError
from .metadata import read_metadata


class SavedRows:
    """Rows (C, ...) of one tensor of a checkpoint folder, whatever number of ranks wrote them; nothing is read before it is taken."""

    def __init__(self, folder: Path, key: str) -> None:
        metadata = read_metadata(folder)
        entry = metadata.state_dict_metadata[key]
        self.key, self.shape, self.dtype = key, tuple(entry.size), entry.properties.dtype
        self.width = self.dtype.itemsize * int(np.prod(self.shape[1:], dtype=np.int64))  # bytes of a row
        self._parts: list[tuple[int, Tensor]] = []  # first row, (rows, width) uint8
        for index, info in metadata.storage_data.items():
            if index.fqn == key:
                first = index.offset[0] if index.offset else 0
                self._parts.append((first, _mapped(folder / Path(info.relative_path).name, info.offset, info.length, self)))
        self._parts.sort(key=lambda part: part[0])
        if sum(part.shape[0] for _, part in self._parts) != self.shape[0]:
            raise CheckpointError(f"load_checkpoint: {folder} is damaged: expected {self.shape[0]} rows of {key!r}, got others")

    def take(self, ids: Tensor) -> Tensor:
        """Rows ids (B,) int64 in [0, C), as a tensor (B, ...) of its own."""
        out = torch.empty(ids.numel(), self.width, dtype=torch.uint8)
        for first, part in self._parts:
            here = (ids >= first) & (ids < first + part.shape[0])
            if bool(here.all()):
                torch.index_select(part, 0, ids - first, out=out)
            elif bool(here.any()):
                out[here] = part[ids[here] - first]
        return out.view(self.dtype).reshape(ids.numel(), *self.shape[1:])


def _mapped(file: Path, offset: int, length: int, rows: SavedRows) -> Tensor:
    """The storage that torch.save put into bytes offset .. offset + length - 1 of a file, as rows of bytes."""
    with file.open("rb") as opened:
        part: Any = _Part(opened, offset, length)
        tensor = torch.load(part, map_location="meta", weights_only=True)
        part.seek(0)
        with zipfile.ZipFile(part) as archive:
            stored = next(info for info in archive.infolist() if info.filename.endswith("/data/0"))
        part.seek(stored.header_offset)
        header = part.read(30)
    start = offset + stored.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    plain = tensor.is_contiguous() and stored.compress_type == zipfile.ZIP_STORED and tuple(tensor.shape[1:]) == rows.shape[1:]
    if not plain or tensor.dtype != rows.dtype or stored.file_size != tensor.shape[0] * rows.width:
        raise CheckpointError(f"load_checkpoint: expected rows of {rows.key!r} as they lie in memory in {file}, got another layout")
    if stored.file_size == 0:
        return torch.empty(0, rows.width, dtype=torch.uint8)
    mapped = np.memmap(file, dtype=np.uint8, mode="c", offset=start, shape=(tensor.shape[0], rows.width))
    return torch.from_numpy(mapped)


class _Part(io.RawIOBase):
    """Some bytes of an open file as a file."""

    def __init__(self, file: Any, offset: int, length: int) -> None:
        self._file, self._offset, self._length, self._at = file, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._offset + self._at)
        wanted = min(len(buffer), max(0, self._length - self._at))
        got = int(self._file.readinto(memoryview(buffer)[:wanted]))
        self._at += got
        return got


def new_rows(file: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor whose memory is a new file, to be filled a block at a time."""
    width = dtype.itemsize * int(np.prod(shape[1:], dtype=np.int64))
    if shape[0] * width == 0:
        return torch.empty(shape, dtype=dtype)
    mapped = np.memmap(file, dtype=np.uint8, mode="w+", shape=(shape[0] * width,))
    return torch.from_numpy(mapped).view(dtype).reshape(shape)
