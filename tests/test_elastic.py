"""tools/train_ranks.py under torchrun: ranks killed at random, signals, other numbers of ranks. Long: RECOG_FAST_ELASTIC=10 kills ten times."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from paths import ROOT

KILLS = int(os.environ.get("RECOG_FAST_ELASTIC", "0"))
STEPS = 400
pytestmark = pytest.mark.skipif(KILLS == 0, reason="starts torchrun again and again: set RECOG_FAST_ELASTIC to how often a rank is killed")


def start(output: Path, ranks: int, restarts: int = 0, steps: int = STEPS) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "--max-restarts", str(restarts)]
    command += ["--monitor-interval", "0.1", str(ROOT / "tools" / "train_ranks.py"), str(output), "--steps", str(steps), "--save", "10"]
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)


def losses(output: Path) -> dict[int, float]:
    """The last loss of every step; a half written line at a kill is none."""
    found = {}
    for line in (output / "losses.jsonl").read_text().splitlines():
        try:
            entry = json.loads(line)
            found[entry["step"]] = entry["loss"]
        except ValueError:
            continue
    return found


def workers(parent: int) -> list[int]:
    """Process ids of torchrun's ranks."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [int(p) for p in children if b"train_ranks" in Path(f"/proc/{p}/cmdline").read_bytes()]


def same(one: dict[int, float], other: dict[int, float]) -> bool:
    return set(one) == set(other) and all(abs(one[s] - other[s]) <= 1e-4 * abs(other[s]) for s in other)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    output = tmp_path_factory.mktemp("undisturbed")
    assert start(output, 2).wait(300) == 0
    return losses(output)


def test_killed_ranks_cost_nothing(undisturbed: dict[int, float], tmp_path: Path) -> None:
    draw = random.Random(3)
    run = start(tmp_path, 2, restarts=KILLS + 5)
    killed, last = 0, 0
    while run.poll() is None:
        time.sleep(0.02)
        log = tmp_path / "losses.jsonl"
        step = len(log.read_text().splitlines()) if log.exists() else 0
        if killed < KILLS and step > last + draw.randrange(5, 25) and len(workers(run.pid)) == 2:
            os.kill(draw.choice(workers(run.pid)), signal.SIGKILL)
            killed, last = killed + 1, step
    assert run.returncode == 0
    assert killed == KILLS
    assert same(losses(tmp_path), undisturbed)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_one_rank_saves_and_ends_all_and_others_go_on(undisturbed: dict[int, float], number: signal.Signals, tmp_path: Path) -> None:
    run = start(tmp_path, 3)
    while not (tmp_path / "checkpoints" / "step_00000010").exists():
        time.sleep(0.02)
    os.kill(workers(run.pid)[1], number)
    assert run.wait(120) == 0
    done = max(losses(tmp_path))
    assert done < STEPS
    assert (tmp_path / "checkpoints" / f"step_{done:08d}").exists()
    assert start(tmp_path, 2).wait(300) == 0
    assert same(losses(tmp_path), undisturbed)
