"""p_max over unseen people, the overlap filter, and the commands around them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from training_data import make_folder, settings

import recog_fast as rf
from recog_fast.cli import main
from recog_fast.data import FolderDataset
from recog_fast.training import sweep as sweeps
from recog_fast.training.config import DataConfig
from recog_fast.training.data import TrainingImages
from recog_fast.training.loop import train
from recog_fast.training.saved import load_run
from recog_fast.training.sweep import read_sweep, sweep, table
from recog_fast.training.unknown import filter_overlap, max_probabilities, statistics_of_run, unknown_statistics


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(a run that knows its thirty people, unlabelled images: 12 of two of them, known_*, and two each of six strangers')."""
    root = tmp_path_factory.mktemp("stage")
    faces = make_folder(root / "faces", identities=32, images=6)
    changes = {"num_epoch": 9, "scale": 10, "data__holdout_classes": 2, "save_interval": 1000, "frequent": 1000}
    config = settings(root, faces, **changes, augment={"flip": 0.0}, network_options={"widths": [4, 8, 16, 16]})
    run = train(config).output
    trained = sorted({Path(path).parent.name for path in TrainingImages(config).splits[0].paths})
    mixed = make_folder(root / "mixed", identities=6, images=2, seed=9)
    for name in trained[:2]:
        shutil.copytree(faces / name, mixed / f"known_{name}")
    return run, mixed


def test_overlapping_people_are_filtered(tmp_path: Path, stage: tuple[Path, Path]) -> None:
    run, mixed = stage
    source = FolderDataset(mixed)
    report = filter_overlap(run, DataConfig(kind="folder", path=str(mixed)), tmp_path / "kept.jsonl", 0.9)
    kept = [json.loads(line) for line in (tmp_path / "kept.jsonl").read_text().splitlines()]
    known = sum("known" in entry["path"] for entry in kept)
    assert report["images"] == len(source) == 24 and report["kept"] == len(kept) == 24 - report["overlapping"]
    assert all(entry["p_max"] <= 0.9 for entry in kept)
    # The network knows its own people's pictures (12) and not the strangers' (12): the first go, most of the others stay.
    assert known <= 2 and len(kept) - known >= 9
    run_config = settings(
        tmp_path,
        mixed,
        method="uir",
        unlabelled={"kind": "folder", "path": str(mixed), "keep": str(tmp_path / "kept.jsonl")},
        max_steps=2,
    )
    assert train(run_config).finished
    with pytest.raises(ValueError, match="images with p_max <= 0.0, got none of 24"):
        filter_overlap(run, DataConfig(kind="folder", path=str(mixed)), tmp_path / "none.jsonl", 0.0)
    with pytest.raises(ValueError, match=r"threshold in \[0, 1\]"):
        filter_overlap(run, DataConfig(kind="folder", path=str(mixed)), tmp_path / "none.jsonl", 1.5)


def test_unreadable_images_are_not_kept(tmp_path: Path, stage: tuple[Path, Path]) -> None:
    folder = make_folder(tmp_path / "some", identities=2, images=2, seed=3)
    (folder / "id00" / "1.png").write_bytes(b"no image")
    report = filter_overlap(stage[0], DataConfig(kind="folder", path=str(folder)), tmp_path / "kept.jsonl", 1.0)
    assert (report["kept"], report["unreadable"]) == (3, 1)
    assert "id00/1.png" not in (tmp_path / "kept.jsonl").read_text()


def test_probabilities_are_those_of_the_softmax(stage: tuple[Path, Path]) -> None:
    """Against the materialised softmax over all classes; batches do not matter."""
    _, backbone, head = load_run(stage[0])
    images = [image for image, _ in FolderDataset(stage[1])]
    found = max_probabilities(backbone, head, images, batch_size=5)
    with torch.no_grad():
        embeddings = backbone(backbone.preprocessing(torch.from_numpy(np.stack(images))))  # type: ignore[operator, arg-type]
        expected = torch.softmax(head.logits(embeddings).double(), dim=1).amax(dim=1)
    np.testing.assert_allclose(found, expected.numpy(), rtol=2e-5)
    report = unknown_statistics(found, head)
    assert report["mean"] == pytest.approx(found.mean())
    assert list(report["cumulative"]) == [f"0.{k}" for k in range(1, 10)]
    assert report["cumulative"]["0.5"] == (found <= 0.5).mean()
    assert sorted(report["cumulative"].values()) == list(report["cumulative"].values())
    assert report["center_sparsity"] == pytest.approx(float(rf.center_sparsity(head.weight.detach())))
    with pytest.raises(ValueError, match="images of unseen people, got none"):
        unknown_statistics(max_probabilities(backbone, head, []), head)


def test_commands_print_the_report(
    tmp_path: Path, stage: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run, mixed = stage
    assert main(["unknowns", str(run), "--json"]) == 0
    own = json.loads(capsys.readouterr().out)
    assert own["images"] == 12 and own == json.loads(json.dumps(statistics_of_run(run, None)))
    assert main(["unknowns", str(run), "--path", str(mixed)]) == 0
    assert "24 images   mean p_max 0." in capsys.readouterr().out
    assert main(["filter-overlap", str(run), "--path", str(mixed), "--output", str(tmp_path / "kept.jsonl")]) == 0
    assert "unreadable 0" in capsys.readouterr().out
    for arguments, code, message in (
        (["filter-overlap", str(run), "--output", "x"], 2, "expected --path with --kind folder, got none"),
        (["unknowns", str(run), "--path", str(mixed), "--options", "[1]"], 2, "--options as a JSON object"),
        (["unknowns", str(tmp_path)], 1, "expected config.yaml and checkpoints of a run"),
    ):
        assert main(arguments) == code
        assert message in capsys.readouterr().err


# --- sweeps ---------------------------------------------------------------------------------------------------------


def _sweep_file(tmp_path: Path, text: str) -> Path:
    settings(
        tmp_path,
        make_folder(tmp_path / "faces", identities=6, images=4),
        data__holdout_classes=2,
        val_targets=["holdout"],
        val_pairs=20,
        batch_size=8,
    )
    file = tmp_path / "sweep.yaml"
    file.write_text("config: settings.yaml\n" + text)
    return file


def test_sweep_runs_every_point_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = _sweep_file(tmp_path, "grid: {memory.delta: [0, 5], margin.m: [0.2]}\nseeds: [1, 2]\n")
    command = ["sweep", str(file), "--output", str(tmp_path / "out"), "--method", "qaface", "--max_steps", "2"]
    assert main(command) == 0
    results = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert [(r["changes"]["memory.delta"], r["seed"]) for r in results] == [(0, 1), (0, 2), (5, 1), (5, 2)]
    assert all(r["step"] == 2 and "val/holdout" in r["metrics"] for r in results)
    assert (tmp_path / "out" / "memory.delta=0,margin.m=0.2,seed=1" / "config.yaml").is_file()
    said = capsys.readouterr().out
    assert "memory.delta=5   margin.m=0.2 (2 seeds): holdout 0." in said and " +- " in said
    monkeypatch.setattr(sweeps, "train", lambda config: pytest.fail("ran again"))
    assert main(command) == 0
    assert table(results) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("grid: {lr: 0.1}\n", "map settings to lists"),
        ("grid: {lr: [0.1, 0.1]}\n", "some twice"),
        ("seeds: [a]\n", "list of whole numbers"),
        ("grids: {}\n", "expected config, grid and seeds"),
    ],
)
def test_bad_sweeps_are_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match="^sweep: expected ") as error:
        read_sweep(_sweep_file(tmp_path, text))
    assert message in str(error.value)


def test_a_mistake_in_the_last_point_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = _sweep_file(tmp_path, "grid: {lr: [0.1, -1]}\n")
    monkeypatch.setattr(sweeps, "train", lambda config: pytest.fail("ran"))
    with pytest.raises(ValueError, match="expected lr >= 0, got -1"):
        sweep(file, tmp_path / "out")
    with pytest.raises(ValueError, match="other than output, resume and seed, got --seed"):
        sweep(file, tmp_path / "out", ["--seed", "3"])


@pytest.mark.parametrize(
    "file", sorted((Path(__file__).parent.parent / "configs" / "sweeps").glob("*.yaml")), ids=lambda p: p.stem
)
def test_every_sweep_of_the_repository_reads(file: Path, tmp_path: Path) -> None:
    config, points = read_sweep(file)
    made = [sweeps.point_config(config, point, [], tmp_path) for point in (points[0], points[-1])]
    assert made[0] != made[1] and len(points) >= 9
