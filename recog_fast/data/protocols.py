"""Protocol files of face benchmarks: TinyFace and SurvFace (MATLAB), IJB-B and IJB-C (text). Names and numbers, no
images.

Which layouts are read is said at each function. MATLAB files: version 5 of either byte order, compressed or not
(`matlab.read_matlab`); version 7.3 is HDF5 and refused by name. Text: UTF-8, fields separated by spaces or tabs, blank lines
skipped, any line ends. Of IJB the text files that InsightFace's evaluation spread, not NIST's .csv protocols.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from .matlab import read_matlab

PathLike = str | os.PathLike[str]
Int64 = NDArray[np.int64]
T = TypeVar("T")
_LARGEST = 1 << 62
_BLOCK = 1 << 20  # bytes of text parsed at once


def _read(where: str, path: PathLike, kind: str, expected: str, read: Callable[[bytes], T]) -> T:
    """read(the file's bytes), any fault told as one ValueError naming file and expectation."""
    if not os.path.isfile(path):
        raise ValueError(f"{where}: expected a {kind} file, got {os.fspath(path)}, which is no file")
    try:
        return read(Path(path).read_bytes())
    except Exception as error:  # a damaged file makes zlib, codecs, struct and NumPy raise almost any type
        raise ValueError(
            f"{where}: expected {expected} in {os.fspath(path)}, got {type(error).__name__}: {error}"
        ) from error


def read_tinyface(path: PathLike) -> tuple[list[str], Int64]:
    """File names and identity numbers (n,) int64 of TinyFace's `probe_img_ID_pairs.mat` or
    `gallery_match_img_ID_pairs.mat` (QMUL; Cheng, Zhu, Gong, ACCV 2018), or SurvFace's `gallery_img_ID_pairs.mat` and
    `mated_probe_img_ID_pairs.mat`.

    The file holds one `<name>_set`, a cell array of n file names in a column or a row, and its `<name>_ids`, n whole numbers of
    any numeric class; <name> is probe, gallery, mated_probe or another word. TinyFace's distractors and SurvFace's unmated
    probes have no such file: they are the files of their folder. Raises ValueError naming the file for anything else.
    """

    def read(data: bytes) -> tuple[list[str], Int64]:
        content = read_matlab(data)
        (name,) = (key for key in content if key.endswith("_set"))
        names, numbers = content[name].cells, content[name.removesuffix("_set") + "_ids"].numbers
        if names is None or numbers is None or len(names) != numbers.size:
            count = 0 if numbers is None else numbers.size
            raise ValueError(f"{len(names or [])} names and {count} ids")
        values = numbers.ravel(order="F")
        if not (np.isfinite(values).all() and np.array_equal(values, values.astype(np.int64))):
            raise ValueError("ids that are no whole numbers")
        return names, values.astype(np.int64)

    return _read("read_tinyface", path, ".mat", "<name>_set and <name>_ids of one length", read)


def read_survface_pairs(path: PathLike) -> list[tuple[str, str]]:
    """The image names of each pair of SurvFace's `positive_pairs_names.mat` or `negative_pairs_names.mat` (QMUL; Cheng,
    Zhu, Gong 2018).

    The file holds one (n, 2) cell array of file names, whatever it is called; n is 5,320 in both. Other variables of numbers
    are passed over. Raises ValueError naming the file for anything else.
    """

    def read(data: bytes) -> list[tuple[str, str]]:
        (pairs,) = (value for value in read_matlab(data).values() if value.cells is not None)
        if pairs.cells is None or len(pairs.dims) != 2 or pairs.dims[1] != 2:
            raise ValueError(f"cells of dimensions {pairs.dims}")
        count = pairs.dims[0]
        return list(zip(pairs.cells[:count], pairs.cells[count:], strict=True))

    return _read("read_survface_pairs", path, ".mat", "one (n, 2) cell array of names", read)


class IJBMedia(NamedTuple):
    """Which template and medium (a still, or one video) each image of IJB belongs to."""

    names: list[str]
    templates: Int64  # (n,)
    media: Int64  # (n,)


class IJBPairs(NamedTuple):
    """Pairs of templates and whether they are one person."""

    first: Int64  # (p,) template ids
    second: Int64  # (p,)
    same: NDArray[np.bool_]  # (p,)


class IJBLandmarks(NamedTuple):
    """Five points and the detector's score of each image."""

    names: list[str]
    points: NDArray[np.float32]  # (n, 5, 2): x, y
    scores: NDArray[np.float32]  # (n,)


def _rows(data: bytes, columns: int) -> list[list[str]]:
    """Fields between spaces and tabs of every line that is not blank; other white space of Unicode belongs to the names."""
    rows = []
    for number, line in enumerate(data.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n").split("\n"), 1):
        fields = list(filter(None, line.replace("\t", " ").split(" ")))
        if fields and len(fields) != columns:
            raise ValueError(f"{len(fields)} fields instead of {columns} in line {number}")
        if fields:
            rows.append(fields)
    if not rows:
        raise ValueError("no lines")
    return rows


def _number_table(data: bytes, columns: int) -> Int64 | None:
    """(lines, columns) of lines of unsigned numbers, blank ones skipped; None for anything else: `_rows` then finds the line."""
    if data.translate(None, b"0123456789 \t\r\n"):
        return None
    tables, at = [], 0
    while at < len(data):
        end = data.find(b"\n", at + _BLOCK) + 1 or len(data)
        text = np.frombuffer(data, np.uint8, end - at, at)
        edges = np.flatnonzero(np.diff(np.concatenate([[True], text <= 32, [True]]))).reshape(-1, 2)
        line = np.cumsum(text == 10)[edges[:, 0]]
        if len(edges) % columns or (np.diff(edges) > 18).any():
            return None
        line = line.reshape(-1, columns)
        if (line != line[:, :1]).any() or (np.diff(line[:, 0]) == 0).any():
            return None
        if len(edges):
            tables.append(np.fromstring(data[at:end], np.int64, sep=" ").reshape(-1, columns))
        at = end
    return np.concatenate(tables) if tables else None


def _whole(fields: list[str]) -> Int64:
    numbers = [int(field) for field in fields if len(field.lstrip("-")) < 20]
    if len(numbers) != len(fields) or max(numbers) > _LARGEST or min(numbers) < -_LARGEST:
        raise ValueError("a number beyond 64 bits")
    return np.array(numbers, np.int64)


def read_ijb_media(path: PathLike) -> IJBMedia:
    """IJB's `ijbb_face_tid_mid.txt` or `ijbc_face_tid_mid.txt`: lines "name template medium", e.g. "1.jpg 1 69544"; template
    and medium are whole numbers, frames of one video share a medium. Raises ValueError naming the file and line."""

    def read(data: bytes) -> IJBMedia:
        names, templates, media = map(list, zip(*_rows(data, 3), strict=True))
        return IJBMedia(names, _whole(templates), _whole(media))

    return _read("read_ijb_media", path, "text", "lines of name, template and medium", read)


def read_ijb_pairs(path: PathLike) -> IJBPairs:
    """IJB's `ijbb_template_pair_label.txt` or `ijbc_template_pair_label.txt`: lines "template template 0|1", e.g.
    "1 11065 1". IJB-C's 15,658,489 pairs are read without a Python object per line. Raises ValueError naming the file and line."""

    def read(data: bytes) -> IJBPairs:
        table = _number_table(data, 3)
        if table is None:
            first, second, same = (_whole(list(column)) for column in zip(*_rows(data, 3), strict=True))
        else:
            first, second, same = np.ascontiguousarray(table.T)
        if not np.isin(same, (0, 1)).all():
            raise ValueError("a label other than 0 and 1")
        return IJBPairs(first, second, same == 1)

    return _read("read_ijb_pairs", path, "text", "lines of template, template and 0 or 1", read)


def read_ijb_landmarks(path: PathLike) -> IJBLandmarks:
    """IJB's `ijbb_name_5pts_score.txt` or `ijbc_name_5pts_score.txt`: lines "name x1 y1 ... x5 y5 score", the eyes, the nose and
    the corners of the mouth in pixels of the loose crop, left ones of the picture first. Raises ValueError naming the file and
    line."""

    def read(data: bytes) -> IJBLandmarks:
        rows = _rows(data, 12)
        values = np.array([[float(field) for field in row[1:]] for row in rows], np.float32)
        if not np.isfinite(values).all():
            raise ValueError("a coordinate or score that is not finite")
        return IJBLandmarks([row[0] for row in rows], values[:, :10].reshape(-1, 5, 2).copy(), values[:, 10].copy())

    return _read("read_ijb_landmarks", path, "text", "lines of name, ten coordinates and a score", read)
