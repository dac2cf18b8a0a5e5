"""Conversions: round trips byte for byte, crashes that go on, targets that lie, names that would escape."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mutations import picture
from paths import data_dir

from recog_fast.cli import main
from recog_fast.data import RecordDataset, convert_dataset, open_dataset, pack_record, write_records
from recog_fast.data import convert as convert_module
from recog_fast.data.targets import TarTarget

# Names with dots, percent signs and accents; a class that sorts elsewhere as a number.
NAMES = ["9/a.jpg", "9/b.c.jpg", "10/100%.png", "10/%2E.png", "10/é b.jpg", "zoë/1.gif"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for k, name in enumerate(NAMES):
        path = tmp_path / "faces" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture({"jpg": "JPEG", "png": "PNG", "gif": "GIF"}[name[-3:]], k))
    return tmp_path / "faces"


def files(root: Path) -> dict[str, bytes]:
    return {
        p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file() and p.suffix != ".csv"
    }


def same(a: Any, b: Any) -> bool:
    items = [[(d.encoded(i)) for i in range(len(d))] for d in (a, b)]
    return items[0] == items[1] and a.num_classes == b.num_classes


@pytest.mark.parametrize("way", [["x.rec", "x.tar", "x"], ["x.tar", "x.rec", "list", "x"], ["shards", "x.rec", "x"]])
def test_round_trips(tmp_path: Path, folder: Path, way: list[str]) -> None:
    """folder -> .rec -> tar -> folder, and other ways round: every name and byte as it was."""
    place: Path = folder
    for step, name in enumerate(way):
        target = tmp_path / f"{step}" / name
        kind = "list" if name == "list" else "tar" if name == "shards" else None
        options = {"images_per_shard": 4} if name == "shards" else {}
        done = convert_dataset(open_dataset(place), target, kind, **options)
        assert done == convert_module.Conversion(6, 0, True, kind or convert_module.target_kind(target))
        place = target / "labels.csv" if kind == "list" else target
        if name.endswith(".rec") or name.endswith(".tar") or kind:
            assert same(open_dataset(place), open_dataset(folder))
    if "list" in way:  # a list has no folder for a class: names are made from labels
        assert sorted(files(place).values()) == sorted(files(folder).values())
    else:
        assert files(place) == files(folder)
    assert not list(tmp_path.rglob("*.converting"))


def test_member_names_are_reversible() -> None:
    for name in NAMES:
        assert TarTarget.original(TarTarget.member(name)) == name
        assert TarTarget.member(name).rpartition("/")[2].count(".") == 1


@pytest.mark.parametrize("target", ["t.rec", "t.tar", "shards", "t", "list"])
@pytest.mark.parametrize("stop", [0, 2, 5])
def test_a_crash_goes_on(tmp_path: Path, folder: Path, target: str, stop: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted in the middle of a write, with torn bytes behind the last whole image: the same bytes in the end."""
    kind = {"list": "list", "shards": "tar"}.get(target)
    options: dict[str, Any] = {"sync_every": 2, **({"images_per_shard": 4} if target == "shards" else {})}
    source = open_dataset(folder)
    convert_dataset(source, tmp_path / "whole" / target, kind, **options)
    original = type(source).encoded
    calls = 0

    def failing(self: Any, index: int) -> tuple[bytes, int]:
        nonlocal calls
        calls += 1
        if calls > stop:
            raise KeyboardInterrupt
        return original(self, index)

    place = tmp_path / "crashed" / target
    with monkeypatch.context() as patch:
        patch.setattr(type(source), "encoded", failing)
        with pytest.raises(KeyboardInterrupt):
            convert_dataset(source, place, kind, **options)
    with pytest.raises(ValueError, match="expected the source that .* was begun with"):
        convert_dataset(open_dataset(data_dir() / "formats" / "label_array.rec"), place, kind, **options)
    for torn in [place] if place.is_file() else [*place.glob("*.tar"), *place.glob("labels.csv")]:
        with torn.open("ab") as file:
            file.write(b"torn")
    done = convert_dataset(source, place, kind, **options)
    assert done.resumed == stop // 2 * 2
    whole, crashed = (
        {p.name: p.read_bytes() for p in (tmp_path / w).rglob("*") if p.is_file()} for w in ("whole", "crashed")
    )
    assert whole == crashed


def test_existing_targets_and_kinds(tmp_path: Path, folder: Path) -> None:
    source = open_dataset(folder)
    convert_dataset(source, tmp_path / "t.rec")
    for arguments, message in [
        ((tmp_path / "t.rec",), "a target that does not exist yet"),
        ((tmp_path / "n", "zip"), "kind in rec, tar, folder, list, got 'zip'"),
    ]:
        with pytest.raises(ValueError, match=message):
            convert_dataset(source, *arguments)
    (tmp_path / "u.csv").write_text("faces/9/a.jpg,-1\nfaces/10/100%.png,3\n")
    unlabelled = open_dataset(tmp_path / "u.csv")
    with pytest.raises(ValueError, match="unlabelled images for a folder, got 2 labels from -1 to 3; use list"):
        convert_dataset(unlabelled, tmp_path / "f")
    with pytest.raises(ValueError, match="identities with labels 0 .. n-1"):
        convert_dataset(unlabelled, tmp_path / "f.rec", layout="identities")
    for name in ("u.rec", "u.tar"):
        convert_dataset(unlabelled, tmp_path / name)
        assert same(open_dataset(tmp_path / name), unlabelled)
    convert_dataset(unlabelled, tmp_path / "l", "list")
    assert same(open_dataset(tmp_path / "l" / "labels.csv"), unlabelled)


def test_a_target_that_reads_back_wrong_is_refused(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = TarTarget.write
    monkeypatch.setattr(
        TarTarget, "write", lambda self, step, name, label, data: original(self, step, name, label, data[:-1])
    )
    with pytest.raises(ValueError, match=r"expected \d+ bytes of class 0 from .*, got \d+ bytes of class 0"):
        convert_dataset(open_dataset(folder), tmp_path / "t.tar")


@pytest.mark.parametrize(
    "name", ["../../escaped.jpg", "/tmp/escaped.jpg", "a/../../x.jpg", "x\n.jpg", "..\\x.jpg", "c/x.py"]
)
def test_names_cannot_lead_out_of_the_target(tmp_path: Path, name: str) -> None:
    """A .lst, like an archive, comes from elsewhere: such names give way to <label>/<number>."""
    write_records(tmp_path / "e.rec", [(0, pack_record(0, picture("JPEG")))])
    (tmp_path / "e.lst").write_text(f"0\t0\t{name}\n")
    convert_dataset(RecordDataset(tmp_path / "e.rec"), tmp_path / "out" / "f")
    assert list(files(tmp_path / "out")) == ["f/000000/000000000.jpg"]


def test_a_key_said_twice_in_a_tar_gives_numbers(tmp_path: Path) -> None:
    """a.jpg and a.png are one WebDataset sample: both stay, under numbers."""
    (tmp_path / "f").mkdir()
    for name, kind in (("a.jpg", "JPEG"), ("a.png", "PNG")):
        (tmp_path / "f" / name).write_bytes(picture(kind))
    convert_dataset(open_dataset(tmp_path / "f"), tmp_path / "t.tar")
    assert open_dataset(tmp_path / "t.tar").paths == ["000000/000000000.jpg", "000000/000000001.png"]


def test_lfw_is_mxnets_file_again(tmp_path: Path) -> None:
    """The real file, written by MXNet, through a tar and back: .rec, .idx and .lst are the same bytes."""
    folder = data_dir() / "lfw112" / "train_sets1-4"
    assert main(["data", "convert", str(folder), str(tmp_path / "lfw.tar")]) == 0
    assert main(["data", "convert", str(tmp_path / "lfw.tar"), str(tmp_path / "lfw.rec"), "--no-verify"]) == 0
    for suffix in ("rec", "idx", "lst"):
        assert (tmp_path / f"lfw.{suffix}").read_bytes() == (folder / f"train.{suffix}").read_bytes()


def test_webdataset_reads_our_tar(tmp_path: Path, folder: Path) -> None:
    wds = pytest.importorskip("webdataset")
    convert_dataset(open_dataset(folder), tmp_path / "t.tar")
    ours = open_dataset(tmp_path / "t.tar")
    samples = list(wds.WebDataset(str(tmp_path / "t.tar"), shardshuffle=False))
    assert [int(sample["cls"]) for sample in samples] == ours.labels.tolist()
    assert [next(sample[k] for k in ("jpg", "png", "gif") if k in sample) for sample in samples] == [
        ours.encoded(i)[0] for i in range(6)
    ]


def test_convert_command(tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "convert", str(folder), str(tmp_path / "s"), "--images-per-shard", "4"]) == 0
    assert "6 images in" in capsys.readouterr().out and len(list((tmp_path / "s").glob("*.tar"))) == 2
    assert main(["data", "convert", str(folder), str(tmp_path / "t.tar"), "--layout", "plain"]) == 2
    assert "--layout is of .rec" in capsys.readouterr().err
    assert np.array_equal(open_dataset(tmp_path / "s").labels, open_dataset(folder).labels)
