"""The ahead-of-time check of the Triton kernels: a part of its table here, the whole of it in `.ci/run`."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

from recog_fast.triton_kernels import check, configs

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")


@pytest.mark.slow
def test_a_part_of_the_table_compiles_within_its_budgets() -> None:
    """The tiles of N = 1024 for sm_90, and a line for each."""
    command = [sys.executable, "-m", "recog_fast.triton_kernels.check", "--arch", "90", "--kernel", "class_step", "--jobs", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "sm_90  class_step" in done.stdout and "3 kernels, 0 over budget" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "kernel", "variant"), [
    (90, "negative_logsumexp", "bf16, 128x128x64, E TMA"), (90, "class_gradient", "bf16, 128x128x64 TMA"), (80, "unknown_rejection", "bf16, 128x64x64"),
])  # fmt: skip
def test_tiles_keep_the_promise_of_the_table(arch: int, kernel: str, variant: str) -> None:
    """No spills, tensor cores; on sm_90 two programs share a processor (128 registers, half the shared memory)."""
    (job,) = [j for j in check.jobs((arch,), kernel) if j.variant == variant]
    line = check.compile_job(job)
    assert not line.broken()
    if arch == 90:
        assert line.registers <= 128 and 2 * line.shared <= configs.SHARED_MEMORY[90]


@pytest.mark.slow
def test_ones_compile() -> None:
    """Triton takes an integer argument of 1 as a constant: one row, one class, a chunk that begins at class 1, one partial."""
    for kernel, ones in (("negative_logsumexp", ("N", "C", "first")), ("class_gradient", ("N", "C", "first")), ("unknown_rejection", ("N", "C", "first")),
                         ("merge", ("S", "M", "stride", "T", "first")), ("class_step", ("R", "first")), ("effective_prototypes", ("R",))):  # fmt: skip
        job = check.jobs((90,), kernel)[-1]
        names = getattr(check._MODULES[job.module], job.function).arg_names
        job = dataclasses.replace(job, constants=(*job.constants, *((name, 1) for name in ones if name in names)))
        assert not check.compile_job(job).broken(), kernel


def test_broken_budgets_are_found() -> None:
    """Each budget by itself, and the exit code."""
    job = next(j for j in check.jobs((90,), "negative_logsumexp") if j.tensor_cores)
    good = check.Line(job, 128, 0, 0, 96 << 10, 4, 1.0)
    assert good.broken() == []
    for change in ({"spills": 3}, {"stack": 8}, {"shared": 228 << 10}, {"tensor_cores": 0}):
        assert len(dataclasses.replace(good, **change).broken()) == 1, change


def test_the_table_is_whole() -> None:
    """Every architecture, kernel, dtype and shape class has a tile, and each is compiled."""
    keys = {(arch, kernel, shape) for arch in configs.ARCHITECTURES for kernel in configs.KERNELS for shape in configs.SHAPES}
    for arch, kernel, shape in keys:
        tiles = [tile for (a, k, _, s), tile in configs.TABLE.items() if (a, k, s) == (arch, kernel, shape)]
        assert len(tiles) == 2
        for tile in tiles:
            assert any(f"{tile.rows}x{tile.classes}x{tile.depth}" in job.variant for job in check.jobs((arch,), kernel)), (arch, kernel, tile)
    assert all(configs.ROW_PADDING % tile.rows == 0 for tile in configs.TABLE.values())
