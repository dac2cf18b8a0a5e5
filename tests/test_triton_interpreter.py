"""`interpreted.py` in a process of its own: Triton's interpreter is chosen before triton is imported."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from paths import ROOT

pytest.importorskip("triton")


@pytest.mark.slow
def test_kernels_and_chunk_loop_in_the_interpreter() -> None:
    """Every kernel on ragged shapes, and the golden cases through the whole chunk loop; its failures are shown here."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    files = ["tests/interpreted.py", "tests/interpreted_steps.py", "tests/interpreted_planes.py"]
    command = [sys.executable, "-m", "pytest", *files, "-p", "no:cacheprovider", "-W", "ignore::DeprecationWarning", "--tb=short"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    passed = re.search(r"(\d+) passed", done.stdout)
    assert done.returncode == 0 and passed is not None and int(passed[1]) >= 50, done.stdout[-8000:] + done.stderr[-2000:]
