"""Streams a command may be started with: an encoding that lacks letters, standard output or error closed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from mutations import picture

from recog_fast.cli import main


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("streams") / "faces"
    for k in range(3):
        path = folder / "大原" / f"{k}é.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture("PNG", k) if k else b"broken")
    return folder


def run(faces: Path, *more: str, closed: str = "") -> subprocess.CompletedProcess[str]:
    code = "import sys; from recog_fast.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "data", "check", str(faces), *more]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii:strict", "OMP_NUM_THREADS": "1"}
    shell = ["sh", "-c", f'exec "$@" {closed}', "sh"]
    return subprocess.run([*shell, *command], env=environment, capture_output=True, text=True, check=False, timeout=120)


def test_names_that_standard_output_cannot_encode_are_escaped(faces: Path) -> None:
    done = run(faces)
    assert done.returncode == 0 and done.stderr == ""
    assert "\\u5927\\u539f" in done.stdout and "\\xe9" in done.stdout


def test_closed_streams_are_no_error_and_do_not_take_each_others_lines(faces: Path) -> None:
    assert (lambda done: (done.returncode, done.stderr))(run(faces, closed=">&-")) == (0, "")
    missing = run(faces / "absent", "--json", closed="2>&-")
    assert missing.returncode == 1 and missing.stdout == ""


def test_an_option_without_a_command_is_refused_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--bogus"])
    assert ended.value.code == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and "unrecognized arguments: --bogus" in said.err
