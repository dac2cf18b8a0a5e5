"""tools/soak.py: twenty seconds of it hold no more memory at the end, and what does grow is told."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from paths import ROOT

TOOL = ROOT / "tools" / "soak.py"


@pytest.fixture(scope="module")
def soak() -> ModuleType:
    spec = importlib.util.spec_from_file_location("soak", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["soak"] = module  # its dataclass looks there
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_heads_of_every_kind_hold_no_more_memory(tmp_path: Path) -> None:
    command = [sys.executable, TOOL, "--minutes", "0.2", "--parts", "heads", "--steps", "1", "--output", tmp_path / "soak.json"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "soak.json").read_text())
    assert report["wrong"] == [] and report["cycles"] >= 8 and report["growth_mb"] <= report["limit_mb"]


def test_growth_is_told(soak: ModuleType) -> None:
    def watch(**grown: list[int]) -> dict[str, object]:
        flat = {"rss": [500.0] * 12, "tensors": [9] * 12, "files": [5] * 12, "threads": [1] * 12}
        verdict: dict[str, object] = soak.Watch(list(range(1, 13)), **{**flat, **grown}).verdict(16.0)
        return verdict

    assert watch()["wrong"] == [] and watch()["slope_mb_per_hour"] == 0
    assert watch(rss=[500, 520, 530, *[530] * 9])["wrong"] == [], "warm-up is no growth"
    assert watch(rss=list(range(500, 560, 5)))["wrong"] == ["RSS grew by 30.0 MB (at most 16)"]
    assert watch(tensors=list(range(12)))["wrong"] == ["tensors went from at most 5 to at least 9"]
    assert watch(files=[5, 9, 5, 9] * 3)["wrong"] == [], "what comes and goes is no leak"
    with pytest.raises(ValueError, match="at least 8 cycles, got 3"):
        soak.Watch([1, 2, 3], [1.0] * 3, [1] * 3, [1] * 3, [1] * 3).verdict(16.0)
