"""The CUDA C++ kernels on a CPU: csrc/cuda and its binding compiled against tests/native/emulated, CPU tensors in place of CUDA ones."""

from __future__ import annotations

import functools
import importlib.util
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from paths import ROOT
from torch import Tensor

from recog_fast.ops import _cuda_native

ORDERS = ("forward", "backward", "mixed")  # in which threads and blocks run


def build_folder() -> Path:
    """Where `make` compiled the extension of this checkout."""
    build = ROOT / "build" / f"cmake.{sysconfig.get_platform()}-{sys.implementation.cache_tag}" / "recog_fast._native"
    if not (build / "CMakeCache.txt").exists():
        pytest.skip(f"no build folder {build.relative_to(ROOT)}: the package was not built from this checkout")
    return build


def load(path: Path) -> ModuleType:
    """An extension under its own name, beside the one of the package."""
    spec = importlib.util.spec_from_file_location("_native", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build(target: str) -> Path:
    """Brings a target of the build folder up to date; the folder."""
    folder = build_folder()
    subprocess.run([sys.executable, "-m", "cmake", "--build", str(folder), "--target", target], check=True, capture_output=True)
    return folder


@functools.cache
def module() -> ModuleType:
    """The emulated extension."""
    (path,) = (build("emulated_cuda") / "emulated").glob("_native*.so")
    return load(path)


def take_over(patch: pytest.MonkeyPatch, order: str = "forward") -> None:
    """`ops._cuda_native` launches the emulated kernels, on CPU tensors."""
    emulated = module()
    patch.setenv("RECOG_FAST_EMULATED_ORDER", order)
    patch.setattr(_cuda_native, "_extension", lambda t: emulated)
    patch.setattr(_cuda_native, "_launch", lambda t: {"stream": 0, "device": 0})


class Guard:
    """Copies of tensors amid a pattern in memory that nobody may change; `shift` elements off a multiple of 16 bytes."""

    def __init__(self, shift: int = 0, device: str = "cpu") -> None:
        self.shift, self.device = shift, device
        self.kept: list[tuple[Tensor, int, int]] = []

    def __call__(self, value: Tensor) -> Tensor:
        """The same values, NaN (integers: -77, bools: True) before and behind."""
        margin = 64 + self.shift
        memory = torch.full((2 * margin + value.numel(),), _pattern(value.dtype), dtype=value.dtype, device=self.device)
        memory[margin : margin + value.numel()].copy_(value.reshape(-1))
        self.kept.append((memory, margin, value.numel()))
        return memory[margin : margin + value.numel()].view(value.shape)

    def check(self) -> None:
        """Nothing was written outside."""
        for memory, margin, count in self.kept:
            for side in (memory[:margin], memory[margin + count :]):
                assert bool((torch.isnan(side) if side.dtype.is_floating_point else side == _pattern(side.dtype)).all())


def _pattern(dtype: torch.dtype) -> Any:
    return float("nan") if dtype.is_floating_point else dtype == torch.bool or -77
