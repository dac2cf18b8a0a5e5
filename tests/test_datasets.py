"""Folders, lists, zips and tars give the same images; decoding; corrupt images; subsets."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from paths import data_dir
from torch.utils.data import DataLoader

from recog_fast.data import (
    CorruptImage,
    FolderDataset,
    ListDataset,
    Resized,
    SkipCorrupt,
    TarDataset,
    ZipDataset,
    class_subset,
    decode_image,
    images_to_tensor,
    resize_image,
)


def encode(value: int, suffix: str = "png", size: tuple[int, int] = (6, 4)) -> bytes:
    """A flat grey image of (width, height)."""
    buffer = io.BytesIO()
    PIL.Image.new("RGB", size, (value, value, value)).save(buffer, {"jpg": "JPEG", "png": "PNG"}[suffix])
    return buffer.getvalue()


# Two alphabets with a folder of the same name, hidden and foreign files between.
FILES = {
    "greek/c01/b.png": 20,
    "greek/c01/a.png": 10,
    "latin/c01/a.jpg": 30,
    "latin/c02/x.PNG": 40,
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name, value in FILES.items():
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(value, name[-3:].lower()))
    (tmp_path / "images" / "greek" / "readme.txt").write_text("no image")
    (tmp_path / "images" / "greek" / "._a.png").write_text("a resource fork")
    return tmp_path / "images"


def check(dataset: FolderDataset | ListDataset | ZipDataset | TarDataset) -> None:
    """Four images of three classes in sorted order, also after pickling."""
    for copy in (dataset, pickle.loads(pickle.dumps(dataset))):
        assert (len(copy), copy.num_classes) == (4, 3)
        assert copy.labels.tolist() == [0, 0, 1, 2] and copy.labels.dtype == np.int64
        assert [(int(image[0, 0, 0]), label) for image, label in copy] == [(10, 0), (20, 0), (30, 1), (40, 2)]
        assert copy[0][0].shape == (4, 6, 3) and copy[0][0].dtype == np.uint8
    with pytest.raises(IndexError):
        dataset[4]


def make_zip(root: Path, prefix: str = "") -> Path:
    path = root.parent / "images.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name in reversed(FILES):
            archive.write(root / name, prefix + name)
        archive.writestr(prefix + "__MACOSX/x.png", b"junk") if not prefix else None
    return path


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


def test_folder(root: Path) -> None:
    dataset = FolderDataset(root)
    check(dataset)
    assert dataset.class_names == ["greek/c01", "latin/c01", "latin/c02"]
    assert dataset.paths[0] == str(root / "greek" / "c01" / "a.png")
    data, label = FolderDataset(root, decode=False)[2]
    assert (data, label) == ((root / "latin/c01/a.jpg").read_bytes(), 1)
    assert FolderDataset(root / "latin" / "c02").class_names == ["."]


def test_zip(root: Path) -> None:
    check(ZipDataset(make_zip(root)))
    dataset = ZipDataset(make_zip(root, "set/"), prefix="set")
    check(dataset)
    assert dataset.class_names == ["greek/c01", "latin/c01", "latin/c02"]
    with pytest.raises(ValueError, match="images below se/ in .*, got none"):
        ZipDataset(root.parent / "images.zip", prefix="se")


def test_lists(root: Path) -> None:
    names, labels = sorted(FILES), ["ann", "ann", "bob", "eve"]
    base = root.parent
    rows = [f"images/{name},{label}" for name, label in zip(names, labels, strict=True)]
    (base / "plain.csv").write_text("\n".join(rows))
    (base / "header.csv").write_text(
        "label,more,path\n" + "\n".join(f"{r.split(',')[1]},?,{r.split(',')[0]}" for r in rows)
    )
    (base / "list.jsonl").write_text(
        "\n\n".join(json.dumps(dict(zip(("path", "label"), r.split(","), strict=True))) for r in rows)
    )
    for name in ("plain.csv", "header.csv", "list.jsonl"):
        check(ListDataset(base / name))
    assert ListDataset(base / "plain.csv").class_names == ["ann", "bob", "eve"]
    (root / "numbers.csv").write_text(
        "\n".join(f"{name},{label}" for name, label in zip(names, (5, -1, 0, 5), strict=True))
    )
    dataset = ListDataset(root / "numbers.csv")
    assert dataset.labels.tolist() == [5, -1, 0, 5] and dataset.num_classes == 6
    (base / "elsewhere.csv").write_text((root / "numbers.csv").read_text())
    assert len(ListDataset(base / "elsewhere.csv", root=root)) == 4


def test_tar(root: Path) -> None:
    """Labels from .cls, from .json, from the folder; two shards; names and numbers."""
    values, labels = [10, 20, 30, 40], [0, 0, 1, 2]
    shards = [root.parent / f"shard{k}.tar" for k in range(2)]
    for k, shard in enumerate(shards):
        with tarfile.open(shard, "w") as archive:
            for i in range(2 * k, 2 * k + 2):
                add(archive, f"./{i:04d}.jpg", encode(values[i], "jpg"))
                add(
                    archive,
                    f"./{i:04d}.cls" if k else f"./{i:04d}.json",
                    str(labels[i]).encode() if k else b'{"label": 0}',
                )
    check(TarDataset(shards))
    with tarfile.open(shards[0], "w") as archive:
        for name in sorted(FILES):
            archive.add(root / name, name)
    check(TarDataset(shards[0]))
    loader = DataLoader(TarDataset(shards[0]), batch_size=None, num_workers=2)
    assert [label for _, label in loader] == [0, 0, 1, 2]


def test_missing_and_empty_sources(root: Path) -> None:
    base = root.parent
    (base / "empty").mkdir()
    (base / "text.csv").write_text("")
    (base / "gone.csv").write_text("images/greek/c01/a.png,0\nimages/gone.png,1\n")
    (base / "short.csv").write_text("images/greek/c01/a.png\n")
    (base / "bad.jsonl").write_text('{"path": "x"}\n')
    (base / "latin.csv").write_bytes(b"\xff\xfe,1\n")
    (base / "huge.csv").write_text("images/greek/c01/a.png,99999999999\n")
    (base / "no.zip").write_bytes(b"PK nothing")
    (base / "no.tar").write_bytes(b"x" * 2000)
    (base / "packed.tar").write_bytes(gzip.compress(b"x" * 2000))
    for call, message in [
        (lambda: FolderDataset(base / "absent"), "expected root to be a folder"),
        (lambda: FolderDataset(base / "empty"), r"expected images \(\.jpg.* below .*empty, got none"),
        (lambda: ListDataset(base / "absent.csv"), "expected path to be a .csv or .jsonl file"),
        (lambda: ListDataset(base / "no.zip"), "expected path to be a .csv or .jsonl file"),
        (lambda: ListDataset(base / "text.csv"), "empty list"),
        (lambda: ListDataset(base / "gone.csv"), "line 2 of .*gone.csv, got .*gone.png, which is no file"),
        (lambda: ListDataset(base / "short.csv"), "path and label in line 1"),
        (lambda: ListDataset(base / "bad.jsonl"), "in line 1 of .*bad.jsonl"),
        (lambda: ListDataset(base / "latin.csv"), "UTF-8"),
        (lambda: ListDataset(base / "huge.csv"), r"below 2\^31"),
        (lambda: ZipDataset(base / "absent.zip"), "expected path to be a zip file"),
        (lambda: ZipDataset(base / "no.zip"), "expected path to be a zip file"),
        (lambda: TarDataset(base / "absent.tar"), "expected path to be a .tar file"),
        (lambda: TarDataset(base / "no.tar"), "uncompressed, whole tar"),
        (lambda: TarDataset(base / "packed.tar"), "uncompressed, whole tar"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


def test_truncated_tar_and_missing_label(root: Path) -> None:
    path = root.parent / "t.tar"
    with tarfile.open(path, "w") as archive:
        add(archive, "a.png", encode(1))
        add(archive, "a.cls", b"0")
        add(archive, "b.png", encode(2) + bytes(20000))
    with pytest.raises(ValueError, match="a .cls or .json label for b.png in .*t.tar, got none"):
        TarDataset(path)
    path.write_bytes(path.read_bytes()[:4000])
    with pytest.raises(ValueError, match="whole tar"):
        TarDataset(path)


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK", "RGB"])
def test_decoding_gives_rgb(mode: str) -> None:
    rng = np.random.default_rng(0)
    image = PIL.Image.fromarray(rng.integers(0, 256, (9, 7, 3), np.uint8)).convert(mode)
    for kind in ("JPEG", "PNG", "TIFF"):
        if (kind, mode) in (("JPEG", "P"), ("JPEG", "LA"), ("JPEG", "RGBA"), ("PNG", "CMYK")):
            continue
        buffer = io.BytesIO()
        image.save(buffer, kind)
        decoded = decode_image(buffer.getvalue())
        assert decoded.shape == (9, 7, 3) and decoded.dtype == np.uint8 and decoded.flags.writeable
        expected = np.asarray(PIL.Image.open(io.BytesIO(buffer.getvalue())).convert("RGB"))
        assert np.array_equal(decoded, expected)


def test_16_bit_grey_keeps_its_high_byte() -> None:
    buffer = io.BytesIO()
    PIL.Image.fromarray(np.array([[0, 255, 256, 65535]], np.uint16)).save(buffer, "PNG")
    assert decode_image(buffer.getvalue())[0, :, 1].tolist() == [0, 0, 1, 255]


def test_corrupt_images_and_bombs() -> None:
    jpeg = encode(7, "jpg", (64, 64))
    # A PNG header that asks for 60000 x 60000 pixels.
    bomb = bytearray(encode(1))
    bomb[16:24] = struct.pack(">II", 60000, 60000)
    sof = jpeg.index(b"\xff\xc0") + 5
    giant = jpeg[:sof] + struct.pack(">HH", 65500, 65500) + jpeg[sof + 4 :]
    for data in (b"", b"\xff\xd8", jpeg[:100], encode(1)[:40], b"nothing", bytes(bomb), giant):
        with pytest.raises(CorruptImage, match=r"in here \(index 3\)"):
            decode_image(data, "here", 3)


def test_resize_and_tensor() -> None:
    image = np.arange(4 * 4 * 3, dtype=np.uint8).reshape(4, 4, 3)
    assert np.array_equal(resize_image(image, 4), image)
    assert resize_image(image, 2)[0, 0].tolist() == np.rint(image[:2, :2].mean((0, 1)) + 1e-6).tolist()
    assert resize_image(image, (8, 3)).shape == (8, 3, 3)
    tensor = images_to_tensor(image)
    assert tensor.shape == (3, 4, 4) and tensor[1, 2, 3] == pytest.approx(image[2, 3, 1] / 127.5 - 1, abs=1e-6)
    assert images_to_tensor(image[None]).shape == (1, 3, 4, 4)
    assert images_to_tensor(np.array([[[0, 255, 0]]], np.uint8)).flatten().tolist() == [-1.0, 1.0, -1.0]
    with pytest.raises(ValueError, match="uint8, got"):
        images_to_tensor(image.astype(np.float32))
    with pytest.raises(ValueError, match="size >= 1"):
        resize_image(image, 0)


def broken_folder(root: Path) -> FolderDataset:
    """Images 1 and 2 of four are corrupt."""
    (root / "greek/c01/b.png").write_bytes(b"broken")
    (root / "latin/c01/a.jpg").write_bytes(b"")
    return FolderDataset(root)


def test_skip_corrupt(root: Path) -> None:
    dataset = SkipCorrupt(broken_folder(root), root.parent / "logs" / "quarantine.jsonl", budget=2)
    for _ in range(2):  # the second epoch counts nothing twice
        assert [(int(image[0, 0, 0]), label) for image, label in (dataset[i] for i in range(4))] == [
            (10, 0),
            (40, 2),
            (40, 2),
            (40, 2),
        ]
    assert [entry["index"] for entry in dataset.corrupt()] == [1, 2]
    assert dataset.corrupt()[0]["source"].endswith("b.png")
    assert len((root.parent / "logs" / "quarantine.jsonl").read_text().splitlines()) == 2
    resumed = SkipCorrupt(FolderDataset(root), root.parent / "logs" / "quarantine.jsonl", budget=1)
    with pytest.raises(RuntimeError, match=r"at most 1 corrupt images \(budget\), got 2, the last .*b\.png"):
        resumed[1]


@pytest.mark.parametrize("workers", [0, 2])
def test_skip_corrupt_budget_spans_workers(root: Path, workers: int) -> None:
    """Each worker meets one corrupt image; together they are more than the budget of one."""
    dataset = SkipCorrupt(broken_folder(root), None, budget=1)
    loader = DataLoader(dataset, batch_size=1, num_workers=workers, collate_fn=lambda batch: batch[0][1])
    with pytest.raises(RuntimeError, match="budget"):
        list(loader)
    assert len(dataset.corrupt()) == 2


def test_temporary_quarantine_goes_with_its_dataset(root: Path) -> None:
    dataset = SkipCorrupt(FolderDataset(root), None)
    temporary, copy = dataset.quarantine, pickle.loads(pickle.dumps(dataset))
    del copy
    assert temporary.is_file()
    del dataset
    assert not temporary.exists()


def test_skip_corrupt_gives_up_on_nothing_readable(root: Path) -> None:
    for name in FILES:
        (root / name).write_bytes(b"")
    with pytest.raises(RuntimeError, match="expected a readable image, got 4 corrupt ones"):
        SkipCorrupt(FolderDataset(root), None)[0]
    with pytest.raises(ValueError, match="budget >= 0"):
        SkipCorrupt(FolderDataset(root), None, budget=-1)


def test_a_file_that_vanishes_is_corrupt(root: Path) -> None:
    dataset = FolderDataset(root)
    os.remove(dataset.paths[0])
    with pytest.raises(CorruptImage, match="FileNotFoundError"):
        dataset[0]


def test_corrupt_image_keeps_its_type_through_a_worker(root: Path) -> None:
    loader = DataLoader(broken_folder(root), batch_size=None, num_workers=1)
    with pytest.raises(CorruptImage, match=r"b\.png \(index 1\)"):
        list(loader)


def test_zip_with_a_bad_checksum(root: Path) -> None:
    path = make_zip(root)
    data = bytearray(path.read_bytes())
    data[data.index(b"IDAT") + 6] ^= 255
    path.write_bytes(data)
    with pytest.raises(CorruptImage, match="images.zip:.*CRC|CRC.*images.zip:"):
        list(ZipDataset(path))


def test_class_subset_and_resized(root: Path) -> None:
    subset = class_subset(FolderDataset(root), [2, 0])
    assert subset.labels.tolist() == [1, 1, 0] and subset.num_classes == 2 and subset.class_ids.tolist() == [2, 0]
    assert [(int(image[0, 0, 0]), label) for image, label in (subset[i] for i in range(3))] == [
        (10, 1),
        (20, 1),
        (40, 0),
    ]
    assert subset.paths[2].endswith("x.PNG")
    small = Resized(subset, (2, 3))
    assert small[0][0].shape == (2, 3, 3) and small.labels is subset.labels and small.num_classes == 2
    for classes in ([], [0, 0], [3], [-1]):
        with pytest.raises(ValueError, match=r"distinct classes in \[0, 3\)"):
            class_subset(FolderDataset(root), classes)
    with pytest.raises(ValueError, match="size >= 1"):
        Resized(subset, 0)
    inside = class_subset(SkipCorrupt(broken_folder(root), None), [0])
    with pytest.raises(ValueError, match="wrap the subset in SkipCorrupt"):
        inside[1]


def test_omniglot() -> None:
    dataset = ZipDataset(data_dir() / "omniglot" / "images_background.zip")
    assert (len(dataset), dataset.num_classes) == (19280, 964)
    assert np.array_equal(np.bincount(dataset.labels), np.full(964, 20))
    image, label = dataset[1234]
    assert image.shape == (105, 105, 3) and set(np.unique(image)) == {0, 255} and label == 1234 // 20
    # The class number in the file name agrees with the folder.
    numbers = {
        (int(label), Path(path).name.split("_")[0]) for path, label in zip(dataset.paths, dataset.labels, strict=True)
    }
    assert len(numbers) == 964


def test_one_wild_label_costs_nothing(root: Path) -> None:
    (root / "wild.csv").write_text("greek/c01/a.png,2147483647\n")
    dataset = ListDataset(root / "wild.csv")
    assert dataset.num_classes == 1 << 31 and dataset[0][1] == (1 << 31) - 1


def test_folder_of_shards_and_unlabelled_samples(root: Path) -> None:
    folder = root.parent / "shards"
    folder.mkdir()
    for k, labels in enumerate((["-1", "10"], ["2", "-1"])):
        with tarfile.open(folder / f"{k}.tar", "w") as archive:
            for i, label in enumerate(labels):
                add(archive, f"{k}{i}.png", encode(10 * k + i))
                add(archive, f"{k}{i}.cls", label.encode())
    dataset = TarDataset(folder)
    assert dataset.labels.tolist() == [-1, 10, 2, -1] and dataset.num_classes == 11
    assert [int(image[0, 0, 0]) for image, _ in dataset] == [0, 1, 10, 11]
    (root.parent / "empty").mkdir()
    with pytest.raises(ValueError, match=r"images in .*empty, got none"):
        TarDataset(root.parent / "empty")


def test_a_header_may_not_claim_what_its_file_cannot_hold() -> None:
    """7,000 x 7,000 pixels from 600 bytes: under the limit on pixels, far more than any codec could pack."""
    png, jpeg = bytearray(encode(1)), encode(7, "jpg", (64, 64))
    png[16:24] = struct.pack(">II", 7000, 7000)
    png[29:33] = struct.pack(">I", zlib.crc32(png[12:29]))
    sof = jpeg.index(b"\xff\xc0") + 5
    for data in (bytes(png), jpeg[:sof] + struct.pack(">HH", 7000, 7000) + jpeg[sof + 4 :]):
        with pytest.raises(CorruptImage, match=rf"7000 x 7000 pixels in {len(data)} bytes"):
            decode_image(data)
    for mode, kind in (("1", "PNG"), ("L", "JPEG"), ("RGB", "GIF"), ("RGB", "JPEG")):
        buffer = io.BytesIO()
        PIL.Image.new(mode, (2000, 2000)).save(buffer, kind)
        assert decode_image(buffer.getvalue()).shape == (2000, 2000, 3), "flat images pack best and are fine"
