"""The blocks of docs/interchange.md, from top to bottom in an empty folder."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from paths import ROOT

pytest.importorskip("safetensors")

from recog_fast.cli import main

PAGE = (ROOT / "docs" / "interchange.md").read_text()
BLOCK = re.compile(r"(?:<!-- (not run|needs): ([^>]*?) -->\n)?```(python|sh)\n(.*?)```", re.DOTALL)


def test_the_page_runs_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    ran = 0
    for why, what, language, text in BLOCK.findall(PAGE):
        if why == "not run" or (why == "needs" and not all(importlib.util.find_spec(name) for name in what.split(", "))):
            continue
        ran += 1
        if language == "python":
            exec(compile(text, "interchange.md", "exec"), scope)
            continue
        here = re.search(r"^cat .*?^END\n", text, re.DOTALL | re.MULTILINE)
        if here:
            subprocess.run(["sh", "-e", "-c", here[0]], check=True, cwd=tmp_path)
            text = text.replace(here[0], "")
        for line in text.replace("\\\n", " ").splitlines():
            words = shlex.split(line)
            assert words[0] == "recog-fast" and main(words[1:]) == 0, (line, capsys.readouterr().err)
    out = capsys.readouterr().out
    assert ran >= 9 and "checkpoint_gpu_2.pt: classes 6 to 7" in out and "0 of 6 people who are not in the gallery get a match" in out
    assert (tmp_path / "models" / "mbf" / "README.md").read_text().count("non-commercial research") == 1
