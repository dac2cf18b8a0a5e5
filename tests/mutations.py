"""Files of every kind the readers know, and ways to damage them; `python tests/mutations.py 2000` runs the whole by itself."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import resource
import signal
import struct
import sys
import tarfile
import tempfile
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from recog_fast.data import (
    CorruptImage,
    ListDataset,
    RecordDataset,
    TarDataset,
    ZipDataset,
    decode_image,
    pack_record,
    read_bin,
    read_ijb_media,
    read_tinyface,
    write_identities,
    write_records,
)
from recog_fast.data.records import RecordFile, read_index

WILD = (0, 1, 0x7F, 0xFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, (1 << 29) - 1, 1 << 28)
SECONDS = 20  # of one case: a hang ends as an error
# What reading costs whatever the file's size: interpreter objects, error texts, a DataLoader-free dataset.
FIXED_BYTES = 1 << 15


class Hang(BaseException):
    """A case that did not end."""


def picture(kind: str, seed: int = 0, mode: str = "RGB") -> bytes:
    """A noisy, compressible image of 40 x 32."""
    rng = np.random.default_rng(seed)
    grid = rng.integers(0, 256, (8, 10, 3)).repeat(4, 0).repeat(4, 1) + rng.integers(0, 9, (32, 40, 3))
    image = PIL.Image.fromarray(np.clip(grid, 0, 255).astype(np.uint8)).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    """Bit flips, wild numbers in place of four aligned bytes, a cut, a gap, a part said twice."""
    out = bytearray(data)
    for _ in range(int(rng.integers(1, 4))):
        if not out:
            break
        at, kind = int(rng.integers(len(out))), int(rng.integers(6))
        if kind <= 1:
            out[at] ^= 1 << int(rng.integers(8))
        elif kind == 2:
            at -= at % 4
            out[at : at + 4] = struct.pack(">I" if rng.integers(2) else "<I", WILD[int(rng.integers(len(WILD)))])
        elif kind == 3:
            del out[at:]
        elif kind == 4:
            del out[at : at + int(rng.integers(1, 64))]
        else:
            out[at:at] = out[at // 2 : at // 2 + int(rng.integers(1, 64))]
    if out[:8] == b"\x89PNG\r\n\x1a\n" and len(out) > 33:
        out[29:33] = struct.pack(">I", zlib.crc32(out[12:29]))  # else Pillow looks no further
    return bytes(out)


@dataclass(frozen=True)
class Kind:
    """Files of one kind, how they are read, and the bytes reading may take (None: not counted)."""

    suffix: str
    files: list[bytes]
    read: Callable[[Path], Any]
    budget: Callable[[bytes], int]


def _names(count: int) -> np.ndarray:
    cells = np.empty((count, 1), object)
    cells[:, 0] = [f"{k}_{k * 37 % 101}.jpg" for k in range(count)]
    return cells


def _lists(folder: Path, images: list[bytes]) -> tuple[bytes, bytes, bytes]:
    """A .csv and a .jsonl over four images in `folder`, and an IJB media file."""
    for k in range(4):
        (folder / f"{k}.jpg").write_bytes(images[k])
    rows = [(f"{k % 4}.jpg", k % 3) for k in range(200)]
    table = "".join(f"{path},{label}\n" for path, label in rows)
    lines = "".join(json.dumps({"path": path, "label": label}) + "\n" for path, label in rows)
    media = "".join(f"{k}.jpg {k // 3} {1000 + k // 2}\n" for k in range(200))
    return table.encode(), lines.encode(), media.encode()


def _archives(images: list[bytes]) -> tuple[bytes, bytes]:
    """A WebDataset tar and a zip of 20 images."""
    shard, archive = io.BytesIO(), io.BytesIO()
    with tarfile.open(fileobj=shard, mode="w") as tar, zipfile.ZipFile(archive, "w") as zipped:
        for k in range(20):
            for member, data in ((f"p{k // 3}/{k}.jpg", images[k]), (f"p{k // 3}/{k}.cls", str(k // 3).encode())):
                info = tarfile.TarInfo(member)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
                zipped.writestr(member, data)
    return shard.getvalue(), archive.getvalue()


def _mat(compressed: bool) -> bytes:
    import scipy.io

    buffer = io.BytesIO()
    content = {"probe_set": _names(300), "probe_ids": np.arange(300)[:, None]}
    scipy.io.savemat(buffer, content, do_compression=compressed)
    return buffer.getvalue()


def _pictures() -> list[bytes]:
    formats = ("JPEG", "PNG", "GIF", "BMP", "PPM", "WEBP", "TIFF", "JPEG")
    odd = [picture("JPEG", 9, "CMYK"), picture("PNG", 9, "1"), picture("JPEG", 10, "L")]
    return [picture(kind, k) for k, kind in enumerate(formats)] + odd


def _read_records(path: Path, index: Path | None = None) -> None:
    dataset = RecordDataset(path, index, decode=False)
    assert len(dataset.labels) == len(dataset) and dataset.num_classes >= 0
    for item in dataset:
        assert isinstance(item[0], bytes)
    for _ in RecordFile(path).scan():
        pass


def _read_all(dataset: Any) -> None:
    assert dataset.num_classes >= 1 and len(dataset.labels) == len(dataset)
    for index in range(len(dataset)):
        with contextlib.suppress(CorruptImage):  # counted skips
            dataset[index]


def _four(data: bytes) -> int:
    return 4 * len(data)


def _pixels(data: bytes) -> int:
    return 12 * max(1 << 16, 8 * 1032 * len(data))


def kinds(folder: Path) -> dict[str, Kind]:
    """What is mutated; the undamaged .rec and .idx stay in `folder`."""
    rec, plain = folder / "whole.rec", folder / "plain.rec"
    write_identities(rec, [(k, picture("JPEG", 3 * k + j)) for k in range(6) for j in range(3)])
    split = struct.pack("<I", 0xCED7230A)
    write_records(plain, [(k, pack_record([k // 2, 1.0], picture("PNG", k) + split)) for k in range(9)])

    def read_idx(path: Path) -> None:
        read_index(path)
        _read_records(rec, path)

    def read_list(path: Path) -> None:
        _read_all(ListDataset(path, root=folder, decode=False))

    images = [picture("JPEG", k) for k in range(30)]
    arrays = [np.frombuffer(data, np.uint8)[:, None] for data in images]
    pickles = [pickle.dumps((c, [True, False] * 7 + [True]), p) for p in (0, 2, 3, 4, 5) for c in (images, arrays)]
    mats = [_mat(False), _mat(True)]
    (shard, archive), (table, lines, media) = _archives(images), _lists(folder, images)
    # A line of a list becomes 38 bytes of arrays while it is read, of an IJB file Python objects of 430 bytes; an image becomes
    # its pixels, whose number is bounded by the file's bytes. Seen here: 3.4 times a list's bytes, 15 times an IJB file's.
    lines_of, media_of = (lambda data: 8 * len(data)), (lambda data: 25 * len(data))
    return {
        "rec": Kind(".rec", [rec.read_bytes(), plain.read_bytes()], _read_records, _four),
        "idx": Kind(
            ".idx", [rec.with_suffix(".idx").read_bytes()], read_idx, lambda data: 4 * (len(data) + rec.stat().st_size)
        ),
        "bin": Kind(".bin", pickles, read_bin, _four),
        "mat": Kind(".mat", mats, read_tinyface, lambda data: 4 * max(len(data), len(mats[0]))),
        "tar": Kind(".tar", [shard], lambda path: _read_all(TarDataset(path, decode=False)), _four),
        "zip": Kind(".zip", [archive], lambda path: _read_all(ZipDataset(path, decode=False)), _four),
        "csv": Kind(".csv", [table], read_list, lines_of),
        "jsonl": Kind(".jsonl", [lines], read_list, lines_of),
        "ijb": Kind(".txt", [media], read_ijb_media, media_of),
        "image": Kind(".img", _pictures(), lambda path: decode_image(path.read_bytes(), str(path)), _pixels),
    }


def run(name: str, count: int, seed: int = 0) -> dict[str, float]:
    """`count` damaged files of one kind: how many were read, refused; raises for anything but a clean ValueError."""
    refused, worst = 0, 0.0

    def alarm(*_: Any) -> None:
        raise Hang(f"{name}, seed {seed}: no end after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, alarm)
    for codec in ("utf-16-le", "utf-32-le", "utf-16-be", "utf-32-be", "latin-1"):
        "".encode(codec)  # a codec's first use imports it
    tracemalloc.start()
    try:
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            kind = kinds(folder)[name]
            kind.read(_written(folder, kind, kind.files[0]))  # lazy imports are nobody's allocation
            for case in range(count):
                data = mutated(kind.files[case % len(kind.files)], np.random.default_rng((seed, case)))
                path = _written(folder, kind, data)
                fault, taken = _attempt(kind, path)
                if taken > kind.budget(data) + FIXED_BYTES:
                    # The interpreter's own tables (of interned path parts) grow now and then, by megabytes: once.
                    fault, taken = _attempt(kind, path)
                assert not fault or place in fault, f"{name} case {case}: which file? {fault}"
                refused += bool(fault)
                worst = max(worst, (taken - FIXED_BYTES) / max(1, len(data)))
                assert taken <= kind.budget(data) + FIXED_BYTES, f"{name} case {case}: {taken} bytes for {len(data)}"
    finally:
        tracemalloc.stop()
        signal.signal(signal.SIGALRM, before)
    return {"cases": count, "refused": refused, "bytes_per_byte": round(worst, 2)}


def _attempt(kind: Kind, path: Path) -> tuple[str, int]:
    """(the error's text, "" for none; the most bytes held meanwhile)."""
    fault = ""
    tracemalloc.reset_peak()
    base = tracemalloc.get_traced_memory()[0]
    signal.alarm(SECONDS)
    try:
        kind.read(path)
    except ValueError as error:  # CorruptImage is one
        fault = str(error) or "no text"
    finally:
        signal.alarm(0)
    return fault, tracemalloc.get_traced_memory()[1] - base


def _written(folder: Path, kind: Kind, data: bytes) -> Path:
    path = folder / f"damaged{kind.suffix}"
    path.write_bytes(data)
    path.with_suffix(".idx").unlink(missing_ok=True) if kind.suffix == ".rec" else None
    return path


def main(count: int) -> None:
    """Every kind, one line each, and the process's own peak: what Pillow and libjpeg take is seen there only."""
    with tempfile.TemporaryDirectory() as place:
        for name in kinds(Path(place)):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            result = run(name, count)
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
            print(name, result, f"resident peak grew by {grown / 1024:.1f} MB", flush=True)
            assert grown < 128 * 1024, name


if __name__ == "__main__":
    main(int(sys.argv[1]))
