"""RecordIO: byte-identical writing, magic words, InsightFace's record 0, and files that lie."""

from __future__ import annotations

import io
import pickle
import struct
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import data_dir
from torch.utils.data import DataLoader

from recog_fast.data import RecordDataset, pack_record, read_records, unpack_record, write_identities, write_records
from recog_fast.data.images import CorruptImage
from recog_fast.data.records import MAGIC, RecordFile, index_path, read_index

MAGIC_BYTES = struct.pack("<I", MAGIC)


def png(value: int, size: int = 4) -> bytes:
    """A flat grey PNG."""
    buffer = io.BytesIO()
    PIL.Image.new("L", (size, size), value).save(buffer, "PNG")
    return buffer.getvalue()


def identities_file(folder: Path, counts: tuple[int, ...] = (2, 3, 1)) -> Path:
    """A small InsightFace file: identity k has counts[k] images of grey level 10 k + j."""
    images = [(k, png(10 * k + j)) for k, count in enumerate(counts) for j in range(count)]
    write_identities(folder / "train.rec", images)
    return folder / "train.rec"


def reference_write(payload: bytes) -> bytes:
    """dmlc-core's RecordIOWriter::WriteRecord, word by word."""
    out, start, kind = b"", 0, 0
    for at in range(0, len(payload) // 4 * 4, 4):
        if payload[at : at + 4] == MAGIC_BYTES:
            out += MAGIC_BYTES + struct.pack("<I", (2 if kind else 1) << 29 | (at - start)) + payload[start:at]
            start, kind = at + 4, 1
    out += MAGIC_BYTES + struct.pack("<I", (3 if kind else 0) << 29 | (len(payload) - start)) + payload[start:]
    return out + bytes(-len(payload) % 4)


pieces = st.lists(st.one_of(st.just(MAGIC_BYTES), st.binary(max_size=9), st.just(MAGIC_BYTES[:2])), max_size=8)


@settings(max_examples=100, deadline=None)
@given(st.lists(pieces.map(b"".join), min_size=1, max_size=6))
def test_round_trip_and_bytes(tmp_path_factory: pytest.TempPathFactory, payloads: list[bytes]) -> None:
    """Payloads full of magic words come back unchanged, and the file is dmlc's byte for byte."""
    path = tmp_path_factory.getbasetemp() / "round.rec"
    items = [(3 * i, payload) for i, payload in enumerate(payloads)]
    assert write_records(path, items) == len(items)
    assert list(read_records(path)) == items
    assert path.read_bytes() == b"".join(map(reference_write, payloads))
    Path(index_path(path)).unlink()
    assert [payload for _, payload in read_records(path)] == payloads


def test_pack_and_unpack() -> None:
    record = unpack_record(pack_record([3, 1.5], b"image", key=7, id2=2**40))
    assert record == (2, (3.0, 1.5), 7, 2**40, b"image")
    assert unpack_record(pack_record(5, b"")) == (0, (5.0,), 0, 0, b"")
    with pytest.raises(ValueError, match="header of 24 bytes"):
        unpack_record(b"short")
    with pytest.raises(ValueError, match="4294967295 labels"):
        unpack_record(struct.pack("<IfQQ", 2**32 - 1, 0, 0, 0))
    for name in ("key", "id2"):
        for value in (-1, 2**64):
            with pytest.raises(ValueError, match=rf"pack_record: expected {name} in \[0, 2\^64\), got {value}"):
                pack_record(5, b"", **{name: value})


def test_insightface_layout(tmp_path: Path) -> None:
    rec = identities_file(tmp_path)
    for idx in (None, index_path(rec)):
        dataset = RecordDataset(rec, idx)
        assert (len(dataset), dataset.num_classes) == (6, 3)
        assert dataset.labels.tolist() == [0, 0, 1, 1, 1, 2]
        assert [int(image[0, 0, 0]) for image, _ in dataset] == [0, 1, 10, 11, 12, 20]
        assert dataset.paths[0] == f"{rec}#1"
    assert dataset[-1][1] == 2 and dataset[0][0].shape == (4, 4, 3)
    with pytest.raises(IndexError):
        dataset[6]
    Path(index_path(rec)).unlink()
    assert RecordDataset(rec).labels.tolist() == [0, 0, 1, 1, 1, 2]


def test_counts_do_not_come_from_float32(tmp_path: Path) -> None:
    """Record 0's float32 numbers may be wrong by rounding (WebFace42M) or altogether: nothing is derived from them."""
    items = list(read_records(identities_file(tmp_path)))
    items[0] = (0, pack_record([42_474_558.0, 44_533_572.0], b""))
    write_records(tmp_path / "odd.rec", items)
    dataset = RecordDataset(tmp_path / "odd.rec")
    assert (len(dataset), dataset.num_classes) == (6, 3)


def test_label_array_record_at_key_0_is_an_image(tmp_path: Path) -> None:
    """InsightFace's own test for record 0 (flag > 0) would swallow the first image of a label-array file."""
    write_records(tmp_path / "a.rec", [(k, pack_record([k // 2, 1.0], png(k))) for k in range(5)])
    dataset = RecordDataset(tmp_path / "a.rec")
    assert dataset.labels.tolist() == [0, 0, 1, 1, 2] and dataset.num_classes == 3
    assert [label for _, label in dataset] == [0, 0, 1, 1, 2]


def test_labels_of_split_records(tmp_path: Path) -> None:
    """A record whose image holds aligned magic words, and one whose header does, still give their label."""
    write_records(tmp_path / "s.rec", [(0, pack_record(4, MAGIC_BYTES * 3)), (1, pack_record(2, b"x", key=MAGIC))])
    dataset = RecordDataset(tmp_path / "s.rec", decode=False)
    assert dataset.labels.tolist() == [4, 2]
    assert [item for item in dataset] == [(MAGIC_BYTES * 3, 4), (b"x", 2)]


@pytest.mark.parametrize("label", [0.5, float("nan"), float("inf"), -2.0, 2.0**24 + 2])
def test_labels_that_are_none(tmp_path: Path, label: float) -> None:
    write_records(tmp_path / "l.rec", [(0, pack_record(1, b"x")), (1, pack_record(label, b"x"))])
    dataset = RecordDataset(tmp_path / "l.rec", decode=False)
    with pytest.raises(ValueError, match=r"whole label in \[-1, 2\^24\] at offset 36"):
        _ = dataset.labels
    with pytest.raises(ValueError, match="whole label"):
        dataset[1]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers(tmp_path: Path, method: str) -> None:
    dataset = RecordDataset(identities_file(tmp_path, (2, 1)))
    assert dataset[0][1] == 0  # the map is open in the parent before the workers start
    loader = DataLoader(dataset, batch_size=2, num_workers=1, multiprocessing_context=method)
    assert [label for _, labels in loader for label in labels.tolist()] == [0, 0, 1]


def test_pickle_carries_no_map(tmp_path: Path) -> None:
    dataset = RecordDataset(identities_file(tmp_path))
    assert len(pickle.dumps(dataset)) < 4000
    assert np.array_equal(pickle.loads(pickle.dumps(dataset))[3][0], dataset[3][0])


def test_writers_refuse(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="key 1: a key seen before"):
        write_records(tmp_path / "w.rec", [(1, b""), (1, b"")])
    with pytest.raises(ValueError, match="labels 0, 1, 2, .* got 2 at item 1"):
        write_identities(tmp_path / "w.rec", [(0, b"a"), (2, b"b")])


def test_corrupt_image_names_its_record(tmp_path: Path) -> None:
    write_records(tmp_path / "c.rec", [(5, pack_record(0, b"\xff\xd8 no jpeg")), (6, pack_record(0, b""))])
    dataset = RecordDataset(tmp_path / "c.rec")
    with pytest.raises(CorruptImage, match=r"c\.rec#5 \(index 0\)") as caught:
        dataset[0]
    assert pickle.loads(pickle.dumps(caught.value)).source == caught.value.source
    with pytest.raises(CorruptImage, match="0 bytes"):
        dataset[1]


def test_truncated_and_foreign_files(tmp_path: Path) -> None:
    rec = identities_file(tmp_path)
    whole, idx = rec.read_bytes(), index_path(rec)
    cut = tmp_path / "cut.rec"
    cut.write_bytes(whole[:-4])
    with pytest.raises(ValueError, match=rf"bytes and padding at offset {len(whole) - 40} of .*cut\.rec"):
        RecordDataset(cut, idx)
    with pytest.raises(ValueError, match="bytes and padding"):
        RecordDataset(cut)
    cut.write_bytes(whole[: read_index(idx)[1][4]])
    with pytest.raises(ValueError, match="offsets inside .*truncated"):
        RecordDataset(cut, idx)
    with pytest.raises(ValueError, match="expected 10 records in .*cut.rec, got 4: truncated"):
        RecordDataset(cut)
    cut.write_bytes(b"")
    with pytest.raises(ValueError, match="got an empty file"):
        RecordDataset(cut)
    cut.write_bytes(b"PK\x03\x04" * 20)
    with pytest.raises(ValueError, match="magic number 0xced7230a at offset 0"):
        RecordDataset(cut)
    with pytest.raises(ValueError, match="which is no file"):
        RecordDataset(tmp_path / "absent.rec")
    with pytest.raises(ValueError, match="which is no file"):
        RecordDataset(rec, tmp_path / "absent.idx")
    write_records(cut, [(0, pack_record([1, 1], b""))])
    with pytest.raises(ValueError, match="expected image records in .*cut.rec, got none of 1"):
        RecordDataset(cut)


@pytest.mark.parametrize("text", ["", "a\tb\n", "1 2\n", "1\t2\t3\n", "1\n2\n", "0\t0\n1\t-5\n", "\x00"])
def test_malformed_index(tmp_path: Path, text: str) -> None:
    rec = identities_file(tmp_path)
    (tmp_path / "bad.idx").write_text(text)
    with pytest.raises(ValueError, match=r"key<TAB>offset in .*bad\.idx"):
        RecordDataset(rec, tmp_path / "bad.idx")


def test_index_inside_a_record(tmp_path: Path) -> None:
    rec = identities_file(tmp_path)
    (tmp_path / "in.idx").write_text("1\t52\n2\t48\n")
    with pytest.raises(ValueError, match="magic number .* at offset 52"):
        RecordDataset(rec, tmp_path / "in.idx")


def test_wild_length_allocates_nothing(tmp_path: Path) -> None:
    path = tmp_path / "wild.rec"
    path.write_bytes(struct.pack("<II", MAGIC, (1 << 29) - 1) + bytes(8))
    with pytest.raises(ValueError, match="expected 536870911 bytes and padding at offset 0 of .*wild.rec, got 8 bytes"):
        RecordFile(path).read(0)


def test_mutations_give_clean_errors(tmp_path: Path) -> None:
    """400 damaged copies: every one reads, or raises ValueError naming the file; nothing else, and never slowly."""
    rec = identities_file(tmp_path)
    whole, text = rec.read_bytes(), Path(index_path(rec)).read_bytes()
    rng = np.random.default_rng(0)
    damaged, index = tmp_path / "damaged.rec", tmp_path / "damaged.idx"
    failures = 0
    for round_ in range(400):
        data, lines = bytearray(whole), bytearray(text)
        target = lines if round_ % 3 == 0 else data
        for _ in range(int(rng.integers(1, 4))):
            target[rng.integers(len(target))] = rng.integers(256)
        if round_ % 5 == 0:
            del data[int(rng.integers(len(data))) :]
        damaged.write_bytes(data)
        index.write_bytes(lines)
        try:
            dataset = RecordDataset(damaged, index if round_ % 2 else None, decode=round_ % 4 == 0)
            assert 0 < dataset.num_classes <= 2**24 + 1
            for item in dataset:
                assert isinstance(item[1], int)
        except ValueError as error:
            assert "damaged" in str(error)
            failures += 1
    assert failures > 130


def test_orl_without_record_0() -> None:
    folder = data_dir()
    dataset = RecordDataset(folder / "formats" / "orl_noheader.rec")
    assert (len(dataset), dataset.num_classes) == (400, 40)
    paths = sorted(f"s{s}/{i}.pgm" for s in range(1, 41) for i in range(1, 11))
    for i in range(0, 400, 7):
        image, label = dataset[i]
        name = paths[dataset.keys[i]]
        grey = np.asarray(PIL.Image.open(folder / "orl" / name))
        assert np.array_equal(image, np.repeat(grey[:, :, None], 3, axis=2))
        assert dataset.labels[i] == label
    # One label, one folder.
    pairs = {(int(label), paths[key].split("/")[0]) for key, label in zip(dataset.keys, dataset.labels, strict=True)}
    assert len(pairs) == 40


def test_lfw_train(tmp_path: Path) -> None:
    rec = data_dir() / "lfw112" / "train_sets1-4" / "train.rec"
    dataset = RecordDataset(rec)
    assert (len(dataset), dataset.num_classes) == (5149, 2268)
    assert len(np.unique(dataset.labels)) == 2268
    rows = [line.split("\t") for line in rec.with_suffix(".lst").read_text().splitlines()]
    assert dataset.labels.tolist() == [int(label) for _, label, _ in rows]
    raw = RecordDataset(rec, decode=False)
    for i in range(0, 5149, 53):
        data, label = raw[i]
        pillow = np.asarray(PIL.Image.open(io.BytesIO(data)).convert("RGB"))
        assert np.array_equal(dataset[i][0], pillow) and dataset[i][1] == label
    write_identities(tmp_path / "again.rec", ((label, data) for data, label in raw))
    assert (tmp_path / "again.rec").read_bytes() == rec.read_bytes()


def test_labels_beyond_float32(tmp_path: Path) -> None:
    """Above 2^24 float32 labels of different people fall together: our records carry the number itself in id2."""
    labels = [2**24 - 1, 2**24, 2**24 + 1, 2**40 + 3, 7]
    write_records(tmp_path / "big.rec", [(k, pack_record(label, b"x", key=k)) for k, label in enumerate(labels)])
    dataset = RecordDataset(tmp_path / "big.rec", decode=False)
    assert dataset.labels.tolist() == labels == [label for _, label in dataset]
    # MXNet's own bytes stay as they are: a small label touches nothing.
    assert pack_record(2**24 - 1, b"x") == struct.pack("<IfQQ", 0, 2.0**24 - 1, 0, 0) + b"x"
    # id2 of other writers, which is no label, is not taken for one.
    write_records(tmp_path / "big.rec", [(0, pack_record(2.0**25, b"x", id2=5))])
    with pytest.raises(ValueError, match="whole label"):
        _ = RecordDataset(tmp_path / "big.rec").labels
