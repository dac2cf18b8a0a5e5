"""Protocol files of IJB and SurvFace, and the MATLAB reader against SciPy's."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

scipy_io = pytest.importorskip("scipy.io")
from paths import data_dir

from recog_fast.data import (
    protocols,
    read_ijb_landmarks,
    read_ijb_media,
    read_ijb_pairs,
    read_survface_pairs,
    read_tinyface,
)
from recog_fast.data.matlab import read_matlab


def cells(texts: Any) -> np.ndarray:
    shape = np.shape(texts)
    made = np.empty(shape, object)
    for place in np.ndindex(*shape):
        made[place] = np.asarray(texts)[place]
    return made


@pytest.mark.parametrize("compressed", [False, True])
def test_matlab_equals_scipy(tmp_path: Path, compressed: bool) -> None:
    content = {
        "names": cells([["a.jpg", "Zoë_1.jpg"], ["", "long" * 30]]),
        "bytes": np.arange(6, dtype=np.uint8).reshape(2, 3),
        "halves": np.array([[0.5, -1e300]]),
        "ids": np.array([[2**40], [-3]], np.int64),
        "empty": np.zeros((0, 3)),
        "title": "text",
    }
    scipy_io.savemat(tmp_path / "m.mat", content, do_compression=compressed)
    ours, theirs = read_matlab((tmp_path / "m.mat").read_bytes()), scipy_io.loadmat(tmp_path / "m.mat")
    assert set(ours) == set(content)
    for name in ("bytes", "halves", "ids", "empty"):
        assert np.array_equal(ours[name].numbers, theirs[name])
    flat = [str(cell.item()) if cell.size else "" for cell in theirs["names"].ravel(order="F")]
    assert ours["names"].cells == flat and ours["names"].dims == (2, 2) and ours["title"].text == "text"


def test_matlab_takes_no_size_on_trust() -> None:
    """A cell array of 2^28 entries and a compressed one of 2^28 zeros, in files of a few hundred bytes."""
    array = (
        struct.pack("<6I", 6, 8, 1, 0, 5, 8) + struct.pack("<ii", 1 << 28, 1) + struct.pack("<II", 1 << 16 | 1, 0x61)
    )
    variable = struct.pack("<II", 14, len(array)) + array
    header = b"MATLAB 5.0".ljust(124) + b"\x00\x01IM"
    with pytest.raises(ValueError, match="268435456 entries in 0 bytes"):
        read_matlab(header + variable)
    packed = zlib.compress(variable)
    with pytest.raises(ValueError, match="268435456 entries"):
        read_matlab(header + struct.pack("<II", 15, len(packed)) + packed)
    with pytest.raises(ValueError, match="class 2; only numbers and cells"):
        read_matlab(header + struct.pack("<II", 14, 40) + struct.pack("<10I", 6, 8, 2, 0, 5, 8, 0, 0, 1, 0))


def test_survface_pairs(tmp_path: Path) -> None:
    pairs = [("1_1.jpg", "1_2.jpg"), ("5_1.jpg", "5_9.jpg"), ("7_1.jpg", "7_3.jpg")]
    path = tmp_path / "positive_pairs_names.mat"
    scipy_io.savemat(path, {"positive_pairs_names": cells(pairs)})
    assert read_survface_pairs(path) == pairs
    scipy_io.savemat(path, {"positive_pairs_names": cells([["a"], ["b"]])})
    with pytest.raises(
        ValueError, match=r"\(n, 2\) cell array of names in .*names.mat, got ValueError: cells of dimensions \(2, 1\)"
    ):
        read_survface_pairs(path)
    scipy_io.savemat(path, {"gallery_set": cells([["3_1.jpg"]]), "gallery_ids": np.array([[3.0]])})
    assert read_tinyface(path)[1].tolist() == [3]


def test_ijb(tmp_path: Path) -> None:
    path = tmp_path / "ijbc.txt"
    path.write_text("1.jpg 1 69544\n2.jpg 1 69544\n\n3.jpg 9 -1\n")
    media = read_ijb_media(path)
    assert media.names == ["1.jpg", "2.jpg", "3.jpg"]
    assert media.templates.tolist() == [1, 1, 9] and media.media.tolist() == [69544, 69544, -1]
    path.write_text("1 11065 1\n1 11066 0\n")
    pairs = read_ijb_pairs(path)
    assert (pairs.first.tolist(), pairs.second.tolist(), pairs.same.tolist()) == ([1, 1], [11065, 11066], [True, False])
    path.write_text("1.jpg 46.1 62.2 87.3 63.4 68.5 83.6 48.7 103.8 87.9 104.1 0.999\n")
    landmarks = read_ijb_landmarks(path)
    assert landmarks.points.shape == (1, 5, 2) and landmarks.points[0, 2].tolist() == pytest.approx([68.5, 83.6])
    assert landmarks.scores.tolist() == pytest.approx([0.999])


@pytest.mark.parametrize(
    ("read", "text", "message"),
    [
        (read_ijb_media, "", "no lines"),
        (read_ijb_media, "a 1 2\nb 1\n", "2 fields instead of 3 in line 2"),
        (read_ijb_media, "a 1 x\n", "ValueError"),
        (read_ijb_media, f"a 1 {10**30}\n", "beyond 64 bits"),
        (read_ijb_pairs, "1 2 3\n", "label other than 0 and 1"),
        (read_ijb_landmarks, "a" + " 1" * 10 + " nan", "not finite"),
        (read_ijb_media, b"\xff\xfe 1 2", "UnicodeDecodeError"),
    ],
)
def test_other_text(tmp_path: Path, read: Any, text: str | bytes, message: str) -> None:
    path = tmp_path / "ijb.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=rf"{read.__name__}: expected lines .* in .*ijb.txt, got .*{message}"):
        read(path)
    with pytest.raises(ValueError, match="which is no file"):
        read(tmp_path / "absent.txt")


def test_tinyface_protocol_equals_scipy() -> None:
    for name in ("probe", "gallery_match"):
        path = data_dir() / "tinyface_protocol" / f"{name}_img_ID_pairs.mat"
        stem, theirs = name.split("_")[0], scipy_io.loadmat(path)
        names, ids = read_tinyface(path)
        assert names == [str(cell.item()) for cell in theirs[f"{stem}_set"].ravel()]
        assert np.array_equal(ids, theirs[f"{stem}_ids"].ravel())


def hdf5(block: int) -> bytes:
    """The head of a version 7.3 file: MATLAB's header in a block of 512 bytes, or none (hdf5storage, h5py)."""
    text = b"MATLAB 7.3 MAT-file, Platform: GLNXA64, HDF5 schema 1.00 .".ljust(124) + b"\x00\x02IM"
    return (text.ljust(512, b"\0") if block else b"") + b"\x89HDF\r\n\x1a\n" + bytes(200)


@pytest.mark.parametrize("read", [read_tinyface, read_survface_pairs])
def test_version_7_3_is_refused_by_name(tmp_path: Path, read: Any) -> None:
    for block in (0, 512):
        (tmp_path / "new.mat").write_bytes(hdf5(block))
        with pytest.raises(ValueError, match=rf"{read.__name__}: .*new.mat, got .*version 7.3 MAT-file \(HDF5\).* -v7"):
            read(tmp_path / "new.mat")
    scipy_io.savemat(tmp_path / "old.mat", {"gallery_ids": np.arange(3)}, format="4")
    with pytest.raises(ValueError, match="no version 5 MAT-file"):
        read(tmp_path / "old.mat")


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("number", [np.uint8, np.uint16, np.float64])
def test_survface_as_it_is_spread(tmp_path: Path, compressed: bool, number: type) -> None:
    """The five files of its two test sets: (n, 2) cells of pairs, (n, 1) cells of names with (n, 1) ids; from them the protocols."""
    people = [9, 9, 10, 200]
    gallery = [f"{person}_cam{k}_{k + 1}.jpg" for k, person in enumerate(people)]
    for name, pairs in (("positive", [gallery[:2]]), ("negative", [gallery[1:3], gallery[2:4]])):
        path = tmp_path / f"{name}_pairs_names.mat"
        scipy_io.savemat(path, {f"{name}_pairs_names": cells(pairs)}, do_compression=compressed)
        assert read_survface_pairs(path) == [tuple(pair) for pair in pairs]
    for name in ("gallery", "mated_probe"):
        path = tmp_path / f"{name}_img_ID_pairs.mat"
        content = {f"{name}_set": cells([[one] for one in gallery]), f"{name}_ids": np.array(people, number)[:, None]}
        scipy_io.savemat(path, content, do_compression=compressed)
        names, ids = read_tinyface(path)
        assert names == gallery and ids.tolist() == people and ids.dtype == np.int64


def test_byte_order_of_the_other_kind(tmp_path: Path) -> None:
    """The same variables from a big-endian machine."""
    names = b"".join(
        struct.pack(">6I", 14, 56, 6, 8, 4, 0) + struct.pack(">2I2i", 5, 8, 1, 5) + struct.pack(">4I", 1, 0, 16, 5) + text + b"\0\0\0"
        for text in (b"a.jpg", b"b.jpg")
    )
    head = struct.pack(">4I", 6, 8, 1, 0) + struct.pack(">2I2i", 5, 8, 2, 1)
    cell = head + struct.pack(">2I", 1, 9) + b"probe_set".ljust(16, b"\0") + names
    numbers = struct.pack(">4I", 6, 8, 6, 0) + struct.pack(">2I2i", 5, 8, 2, 1) + struct.pack(">2I", 1, 9) + b"probe_ids".ljust(16, b"\0")
    numbers += struct.pack(">2I2d", 9, 16, 7.0, 300.0)
    data = b"MATLAB 5.0".ljust(124) + b"\x01\x00MI"
    for part in (cell, numbers):
        data += struct.pack(">2I", 14, len(part)) + part
    (tmp_path / "big.mat").write_bytes(data)
    assert scipy_io.loadmat(tmp_path / "big.mat")["probe_ids"].ravel().tolist() == [7, 300]
    assert read_tinyface(tmp_path / "big.mat")[0] == ["a.jpg", "b.jpg"]
    assert read_tinyface(tmp_path / "big.mat")[1].tolist() == [7, 300]


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        (b"1 2 0\n3 4 1", 2),
        (b"\n1\t2  0 \r\n\r\n3 4 1\r\n\n", 2),
        (b"1 2 0\r3 4 1\r", 2),  # old line ends: not the fast path's
        (b"1 2 0 3 4 1\n", 0),
        (b"1 2\n0 3\n4 1\n", 0),
        (b"1 2 0\n3 4\n1\n", 0),
        (b"\n \n", 0),
        (b"1 2 9223372036854775807\n", 0),
        (b"1 2 1\n" * 5000, 5000),
    ],
)
def test_ijb_pairs_in_blocks_are_those_line_by_line(
    tmp_path: Path, text: bytes, lines: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several blocks, blank lines, other line ends, lines of too few fields that add up: what the reader by lines says."""
    (tmp_path / "pairs.txt").write_bytes(text)
    found = []
    for parse in (protocols._number_table, lambda data, columns: None):
        monkeypatch.setattr(protocols, "_number_table", parse)
        monkeypatch.setattr(protocols, "_BLOCK", 700)
        try:
            pairs = read_ijb_pairs(tmp_path / "pairs.txt")
            found.append([pairs.first.tolist(), pairs.second.tolist(), pairs.same.tolist()])
        except ValueError as error:
            found.append([str(error)])
    assert found[0] == found[1] and len(found[0]) == (3 if lines else 1) and (not lines or len(found[0][0]) == lines)
