"""The kernels without Python: tests/native/kernel_check.cpp, built in the extension's own build folder, on every ISA here."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from paths import ROOT
from routes import isas


@pytest.fixture(scope="module")
def program() -> Path:
    """kernel_check, up to date; the sources' build folder is what `make` left."""
    build = ROOT / "build" / f"cmake.{sysconfig.get_platform()}-{sys.implementation.cache_tag}" / "recog_fast._native"
    if not (build / "CMakeCache.txt").exists():
        pytest.skip(f"no build folder {build.relative_to(ROOT)}: the package was not built from this checkout")
    subprocess.run([sys.executable, "-m", "cmake", "--build", str(build), "--target", "kernel_check"], check=True, capture_output=True)
    return build / "kernel_check"


@pytest.mark.parametrize("isa", isas())
def test_sweeps_agree_with_double_loops(program: Path, isa: str) -> None:
    done = subprocess.run([str(program), isa, "all", "small"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    # an arithmetic's results: prototypes, three of the row sweep, two of the unknown sweep, two of lists, and the class sweeps
    assert done.stdout.count("of what is allowed") in (25, 50)


def test_an_unknown_isa_is_no_success(program: Path) -> None:
    assert subprocess.run([str(program), "sse9"], capture_output=True).returncode == 2
