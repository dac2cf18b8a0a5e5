"""`recog-fast warmup`: kernels compiled without a GPU are those that another process finds; nothing of the process stays changed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from paths import ROOT

import recog_fast as rf
from recog_fast.cli import main

pytest.importorskip("triton")
from recog_fast.triton_kernels.ahead import Kernel

from recog_fast.ops.ahead import compiling_for

KERNELS = {"prototype_rows", "forward_tile", "merge_tiles", "add_partials", "slope_tile", "class_epilogue"}


def warm(cache: Path, *arguments: str) -> list[dict[str, Any]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "recog_fast", "warmup", *arguments, "--cache", str(cache), "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    said = json.loads(done.stdout)
    assert said["cache"] == str(cache)
    targets: list[dict[str, Any]] = said["targets"]
    return targets


def test_another_process_finds_what_was_compiled(tmp_path: Path) -> None:
    """Two architectures; a second process compiles nothing; other sizes of the same divisibility find the same entries."""
    first = warm(tmp_path, "--batch", "32", "--dim", "64", "--classes", "512", "--arch", "sm_80", "--arch", "sm_90")
    assert [t["target"] for t in first] == ["sm_80", "sm_90"]
    assert all(set(t["kernels"]) == KERNELS and t["compiled"] >= len(KERNELS) and t["found"] == 0 for t in first)
    cubins = list(tmp_path.rglob("*.cubin"))
    assert len(cubins) == sum(t["compiled"] for t in first)
    (again,) = warm(tmp_path, "--batch", "48", "--dim", "64", "--classes", "640", "--arch", "sm_90")
    assert again["compiled"] == 0 and again["found"] == first[1]["compiled"]


def test_the_process_is_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import triton
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    if triton.knobs.runtime.interpret:
        pytest.skip("TRITON_INTERPRET is set in this process")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    before = driver._active, JITFunction.run, triton.knobs.compilation.listener
    x, labels = torch.randn(8, 32), torch.arange(8)
    torch.manual_seed(1)
    head = rf.MarginHead(200, 32)
    loss = float(head(x, labels).detach())

    def fails() -> None:
        with compiling_for(80, told.append) as kernels:
            head(x, labels)
            found.update(k.name for k in kernels.values())
            assert told == list(kernels.values())
            raise KeyError("inside")

    found: set[str] = set()
    told: list[Kernel] = []
    with pytest.raises(KeyError, match="inside"):
        fails()
    assert found >= {"prototype_rows", "forward_tile"}
    assert (driver._active, JITFunction.run, triton.knobs.compilation.listener) == before
    assert float(head(x, labels).detach()) == loss


def test_what_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    refused = [(["--batch", "4", "--arch", "sm_70"], 2, "--arch sm_80"), (["--arch", "sm_80"], 2, "settings file or --batch")]
    for arguments, code, text in [*refused, *([] if torch.cuda.is_available() else [(["--batch", "4"], 1, "--arch sm_80")])]:
        assert main(["warmup", *arguments]) == code
        assert text in capsys.readouterr().err
