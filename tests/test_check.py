"""`recog-fast data check`: counts, label faults, unreadable and repeated images, on sources made to have them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from mutations import picture
from paths import data_dir

from recog_fast.cli import main
from recog_fast.data import ListDataset, check_dataset, open_dataset, plot_class_sizes
from recog_fast.data.opening import source_kind


def listed(folder: Path, labels: list[int], pictures: list[bytes] | None = None) -> Path:
    """labels.csv over distinct images."""
    rows = []
    for k, label in enumerate(labels):
        (folder / f"{k}.jpg").write_bytes(picture("JPEG", k) if pictures is None else pictures[k])
        rows.append(f"{k}.jpg,{label}\n")
    (folder / "labels.csv").write_text("".join(rows))
    return folder / "labels.csv"


def test_a_clean_source(tmp_path: Path) -> None:
    report = check_dataset(ListDataset(listed(tmp_path, [0, 0, 1, 2, 2, 2])))
    assert (report.images, report.classes, report.num_classes, report.unlabelled, report.gaps) == (6, 3, 3, 0, 0)
    assert report.per_class.tolist() == [2, 1, 3] and report.problems == [] and report.checked == 6
    assert report.sizes == [((32, 40), 6)] and report.formats == [("JPEG", 6)] and report.grey == 0
    pixels = np.concatenate([image.reshape(-1, 3) for image, _ in ListDataset(tmp_path / "labels.csv")]) / 255.0
    np.testing.assert_allclose(report.mean, pixels.mean(0), rtol=1e-12)
    np.testing.assert_allclose(report.std, pixels.std(0), rtol=1e-9)


@pytest.mark.parametrize(
    ("labels", "problem"),
    [
        ([1, 1, 2, 3], "labels begin at 1"),
        ([0, 1, 4, 9], "6 labels below 10 never occur, the first [2, 3, 5, 6, 7, 8]"),
        ([3, 4, 5, 5], "3 labels below 6 never occur, the first [0, 1, 2]"),
        ([0, 2**31 - 1, 0, 0], "2147483646 labels below 2147483648 never occur"),
        ([-1, -1, -1, -1], "no labelled images"),
    ],
)
def test_label_faults(tmp_path: Path, labels: list[int], problem: str) -> None:
    report = check_dataset(ListDataset(listed(tmp_path, labels)), sample=0)
    assert any(problem in found for found in report.problems), report.problems
    assert report.checked == 0 and report.off_by_one == (labels == [1, 1, 2, 3])


def test_unreadable_repeated_conflicting(tmp_path: Path) -> None:
    same = picture("PNG", 5)
    again = picture("BMP", 5)  # other bytes, the same pixels
    pictures = [same, again, same, picture("JPEG", 1), b"no image", picture("JPEG", 2, "L"), picture("JPEG", 3)]
    report = check_dataset(ListDataset(listed(tmp_path, [0, 0, 0, 1, 1, 2, -1], pictures)))
    assert [[Path(name).name for name in group] for group in report.repeated] == [["0.jpg", "1.jpg", "2.jpg"]]
    assert report.conflicting == [] and report.grey == 1 and report.unlabelled == 1
    assert [Path(source).name for source, _ in report.unreadable] == ["4.jpg"] and report.checked == 7
    report = check_dataset(ListDataset(listed(tmp_path, [0, 1], [same, again])))
    assert [[(Path(name).name, label) for name, label in group] for group in report.conflicting] == [
        [("0.jpg", 0), ("1.jpg", 1)]
    ]
    assert "occur under several labels" in report.text()


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(listed(tmp_path, [1, 1, 2, 3]))
    assert main(["data", "check", file, "--json", "--plot", str(tmp_path / "h.svg"), "--sample", "2"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["off_by_one"] and report["checked"] == 2 and report["per_class"]["max"] == 2
    assert "<svg" in (tmp_path / "h.svg").read_text()
    assert main(["data", "check", file, "--strict"]) == 1
    assert "! labels begin at 1" in capsys.readouterr().out
    assert main(["data", "check", str(tmp_path / "absent.rec")]) == 1
    with pytest.raises(SystemExit) as stop:
        main(["data", "check", file, "--sample", "-1"])
    assert stop.value.code == 2 and "expected at least 0, got -1" in capsys.readouterr().err
    with pytest.raises(ValueError, match="sample >= 0"):
        check_dataset(open_dataset(file), -1)


def test_what_a_path_looks_like(tmp_path: Path) -> None:
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars" / "0.tar").write_bytes(b"")
    assert source_kind(tmp_path / "tars") == "tar" and source_kind(tmp_path) == "folder"
    for suffix in ("rec", "csv", "jsonl", "zip", "tar", "lmdb"):
        (tmp_path / f"x.{suffix}").touch()
    assert [source_kind(tmp_path / f"x.{s}") for s in ("rec", "csv", "jsonl", "zip", "tar")] == [
        "rec",
        "list",
        "list",
        "zip",
        "tar",
    ]
    with pytest.raises(ValueError, match="a folder or a file ending in .rec"):
        source_kind(tmp_path / "x.lmdb")
    for missing in ("faces", "faces.rec"):
        with pytest.raises(ValueError, match=rf"expected path to be a folder or file, got .*{missing}, which does not exist"):
            source_kind(tmp_path / missing)
    with pytest.raises(ValueError, match="kind in rec, folder"):
        open_dataset(tmp_path, "lmdb")


def test_empty_plot(tmp_path: Path) -> None:
    plot_class_sizes(check_dataset(ListDataset(listed(tmp_path, [-1])), 0), tmp_path / "e.svg")


def test_real_sources(tmp_path: Path) -> None:
    """LFW: 5,149 images of 2,268 people, none repeated; a copy with an image under two names is found."""
    report = check_dataset(open_dataset(data_dir() / "lfw112" / "train_sets1-4"), sample=500)
    assert (report.images, report.classes, report.problems) == (5149, 2268, [])
    assert int(report.per_class.max()) == 236
    shutil.copytree(data_dir() / "orl" / "s1", tmp_path / "orl" / "s1")
    shutil.copytree(data_dir() / "orl" / "s2", tmp_path / "orl" / "s2")
    for copied in (tmp_path / "orl" / "s2", tmp_path / "orl" / "s2" / "1.pgm"):
        copied.chmod(0o755)
    shutil.copy(tmp_path / "orl" / "s1" / "3.pgm", tmp_path / "orl" / "s2" / "33.pgm")
    report = check_dataset(open_dataset(tmp_path / "orl"))
    assert len(report.conflicting) == 1 and report.grey == 21 and report.formats == [("PNM", 21)]
