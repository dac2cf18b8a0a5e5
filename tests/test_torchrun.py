"""`recog-fast train` as people start it over ranks: torchrun, a rank killed, a signal, a rank that hangs. RECOG_FAST_ELASTIC=10 kills ten times."""

from __future__ import annotations

import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import ranks as processes
from paths import ROOT
from ranks import Ranks
from training_data import make_folder, settings
from training_ranks import train_run

from recog_fast.evaluation.report import read_metrics
from recog_fast.training.loop import train

ranks = pytest.fixture(scope="module")(processes.ranks)

KILLS = max(1, int(os.environ.get("RECOG_FAST_ELASTIC", "1")))
STEPS = 40 * (KILLS + 2)
RUN: dict[str, Any] = {
    "network_options": {"widths": [4, 8, 8, 8]}, "method": "qaface", "memory": {"start": 5, "inject_scale": 0.176}, "memory_momentum": 0.9,
    "sync_batchnorm": True, "num_workers": 1, "num_epoch": 1000, "max_steps": STEPS, "save_interval": 10, "lr": 0.01,
}  # fmt: skip
# Two runs of the same ranks differ in nothing; another number of ranks in summation orders, over the steps compared.
BUDGET = 1e-4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("images") / "faces")


def start(tmp_path: Path, output: Path, ranks: int, restarts: int = 0) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "--max-restarts", str(restarts)]
    command += ["--monitor-interval", "0.1", "-m", "recog_fast", "train", str(tmp_path / "settings.yaml"), "--output", str(output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with (output.parent / f"{output.name}.log").open("ab") as log:
        return subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=log, stderr=log)


def losses(output: Path) -> dict[int, float]:
    file = output / "metrics.jsonl"
    return {int(line["step"]): line["loss"] for line in read_metrics(file) if "loss" in line} if file.exists() else {}


def workers(torchrun: int) -> dict[int, int]:
    """Rank -> process id of torchrun's ranks."""
    found = {}
    for child in Path(f"/proc/{torchrun}/task/{torchrun}/children").read_text().split():
        entries = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        found |= {int(entry[5:]): int(child) for entry in entries if entry.startswith(b"RANK=")}
    return found


def until(run: subprocess.Popen[bytes], output: Path, step: int) -> bool:
    """Waits for a step to be logged; False where the run ended before."""
    while max(losses(output), default=0) < step:
        if run.poll() is not None:
            return False
        time.sleep(0.02)
    return True


def stopped(run: subprocess.Popen[bytes], output: Path, code: int) -> int:
    """The step that a signalled run ended at, with its exit code and a checkpoint of that step."""
    assert run.wait(120) == code, (output.parent / "run.log").read_text()[-2000:]
    done = max(losses(output))
    assert (output / "checkpoints" / f"step_{done:08d}").exists()
    return done


def test_a_killed_rank_costs_nothing_and_sigterm_ends_all(ranks: Ranks, tmp_path: Path, folder: Path) -> None:
    """kill -9 (the run goes on by itself), SIGTERM to one rank (exit code 0), resumed, to torchrun (1), by one process: one trajectory."""
    settings(tmp_path, folder, **RUN)
    undisturbed, output = tmp_path / "undisturbed", tmp_path / "run"
    ranks.run(2, train_run, str(tmp_path / "settings.yaml"), {"output": str(undisturbed), "num_workers": 0})
    expected = losses(undisturbed)
    assert set(expected) == set(range(1, STEPS + 1))
    draw, run = random.Random(3), start(tmp_path, output, 2, restarts=KILLS + 1)
    try:
        for kill in range(KILLS):
            step = 40 * kill + draw.randrange(12, 38)
            assert until(run, output, step), (tmp_path / "run.log").read_text()[-2000:]
            os.kill(workers(run.pid)[draw.randrange(2)], signal.SIGKILL)
            while max(losses(output), default=0) >= step and run.poll() is None:
                time.sleep(0.02)  # until the restarted run drops what it does again
        assert until(run, output, STEPS - 65)
        os.kill(workers(run.pid)[1], signal.SIGTERM)
        first = stopped(run, output, 0)
        assert STEPS - 65 <= first < STEPS - 5
        settings(tmp_path, folder, **{**RUN, "resume": True})
        run = start(tmp_path, output, 2)
        assert until(run, output, first + 1), (tmp_path / "run.log").read_text()[-2000:]
        run.terminate()
        done = stopped(run, output, 1)
    finally:
        run.kill()
    assert first < done < STEPS
    found = losses(output)
    assert found == pytest.approx({step: expected[step] for step in found}, rel=BUDGET)
    steps = min(STEPS, done + 5)
    train(settings(tmp_path, folder, **{**RUN, "resume": True}))
    found = losses(output)
    assert {s: found[s] for s in range(1, steps + 1)} == pytest.approx({s: expected[s] for s in range(1, steps + 1)}, rel=BUDGET)


def test_a_rank_that_hangs_is_named_by_the_others(tmp_path: Path, folder: Path) -> None:
    """Started without torchrun, by the four variables alone; a stopped process answers nothing."""
    settings(tmp_path, folder, **{**RUN, "num_workers": 0, "max_steps": 0, "timeout": 4})
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    output = tmp_path / "run"
    started = []
    for rank in range(3):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "RANK": str(rank), "WORLD_SIZE": "3"}
        environment |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        command = [sys.executable, "-m", "recog_fast", "train", str(tmp_path / "settings.yaml"), "--output", str(output)]
        started.append(subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True))
    try:
        assert until(started[0], output, 3), started[0].communicate()  # type: ignore[arg-type]
        os.kill(started[1].pid, signal.SIGSTOP)
        for rank in (0, 2):
            _, said = started[rank].communicate(timeout=60)
            assert started[rank].returncode == 1
            assert "rank 1 of 3 did not answer" in said
            assert re.search(r"train: error: (saving after )?step \d+: rank 1", said)  # wherever the others were when it stopped
    finally:
        for process in started:
            process.kill()
            process.communicate()
