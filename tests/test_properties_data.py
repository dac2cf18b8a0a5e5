"""Properties of whatever is drawn: conversions, samplers and protocol files."""

from __future__ import annotations

import csv
import itertools
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from fuzz import examples
from hypothesis import assume, example, given
from hypothesis import strategies as st

from recog_fast import data

SEEDS = st.integers(0, 2**32 - 1)

# -- conversions -------------------------------------------------------------------------------------------------------

# Letters with meaning to one of the formats: dots and percent signs (tar), quotes and commas (list), tabs and line ends (.lst), bytes
# that are no UTF-8, a combining accent, a long name (pax).
STEMS = st.text(st.sampled_from(list("abA1 .%,\"'#~é\u0301\t\n\\\udce9")), min_size=1, max_size=6) | st.just("x" * 120)
FOLDERS = STEMS.filter(lambda name: name not in (".", ".."))
TREES = st.dictionaries(
    st.tuples(st.lists(FOLDERS, max_size=2).map("/".join), STEMS.filter(lambda n: not n.startswith(".")), st.sampled_from([".jpg", ".JPG", ".png"])),
    st.binary(max_size=20) | st.just(b"\x0a\x23\xd7\xce" * 3), min_size=1, max_size=6,
)  # fmt: skip


def written(root: Path, tree: dict[tuple[str, str, str], bytes]) -> None:
    """The tree's files below a folder."""
    for (folder, stem, suffix), content in tree.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        (root / folder / f"{stem}{suffix}").write_bytes(content)


def by_class(source: Any) -> list[list[bytes]]:
    """The files of every class, sorted."""
    found: dict[int, list[bytes]] = {}
    for k in range(len(source)):
        content, label = source.encoded(k)
        found.setdefault(label, []).append(content)
    return [sorted(found[label]) for label in sorted(found)]


@examples(25)
@given(tree=TREES, way=st.permutations(["x.rec", "x.tar", "folder", "list"]))
def test_a_tree_of_files_comes_through_every_format(tree: dict[tuple[str, str, str], bytes], way: list[str]) -> None:
    """Classes and bytes whatever the names; names too, where they are ones that every format takes."""
    with tempfile.TemporaryDirectory() as folder:
        written(Path(folder) / "start", tree)
        place = Path(folder) / "start"
        first = data.open_dataset(place)
        truth = by_class(first)
        for name in way:
            target = Path(folder) / "made" / name
            target.parent.mkdir(exist_ok=True)
            kind = name if name in ("folder", "list") else None
            assert data.convert_dataset(data.open_dataset(place, "list" if place.suffix == ".csv" else None), target, kind).verified
            place = target / "labels.csv" if kind == "list" else target
            opened = data.open_dataset(place)
            assert by_class(opened) == truth and opened.num_classes == first.num_classes
        plain = all(part.isalnum() and part.isascii() for (where, stem, _) in tree for part in [*where.split("/"), stem] if part)
        keys = {(where, stem) for where, stem, _ in tree}
        if plain and len(keys) == len(tree):
            names = [os.path.relpath(path, Path(folder) / "start") for path in first.paths]  # type: ignore[attr-defined]
            with (Path(folder) / "made" / "list" / "labels.csv").open(encoding="utf-8", newline="") as file:
                assert sorted(row[0] for row in list(csv.reader(file))[1:]) == sorted(names)


# -- samplers ----------------------------------------------------------------------------------------------------------


@examples(100)
@given(length=st.integers(1, 60), batch=st.integers(1, 9), world=st.integers(1, 5), drop_last=st.booleans(), buffer=st.integers(0, 20), seed=SEEDS, data_=st.data())
def test_an_epoch_is_every_index_once_over_the_ranks_and_resumes_anywhere(
    length: int, batch: int, world: int, drop_last: bool, buffer: int, seed: int, data_: st.DataObject
) -> None:
    assume(not drop_last or length >= batch * world)

    def sampler(rank: int) -> data.ResumableBatches:
        return data.ResumableBatches(length, batch, seed, rank, world, drop_last, buffer)

    ranks = [list(sampler(rank)) for rank in range(world)]
    assert len({len(batches_) for batches_ in ranks}) == 1 and len({tuple(map(len, batches_)) for batches_ in ranks}) == 1
    seen = [index for step in zip(*ranks, strict=True) for keys in step for _, index in keys]
    if drop_last:
        assert len(seen) == len(set(seen)) == length // (batch * world) * batch * world and set(seen) <= set(range(length))
    else:
        assert set(seen) == set(range(length)) and len(seen) == length + -length % world
    stop = data_.draw(st.integers(0, len(ranks[0]) - 1))
    first = sampler(0)
    handed = list(itertools.islice(first.track(first), stop))
    again = sampler(0)
    again.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert handed + list(again) == ranks[0]


@examples(60)
@given(streams=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 4)), min_size=1, max_size=3), world=st.integers(1, 3), stop=st.integers(0, 12), seed=SEEDS)
def test_every_stream_is_every_index_once_an_epoch_and_resumes_anywhere(streams: list[tuple[int, int]], world: int, stop: int, seed: int) -> None:
    assume(all(length >= count * world for length, count in streams))
    lengths, counts = zip(*streams, strict=True)

    def sampler(rank: int) -> data.StreamBatches:
        return data.StreamBatches(lengths, counts, seed, rank, world, steps=20)

    ranks = [list(sampler(rank)) for rank in range(world)]
    start = 0
    for length, count in streams:
        keys = [key for step in zip(*ranks, strict=True) for keys in step for key in keys if start <= key[1] < start + length]
        assert len(keys) == 20 * count * world and len(set(keys)) == len(keys), "an image twice in an epoch of its stream"
        assert max(epoch for epoch, _ in keys) == (20 - 1) // (length // (count * world))
        start += length
    first = sampler(0)
    handed = list(itertools.islice(first.track(first), stop))
    again = sampler(0)
    again.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert handed + list(again) == ranks[0]


# -- protocol files ----------------------------------------------------------------------------------------------------

WORDS = st.text(st.characters(codec="utf-8", exclude_characters=" \t\r\n\0"), min_size=1, max_size=8)
IDS = st.integers(-(2**62), 2**62)
SPACES, ENDS = st.sampled_from([" ", "\t", "  "]), st.sampled_from(["\n", "\r\n", "\n\n", "\r"])


def lines(rows: list[tuple[Any, ...]], space: str, end: str) -> bytes:
    """A text file of these rows."""
    return "".join(space.join(map(str, row)) + end for row in rows).encode()


def read_back(read: Any, content: bytes) -> Any:
    """What a reader gives for a file of these bytes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "protocol.txt"
        path.write_bytes(content)
        return read(path)


@examples(60)
@given(rows=st.lists(st.tuples(WORDS, IDS, IDS), min_size=1, max_size=5), space=SPACES, end=ENDS)
@example(rows=[("1.jpg", -(10**18), 2**62)], space=" ", end="\n")
def test_media_are_read_as_they_were_written(rows: list[tuple[str, int, int]], space: str, end: str) -> None:
    media = read_back(data.read_ijb_media, lines(rows, space, end))
    assert list(zip(media.names, media.templates.tolist(), media.media.tolist(), strict=True)) == rows


@examples(60)
@given(rows=st.lists(st.tuples(st.integers(0, 10**6) | IDS, st.integers(0, 10**6), st.integers(0, 1)), min_size=1, max_size=5), space=SPACES, end=ENDS)
def test_pairs_are_read_as_they_were_written(rows: list[tuple[int, int, int]], space: str, end: str) -> None:
    pairs = read_back(data.read_ijb_pairs, lines(rows, space, end))
    assert list(zip(pairs.first.tolist(), pairs.second.tolist(), pairs.same.tolist(), strict=True)) == [(a, b, bool(c)) for a, b, c in rows]


@examples(30)
@given(rows=st.lists(st.tuples(WORDS, *[st.floats(-1e4, 1e4, width=32)] * 11), min_size=1, max_size=4), space=SPACES, end=ENDS)
def test_landmarks_are_read_as_they_were_written(rows: list[tuple[Any, ...]], space: str, end: str) -> None:
    found = read_back(data.read_ijb_landmarks, lines(rows, space, end))
    values = np.array([row[1:] for row in rows], np.float32)
    assert found.names == [row[0] for row in rows]
    assert np.array_equal(found.points.reshape(-1, 10), values[:, :10]) and np.array_equal(found.scores, values[:, 10])
