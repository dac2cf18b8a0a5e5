"""Data workers outlive no training process: neither a scheduler's signal nor an exit in the middle of an epoch leaves one behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT
from training_data import make_folder, settings

# Ends with a live persistent worker: its iterator is in a reference cycle, as after an error in a notebook.
SCRIPT = """
import multiprocessing
import sys
from recog_fast.training.config import read_config
from recog_fast.training.data import TrainingImages, step_loader

multiprocessing.set_start_method(sys.argv[2])
config = read_config(sys.argv[1])
position, loader = step_loader(TrainingImages(config), config, pin_memory=False)
iterator = iter(loader)
next(iterator)
cycle = [iterator]
cycle.append(cycle)
print(*[worker.pid for worker in iterator._workers], flush=True)
"""


@pytest.mark.parametrize("start", ["fork", "forkserver"])
def test_an_exit_in_mid_epoch_does_not_wait_for_workers(start: str, tmp_path: Path) -> None:
    """Workers ignore a scheduler's SIGTERM; ignoring their parent's too would keep it waiting for them at its exit for ever. A worker of a
    fork server has the server for its parent, and is the training process's all the same: so from Python 3.14 on by default."""
    settings(tmp_path, make_folder(tmp_path / "faces"), num_workers=1)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "settings.yaml"), start], env=environment, cwd=tmp_path,
        stdout=subprocess.PIPE, text=True, timeout=90, check=True,
    )  # fmt: skip
    workers = [int(pid) for pid in done.stdout.split()]
    assert workers
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
