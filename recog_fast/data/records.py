"""MXNet RecordIO (.rec/.idx) and InsightFace's use of it, math.md section 7: reader and byte-identical writer.

A record is one or more parts [u32 magic][u32 cflag << 29 | length][payload][pad to 4]; cflag 0 is a whole record, 1 / 2
/ 3 its first, middle and last part. The writer cuts the payload at every 4-byte-aligned magic word and drops that word;
the reader puts it back. An image record's payload is the header '<IfQQ' (flag, label, id, id2), then `flag` float32
labels, then the image file.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

MAGIC = 0xCED7230A
EXACT = 1 << 24  # float32 counts exactly up to here
_MAGIC_BYTES = struct.pack("<I", MAGIC)
_PART = struct.Struct("<II")
_HEADER = struct.Struct("<IfQQ")
_WHOLE = struct.Struct("<III")  # magic, length of an unsplit record, flag
_LENGTH_MASK = (1 << 29) - 1
_HEAD = np.dtype([("magic", "<u4"), ("word", "<u4"), ("flag", "<u4"), ("label", "<f4")])
HEADER_BYTES = _HEADER.size
IDENTITY_BYTES = _PART.size + _HEADER.size + 8  # flag 2, two float32, no image

PathLike = str | os.PathLike[str]
Int64 = NDArray[np.int64]


class ImageRecord(NamedTuple):
    """An unpacked image record: labels as float32 values (one, or `flag` of them), the two ids, the image file's
    bytes."""

    flag: int
    labels: tuple[float, ...]
    key: int
    id2: int
    image: bytes


def pack_record(label: float | Sequence[float], image: bytes, *, key: int = 0, id2: int = 0) -> bytes:
    """The payload of an image record, as mxnet.recordio.pack writes it: a number gives flag 0, a sequence gives flag =
    its length. An int label of 2^24 or more, which float32 may round, is also written to `id2` (where that is 0).

    Raises ValueError for a key or id2 outside [0, 2^64).
    """
    for name, value in (("key", key), ("id2", id2)):
        if not 0 <= value < 1 << 64:
            raise ValueError(f"pack_record: expected {name} in [0, 2^64), got {value!r}")
    if isinstance(label, int) and label >= EXACT and not id2:
        id2 = label
    if isinstance(label, Sequence):
        return _HEADER.pack(len(label), 0.0, key, id2) + np.asarray(label, "<f4").tobytes() + image
    return _HEADER.pack(0, float(label), key, id2) + image


def unpack_record(payload: bytes, source: str = "record") -> ImageRecord:
    """Header, labels and image of an image record's payload, as mxnet.recordio.unpack takes it apart.

    Raises ValueError naming `source` where the payload is too short.
    """
    if len(payload) < _HEADER.size:
        raise ValueError(
            f"unpack_record: expected {source} to hold a header of {_HEADER.size} bytes, got {len(payload)} bytes"
        )
    flag, label, key, id2 = _HEADER.unpack_from(payload)
    start = _HEADER.size + 4 * flag
    if start > len(payload):
        raise ValueError(
            f"unpack_record: expected {source} to hold {flag} labels (flag), got {len(payload)} bytes in all"
        )
    labels = tuple(np.frombuffer(payload, "<f4", flag, _HEADER.size).tolist()) if flag else (label,)
    return ImageRecord(flag, labels, key, id2, payload[start:])


class RecordFile:
    """A memory-mapped .rec: `read(offset)`, `scan()`, and `heads(offsets)`. Opened on first use in each process;
    pickles as its path.

    Lengths are checked against the file before anything is copied. Raises ValueError naming the file, the offset and
    what was expected.
    """

    def __init__(self, path: PathLike) -> None:
        self.path = os.fspath(path)
        self._map: mmap.mmap | None = None
        self._view: memoryview | None = None  # of the map
        if not os.path.isfile(self.path):
            raise ValueError(f"read_records: expected a .rec file, got {self.path}, which is no file")
        self.size = os.path.getsize(self.path)
        if self.size == 0:
            raise ValueError(f"read_records: expected records in {self.path}, got an empty file")

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "size": self.size, "_map": None, "_view": None}

    def _bytes(self) -> mmap.mmap:
        if self._map is None:
            with open(self.path, "rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self.size = len(self._map)
        return self._map

    def _fail(self, offset: int, expected: str, got: str) -> ValueError:
        return ValueError(f"read_records: expected {expected} at offset {offset} of {self.path}, got {got}")

    def _spans(self, offset: int) -> tuple[list[tuple[int, int]], int]:
        """(start, end) of each part of the record at `offset`, and where the next record starts."""
        data = self._bytes()
        spans: list[tuple[int, int]] = []
        while True:
            if not 0 <= offset <= self.size - _PART.size:
                raise self._fail(offset, "a record", f"the end of the file ({self.size} bytes)")
            magic, word = _PART.unpack_from(data, offset)
            if magic != MAGIC:
                raise self._fail(offset, f"the magic number {MAGIC:#x}", f"{magic:#x}")
            part, length = word >> 29, word & _LENGTH_MASK
            start = offset + _PART.size
            following = start + ((length + 3) & ~3)
            if following > self.size:
                raise self._fail(
                    offset, f"{length} bytes and padding", f"{self.size - start} bytes to the end of the file"
                )
            if part not in ((2, 3) if spans else (0, 1)):
                raise self._fail(
                    offset, "a middle or last part" if spans else "the start of a record", f"part kind {part}"
                )
            spans.append((start, start + length))
            offset = following
            if part in (0, 3):
                return spans, following

    def read(self, offset: int) -> bytes:
        """The payload of the record at `offset`, with the magic words put back between its parts."""
        spans, _ = self._spans(offset)
        data = self._bytes()
        return _MAGIC_BYTES.join([data[start:end] for start, end in spans])

    def images(self, offsets: Int64) -> list[memoryview | None]:
        """The image bytes of each record, in the map itself; None where it is split, broken or no image record: `read` says why."""
        data = self._bytes()
        view = self._view = memoryview(data) if self._view is None else self._view
        last, head = self.size - _PART.size - _HEADER.size, _PART.size + _HEADER.size
        found: list[memoryview | None] = []
        for offset in offsets.tolist():
            magic, word, flag = _WHOLE.unpack_from(data, offset) if 0 <= offset <= last else (0, 0, 0)
            start, end = offset + head + 4 * flag, offset + _PART.size + word
            whole = magic == MAGIC and word <= _LENGTH_MASK and start <= end <= self.size - (-word & 3)
            found.append(view[start:end] if whole else None)
        return found

    def scan(self) -> Iterator[int]:
        """Offsets of all records in file order, without an .idx."""
        offset = 0
        while offset < self.size:
            _, following = self._spans(offset)
            yield offset
            offset = following

    def heads(self, offsets: Int64) -> tuple[NDArray[np.void], NDArray[np.bool_]]:
        """(n,) first 16 bytes of each record as `_HEAD`, and which of them are whole, unsplit image records."""
        raw = np.frombuffer(self._bytes(), np.uint8)
        plain: NDArray[np.bool_] = (offsets >= 0) & (offsets <= self.size - _HEAD.itemsize)
        head = raw[(offsets * plain)[:, None] + np.arange(_HEAD.itemsize)].view(_HEAD)[:, 0]
        length = head["word"] & _LENGTH_MASK
        plain &= (head["magic"] == MAGIC) & (head["word"] >> 29 == 0)
        plain &= (length >= _HEADER.size) & (offsets + _PART.size + length <= self.size)
        return head, plain

    def first_labels(self, offsets: Int64) -> NDArray[np.float32]:
        """The (first) label of each image record: vectorised, touches 36 bytes of each record and decodes nothing."""
        raw = np.frombuffer(self._bytes(), np.uint8)
        labels = np.empty(len(offsets), np.float32)
        for begin in range(0, len(offsets), 1 << 16):
            part = offsets[begin : begin + (1 << 16)]
            head, plain = self.heads(part)
            length = head["word"] & _LENGTH_MASK
            out = np.where(head["flag"] == 0, head["label"], np.float32(0))
            many = np.flatnonzero(plain & (head["flag"] > 0) & (length >= _HEADER.size + 4))
            at = part[many] + _PART.size + _HEADER.size
            out[many] = raw[at[:, None] + np.arange(4)].view("<f4")[:, 0]
            plain &= (head["flag"] == 0) | (length >= _HEADER.size + 4 * head["flag"].astype(np.int64))
            # Split records and broken ones take the slow path, which either knows better or raises the clear error.
            for row in np.flatnonzero(~plain):
                out[row] = unpack_record(self.read(int(part[row])), f"{self.path} at offset {part[row]}").labels[0]
            labels[begin : begin + len(part)] = out
        return labels


def read_index(path: PathLike) -> tuple[Int64, Int64]:
    """Keys and byte offsets, each (n,) int64, of an .idx file: lines "key<TAB>offset" in the file's order. Raises
    ValueError."""
    if not os.path.isfile(path):
        raise ValueError(f"read_index: expected an .idx file, got {os.fspath(path)}, which is no file")
    text = Path(path).read_bytes()
    stray = text.translate(None, b"0123456789\t\r\n")
    lines = text.count(b"\n") + (1 if text and not text.endswith(b"\n") else 0)
    values = np.fromstring(text, np.int64, sep=" ") if not stray and text.strip() else np.empty(0, np.int64)
    if stray or len(values) != 2 * lines or text.count(b"\t") != lines or not lines:
        raise ValueError(
            f"read_index: expected lines key<TAB>offset in {os.fspath(path)}, got {lines} lines, {len(values)} numbers"
        )
    return np.ascontiguousarray(values[0::2]), np.ascontiguousarray(values[1::2])


def index_path(path: PathLike) -> str:
    """Where the .idx of a .rec lies: the same name with suffix .idx."""
    return os.fspath(Path(path).with_suffix(".idx"))


def load_index(file: RecordFile, idx: PathLike | None) -> tuple[Int64, Int64]:
    """Keys and offsets from `idx`, from the .idx beside the file, or from a scan (keys 0, 1, 2, ...)."""
    if idx is None and os.path.isfile(index_path(file.path)):
        idx = index_path(file.path)
    if idx is None:
        offsets = np.fromiter(file.scan(), np.int64)
        return np.arange(len(offsets), dtype=np.int64), offsets
    keys, offsets = read_index(idx)
    last = int(np.argmax(offsets))
    if int(offsets[last]) > file.size - _PART.size:
        raise ValueError(
            f"read_index: expected offsets inside {file.path} ({file.size} bytes) in {os.fspath(idx)}, "
            f"got {offsets[last]} for key {keys[last]}: the .rec is truncated or another file's"
        )
    return keys, offsets


def read_records(path: PathLike, idx: PathLike | None = None) -> Iterator[tuple[int, bytes]]:
    """Iterate over (key, payload bytes) of a RecordIO file, as mxnet.recordio and im2rec write them.

    Order and keys are those of `idx`, of the .idx beside the file, or the file's own order with keys 0, 1, 2, ... where
    there is none. Image records' payloads are taken apart by `unpack_record`. Raises ValueError naming file, offset and
    expectation for a truncated file, a bad magic number, a wild length or an index that points outside.
    """
    file = RecordFile(path)
    keys, offsets = load_index(file, idx)
    return ((int(key), file.read(int(offset))) for key, offset in zip(keys, offsets, strict=True))


def _split(payload: bytes) -> list[bytes]:
    """The parts between 4-byte-aligned magic words."""
    parts, start = [], 0
    at = payload.find(_MAGIC_BYTES)
    while at >= 0:
        if at % 4 == 0:
            parts.append(payload[start:at])
            start = at + 4
        at = payload.find(_MAGIC_BYTES, at + 4 if at % 4 == 0 else at + 1)
    return [*parts, payload[start:]]


class RecordWriter:
    """Appends (key, payload) pairs to a .rec and its .idx, byte for byte what mxnet.recordio.MXIndexedRecordIO writes.

    resume: (bytes of the .rec, bytes of the .idx) that are whole: both files are cut there and gone on with; keys
    written before are then not checked for repetition. Raises ValueError for a repeated key or a payload of 2^29 bytes
    or more.
    """

    def __init__(self, path: PathLike, idx: PathLike | None = None, resume: tuple[int, int] | None = None) -> None:
        self._seen: set[int] = set()
        mode = "wb" if resume is None else "r+b"
        self._rec, self._idx = open(path, mode), open(index_path(path) if idx is None else idx, mode)
        for file, size in zip((self._rec, self._idx), resume or (0, 0), strict=True):
            file.seek(size)
            file.truncate()

    def write(self, key: int, payload: bytes) -> None:
        """Append one record."""
        if key in self._seen or len(payload) > _LENGTH_MASK:
            fault = "a key seen before" if key in self._seen else f"{len(payload)} bytes"
            raise ValueError(
                f"write_records: expected items of distinct keys, payloads below 2^29 bytes, got key {key}: {fault}"
            )
        self._seen.add(key)
        self._idx.write(f"{key}\t{self._rec.tell()}\n".encode())
        parts = _split(payload)
        for place, part in enumerate(parts):
            kind = 0 if len(parts) == 1 else 1 if place == 0 else 3 if place == len(parts) - 1 else 2
            self._rec.write(_PART.pack(MAGIC, kind << 29 | len(part)) + part + bytes(-len(part) % 4))

    def sync(self) -> tuple[int, int]:
        """Put everything on the disk; the sizes that `resume` takes."""
        for file in (self._rec, self._idx):
            file.flush()
            os.fsync(file.fileno())
        return self._rec.tell(), self._idx.tell()

    def close(self) -> None:
        """Close both files."""
        self._rec.close()
        self._idx.close()


def write_records(path: PathLike, items: Iterable[tuple[int, bytes]], *, idx: PathLike | None = None) -> int:
    """Write (key, payload) pairs as .rec and .idx, byte for byte as mxnet.recordio.MXIndexedRecordIO does; returns their number.

    `idx` defaults to the .idx beside `path`. Image payloads come from `pack_record`. Raises ValueError for a repeated
    key or a payload of 2^29 bytes or more.
    """
    count = 0
    with contextlib.closing(RecordWriter(path, idx)) as writer:
        for key, payload in items:
            writer.write(key, payload)
            count += 1
    return count


def write_identities(path: PathLike, images: Iterable[tuple[int, bytes]], *, idx: PathLike | None = None) -> int:
    """Write (label, image file bytes), sorted by label, in InsightFace's layout; returns the number of images.

    Record 0 holds [images + 1, images + 1 + identities] as float32, images have keys 1, 2, ..., one record of [first
    key, past last key] per identity follows. Labels must be 0, 1, 2, ... without gaps, each identity's images together;
    ValueError otherwise.
    """
    labelled = list(images)
    starts: list[int] = []
    for place, (label, _) in enumerate(labelled):
        if label == len(starts):
            starts.append(place + 1)
        elif label != len(starts) - 1:
            raise ValueError(f"write_identities: expected labels 0, 1, 2, ... in order, got {label} at item {place}")
    end = len(labelled) + 1
    ends = [*starts[1:], end]

    def items() -> Iterator[tuple[int, bytes]]:
        yield 0, pack_record([end, end + len(starts)], b"")
        for key, (label, image) in enumerate(labelled, 1):
            yield key, pack_record(label, image, key=key)
        for label, (first, past) in enumerate(zip(starts, ends, strict=True)):
            yield end + label, pack_record([first, past], b"", key=end + label)

    write_records(path, items(), idx=idx)
    return len(labelled)
