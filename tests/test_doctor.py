"""`recog-fast doctor`: what it says, what it warns about, and what it measures between ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from paths import ROOT

from recog_fast.cli import main
from recog_fast.commands import doctor, host


def test_everything_is_said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    assert main(["doctor", "--json", "--probe"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["environment"]["NCCL_DEBUG"] == "WARN"
    assert said["isas"]["active"] in [*said["isas"]["available"], said["isas"]["active"]]
    assert {"torch", "triton", "nccl", "nvcc"} <= set(said["versions"])
    assert said["probe"]["memory"] > 1e8 and said["probe"]["float32"] > 1e8 and "collectives" not in said["probe"]
    assert 0 < said["host"]["memory"]["available"] <= said["host"]["memory"]["total"]
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("dispatch", "NCCL_DEBUG=WARN", "open files", "triton cache", "/dev/shm"))


def report(**changes: Any) -> dict[str, Any]:
    sound: dict[str, Any] = {
        "backends": {"cpu": "native avx2"}, "environment": {}, "groups": ["gloo", "nccl"],
        "devices": {"cuda": [], "topology": None},
        "host": {
            "cores": 8, "threads": 8, "memory": {"total": 64e9, "available": 60e9}, "shared_memory": {"total": 32e9, "available": 32e9},
            "open_files": {"soft": 65536, "hard": 65536}, "triton_cache": {"folder": "/c", "file_system": "ext4"},
        },
    }  # fmt: skip
    for key, value in changes.items():
        place, *rest = key.split("__")
        if rest:
            sound[place][rest[0]] = value
        else:
            sound[place] = value
    return sound


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"backends": {"cpu": "reference: not built"}}, "slow reference"),
        ({"host__memory": {"total": 64e9, "available": 1e9}}, "1.0 GB of memory"),
        ({"host__shared_memory": {"total": 64e6, "available": 60e6}}, "--shm-size"),
        ({"host__open_files": {"soft": 1024, "hard": 4096}}, "ulimit -n 4096"),
        ({"environment": {"LOCAL_WORLD_SIZE": "4"}}, "OMP_NUM_THREADS=2"),
        ({"host__triton_cache": {"folder": "/c", "file_system": "nfs4"}}, "TRITON_CACHE_DIR"),
        ({"environment": {"TRITON_INTERPRET": "1"}}, "interpreter"),
        ({"devices": {"cuda": [], "topology": "GPU0"}}, "torch does not"),
        ({"devices": {"cuda": [{}, {}], "topology": None}, "groups": ["gloo"]}, "no NCCL"),
    ],
)
def test_what_is_warned_about(changes: dict[str, Any], text: str) -> None:
    assert doctor.warnings_of(report()) == []
    (said,) = doctor.warnings_of(report(**changes))
    assert text in said


def test_the_control_groups_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "limit").write_text("1000000\n")
    (tmp_path / "none").write_text("max\n")
    monkeypatch.setattr(host, "_CGROUPS", (str(tmp_path / "limit"), str(tmp_path / "none"), str(tmp_path / "absent")))
    assert host.memory() == {"total": 1_000_000, "available": 1_000_000}


def test_ranks_are_probed() -> None:
    """Under torchrun: every collective and size, latency above 0; rank 0 alone prints."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "recog_fast", "doctor", "--probe", "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    probe = json.loads(done.stdout)["probe"]
    assert probe["ranks"] == 2
    assert {c["kind"] for c in probe["collectives"]} == {"all-reduce", "all-gather", "reduce-scatter"}
    assert len(probe["collectives"]) == 3 * len(doctor._SIZES)
    assert all(c["seconds"] > 0 and c["link"] > 0 for c in probe["collectives"])
