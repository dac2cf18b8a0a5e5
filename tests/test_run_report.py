"""The report of a training run: made at its end, made again without its data, honest about what is not there."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from training_data import make_folder, settings

pytest.importorskip("matplotlib")
pytest.importorskip("jsonargparse")

import recog_fast as rf
from recog_fast.cli import main
from recog_fast.evaluation.report import read_metrics
from recog_fast.training import measure
from recog_fast.training.findings import Findings
from recog_fast.training.run_report import report_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with a target, as the command line leaves it."""
    folder = tmp_path_factory.mktemp("run")
    settings(
        folder, make_folder(folder / "<i>faces"), data__holdout_classes=4, val_targets=["holdout", "absent.bin"][:1], val_sizes=[8], val_pairs=40
    )  # fmt: skip
    assert main(["train", str(folder / "settings.yaml")]) == 0
    return folder / "run"


def test_train_leaves_a_page(run: Path) -> None:
    page = (run / "report.html").read_text()
    for word in ("Training run: run", "Confused with the nearest class", "Attention", "Error versus reject", "peak memory of the process", "full size", "8x8", "ERS"):
        assert word in page
    assert "<i>faces" not in page and "&lt;i&gt;faces" in page
    # Verification 3; training 6: loss, cosines, p_y, accuracy, norm, rate; quality 3; speed and memory
    assert page.count('<svg class="plot"') == 3 + 6 + 3 + 2
    assert all(row["peak_memory_mb"] > 1 for row in read_metrics(run / "metrics.jsonl") if "loss" in row)
    assert {p.name for p in run.iterdir()} >= {"findings.npz", "report.html", "model.pt"}


def test_what_was_verified_in_training_is_what_the_page_shows(run: Path) -> None:
    last = read_metrics(run / "metrics.jsonl")[-1]
    found = Findings.load(run / "findings.npz")
    assert found.results["full size"].accuracy == last["val/holdout"]
    assert found.results["8x8"].accuracy == last["val/holdout@8"]


def test_page_is_made_again_without_data_and_weights(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "run"
    copy.mkdir()
    for name in ("config.yaml", "metrics.jsonl", "findings.npz"):
        shutil.copy(run / name, copy / name)
    assert main(["report", str(copy)]) == 0
    assert capsys.readouterr().out.strip() == str(copy / "report.html")
    assert (copy / "report.html").read_text() == (run / "report.html").read_text()


def test_killed_run_without_anything_measured(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "half"
    copy.mkdir()
    shutil.copy(run / "config.yaml", copy / "config.yaml")
    (copy / "metrics.jsonl").write_text("\n".join((run / "metrics.jsonl").read_text().splitlines()[:3])[:-4])
    page = report_run(copy).read_text()
    assert "No evaluation target" in page and "no checkpoint to measure" in page
    assert page.count('<svg class="plot"') == 5 + 2


def test_gone_data_and_broken_targets_are_named(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "moved"
    shutil.copytree(run, copy)
    text = (copy / "config.yaml").read_text().replace("faces", "gone").replace("[holdout]", "[holdout, no/such.bin]")
    (copy / "config.yaml").write_text(text)
    page = report_run(copy, measure=True).read_text()
    for word in ("the training data cannot be opened", "Evaluation target no/such.bin: verification: no pair file", "Evaluation target holdout"):
        assert word in page
    assert "class weight" in page


def test_run_without_target_shows_training_pictures_and_says_so(tmp_path: Path) -> None:
    settings(tmp_path, make_folder(tmp_path / "faces"), num_epoch=1)
    assert main(["train", str(tmp_path / "settings.yaml")]) == 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert "No evaluation target" in page and "This run had no val_targets" in page
    assert "Least recognizable" in page and 'id="verification"' not in page


def test_report_can_be_switched_off(tmp_path: Path) -> None:
    settings(tmp_path, make_folder(tmp_path / "faces"), num_epoch=1, report=False)
    assert main(["train", str(tmp_path / "settings.yaml")]) == 0
    assert not (tmp_path / "run" / "report.html").exists()


def test_a_failing_report_does_not_fail_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from recog_fast.training import run_report

    def fail(path: Path, **_: object) -> Path:
        raise ImportError("no plots")

    monkeypatch.setattr(run_report, "report_run", fail)
    settings(tmp_path, make_folder(tmp_path / "faces"), num_epoch=1)
    assert main(["train", str(tmp_path / "settings.yaml")]) == 0
    assert "no report: no plots; `recog-fast report" in capsys.readouterr().err


def test_command_errors(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 1
    assert "expected the output folder of a training run, with config.yaml" in capsys.readouterr().err
    copy = tmp_path / "broken"
    copy.mkdir()
    for name in ("config.yaml", "metrics.jsonl"):
        shutil.copy(run / name, copy / name)
    (copy / "findings.npz").write_bytes(b"PK nonsense")
    assert main(["report", str(copy)]) == 1
    assert "to hold the findings of a run" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["report", str(copy), "--measure", "--no-measure"])
    assert stop.value.code == 2


def test_findings_come_back_as_they_were(run: Path, tmp_path: Path) -> None:
    found = Findings.load(run / "findings.npz")
    found.baseline = dict(found.results)
    found.save(tmp_path / "again.npz")
    again = Findings.load(tmp_path / "again.npz")
    assert list(again.results) == list(again.baseline) == list(found.results)
    for one, other in ((found.results["8x8"], again.baseline["8x8"]),):
        for field in dataclasses.fields(one):
            np.testing.assert_array_equal(getattr(one, field.name), getattr(other, field.name))
    assert found.rejection is not None and again.rejection is not None
    assert found.rejection.protocol == again.rejection.protocol and found.rejection.areas == again.rejection.areas
    for name, curve in found.rejection.curves.items():
        np.testing.assert_array_equal(curve, again.rejection.curves[name])
    assert [g.title for g in found.galleries] == [g.title for g in again.galleries]
    np.testing.assert_array_equal(found.galleries[0].items[0].image, again.galleries[0].items[0].image)
    assert found.facts == again.facts and found.missing == again.missing and found.rejected == again.rejected
    stored = dict(np.load(tmp_path / "again.npz"))
    described = json.loads(bytes(stored["described"]).decode()) | {"format": 99}
    np.savez(tmp_path / "new.npz", **stored | {"described": np.frombuffer(json.dumps(described).encode(), np.uint8)})
    with pytest.raises(ValueError, match="expected format 1, got 99"):
        Findings.load(tmp_path / "new.npz")


class _Flat(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * x.flatten(1)


class _Head:
    """Counts how many rows are searched."""

    num_classes, embedding_dim, rows = 10_000_000, 512, 0

    def topk(self, embeddings: object, k: int) -> object:
        self.rows = len(embeddings)  # type: ignore[arg-type]
        raise RuntimeError("enough")


def test_search_for_confusions_is_bounded_over_many_classes() -> None:
    head = _Head()
    images = np.random.default_rng(0).integers(0, 256, (600, 4, 4, 3), dtype=np.uint8)
    with pytest.raises(RuntimeError, match="enough"):
        measure.confusions(measure.Network(_Flat()), head, lambda i: images[i], np.arange(600), 0)
    assert head.rows == 19  # 2e11 multiplications / (2 x 10M x 512)


def test_a_class_without_pictures_is_nobodys_confusion() -> None:
    images = np.random.default_rng(0).integers(0, 256, (6, 4, 4, 3), dtype=np.uint8)
    network, labels = measure.Network(_Flat()), np.arange(6)
    head = rf.MarginHead(7, 48)  # class 6 was just added, where everybody is nearest
    rows = network.embed(list(images), mirrored=False).plain
    with torch.no_grad():
        head.weight[6] = rows.mean(0)
        head.weight[:6] = -rows
        head.weight[5] = rows[5]
    assert int(head.topk(rows, 1)[1][0]) == 6
    for gallery in measure.confusions(network, head, lambda i: images[i], labels, 0):
        assert not any("class 6" in item.caption for item in gallery.items)
