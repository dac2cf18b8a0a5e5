"""Images of a RecordIO file as a dataset: im2rec's layout and InsightFace's (record 0, identity records)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from .images import EncodedDataset
from .names import MadeNames, Names
from .records import (
    EXACT,
    HEADER_BYTES,
    IDENTITY_BYTES,
    ImageRecord,
    Int64,
    PathLike,
    RecordFile,
    index_path,
    load_index,
    unpack_record,
)


class RecordDataset(EncodedDataset):
    """Images of a .rec file, memory-mapped: im2rec files (no record 0) and InsightFace's (record 0, identity records at
    the end).

    `idx=None` takes the .idx beside the file, else scans. Items come in the order of the .idx, as InsightFace reads
    them; `.keys` has their keys. The label is the header's number, the first of a label array. With identity records
    `.num_classes` is their number, otherwise the largest label + 1: record 0's float32 counts are never used (exact to
    2^24 only). `.labels` reads every header on first use. Raises ValueError naming file and offset for truncated or
    foreign files, and for labels that are no whole numbers >= -1, or above 2^24 (where float32 labels of different
    identities fall together) without the number itself in the header's `id2`, where `pack_record` puts it.
    """

    def __init__(self, rec: PathLike, idx: PathLike | None = None, decode: bool = True) -> None:
        self.file = RecordFile(rec)
        self.decode = decode
        keys, offsets = load_index(self.file, idx)
        last = int(offsets.max())
        self.file.read(last)
        images = np.ones(len(keys), bool)
        self._identities = 0
        zero = np.flatnonzero(keys == 0)
        if len(zero):
            first = self.file.read(int(offsets[zero[0]]))
            if (
                len(first) >= HEADER_BYTES
                and (record := unpack_record(first, f"record 0 of {self.file.path}")).flag
                and not record.image
            ):
                self._check_complete(len(keys), record.labels, idx)
                identities = self._identity_records(offsets)
                identities[zero[0]] = False
                images = ~identities
                images[zero[0]] = False
                self._identities = int(identities.sum())
        self.keys, self.offsets = keys[images], offsets[images]
        if not len(self.keys):
            raise ValueError(
                f"RecordDataset: expected image records in {self.file.path}, got none of {len(keys)} records"
            )
        self._labels: Int64 | None = None

    def _check_complete(self, records: int, counts: tuple[float, ...], idx: PathLike | None) -> None:
        """A scan cannot see a file cut off between two records; record 0's count can, as far as float32 is exact."""
        scanned = idx is None and not os.path.isfile(index_path(self.file.path))
        if scanned and np.float32(records) < counts[-1]:
            raise ValueError(
                f"RecordDataset: expected {counts[-1]:.0f} records in {self.file.path}, got {records}: truncated"
            )

    def _identity_records(self, offsets: Int64) -> NDArray[np.bool_]:
        """Which records are [first, past last] without an image: found by size from the index, so that image pages stay
        untouched."""
        order = np.argsort(offsets, kind="stable")
        sizes = np.empty(len(offsets), np.int64)
        sizes[order] = np.diff(np.append(offsets[order], self.file.size))
        found: NDArray[np.bool_] = np.equal(sizes, IDENTITY_BYTES)
        candidates = np.flatnonzero(found)
        head, plain = self.file.heads(offsets[candidates])
        found[candidates] = plain & (head["word"] == IDENTITY_BYTES - 8) & (head["flag"] == 2)
        return found

    def _class(self, record: ImageRecord, index: int) -> int:
        label = record.labels[0]
        if label >= EXACT and 0 < record.id2 < 1 << 53 and np.float32(record.id2) == np.float32(label):
            return record.id2
        if not (-1 <= label <= EXACT and label == int(label)):
            raise ValueError(
                f"RecordDataset: expected a whole label in [-1, 2^24] at offset {self.offsets[index]} "
                f"of {self.file.path}, got {label}"
            )
        return int(label)

    def _record(self, index: int) -> ImageRecord:
        offset = int(self.offsets[index])
        return unpack_record(self.file.read(offset), f"{self.file.path} at offset {offset}")

    @property
    def labels(self) -> Int64:
        """(n,) int64 labels of all images, read from their headers on first use."""
        if self._labels is None:
            rounded = self.file.first_labels(self.offsets)
            plain = (rounded >= -1) & (rounded < EXACT) & (rounded == np.floor(rounded))
            labels = np.where(plain, rounded, 0).astype(np.int64)
            for index in np.flatnonzero(~plain).tolist():
                labels[index] = self._class(self._record(index), index)
            self._labels = labels
        return self._labels

    @property
    def num_classes(self) -> int:
        """Number of identity records, else the largest label + 1."""
        return self._identities or int(self.labels.max()) + 1

    @property
    def paths(self) -> Names:
        """A name for every image: "<file>#<key>"."""
        return MadeNames(len(self), self.source)

    def source(self, index: int) -> str:
        return f"{self.file.path}#{self.keys[index]}"

    def __len__(self) -> int:
        return len(self.keys)

    def encoded(self, index: int) -> tuple[bytes, int]:
        record = self._record(index)
        return record.image, self._class(record, index)

    def stored(self, indices: Sequence[int]) -> Iterator[tuple[bytes | memoryview, int]]:
        places = np.asarray(indices, np.int64)
        labels: list[int] = self.labels[places].tolist()
        for index, image, label in zip(indices, self.file.images(self.offsets[places]), labels, strict=True):
            yield self.encoded(index) if image is None else (image, label)
