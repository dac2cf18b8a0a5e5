"""What ran: device, versions, commit. Nothing here names a machine or a person."""

from __future__ import annotations

import functools
import importlib.util
import os
import platform
import re
import subprocess
from pathlib import Path

import numpy
import torch

import recog_fast
from recog_fast.commands.host import cpu_fields, cpu_name

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"


def has_bf16() -> bool:
    """Whether the CPU multiplies bfloat16 in hardware (AVX512_BF16, AMX, or the BF16 extension of Arm)."""
    fields = cpu_fields()
    flags = f"{fields.get('flags', '')} {fields.get('Features', '')}".split()
    return any(f in flags for f in ("avx512_bf16", "amx_bf16", "bf16"))


def slug() -> str:
    """Folder name of this device's results."""
    return re.sub(r"[^a-z0-9]+", "-", f"{cpu_name()} {os.cpu_count()}core".lower()).strip("-")


@functools.cache
def commit() -> str:
    """Commit of the source tree, "+changes" when it is not clean (stored results apart). Where the files came without their
    history: what RECOG_FAST_COMMIT says, or "unknown"."""
    status = ("status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)benchmarks/results")
    try:
        run = [subprocess.run(["git", *a], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
               for a in (("rev-parse", "--short=12", "HEAD"), status)]  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("RECOG_FAST_COMMIT", "unknown")
    return run[0] + ("+changes" if run[1] else "")


def describe() -> dict[str, str]:
    """Everything a reader of a table needs to judge it."""
    return {
        "device": f"{cpu_name()}, {os.cpu_count()} cores, one thread used",
        "recog_fast": recog_fast.__version__,
        "commit": commit(),
        "bf16_instructions": "yes" if has_bf16() else "no",
        "backend": recog_fast.backends()["cpu"],
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
    }


def use_source_tree() -> None:
    """Makes `recog_fast.triton_kernels` importable from a checkout that was never installed: CUDA tensors need no build."""
    if importlib.util.find_spec("recog_fast.triton_kernels") is None:
        recog_fast.__path__.append(str(ROOT))


def repository_environment() -> dict[str, str]:
    """The environment in which a child process finds this package and runs on one thread."""
    path = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH", "")) if p)
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
