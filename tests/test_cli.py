"""The command line: exit codes, one-line errors, a signal to a real process, evaluation of what was trained."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from training_data import make_folder, settings

from recog_fast import __version__
from recog_fast.cli import main

ROOT = Path(__file__).resolve().parent.parent


def run(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "recog_fast", *arguments]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def test_signal_saves_and_the_run_goes_on(tmp_path: Path) -> None:
    """SIGTERM to the whole process group, workers included, as schedulers send it: exit code 0, a checkpoint, and a resumed run."""
    settings(tmp_path, make_folder(tmp_path / "faces"), num_epoch=100_000, num_workers=1)
    command = run("train", str(tmp_path / "settings.yaml"))
    with subprocess.Popen(
        command, env=environment(), cwd=tmp_path, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "Global Step: 3" in line:
                os.killpg(process.pid, signal.SIGTERM)
                break
        rest = process.stdout.read()
        assert process.wait(timeout=60) == 0
    assert "Stopped by a signal" in rest
    step = int(max(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()).removeprefix("step_"))
    assert step >= 3
    assert main(["train", str(tmp_path / "settings.yaml"), "--resume", "true", "--max_steps", str(step + 2)]) == 0


def test_exit_codes_and_one_line_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "COMMAND" in capsys.readouterr().out
    for arguments in (["fly"], ["eval"], ["eval", "x", "--target", "y", "--colour", "red"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert __version__ in capsys.readouterr().out
    settings(tmp_path, tmp_path / "nowhere")
    file = str(tmp_path / "settings.yaml")
    for arguments, code, text in (
        (["train", file], 1, "nowhere does not exist"),
        (["train"], 2, "expected a settings file"),
        (["train", file, "--lrr", "1"], 2, "did you mean 'lr'"),
        (["train", str(tmp_path / "absent.yaml")], 1, "no settings file"),
        (["eval", str(tmp_path / "none"), "--target", "x.bin"], 1, "no run, checkpoint or weights file"),
    ):
        assert main(arguments) == code
        error = capsys.readouterr().err
        assert text in error
        assert error.count("\n") == 1
    with pytest.raises(FileNotFoundError):
        main(["train", file, "--debug"])


def test_error_of_a_data_worker_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_folder(tmp_path / "faces", identities=4, images=4)
    (folder / "id01" / "1.png").write_bytes(b"no image")
    settings(tmp_path, folder, num_workers=1, data__max_corrupt=0)
    assert main(["train", str(tmp_path / "settings.yaml")]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "Traceback" not in error
    assert "id01" in error


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--help"], ["train", "--help"], ["eval", "--help"], ["doctor", "--help"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 0
    assert main(["train", "--help-settings"]) == 0
    assert "--margin_ramp" in capsys.readouterr().out


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "torch" in out
    assert "cpu" in out
    assert "triton" in out


def test_eval_of_a_run_a_checkpoint_and_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_folder(tmp_path / "faces")
    settings(tmp_path, folder, max_steps=3, network_options={"widths": [4, 8, 8, 8]})
    assert main(["train", str(tmp_path / "settings.yaml")]) == 0
    images, same = [], []
    for k in range(10):
        for other in (k, k + 1):
            images += [
                (folder / f"id{k:02d}" / "0.png").read_bytes(),
                (folder / f"id{other:02d}" / "1.png").read_bytes(),
            ]
            same.append(other == k)
    target = tmp_path / "pairs.bin"
    target.write_bytes(pickle.dumps((images, same)))
    output = tmp_path / "run"
    capsys.readouterr()
    reports = []
    for model in (output, output / "checkpoints" / "step_00000003"):
        assert main(["eval", str(model), "--target", str(target), "--down", "8", "--json"]) == 0
        reports.append(json.loads(capsys.readouterr().out))
    assert reports[0] == reports[1]
    assert set(reports[0]) == {"pairs", "pairs@8"}
    assert 0.5 <= reports[0]["pairs"]["accuracy"] <= 1
    # The bare file: the default widths do not fit, and that is said.
    code = main(
        [
            "eval",
            str(output / "model.pt"),
            "--network",
            "tiny",
            "--embedding-size",
            "16",
            "--size",
            "32",
            "--target",
            str(target),
        ]
    )
    assert code == 1
    assert "wrong shape" in capsys.readouterr().err
    assert main(["eval", str(output / "model.pt"), "--target", str(target)]) == 2


def test_command_line_starts_light() -> None:
    code = "import sys, recog_fast.cli as c; c._parser(); print([m for m in ('jsonargparse', 'yaml', 'PIL', 'rich', 'tensorboard', 'scipy') if m in sys.modules])"
    out = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True
    ).stdout
    assert out.strip() == "[]"
