"""Names of tens of millions of images: sequences of text that keep no Python object per name.

A list of str costs some 60 bytes a name beside its text, and forked data workers copy it: looking at an object writes its
reference count, so a worker gets a page of its own of every page of names it touches. Arrays are only read.
"""

from __future__ import annotations

import os
from abc import abstractmethod
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import overload

import numpy as np
from numpy.typing import NDArray

from recog_fast._arguments import is_whole

from .images import checked_index

Int64 = NDArray[np.int64]
_AT_ONCE = 4096


class Names(Sequence[str]):
    """Texts that are made when they are asked for: length, indexing, slices (again Names), iteration, `in`, and `==` as lists
    have them. They cannot be changed; `list(names)` is the list."""

    @abstractmethod
    def _name(self, index: int) -> str:
        """The text at 0 <= index < len."""

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> Names: ...

    def __getitem__(self, index: int | slice) -> str | Names:
        if isinstance(index, slice):
            return chosen_names(self, range(len(self))[index])
        return self._name(checked_index(index, len(self)))

    def __iter__(self) -> Iterator[str]:
        return map(self._name, range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, (list, tuple, Names)):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        shown = ", ".join(map(repr, self[:3]))
        return f"<{len(self)} names: {shown}{', ...' if len(self) > 3 else ''}>"


class PackedNames(Names):
    """Names kept as one block of UTF-8 and where each begins, (n + 1,) int64: 8 bytes more than the text. They are paths below
    `folder` unless absolute, as `os.path.join` has it."""

    def __init__(self, names: Iterable[str], folder: str = "") -> None:
        text, starts = bytearray(), array("q", [0])
        for name in names:
            # surrogatepass: file names that are no UTF-8, and JSON's halves of pairs, come back as they were.
            text += name.encode("utf-8", "surrogatepass")
            starts.append(len(text))
        self.folder = folder
        self._text: NDArray[np.uint8] = np.frombuffer(text, np.uint8)
        self._starts: Int64 = np.frombuffer(starts, np.int64)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def _name(self, index: int) -> str:
        start, end = self._starts[index : index + 2].tolist()
        return os.path.join(self.folder, self._text[start:end].tobytes().decode("utf-8", "surrogatepass"))

    def __iter__(self) -> Iterator[str]:
        for first in range(0, len(self), _AT_ONCE):
            starts = self._starts[first : first + _AT_ONCE + 1].tolist()
            text = self._text[starts[0] : starts[-1]].tobytes()
            for start, end in pairwise(starts):
                name = text[start - starts[0] : end - starts[0]].decode("utf-8", "surrogatepass")
                yield os.path.join(self.folder, name)


class MadeNames(Names):
    """`length` names, each of them name(index): what a source's `paths` gives, so that no list of its names is ever made.

    Raises ValueError for a length below 0, TypeError for a name that cannot be called.
    """

    def __init__(self, length: int, name: Callable[[int], str]) -> None:
        if not is_whole(length, 0):
            raise ValueError(f"MadeNames: expected length as an integer >= 0, got {length!r}")
        if not callable(name):
            raise TypeError(f"MadeNames: expected name as a function of the index, got {name!r}")
        self._length, self._made = length, name

    def __len__(self) -> int:
        return self._length

    def _name(self, index: int) -> str:
        return self._made(index)


def chosen_names(names: Sequence[str], indices: Sequence[int] | Int64) -> Names:
    """names[i] for i in `indices`, which are not copied."""
    return MadeNames(len(indices), partial(_chosen, names, indices))


def _chosen(names: Sequence[str], indices: Sequence[int] | Int64, index: int) -> str:
    return names[int(indices[index])]


def joined_names(parts: Sequence[Sequence[str]]) -> Names:
    """The names of several sequences, one after the other."""
    ends = np.cumsum([len(part) for part in parts]).astype(np.int64)
    return MadeNames(int(ends[-1]), partial(_joined, parts, ends))


def _joined(parts: Sequence[Sequence[str]], ends: Int64, index: int) -> str:
    part = int(np.searchsorted(ends, index, side="right"))
    return parts[part][index - int(ends[part])]


class Numbering:
    """Counts class names as they come: 8 bytes each, and every distinct one once."""

    def __init__(self) -> None:
        self._seen: dict[str, int] = {}
        self._found = array("q")

    def add(self, name: str) -> None:
        """The next image's class."""
        self._found.append(self._seen.setdefault(name, len(self._seen)))

    def result(self) -> tuple[Int64, list[str]]:
        """(places (n,) int64, names): the distinct names in sorted order, and which of them each image has."""
        names = sorted(self._seen)
        place = np.empty(len(names), np.int64)
        place[[self._seen[name] for name in names]] = np.arange(len(names))
        return place[np.array(self._found, np.int64)], names
