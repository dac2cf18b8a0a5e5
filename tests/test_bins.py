"""InsightFace's .bin: every pickle protocol and spelling it comes in, and pickles that want to do more than hold data."""

from __future__ import annotations

import os
import pickle
import pickletools
import struct
import time
from pathlib import Path

import numpy as np
import pytest

from recog_fast.data import read_bin

IMAGES = [b"\xff\xd8 one", b"", bytes(range(256)), b"four" * 100]
SAME = [True, False]
# What Python 2 and numpy 1.x wrote: str for bytes, an ndarray reconstructed from a str.
PYTHON_2 = (
    b"\x80\x02]q\x01(U\x03abcq\x02cnumpy.core.multiarray\n_reconstruct\nq\x03cnumpy\nndarray\nq\x04K\x00\x85U\x01b\x87Rq\x05"
    b"(K\x01K\x03K\x01\x86cnumpy\ndtype\nq\x06U\x02u1K\x00K\x01\x87Rq\x07(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00t"
    b"b\x89U\x03xyztbe]\x88a\x86."
)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("kind", ["bytes", "flat", "column", "bool_"])
def test_every_protocol(tmp_path: Path, protocol: int, kind: str) -> None:
    images: list[object] = list(IMAGES)
    same: object = list(SAME)
    if kind in ("flat", "column"):
        arrays = [np.frombuffer(image, np.uint8).copy() for image in IMAGES]
        images = [array if kind == "flat" else array[:, None] for array in arrays]
        same = np.array(SAME)
    if kind == "bool_":
        same = tuple(np.bool_(flag) for flag in SAME)
    path = tmp_path / "pairs.bin"
    path.write_bytes(pickle.dumps((images, same), protocol))
    assert read_bin(path) == (IMAGES, SAME)


def test_python_2(tmp_path: Path) -> None:
    (tmp_path / "p.bin").write_bytes(PYTHON_2)
    assert read_bin(tmp_path / "p.bin") == ([b"abc", b"xyz"], [True])


def test_numpy_1_names(tmp_path: Path) -> None:
    array = np.frombuffer(b"xyz", np.uint8).copy()
    text = pickle.dumps(([array, array], [True]), 2).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    (tmp_path / "p.bin").write_bytes(text)
    assert read_bin(tmp_path / "p.bin") == ([b"xyz", b"xyz"], [True])


class Evil:
    """Writes a marker file when a careless reader loads it."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> object:
        return self.call


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_callables_are_refused_unexecuted(tmp_path: Path, protocol: int) -> None:
    marker = tmp_path / "marker"
    path = tmp_path / "evil.bin"
    for evil in (Evil(os.mkdir, str(marker)), Evil(eval, f"open({str(marker)!r}, 'w')"), Evil(getattr, os, "system")):
        for content in (evil, ([evil, b""], [True]), ([b"", b""], [True, evil])):
            try:
                path.write_bytes(pickle.dumps(content, protocol))
            except TypeError:
                continue  # modules do not pickle
            with pytest.raises(ValueError, match=r"list of bool\) in .*evil\.bin, got the name|got opcode"):
                read_bin(path)
            assert not marker.exists()
    path.write_bytes(pickle.dumps(Evil(os.mkdir, str(marker)), protocol))
    pickle.loads(path.read_bytes())  # the same file, carelessly read, does its work: the test above can fail
    assert marker.is_dir()


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x04" + b"\x8e" + struct.pack("<Q", 1 << 45) + b"x.",  # BINBYTES8 of 32 TB
        b"\x80\x04" + b"B" + struct.pack("<I", (1 << 32) - 1) + b"x.",  # BINBYTES of 4 GB
        b"\x80\x04" + b"\x96" + struct.pack("<Q", 1 << 45) + b"x.",  # BYTEARRAY8
        b"\x80\x04" + b"\x8b" + struct.pack("<I", (1 << 31) - 1) + b"x.",  # LONG4
        b"\x80\x02]r" + struct.pack("<I", (1 << 32) - 1) + b".",  # LONG_BINPUT: the memo would be doubled to 64 GB
        b"\x80\x02]p4294967295\n.",  # PUT
        b"\x80\x04\x95" + struct.pack("<Q", 1 << 45) + b"].",  # FRAME
        b"",
        b"\x80\x04",
        pickle.dumps([1, 2, 3]),
        pickle.dumps(({}, [True])),
        pickle.dumps(([b"", b""], ["yes"])),
        pickle.dumps(([b"", 3], [True])),
        pickle.dumps(([b"a"], [True])),
        pickle.dumps(([np.zeros(3), b""], [True])),
        pickle.dumps(([np.zeros((2, 2), np.uint16), b""], [True])),
        pickle.dumps(([np.array([None]), b""], [True])),
    ],
)
def test_bombs_and_other_content(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "odd.bin").write_bytes(content)
    began = time.perf_counter()
    with pytest.raises(ValueError, match=r"^read_bin: expected .* in .*odd\.bin, got "):
        read_bin(tmp_path / "odd.bin")
    assert time.perf_counter() - began < 1


def test_small_files_do_not_grow(tmp_path: Path) -> None:
    """A nest of shared tuples, whose repr has no end; one large image listed a hundred thousand times."""
    nest = b"\x80\x04)\x94" + b"".join(b"h" + bytes([k]) + b"h" + bytes([k]) + b"\x86\x94" for k in range(200))
    array = b"cnumpy.core.multiarray\n_reconstruct\n" + b"h\xc8h\xc8h\xc8\x87R(K\x01h\xc8h\xc8h\xc8h\xc8tb."
    dtype = b"cnumpy\ndtype\nh\xc8\x85R."
    codec = b"c_codecs\nencode\nh\xc8h\xc8\x86R."
    for tail in (array, dtype, codec, b"]\x86."):
        (tmp_path / "nest.bin").write_bytes(nest + tail)
        with pytest.raises(ValueError, match="nest.bin, got"):
            read_bin(tmp_path / "nest.bin")
    large = bytearray(1 << 20)
    (tmp_path / "many.bin").write_bytes(pickle.dumps(([large] * 100_000, [True] * 50_000), 5))
    images, _ = read_bin(tmp_path / "many.bin")
    assert len(images) == 100_000 and len({id(image) for image in images}) == 1


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="which is no file"):
        read_bin(tmp_path / "absent.bin")


def test_mutations(tmp_path: Path) -> None:
    """500 damaged pickles: each reads as data or raises ValueError naming the file."""
    arrays = [np.frombuffer(image, np.uint8).copy() for image in IMAGES]
    sources = [pickletools.optimize(pickle.dumps((c, SAME), p)) for p in (0, 2, 3, 5) for c in (IMAGES, arrays)]
    rng = np.random.default_rng(1)
    path, refused = tmp_path / "damaged.bin", 0
    for round_ in range(500):
        data = bytearray(sources[round_ % len(sources)])
        for _ in range(int(rng.integers(1, 5))):
            data[rng.integers(len(data))] = rng.integers(256)
        path.write_bytes(data)
        try:
            images, same = read_bin(path)
            assert all(isinstance(image, bytes) for image in images) and all(isinstance(flag, bool) for flag in same)
        except ValueError as error:
            assert "damaged.bin" in str(error)
            refused += 1
    assert refused > 100
