"""Compiling the Triton kernels of a training step without a GPU, into the entries of Triton's cache that a GPU's launches look up.

The real launches are made, on CPU tensors, by Triton's own just-in-time path (`JITFunction.run` with warmup=True): signature,
specialisation, options and target are those of a launch, and so is the key (triton 3.6: `compiler.get_cache_key` hashes the kernel's
source and what it calls, signature, constants, attributes, options, the ptxas version, the target, triton's own files and some
environment variables; no device and no address but its alignment). `triton_kernels.check` compiles other entries: its options lack what a launch adds.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from . import _cuda, _library


@dataclass(frozen=True)
class Kernel:
    """One kernel that was asked for: compiled now, or found in the cache."""

    name: str
    key: str
    cached: bool


@contextlib.contextmanager
def listening() -> Iterator[dict[str, Kernel]]:
    """The kernels (by key) that are compiled or found within it, by whoever asks for them first in this process."""
    import triton

    found: dict[str, Kernel] = {}

    def note(*, src: Any, metadata: dict[str, Any], cache_hit: bool, **_: Any) -> None:
        key = str(metadata["hash"])
        found.setdefault(key, Kernel(src.name, key, cache_hit))

    before = triton.knobs.compilation.listener
    triton.knobs.compilation.listener = note
    try:
        yield found
    finally:
        triton.knobs.compilation.listener = before


class _Driver:
    """What the just-in-time path asks of a driver, for a device that is not there."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> str:
        return f"sm_{self.arch}, not there"  # its own entry among each kernel's devices

    def get_current_stream(self, _: Any) -> int:
        return 0


@contextlib.contextmanager
def compiling_for(arch: int) -> Iterator[dict[str, Kernel]]:
    """Within it the operations on CPU tensors make the launches of a GPU of compute capability arch (80, 89, 90, 100), which are compiled
    and not run: results are whatever lay in memory. Whole process; gives the kernels as `listening` does.

    Raises ValueError for another architecture, RuntimeError under TRITON_INTERPRET.
    """
    import triton
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    from ..triton_kernels import configs

    if triton.knobs.runtime.interpret:
        raise RuntimeError("warmup: expected TRITON_INTERPRET not to be set: nothing would be compiled")

    def runs(_: str, *operands: Tensor | None, kept: Tensor | None = None) -> bool:
        return _library.backend() == "auto" and kept is None and all(t is None or t.dtype != torch.float64 for t in operands)

    launch = JITFunction.run

    def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        return launch(self, *arguments, grid=grid, warmup=True, **options)

    library = torch.library.Library("recog_fast", "IMPL")
    active = driver._active
    try:
        with configs.pretend(arch), mock.patch.object(_cuda, "_runs", runs), mock.patch.object(JITFunction, "run", compile_only), listening() as found:
            driver.set_active(_Driver(arch))
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Warning only once for all operators")
                for stem, kernel in _cuda.KERNELS.items():
                    library.impl(stem, kernel, "CPU", allow_override=True)
            yield found
    finally:
        driver._active = active
        library._destroy()
