"""The demo at toy size, end to end: it draws, trains, evaluates and writes its page."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("jsonargparse")

import numpy as np
import torch

from recog_fast.cli import _parser, main
from recog_fast.evaluation.report import read_metrics
from recog_fast.training import demo, loop
from recog_fast.training.config import read_config
from recog_fast.training.demo_size import QUICK, Size, size_of

CONDITIONS = list(demo.CONDITIONS)


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    threads = torch.get_num_threads()
    folder = tmp_path_factory.mktemp("demo")
    assert main(["demo", "--quick", "--output", str(folder)]) == 0
    assert torch.get_num_threads() == threads
    return folder


def test_results_are_complete_numbers(output: Path) -> None:
    numbers = json.loads((output / "results.json").read_text())
    for network in ("trained", "untrained"):
        assert list(numbers[network]) == CONDITIONS
        for result in numbers[network].values():
            assert 0 <= result["accuracy"] <= 1
            assert 0 <= result["eer"] <= 1
            assert list(result["tar"]) == ["0.1", "0.01", "0.001"]
            assert len(result["per_fold"]) == 10
            assert result["pairs"] == {"genuine": 50, "impostor": 50}
    assert set(numbers["backends"]) == {"cpu", "cuda", "triton", "dispatch"}
    assert numbers["config"]["data"]["options"]["num_identities"] == QUICK.identities + QUICK.holdout


def test_every_method_took_part(output: Path) -> None:
    quality = json.loads((output / "results.json").read_text())["quality"]
    assert list(quality["mean"]) == ["learned", "ers", "norm"]
    assert all(list(means) == CONDITIONS for means in quality["mean"].values())
    assert list(quality["fnmr_after_rejecting"]) == ["learned", "ers", "norm", "random"]
    for curve in quality["fnmr_after_rejecting"].values():
        assert list(curve) == ["0.0", "0.2", "0.4", "0.6"]
        assert all(0 <= value <= 1 for value in curve.values())
    # Nothing is rejected at 0: the same number for every quality.
    assert len({curve["0.0"] for curve in quality["fnmr_after_rejecting"].values()}) == 1
    assert all(-1 <= rho <= 1 for rho in quality["rank_correlation_with_resolution"].values())
    assert quality["strangers"]["images"] == QUICK.test_identities * QUICK.images
    steps = [line for line in read_metrics(output / "training" / "metrics.jsonl") if "loss" in line]
    assert steps[-1]["memory/live"] > 0 and steps[-1]["unknown_max_probability"] > 0
    assert steps[-1]["recognizability/predicted"] != 0
    assert (output / "training" / "recognizability.pt").is_file()


def test_page_shows_everything_and_loads_nothing(output: Path) -> None:
    page = (output / "report.html").read_text(encoding="utf-8")
    # ROC, DET, cosines; loss, cosines, probability, accuracy, index, norm, rate; three qualities and rejection; speed, memory
    assert page.count('<svg class="plot"') == 3 + 7 + 4 + 2
    # least and most recognizable, 3 galleries of 6 pairs, confusions and attention, 12 people, 3 resolutions
    assert page.count("<img ") == 12 + 18 + 12 + 12 + 3
    assert len(page) < 3_000_000
    assert "<script" not in page
    assert "http://" not in page
    assert "https://" not in page
    for word in (*CONDITIONS, "untrained", "Least recognizable", "qaface+uir+ri", "Same person, least alike", "Confused with the nearest class", "Attention", "threshold re-estimated", "95 %",
                 "Which path ran", "augment.low_resolution"):
        assert word in page
    assert [p.name for p in output.iterdir() if p.name.endswith(".partial")] == []


def test_settings_can_be_trained_again(output: Path) -> None:
    config = read_config(output / "training" / "config.yaml")
    assert config == demo.demo_config(QUICK, output, 0)


def test_second_run_starts_over_and_agrees(
    output: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = json.loads((output / "results.json").read_text())
    # The page is tested above; drawing it again is most of the time.
    monkeypatch.setattr(demo, "report_run", lambda path: path)
    assert main(["demo", "--quick", "--output", str(output), "--json"]) == 0
    said = capsys.readouterr()
    assert "Global Step" in said.err
    document = json.loads(said.out)
    assert document["finished"] and document["trained"] == first["trained"]
    again = json.loads((output / "results.json").read_text())
    assert again["trained"] == first["trained"]
    assert again["untrained"] == first["untrained"]
    assert again["quality"] == first["quality"]


def test_test_people_are_not_training_people() -> None:
    test = demo.draw_test_set(QUICK, seed=0)
    drawn = demo.sources.SyntheticIdentities(
        QUICK.identities + QUICK.holdout, QUICK.images, size=QUICK.pixels, seed=0
    )
    assert drawn.identities.max() < demo.FIRST_TEST_IDENTITY
    assert len(test.images) == QUICK.test_identities * QUICK.images
    assert test.same.mean() == 0.5
    people_a, people_b = test.first // QUICK.images, test.second // QUICK.images
    np.testing.assert_array_equal(people_a == people_b, test.same)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--identities", "3"], "--identities: expected at least 20, got 3"),
        (["--epochs", "0"], "--epochs: expected at least 1, got 0"),
        (["--threads", "-2"], "--threads: expected at least 0, got -2"),
        (["--seed", "-1"], "--seed: expected at least 0, got -1"),
        (["--speed"], "unrecognized arguments: --speed"),
    ],
)
def test_bad_options(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(["demo", *options])
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_options_override_the_size() -> None:
    def read(*options: str) -> argparse.Namespace:
        return _parser().parse_args(["demo", *options])

    options = read("--quick", "--identities", "50", "--epochs", "3", "--output", "x", "--seed", "5")
    assert size_of(options) == dataclasses.replace(QUICK, identities=50, epochs=3)
    assert (options.output, options.seed) == (Path("x"), 5)
    assert size_of(read()) == Size()


@pytest.mark.parametrize("more", [[], ["--json"]], ids=["text", "json"])
def test_a_signal_during_training_leaves_no_report(
    more: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 0, as of `train`; with --json one document that says so."""
    monkeypatch.setattr(demo, "train", lambda config: loop.TrainResult(7, False, {}, tmp_path))
    assert main(["demo", "--quick", "--output", str(tmp_path), *more]) == 0
    said = capsys.readouterr()
    assert "recog-fast demo: stopped by a signal at step 7; no report\n" in said.err
    if more:
        assert json.loads(said.out) == {"finished": False, "step": 7, "output": str(tmp_path), "report": None}
    assert not list(tmp_path.glob("report*"))


def test_missing_matplotlib_is_said_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["demo", "--quick", "--output", str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert "plots need matplotlib" in said.err and said.out == ""
