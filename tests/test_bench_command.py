"""`recog-fast bench` at toy size: the same numbers for everyone, complete output, clear errors."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from recog_fast.cli import main
from recog_fast.commands import head_bench


def test_everyone_runs_and_agrees(capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    assert main(["bench", "--classes", "300,2e3", "--rows", "16", "--dim", "32", "--rounds", "2", "--json"]) == 0
    assert torch.get_num_threads() == threads
    report = json.loads(capsys.readouterr().out)
    assert [(r["name"], r["classes"]) for r in report["results"]] == [(n, c) for c in (300, 2000) for n in (head_bench.EAGER, *head_bench.OURS)]
    for one in report["results"]:
        assert 0 < one["low"] <= one["median"] <= one["high"] and one["share_of_gemm"] > 0 and not one["skipped"]
    assert {r["loss"] for r in report["results"] if r["classes"] == 300} != {0.0}
    assert report["machine"]["threads"] == 1 and report["rounds"] == 2


def test_table_and_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    output = tmp_path / "bench"
    assert main(["bench", "--classes", "300", "--rows", "8", "--dim", "16", "--rounds", "1", "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert "recog_fast, float32" in printed and str(output / "report.html") in printed
    page = (output / "report.html").read_text()
    assert page.count("<svg") in (1, 2) and head_bench.EAGER in page
    assert json.loads((output / "bench.json").read_text())["results"][0]["classes"] == 300


def test_eager_is_left_out_where_it_does_not_fit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(head_bench, "_room", lambda device: 1e5)
    assert main(["bench", "--classes", "500", "--rows", "8", "--dim", "16", "--rounds", "1"]) == 0
    assert "eager PyTorch, float32: needs about 0.0 GB" in capsys.readouterr().out


def test_a_wrong_loss_is_no_measurement(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(head_bench, "MARGIN", 0.5)
    eager = head_bench._eager
    monkeypatch.setattr(head_bench, "_eager", lambda *a: lambda: 1.001 * eager(*a)())
    assert main(["bench", "--classes", "300", "--rows", "8", "--dim", "16", "--rounds", "1"]) == 1
    assert "to give eager's loss" in capsys.readouterr().err


@pytest.mark.parametrize("classes", ["0", "1.5", "ten"])
def test_bad_sizes(classes: str) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["bench", "--classes", classes])
    assert stop.value.code == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_device_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    for device in ("cuda", "cuda:1"):
        assert main(["bench", "--device", device]) == 1
        assert f"expected a CUDA device for --device {device}, got none" in capsys.readouterr().err


def test_extra_memory_of_eager_holds_its_cosines_and_gradient() -> None:
    found = {one.name: one for one in head_bench.bench(32, 20_000, 128, 1, torch.device("cpu"))}
    if math.isnan(found[head_bench.EAGER].extra_mb):
        pytest.skip("this system does not say how much memory a step took")
    assert found[head_bench.EAGER].extra_mb > 12  # dW alone is 10.2 MB, each 32 x 20,000 tensor 2.6 MB
    assert found["recog_fast, float32"].extra_mb < found[head_bench.EAGER].extra_mb
