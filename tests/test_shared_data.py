"""Every file of the shared real data by its reader: checksums, counts, and pixels byte for byte as Pillow decodes them."""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Callable, Iterable
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from paths import data_dir

from recog_fast.data import (
    FolderDataset,
    RecordDataset,
    ZipDataset,
    decode_image,
    pack_record,
    read_bin,
    read_records,
    read_tinyface,
    unpack_record,
    write_records,
)
from recog_fast.data.images import EncodedDataset, read_many
from recog_fast.data.records import read_index
from recog_fast.models import build_model, load_backbone

DATA = data_dir()
SAMPLE = 300  # images compared of sources of thousands


def pillow(data: bytes) -> np.ndarray:
    """The image as Pillow alone decodes it."""
    return np.asarray(PIL.Image.open(io.BytesIO(data)).convert("RGB"))


def spread(count: int) -> list[int]:
    """All of few, else SAMPLE evenly spread places, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(count, SAMPLE)).astype(int)).tolist()


def same_pixels(images: Iterable[bytes]) -> None:
    for data in images:
        assert np.array_equal(decode_image(data), pillow(data))


def same_dataset(dataset: EncodedDataset, counts: tuple[int, int]) -> None:
    """Images and classes counted; pixels of single images and of whole batches are Pillow's."""
    assert (len(dataset), dataset.num_classes, len(np.unique(dataset.labels))) == (*counts, counts[1])  # type: ignore[attr-defined]
    places = spread(len(dataset))
    expected = [pillow(dataset.encoded(i)[0]) for i in places]
    rows = [np.empty_like(image) for image in expected]
    assert read_many(dataset, places, rows, [False] * len(rows)) == dataset.labels[places].tolist()  # type: ignore[attr-defined]
    for i, image, row in zip(places, expected, rows, strict=True):
        assert np.array_equal(dataset[i][0], image) and np.array_equal(row, image)


def counted_people(lines: list[str]) -> dict[str, int]:
    """Name -> images of the first four sets of people.txt."""
    found: dict[str, int] = {}
    at = 1
    for _ in range(4):
        size = int(lines[at])
        found |= {name: int(count) for name, count in (line.split("\t") for line in lines[at + 1 : at + 1 + size])}
        at += 1 + size
    return found


def orl(files: list[Path]) -> None:
    """All of them; the pixels of a PGM are its last bytes."""
    dataset = FolderDataset(DATA / "orl")
    assert sorted(dataset.paths) == sorted(map(str, files)) and (len(dataset), dataset.num_classes) == (400, 40)
    for name, (image, _) in zip(dataset.paths, dataset, strict=True):
        data = Path(name).read_bytes()
        assert np.array_equal(image, pillow(data)) and image[:, :, 1].tobytes() == data[-92 * 112 :]


def lfw_train(path: Path) -> None:
    dataset = RecordDataset(path)
    same_dataset(dataset, (5149, 2268))
    assert (path.parent / "property").read_text().split(",")[0].strip() == str(dataset.num_classes)


def lfw_list(path: Path) -> None:
    """Keys and labels of the .lst are those of the .rec; its people and their counts those of the official sets 1 to 4."""
    rows = [line.split("\t") for line in path.read_text().splitlines()]
    dataset = RecordDataset(path.with_suffix(".rec"))
    assert [int(key) for key, _, _ in rows] == dataset.keys.tolist()
    assert [int(label) for _, label, _ in rows] == dataset.labels.tolist()
    counts: dict[str, int] = {}
    for _, _, name in rows:
        person = name.split("/")[0]
        counts[person] = counts.get(person, 0) + 1
    assert counts == counted_people((DATA / "lfw112" / "people.txt").read_text().splitlines())


def lfw_pairs(path: Path) -> None:
    """Names and flags of the .tsv, and so of the .bin, are those of fold 5 of the official pairs."""
    expected = []
    for line in (path.parent / "pairs.txt").read_text().splitlines()[1 + 4 * 600 : 1 + 5 * 600]:
        fields = line.split("\t")
        people = ((fields[0], fields[1]), (fields[-2] if len(fields) == 4 else fields[0], fields[-1]))
        names = [f"{name}/{name}_{int(number):04d}.jpg" for name, number in people]
        expected.append([*names, str(int(len(fields) == 3))])
    assert [line.split("\t") for line in path.with_name("lfw_fold05.tsv").read_text().splitlines()] == expected


def fold_bin(path: Path) -> None:
    images, same = read_bin(path)
    assert (len(images), len(same), sum(same)) == (1200, 600, 300)
    assert [str(int(flag)) for flag in same] == [
        line.split("\t")[2] for line in path.with_suffix(".tsv").read_text().splitlines()
    ]
    same_pixels(images[i] for i in spread(1200))


def small_bin(path: Path) -> None:
    images, same = read_bin(path)
    assert (len(images), same) == (20, [True] * 10)
    same_pixels(images)


def label_array(path: Path) -> None:
    dataset = RecordDataset(path)
    same_dataset(dataset, (10, 4))
    assert dataset.labels.tolist() == [k // 3 for k in range(10)]


def magic_split(path: Path) -> None:
    rows = [line.split("\t") for line in path.with_suffix(".tsv").read_text().splitlines()[1:]]
    found = [[str(k), str(len(p)), hashlib.sha256(p).hexdigest()] for k, p in read_records(path.with_suffix(".rec"))]
    assert found == rows and len(rows) == 8


def index(path: Path) -> None:
    """Keys once each; offsets inside the .rec, on its 4-byte grid, the first 0."""
    keys, offsets = read_index(path)
    assert len(np.unique(keys)) == len(keys) == len(path.read_text().splitlines()) and offsets.min() == 0
    assert not (offsets % 4).any() and offsets.max() < path.with_suffix(".rec").stat().st_size


def tinyface(path: Path) -> None:
    names, ids = read_tinyface(path)
    assert len(names) == len(ids) == len(set(names)) == (3728 if path.name.startswith("probe") else 4443)


def omniglot(path: Path) -> None:
    dataset = ZipDataset(path)
    same_dataset(dataset, (19280, 964))
    assert np.array_equal(np.bincount(dataset.labels), np.full(964, 20))
    with zipfile.ZipFile(path) as archive:  # our reader of entries against Python's
        for i in spread(len(dataset)):
            assert dataset.encoded(i)[0] == archive.read(dataset.paths[i])


def embeddings(path: Path) -> None:
    with np.load(path, allow_pickle=False) as stored:
        rows = len(stored["names"])
        for name in ("clean", "down16", "down8", "down4"):
            values = stored[name].astype(np.float32)
            assert values.shape == (rows, 128) and np.isfinite(values).all() and np.linalg.norm(values, axis=1).min() > 0
        for name in ("a", "b"):
            assert stored[name].shape == (600,) and 0 <= stored[name].min() and stored[name].max() < rows
        assert rows == 737
        names, same = stored["names"], stored["same"].tolist()
        pairs = [[str(names[a]), str(names[b]), str(s)] for a, b, s in zip(stored["a"], stored["b"], same, strict=True)]
    assert pairs == [line.split("\t") for line in (DATA / "lfw112" / "lfw_fold05.tsv").read_text().splitlines()]


def yale(path: Path) -> None:
    with np.load(path, allow_pickle=False) as stored:
        images, labels = stored["images"], stored["labels"]
    assert images.shape == (1205, 32, 32) and images.dtype == np.uint8 and images.std() > 10
    assert sorted(set(labels.tolist())) == list(range(1, 38, 2))


def weights(path: Path) -> None:
    model = build_model("mobilenet_v2", embedding_dim=128)
    assert load_backbone(model, path).loaded == 307
    assert all(value.isfinite().all() for value in model.state_dict().values())


def each(check: Callable[[Path], None]) -> Callable[[list[Path]], None]:
    def run(files: list[Path]) -> None:
        for path in files:
            check(path)

    return run


READERS: dict[str, Callable[[list[Path]], None]] = {
    "embeddings/*.npz": each(embeddings),
    "formats/label_array.rec": each(label_array),
    "formats/magic_split.tsv": each(magic_split),
    "formats/magic_split.rec": each(magic_split),
    "formats/orl_noheader.rec": each(lambda path: same_dataset(RecordDataset(path), (400, 40))),
    "formats/small_lfw.bin": each(small_bin),
    "lfw112/lfw_fold05.bin": each(fold_bin),
    "lfw112/lfw_fold05.tsv": each(lfw_pairs),
    "lfw112/pairs.txt": each(lfw_pairs),
    "lfw112/people.txt": each(lambda path: lfw_list(path.parent / "train_sets1-4" / "train.lst")),
    "lfw112/train_sets1-4/property": each(lambda path: lfw_train(path.with_name("train.rec"))),
    "lfw112/train_sets1-4/train.lst": each(lfw_list),
    "lfw112/train_sets1-4/train.rec": each(lfw_train),
    "*.idx": each(index),
    "omniglot/images_background.zip": each(omniglot),
    "orl/s*/*.pgm": orl,
    "tinyface_protocol/*.mat": each(tinyface),
    "weights/*.pt": each(weights),
    "yaleb32/*.npz": each(yale),
}
# No data: words about the data, and the sums that `test_checksums` compares.
TEXTS = ("README.md", "[!R]*/README.md", "orl/README", "lfw112/README.txt", "*/LICENSE", "SHA256SUMS")
FILES = {path.relative_to(DATA).as_posix(): path for path in sorted(DATA.rglob("*")) if path.is_file()}


def matching(pattern: str) -> list[Path]:
    return [path for name, path in FILES.items() if fnmatch(name, pattern)]


def test_every_file_has_one_reader_or_is_text() -> None:
    """A file of a new kind must get a line above."""
    kinds = {name: [pattern for pattern in (*READERS, *TEXTS) if fnmatch(name, pattern)] for name in FILES}
    assert {name: found for name, found in kinds.items() if len(found) != 1} == {}


@pytest.mark.parametrize("pattern", READERS)
def test_files_are_read_as_they_are(pattern: str) -> None:
    files = matching(pattern)
    if not files:
        pytest.skip(f"no {pattern} below {DATA}")
    READERS[pattern](files)


def test_checksums() -> None:
    """Every file but the list itself is in it, and is what was put there."""
    if "SHA256SUMS" not in FILES:
        pytest.skip(f"no SHA256SUMS in {DATA}")
    sums = dict(reversed(line.split("  ./")) for line in FILES["SHA256SUMS"].read_text().splitlines())
    assert sums == {
        name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in FILES.items() if name != "SHA256SUMS"
    }


MXNET = ["formats/label_array", "formats/magic_split", "formats/orl_noheader", "lfw112/train_sets1-4/train"]


def test_mxnets_files_are_all_compared() -> None:
    """All that lie there: a new one must be added above."""
    assert {name.removesuffix(".rec") for name in FILES if name.endswith(".rec")} <= set(MXNET)


@pytest.mark.parametrize("name", MXNET)
def test_packed_anew_is_mxnets_file(tmp_path: Path, name: str) -> None:
    """From labels, keys and image files, as a user gives them: MXNet's .rec and .idx byte for byte. An independent reader
    thus reads what we write: it is what the independent writer wrote."""
    source = DATA / f"{name}.rec"
    if not source.is_file():
        pytest.skip(f"no {name}.rec in {DATA}")

    def items() -> Iterable[tuple[int, bytes]]:
        for key, payload in read_records(source):
            if name == "formats/magic_split":  # no image records
                yield key, payload
                continue
            found = unpack_record(payload)
            label = list(found.labels) if found.flag else int(found.labels[0])
            yield key, pack_record(label, found.image, key=found.key, id2=found.id2)

    write_records(tmp_path / "o.rec", items())
    assert (tmp_path / "o.rec").read_bytes() == source.read_bytes()
    assert (tmp_path / "o.idx").read_bytes() == source.with_suffix(".idx").read_bytes()
