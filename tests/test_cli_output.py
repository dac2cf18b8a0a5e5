"""What every command prints where nobody watches: results alone on standard output, one document with --json, errors in one line."""

from __future__ import annotations

import json
import math
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_cli import environment
from training_data import make_folder, settings

pytest.importorskip("jsonargparse")
pytest.importorskip("safetensors")

from recog_fast.cli import main
from recog_fast.commands import doctor as doctor_command
from recog_fast.commands.evaluate import names_of
from recog_fast.data import FolderDataset, register_source
from recog_fast.data.formats import SOURCES
from recog_fast.data.opening import KINDS
from recog_fast.terminal.console import print_json
from recog_fast.training.config import read_config


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run and what the commands read."""
    folder = tmp_path_factory.mktemp("cli")
    faces = make_folder(folder / "faces", identities=8, images=4)
    settings(folder, faces, max_steps=2, data__holdout_classes=3, val_targets=["holdout"], val_pairs=20, report=False)
    assert main(["train", str(folder / "settings.yaml")]) == 0
    (folder / "sweep.yaml").write_text("config: settings.yaml\ngrid: {margin.m: [0.1, 0.2]}\n")
    images = [path.read_bytes() for k in range(8) for path in sorted((faces / f"id{k:02d}").iterdir())[:2]]
    shuffled = [image for k in range(8) for image in (images[2 * k], images[(2 * k + 3) % 16])]
    (folder / "pairs.bin").write_bytes(pickle.dumps((images[:16] + shuffled, [True] * 8 + [False] * 8)))
    (folder / "shards").mkdir()
    for rank, rows in enumerate((3, 2)):
        torch.save({"state_dict_softmax_fc": {"weight": torch.randn(rows, 4)}}, folder / "shards" / f"checkpoint_gpu_{rank}.pt")
    (folder / "recipe.py").write_text("from easydict import EasyDict as edict\nconfig = edict()\nconfig.network = 'r50'\nconfig.rec = '/data/ms1m'\nconfig.batch_size = 64\n")
    (folder / "groups.csv").write_text("0,1\n")
    return folder


WIDTHS = ["--network", "tiny", "--network-options", '{"widths": [4, 8, 8, 8]}', "--embedding-size", "16", "--size", "32"]
# name: (arguments, keys of the document); {new}: a path that does not exist yet
COMMANDS: dict[str, tuple[list[str], set[str]]] = {
    "train": (["train", "settings.yaml", "--output", "{new}"], {"step", "finished", "output", "metrics", "report"}),
    "sweep": (["sweep", "sweep.yaml", "--output", "{new}", "--max_steps", "1"], {"output", "finished", "results"}),
    "eval": (["eval", "run", "--target", "pairs.bin", "--down", "8"], {"pairs", "pairs@8"}),
    "data check": (["data", "check", "faces"], {"images", "problems"}),
    "data convert": (["data", "convert", "faces", "{new}.rec"], {"target", "kind", "images", "resumed", "verified"}),
    "import, weights": (["import", "run/model.pt", "{new}", *WIDTHS], {"target", "kind", "read", "network", "embedding_size", "color_order", "mean", "std"}),
    "import, head": (["import", "shards", "{new}.safetensors"], {"target", "kind", "classes", "embedding_size", "files"}),
    "import, recipe": (["import", "recipe.py", "{new}.yaml"], {"target", "kind", "notes"}),
    "export": (["export", "run", "{new}"], {"target", "kind", "files"}),
    "identify": (["identify", "run", "--gallery", "faces", "--probes", "faces", "--fpir", "0.1", "--strangers", "faces"], {"probes", "gallery", "rank_1", "open_set"}),
    "report": (["report", "run", "--no-measure"], {"report"}),
    "bench": (["bench", "--classes", "300", "--rows", "8", "--dim", "16", "--rounds", "1"], {"machine", "rounds", "results"}),
    "filter-overlap": (["filter-overlap", "run", "--path", "faces", "--output", "{new}.jsonl", "--threshold", "1"], {"images", "mean", "kept", "output"}),
    "unknowns": (["unknowns", "run"], {"images", "mean", "cumulative", "center_sparsity"}),
    "classes add": (["classes", "add", "run", "{new}", "--images", "faces"], {"checkpoint", "labels", "added"}),
    "classes merge": (["classes", "merge", "run", "{new}", "--groups", "groups.csv"], {"checkpoint", "labels", "merged"}),
    "doctor": (["doctor"], {"versions", "backends", "warnings"}),
    "estimate": (["estimate", "--classes", "1e6", "--batch", "256"], {"memory", "measured"}),
    "completion": (["completion", "bash"], set()),
}  # warmup and demo: tests/test_warmup.py, tests/test_demo.py


def run(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, *more: str) -> int:
    monkeypatch.chdir(place)
    monkeypatch.setattr(doctor_command, "nvcc", lambda: None)
    return main([word.format(new=tmp_path / "new") if "{new}" in word else word for word in COMMANDS[name][0]] + list(more))


@pytest.mark.parametrize("name", COMMANDS)
def test_what_a_pipe_gets(name: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Text without escape characters or carriage returns; no progress anywhere. With --json one strict document and nothing else."""
    assert run(place, tmp_path, monkeypatch, name) == 0
    plain = capsys.readouterr()
    assert plain.out and plain.out.endswith("\n")
    for text in (plain.out, plain.err):
        assert "\x1b" not in text and "\r" not in text
    if not COMMANDS[name][1]:
        return
    (tmp_path / "again").mkdir()
    assert run(place, tmp_path / "again", monkeypatch, name, "--json") == 0
    said = capsys.readouterr()
    assert said.out.count("\n") == 1, "one line"

    def refuse(constant: str) -> None:
        pytest.fail(f"{constant} is no JSON")

    document = json.loads(said.out, parse_constant=refuse)
    assert document.keys() >= COMMANDS[name][1]
    assert "\x1b" not in said.err and "\r" not in said.err


def test_the_settings_are_named_and_not_printed(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(place, tmp_path, monkeypatch, "train") == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0] == f"Settings: {tmp_path / 'new' / 'config.yaml'}" and "weight_decay" not in out
    assert "weight_decay" in (tmp_path / "new" / "config.yaml").read_text()


def test_log_of_json_training_goes_to_standard_error(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(place, tmp_path, monkeypatch, "train", "--json") == 0
    said = capsys.readouterr()
    assert "Global Step: 2" in said.err and json.loads(said.out)["step"] == 2


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["data", "convert", "faces", "out.xyz"], 2, "a target ending in .rec or .tar, or a folder"),
        (["data", "convert", "faces", "out.rec", "--images-per-shard", "4"], 2, "--images-per-shard of tar targets"),
        (["data", "convert", "nowhere", "out.rec"], 1, "does not exist"),
        (["data", "check", "faces", "--sample", "-1"], 2, "expected at least 0, got -1"),
        (["train"], 2, "expected a settings file"),
        (["train", "settings.yaml", "--lrr", "1"], 2, "did you mean 'lr'"),
        (["train", "settings.yaml", "--network", "foo"], 2, "expected network in iresnet18"),
        (["train", "settings.yaml", "--margin.name", "Foo"], 2, "expected margin.name in Softmax"),
        (["train", "settings.yaml", "--method", "foo"], 2, "expected method of margin"),
        (["train", "settings.yaml", "--device", "abacus"], 2, "expected device auto"),
        (["train", "--help-settings", "--json"], 2, "got both"),
        (["sweep", "broken.yaml", "--output", "x"], 2, "no valid YAML"),
        (["sweep", "sweep.yaml", "--output", "x", "--lrr", "1"], 2, "did you mean 'lr'"),
        (["sweep", "sweep.yaml", "--output", "x", "--margin.name", "Foo"], 2, "expected margin.name in Softmax"),
        (["sweep", "absent.yaml", "--output", "x"], 1, "no file absent.yaml"),
        (["filter-overlap", "run", "--path", "faces", "--output", "x.jsonl", "--threshold", "3"], 2, "in [0, 1], got 3"),
        (["eval", "run", "--target", "pairs.bin", "--device", "foo"], 2, "expected cpu, cuda or cuda:N, got 'foo'"),
        (["eval", "run", "--target", "pairs.bin", "--target", "./pairs.bin"], 2, "once, got pairs.bin twice"),
        (["eval", "run", "--target", "pairs.bin", "--down", "8", "--down", "8"], 2, "once, got pairs@8 twice"),
        (["eval", "run/model.pt", "--target", "pairs.bin"], 2, "expected --network for the weights file"),
        (["eval", "run/model.pt", "--target", "pairs.bin", "--network", "foo"], 2, "expected --network in iresnet18"),
        (["import", "run/model.pt", "x", "--network", "foo"], 2, "expected --network in iresnet18"),
        (["identify", "run", "--gallery", "faces", "--probes", "faces", "--fpir", "2"], 2, "in [0, 1], got 2"),
        (["identify", "run", "--gallery", "faces", "--probes", "faces", "--threshold", "nan"], 2, "in [-1, 1], got nan"),
        (["identify", "run", "--gallery", "faces", "--probes", "faces", "--device", "foo"], 2, "expected cpu, cuda or cuda:N"),
        (["estimate", "--classes", "1", "--batch", "1", "--optimizer", "foo"], 2, "invalid choice: 'foo'"),
        (["estimate", "--classes", "1", "--batch", "1", "--weight-format", "x"], 2, "invalid choice: 'x'"),
        (["estimate", "--classes", "1", "--batch", "1", "--sample-rate", "2"], 2, "in (0, 1], got 2"),
        (["estimate", "--classes", "1", "--batch", "1", "--link", "inf"], 2, "a number above 0, got inf"),
        (["estimate", "--classes", "9", "--batch", "1", "--gpus", "2", "--weight-format", "split"], 2, "expected weight_format float32"),
        (["classes", "add", "broken", "x", "--count", "1", "--images", "faces"], 2, "got --count and --images"),
        (["warmup", "settings.yaml", "--batch", "4", "--arch", "sm_10"], 2, "expected --arch sm_80"),
        (["warmup", "broken.yaml", "--arch", "sm_80"], 2, "no valid YAML"),
        (["eval", "run", "--target", "pairs.bin", "--target", "absent.bin"], 1, "no pair file absent.bin"),
        (["identify", "run", "--gallery", "faces", "--probes", "faces", "--strangers", "faces"], 2, "expected --fpir with --strangers"),
        (["identify", "run", "--gallery", "faces", "--probes", "faces", "--top", "0"], 2, "from 1 on"),
        (["import", "run/model.pt", "x"], 2, "expected --network"),
        (["import", "run/model.pt", "x", "--metric", "[1]"], 2, "expected a JSON object, got '[1]'"),
        (["export", "absent", "x"], 1, "expected a run, a checkpoint or a model folder"),
        (["unknowns", "run", "--kind", "rec"], 2, "expected --path with --kind rec"),
        (["classes", "add", "run", "x"], 2, "expected one of --count, --embeddings and --images"),
        (["classes", "merge", "run", "x", "--groups", "absent.csv"], 1, "absent.csv"),
        (["bench", "--device", "abacus"], 2, "expected cpu, cuda or cuda:N, got 'abacus'"),
        (["estimate", "--classes", "1", "--batch", "1", "--device", "abacus"], 2, "invalid choice: 'abacus'"),
        (["warmup", "--arch", "sm_80"], 2, "expected a settings file or --batch"),
        (["report", "faces"], 1, "expected the output folder of a training run"),
        (["data"], 2, "ACTION"),
        (["demo", "--identities", "3"], 2, "expected at least 20"),
        (["completion", "tcsh"], 2, "invalid choice"),
    ],
    ids=lambda x: " ".join(x)[:50] if isinstance(x, list) else "",
)
def test_errors(arguments: list[str], code: int, text: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """1 for what was met on the way, 2 and the way to the help for what was typed; a line on standard error, nothing on standard output."""
    if arguments[0] == "warmup":
        pytest.importorskip("triton")
    monkeypatch.chdir(place)
    (place / "broken.yaml").write_text("config: [")
    try:
        found = main(arguments)
    except SystemExit as stop:
        found = int(stop.code or 0)
    said = capsys.readouterr()
    command = re.match(r"recog-fast( (data|classes) \w+| [\w-]+): error: ", said.err)
    assert (found, said.out, said.err.count("\n")) == (code, "", 1), said.err
    assert text in said.err and command and command[0].split(":")[0].split()[1] == arguments[0]
    assert said.err.rstrip().endswith("--help)") == (code == 2)
    assert not (place / "out.xyz").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
@pytest.mark.parametrize(
    "command", [["bench"], ["warmup", "--batch", "4"], ["eval", "run", "--target", "pairs.bin"], ["identify", "run", "--gallery", "faces", "--probes", "faces"]],
    ids=lambda words: words[0],
)  # fmt: skip
def test_a_missing_device_is_one_code(command: list[str], place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(place)
    if command[0] == "warmup":
        pytest.importorskip("triton")
    assert main([*command, *([] if command[0] == "warmup" else ["--device", "cuda"])]) == 1
    assert "CUDA device" in capsys.readouterr().err


def test_files_of_one_name_keep_their_results(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "lfw.bin").symlink_to(place / "pairs.bin")
    (tmp_path / "cfp.bin").symlink_to(place / "pairs.bin")
    assert main(["eval", str(place / "run"), *[word for t in ("a/lfw.bin", "cfp.bin", "b/lfw.bin") for word in ("--target", t)], "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)) == ["a/lfw", "cfp", "b/lfw"]
    assert names_of(["x/a/lfw.bin", "x/b/lfw.bin", "lfw.txt"]) == ["a/lfw", "b/lfw", "lfw.txt"]


def test_options_are_checked_before_the_checkpoint_is_read(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("recog_fast.checkpoint.latest_checkpoint", lambda *a, **k: pytest.fail("read a checkpoint"))
    for more in ([], ["--count", "1", "--labels", "l.npy"]):
        assert main(["classes", "add", "run", "x", *more]) == 2
    assert "expected --embeddings with --labels" in capsys.readouterr().err


def test_a_registered_source_is_a_kind_of_the_commands(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    register_source("mine", FolderDataset)
    try:
        register_source("mine", FolderDataset)
        assert SOURCES.count("mine") == 1
        assert main(["data", "check", "faces", "--kind", "mine", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["images"] == 32
        assert main(["unknowns", "run", "--kind", "mine", "--path", "faces"]) == 0
        assert read_config("settings.yaml", ["--data.kind", "mine"]).data.kind == "mine"
    finally:
        SOURCES.remove("mine")
        del KINDS["mine"]


def test_an_error_nobody_thought_of_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(error: BaseException) -> Callable[[], dict[str, Any]]:
        def describe() -> dict[str, Any]:
            raise error

        return describe

    monkeypatch.setattr(doctor_command, "describe", fails(KeyError("x")))
    assert main(["doctor"]) == 1
    assert capsys.readouterr().err == "recog-fast doctor: error: KeyError: 'x' (--debug shows where)\n"
    with pytest.raises(KeyError):
        main(["doctor", "--debug"])
    monkeypatch.setattr(doctor_command, "describe", fails(KeyboardInterrupt()))
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err == "recog-fast: interrupted\n"


def test_a_pipe_that_breaks_elsewhere_is_an_error() -> None:
    """Only where nobody reads standard output is a broken pipe no error."""
    code = (
        "import sys, recog_fast.commands.doctor as d\nfrom recog_fast.cli import main\n"
        "def fails(): raise BrokenPipeError(32, 'of a worker')\nd.describe = fails\nsys.exit(main(['doctor']))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True)
    assert done.returncode == 1 and "of a worker" in done.stderr


def test_strict_json(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"a": math.nan, "b": [math.inf, np.float32("nan"), np.arange(2)], Path("c"): Path("d"), 3: (1.5, None, True)})
    assert capsys.readouterr().out == '{"a": null, "b": [null, null, [0, 1]], "c": "d", "3": [1.5, null, true]}\n'
