"""MATLAB v5 files of names and numbers, read strictly: what scipy.io.loadmat gives for cell arrays of text and numeric
arrays, without believing a single size.

scipy makes an array of as many entries as a header claims before it looks for them: eight forged bytes ask for
gigabytes. Here every size is compared with the bytes that are there first; whatever is not text in cells or numbers is
refused. The format: MathWorks, "MAT-File Format", version 5.
"""

from __future__ import annotations

import math
import struct
import zlib
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

MAX_INFLATED = 1 << 28
_HDF5 = b"\x89HDF\r\n\x1a\n"  # behind a block of 512 bytes in MATLAB's files
_MATRIX, _COMPRESSED = 14, 15
_CELL, _CHAR, _NUMERIC = 1, 4, range(6, 16)
# miINT8 ... miUINT64
_NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_TEXT = {1: "latin-1", 2: "latin-1", 4: "utf-16", 16: "utf-8", 17: "utf-16", 18: "utf-32"}


class Matrix(NamedTuple):
    """A variable: numbers (dims) in `numbers`, or text cells in column-major order in `cells`, one text in `text`."""

    dims: tuple[int, ...]
    numbers: NDArray[Any] | None = None
    cells: list[str] | None = None
    text: str | None = None


class _Reader:
    """A cursor over elements [type, size, data, pad to 8]; never past `end`."""

    def __init__(self, data: bytes, start: int, end: int, order: str) -> None:
        self.data, self.at, self.end, self.order = data, start, end, order

    def element(self) -> tuple[int, int, int]:
        """(type, start, end) of the next element's data; the cursor moves behind its padding."""
        if self.at + 8 > self.end:
            raise ValueError(f"an element at byte {self.at} of {self.end}")
        kind, size = struct.unpack_from(self.order + "II", self.data, self.at)
        if kind >> 16:  # a small element: size and type in one word, data in the next
            start, size = self.at + 4, kind >> 16
            kind, following = kind & 0xFFFF, self.at + 8
            if size > 4:
                raise ValueError(f"a small element of {size} bytes")
        else:
            start = self.at + 8
            following = start + size + (0 if kind == _COMPRESSED else -size % 8)
        if start + size > self.end:
            raise ValueError(f"{size} bytes at byte {start} of {self.end}")
        self.at = min(following, self.end)
        return kind, start, start + size

    def numbers(self) -> NDArray[np.generic]:
        kind, start, end = self.element()
        if kind not in _NUMBERS or (end - start) % int(_NUMBERS[kind][1]):
            raise ValueError(f"{end - start} bytes of type {kind} for numbers")
        return np.frombuffer(
            self.data, np.dtype(self.order + _NUMBERS[kind]), (end - start) // int(_NUMBERS[kind][1]), start
        )

    def string(self) -> str:
        kind, start, end = self.element()
        if kind not in _TEXT:
            raise ValueError(f"type {kind} for text")
        codec = _TEXT[kind] + ("" if kind in (1, 2, 16) else "-le" if self.order == "<" else "-be")
        return self.data[start:end].decode(codec)

    def matrix(self, inside_cell: bool = False) -> tuple[str, Matrix]:
        """(name, value) of a miMATRIX whose data lies between the cursor and `end`."""
        flags = self.numbers()
        dims = tuple(int(side) for side in self.numbers().tolist()[:33])
        kind, start, end = self.element()
        name = self.data[start:end].decode("latin-1")
        if not len(flags) or kind not in (1, 2, 16) or not 2 <= len(dims) <= 32 or min(dims) < 0:
            raise ValueError(f"an array of dimensions {dims}")
        family, count = int(flags[0]) & 0xFF, math.prod(dims)
        if count > self.end - self.at + 8:
            raise ValueError(f"{count} entries in {self.end - self.at} bytes")
        if family == _CHAR:
            text = self.string() if count else ""
            if len(text) != count or max(dims) != count:
                raise ValueError(f"{len(text)} characters for dimensions {dims}")
            return name, Matrix(dims, text=text)
        if family in _NUMERIC and not int(flags[0]) & 0x800:
            values = self.numbers()
            if len(values) != count:
                raise ValueError(f"{len(values)} numbers for dimensions {dims}")
            whole = values.dtype.kind in "iu"
            return name, Matrix(dims, numbers=values.astype(np.int64 if whole else np.float64).reshape(dims, order="F"))
        if family == _CELL and not inside_cell:
            return name, Matrix(dims, cells=[self._cell() for _ in range(count)])
        raise ValueError(f"an array of class {family}; only numbers and cells of text are read")

    def _cell(self) -> str:
        kind, start, end = self.element()
        if kind != _MATRIX:
            raise ValueError(f"type {kind} for a cell")
        _, value = _Reader(self.data, start, end, self.order).matrix(inside_cell=True)
        if value.text is None:
            raise ValueError("a cell that is no text")
        return value.text


def read_matlab(data: bytes) -> dict[str, Matrix]:
    """The variables of a version 5 MAT-file that are numeric arrays or cell arrays of text, by name.

    Version 5 is what MATLAB's save writes as -v6 and -v7 (compressed) and scipy.io.savemat by default, of either byte order.
    Raises ValueError or zlib.error for anything else in it, for version 7.3 (HDF5) and 4, and for more than 2^28 bytes after
    decompression.
    """
    if data.startswith(_HDF5) or data[512:520] == _HDF5 or (b"MATLAB" in data[:16] and data[124:126] in (b"\0\2", b"\2\0")):
        raise ValueError("a version 7.3 MAT-file (HDF5); load it in MATLAB and save it with -v7")
    if len(data) < 128 or data[126:128] not in (b"IM", b"MI") or b"MATLAB" not in data[:16]:
        raise ValueError("no version 5 MAT-file")
    order = "<" if data[126:128] == b"IM" else ">"
    found: dict[str, Matrix] = {}
    whole = _Reader(data, 128, len(data), order)
    while whole.at < whole.end:
        kind, start, end = whole.element()
        inner = whole
        if kind == _COMPRESSED:
            plain = zlib.decompressobj().decompress(data[start:end], MAX_INFLATED)
            inner = _Reader(plain, 0, len(plain), order)
            kind, start, end = inner.element()
        if kind != _MATRIX:
            raise ValueError(f"type {kind} for a variable")
        name, value = _Reader(inner.data, start, end, order).matrix()
        found[name] = value
    return found
