"""Names of images without an object per image: what lists of str would say, in a fraction of the memory."""

from __future__ import annotations

import gc
import json
import os
import pickle
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recog_fast.data import (
    CorruptImage,
    FolderDataset,
    ListDataset,
    MixedDataset,
    RecordDataset,
    SkipCorrupt,
    SyntheticIdentities,
    TarDataset,
    ZipDataset,
    class_subset,
    pack_record,
    write_records,
)
from recog_fast.data.names import Names, Numbering, PackedNames, chosen_names, joined_names
from recog_fast.training.data import Split, _Unlabelled
from recog_fast.training.kept import Kept

# Relative names; a lone surrogate stands for a byte of a file name that is no UTF-8, and comes from JSON.
letters = st.one_of(st.characters(exclude_characters="/"), st.sampled_from(["\udce9", "\ud800"]))
texts = st.lists(st.text(letters, max_size=6), max_size=12)


def same(names: Names, expected: list[str]) -> None:
    """Length, items from both ends, slices, iteration, membership and equality are the list's, also after pickling."""
    for copy in (names, pickle.loads(pickle.dumps(names))):
        count = len(expected)
        assert len(copy) == count and list(copy) == expected and copy == expected and expected == copy
        assert [copy[k] for k in range(-count, count)] == expected * 2
        for part in (slice(1, None), slice(None, None, -1), slice(-3, 40, 2), slice(5, 2)):
            assert copy[part] == expected[part] and isinstance(copy[part], Names)
        assert copy != [*expected, "more"] and copy != (["other"] * count or ["other"]) and copy != "text"
        assert all(name in copy for name in expected) and "\0absent" not in copy
        for index in (count, -count - 1):
            with pytest.raises(IndexError):
                copy[index]


@given(texts, texts)
def test_names_are_those_of_lists(first: list[str], second: list[str]) -> None:
    packed = PackedNames(first)
    same(packed, first)
    same(PackedNames(iter(first), "/data/of"), [f"/data/of/{name}" for name in first])
    same(joined_names([packed, second, PackedNames([])]), first + second)
    indices = np.arange(len(first))[::-2]
    same(chosen_names(packed, indices), first[::-2])
    same(joined_names([chosen_names(second, range(len(second))), packed])[1:], (second + first)[1:])


def test_many_names_and_absolute_ones() -> None:
    """More than are taken out of the block at once; absolute paths stand for themselves."""
    names = [f"{k:x}/é{k}.jpg" for k in range(9001)] + ["/elsewhere/a.png"]
    packed = PackedNames(names, "faces")
    assert list(packed) == [f"faces/{name}" for name in names[:-1]] + names[-1:]
    assert packed[4096] == f"faces/{names[4096]}"
    held = sum(map(len, map(str.encode, names))) + 8 * 9003
    assert held <= len(pickle.dumps(packed)) < held + 1000, "text and starts, nothing else"
    assert repr(packed) == "<9002 names: 'faces/0/é0.jpg', 'faces/1/é1.jpg', 'faces/2/é2.jpg', ...>"


def test_file_names_that_are_no_text(tmp_path: Path) -> None:
    """Latin-1 of another century: the file is found again."""
    for name in (b"\xe9/b.jpg", b"a/\xff.jpg"):
        path = os.path.join(os.fsencode(tmp_path), name)
        os.makedirs(os.path.dirname(path))
        Path(os.fsdecode(path)).write_bytes(name)
    dataset = FolderDataset(tmp_path, decode=False)
    assert [data for data, _ in dataset] == [b"a/\xff.jpg", b"\xe9/b.jpg"] and dataset.class_names == ["a", "\udce9"]


@given(texts)
def test_classes_are_numbered_in_sorted_order(names: list[str]) -> None:
    numbering = Numbering()
    for name in names:
        numbering.add(name)
    places, distinct = numbering.result()
    assert distinct == sorted(set(names)) and [distinct[k] for k in places] == names and places.dtype == np.int64


COUNT, EACH = 4000, 8
NAMES = [f"n{k // EACH:06d}/{k % EACH:04d}_01.jpg" for k in range(COUNT)]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Callable[[], Any]]:
    """The same 4,000 names as every kind of source."""
    root = tmp_path_factory.mktemp("many")
    for k, name in enumerate(NAMES):
        if k % EACH == 0:
            (root / "faces" / name).parent.mkdir(parents=True)
        (root / "faces" / name).touch()
    (root / "names.csv").write_text("".join(f"faces/{name},{name[:7]}\n" for name in NAMES))
    (root / "numbers.jsonl").write_text(
        "".join(json.dumps({"path": f"faces/{name}", "label": k // EACH}) + "\n" for k, name in enumerate(NAMES))
    )
    with tarfile.open(root / "faces.tar", "w") as tar, zipfile.ZipFile(root / "faces.zip", "w") as archive:
        for name in NAMES:
            tar.addfile(tarfile.TarInfo(name))
            archive.writestr(name, b"")
    write_records(root / "faces.rec", [(k, pack_record(k // EACH, b"", key=k)) for k in range(COUNT)])
    return {
        "folder": lambda: FolderDataset(root / "faces"),
        "csv": lambda: ListDataset(root / "names.csv"),
        "jsonl": lambda: ListDataset(root / "numbers.jsonl"),
        "tar": lambda: TarDataset(root / "faces.tar"),
        "zip": lambda: ZipDataset(root / "faces.zip"),
        "rec": lambda: RecordDataset(root / "faces.rec"),
    }


# Bytes an image beside its name: 8 where it begins, 8 of label, then what finds it in an archive (24 in a tar, 48 in a zip, key
# and offset in a .rec). A list of str alone takes 57 beside the text.
BESIDE = {"folder": 16, "csv": 16, "jsonl": 16, "tar": 40, "zip": 64, "rec": 24}


@pytest.mark.parametrize("kind", BESIDE)
def test_a_source_keeps_no_object_per_image(sources: dict[str, Callable[[], Any]], kind: str) -> None:
    """All of it, names looked at, a split of it and a mixture of both: the arrays, and 2 bytes an image for all else."""
    sources[kind]()  # imports and caches
    gc.collect()
    tracemalloc.start()
    dataset = sources[kind]()
    labels, kept = dataset.labels, sum(map(len, dataset.paths))
    gc.collect()
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(labels) == COUNT == len(dataset.paths) and kept >= COUNT
    text = 0 if kind == "rec" else 19 + 6 * (kind in ("csv", "jsonl"))
    classes = 0 if kind in ("rec", "jsonl") else (8 + 7) / EACH
    assert held / COUNT <= (text + BESIDE[kind] + classes) * 1.13 + 2  # a block that grew has an eighth to spare


def test_parts_and_mixtures_name_their_images(sources: dict[str, Callable[[], Any]]) -> None:
    """Whatever a training set is made of: names made when asked for, those of its images."""
    folder, records = sources["folder"](), sources["rec"]()
    names = [f"{folder.root}/{name}" for name in NAMES]
    keys = [f"{records.file.path}#{k}" for k in range(COUNT)]
    chosen = np.array([5, 3999, 17])
    synthetic = SyntheticIdentities(3, 2, split="unlabelled")
    for dataset, expected in [
        (folder, names),
        (records, keys),
        (MixedDataset([folder, records], unlabelled=[1]), names + keys),
        (class_subset(folder, [3, 1]), [*names[EACH : 2 * EACH], *names[3 * EACH : 4 * EACH]]),
        (Split(records, np.array([0, 499]), unlabelled=True), keys[:EACH] + keys[-EACH:]),
        (_Unlabelled(Split(folder, np.array([2]), unlabelled=False)), names[2 * EACH : 3 * EACH]),
        (Kept(MixedDataset([records, folder]), chosen), [keys[5], keys[3999], keys[17]]),
        (SkipCorrupt(folder), names),
        (synthetic, [f"synthetic/unlabelled/{k:06d}/{j:02d}" for k in range(3) for j in range(2)]),
    ]:
        assert isinstance(dataset.paths, Names) and len(dataset.paths) == len(dataset)
        same(dataset.paths[-20:], expected[-20:])
        assert dataset.paths == expected


def test_a_tar_is_indexed_without_its_headers(sources: dict[str, Callable[[], Any]]) -> None:
    """tarfile keeps an object of a kilobyte for every member it has seen."""
    tracemalloc.start()
    sources["tar"]()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak / COUNT < 600


def test_an_archive_reads_on_in_a_copy(tmp_path: Path) -> None:
    """What was opened before does not travel with it: the copy of a worker opens the file for itself. Every way zip packs, an
    entry with an extra field, bytes before the archive."""
    path, methods = tmp_path / "packed.zip", (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
    with zipfile.ZipFile(path, "w") as archive:
        for method in methods:
            archive.writestr(f"{method}.png", b"%d" % method * 500, method)
        with archive.open("64.png", "w", force_zip64=True) as file:
            file.write(b"64" * 500)
    path.write_bytes(b"#!/bin/sh\n" + path.read_bytes())
    first = ZipDataset(path, decode=False)
    expected = [(name.removesuffix(".png").encode() * 500, 0) for name in first.paths]
    assert [first[k] for k in range(5)] == expected and len({data for data, _ in expected}) == 5
    copy = pickle.loads(pickle.dumps(first))
    del first
    assert [copy[k] for k in range(5)] == expected


def test_entries_that_cannot_be_read(tmp_path: Path) -> None:
    """Encrypted ones, and a directory that points to no entry, each by its name."""
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.png", b"a")
        archive.writestr("b.png", b"b")
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\x01\x02") + 8] |= 1
    data[data.rindex(b"PK\x03\x04") + 3] = 0
    path.write_bytes(data)
    dataset = ZipDataset(path)
    for index, message in ((0, r"an encrypted entry in .*a\.zip:a\.png"), (1, r"no entry at byte \d+ in .*a\.zip:b\.png")):
        with pytest.raises(CorruptImage, match=message):
            dataset[index]
