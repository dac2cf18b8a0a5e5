"""The extension's CUDA kernels as nvcc made them: machine code for every architecture, no spills; and what a launch does without a driver."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest
import torch
from paths import ROOT

import recog_fast as rf
from recog_fast import native

KERNELS = {  # by their stem; several kernels of one operation, and a twin for rows that are not aligned
    "class_step_rows": 2, "prototype_rows": 2, "last_rows": 1, "plan_write": 1, "count_digits": 1, "count_slots": 1, "gather_slots": 1,
    "order_slots": 1, "store_rows": 1, "update_statistics": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def extension() -> ModuleType:
    module, reason = native.load()
    if module is None:
        pytest.skip(f"extension {reason}")
    if module.cuda_built() is None:
        pytest.skip(f"the extension was built without CUDA kernels: {module.CUDA_MISSING}")
    return module


def cuobjdump() -> str:
    """On PATH, or in Triton's wheel."""
    found = shutil.which("cuobjdump")
    if found is None:
        knobs = pytest.importorskip("triton", reason="no cuobjdump on PATH and no Triton, whose wheel has one").knobs
        found = str(knobs.nvidia.cuobjdump.path)
    return found


def test_machine_code_for_every_architecture_and_no_spills(extension: ModuleType) -> None:
    version, names = extension.cuda_built()
    assert re.fullmatch(r"\d+\.\d+.*", version) and names == "80-real 90a-real 100-real 120-virtual"
    used = subprocess.check_output([cuobjdump(), "-res-usage", str(extension.__file__)], text=True, stderr=subprocess.STDOUT)
    code = set(re.findall(r"^arch = (\S+)", used, re.MULTILINE))
    assert {"sm_80", "sm_90a", "sm_100"} <= code, used[:2000]
    rows = re.findall(r"^ Function (\S+):\n\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", used, re.MULTILINE)
    for kernel, twins in KERNELS.items():
        its = [row for row in rows if re.search(rf"\d{kernel}(I|E|v)", row[0])]
        assert len(its) == 3 * twins, (kernel, its)
    assert len(rows) == 3 * sum(KERNELS.values())
    for name, registers, stack, _, local in rows:
        assert int(stack) == int(local) == 0, f"{name} spills"
        # class_step: 4 blocks of 128 threads a processor keep more bytes on their way than memory needs
        assert int(registers) <= 128, name
    ptx = subprocess.check_output([cuobjdump(), "-lptx", str(extension.__file__)], text=True, stderr=subprocess.STDOUT)
    assert "sm_120" in ptx


def test_it_brings_its_runtime_and_needs_no_other(extension: ModuleType) -> None:
    """No libcudart and no libcuda among what the dynamic linker must find."""
    data = Path(str(extension.__file__)).read_bytes()
    assert b"libcudart.so" not in data and data.count(b"cudaErrorInsufficientDriver")


def test_a_launch_without_a_driver_raises_cudas_text_and_leaves_the_process_usable(extension: ModuleType) -> None:
    missing = extension.cuda_missing(0)
    if not missing:
        pytest.skip("there is a driver and a device: tests/test_gpu_native.py launches")
    assert missing.startswith("CUDA C++: ") and "(cudaError" in missing
    assert native.cuda_missing(0) == missing
    none, where = extension.CudaInjection(), {"stream": 0, "device": 0}
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"^class_step: .+ \(cudaError\w+\)$"):
            extension.cuda_class_step(d_prototypes=0, weight=0, memory=none, R=1, D=4, **where)
        with pytest.raises(RuntimeError, match=r"^effective_prototypes: .+ \(cudaError\w+\)$"):
            extension.cuda_effective_prototypes(weight=0, memory=none, prototypes=0, bfloat16=False, R=1, D=4, **where)
        with pytest.raises(RuntimeError, match=r"^norm_statistics: .+ \(cudaError\w+\)$"):
            extension.cuda_norm_statistics(
                norms=0, labelled=0, N=1, norms_double=False, old=0.9, mean=0, std=0, batches=0, new_mean=0, new_std=0, new_batches=0, **where
            )  # fmt: skip
        ring = extension.CudaRing(rows=0, strength=0, stamp=0, owner=0, slot=0, cursor=0, S=1, C=1, D=1, bfloat16=False)
        with pytest.raises(RuntimeError, match=r"^memory_write: .+ \(cudaError\w+\)$"):
            extension.cuda_memory_write(
                ring, embeddings=0, labels=0, strengths=0, N=1, step=0, bfloat16=False, strengths_double=False, scratch=0, evicted=0, **where
            )  # fmt: skip
    assert bool(rf.margin_softmax_loss(torch.ones(2, 4), torch.eye(4), torch.tensor([0, 3])).isfinite())


def test_backends_says_what_was_built_and_why_it_does_not_run(extension: ModuleType) -> None:
    version, names = extension.cuda_built()
    assert f"CUDA {version} for {names}" in rf.backends()["cuda"]


def test_an_extension_without_them_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    class Without:
        CUDA_MISSING = "no nvcc (test)"

        def cuda_built(self) -> None:
            return None

    monkeypatch.setattr(native, "load", lambda: (Without(), "avx2"))
    native.cuda_missing.cache_clear()
    try:
        text = "the extension was built without CUDA kernels: no nvcc (test)"
        assert native.cuda_missing(0) == text and native.describe_cuda() == f"none: {text}"
        monkeypatch.setattr(native, "load", lambda: (None, "not built (test)"))
        native.cuda_missing.cache_clear()
        assert native.cuda_missing(0) == "extension not built (test)" and native.describe_cuda() == "none: extension not built (test)"
    finally:
        native.cuda_missing.cache_clear()


def test_atomics_add_integers_only() -> None:
    """Floating-point results must not depend on the order of threads: atomicAdd is for integers, in memory_write alone."""
    users = {p.name for p in (ROOT / "csrc" / "cuda").iterdir() if "atomic" in p.read_text()}
    assert users == {"memory_write.cu", "memory_write.cuh"}
