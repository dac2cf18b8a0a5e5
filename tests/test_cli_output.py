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
from recog_fast.terminal.console import print_json


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
        (["sweep", "broken.yaml", "--output", "x"], 1, "no valid YAML"),
        (["eval", "run", "--target", "pairs.bin", "--target", "absent.bin"], 1, "no pair file absent.bin"),
        (["identify", "run", "--gallery", "faces", "--probes", "faces", "--strangers", "faces"], 2, "expected --fpir with --strangers"),
        (["identify", "run", "--gallery", "faces", "--probes", "faces", "--top", "0"], 2, "from 1 on"),
        (["import", "run/model.pt", "x"], 2, "expected --network"),
        (["import", "run/model.pt", "x", "--metric", "[1]"], 2, "expected a JSON object, got '[1]'"),
        (["export", "absent", "x"], 1, "expected a run, a checkpoint or a model folder"),
        (["unknowns", "run", "--kind", "rec"], 2, "expected --path with --kind rec"),
        (["classes", "add", "run", "x"], 2, "expected one of --count, --embeddings and --images"),
        (["classes", "merge", "run", "x", "--groups", "absent.csv"], 1, "absent.csv"),
        (["bench", "--device", "abacus"], 2, "expected device cpu or cuda"),
        (["estimate", "--classes", "1", "--batch", "1", "--device", "abacus"], 2, "expected device in A100"),
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
