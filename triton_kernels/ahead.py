"""Compiling launches without a GPU, into the entries of Triton's cache that launches on one look up.

Launches on CPU tensors go through Triton's own just-in-time path (`JITFunction.run` with warmup=True): signature, specialisation,
options and target are those of a launch, and so is the key (triton 3.6: `compiler.get_cache_key` hashes the kernel's source and what it
calls, signature, constants, attributes, options, the ptxas version, the target, triton's own files and some environment variables; no
device, and no address but its alignment). `check.py` compiles other entries: its options lack what a launch adds.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from . import configs


@dataclass(frozen=True)
class Kernel:
    """One kernel that was asked for: compiled now, or found in the cache."""

    name: str
    key: str
    cached: bool


def cache_folder() -> Path:
    """Where Triton keeps what it compiled."""
    return Path(triton.knobs.cache.dir)


@contextlib.contextmanager
def listening(each: Callable[[Kernel], None] | None = None) -> Iterator[dict[str, Kernel]]:
    """The kernels (by key) that are compiled or found within it, by whoever asks for them first in this process; each is called with them."""
    found: dict[str, Kernel] = {}

    def note(*, src: Any, metadata: dict[str, Any], cache_hit: bool, **_: Any) -> None:
        key = str(metadata["hash"])
        if key not in found:
            found[key] = Kernel(src.name, key, cache_hit)
            if each is not None:
                each(found[key])

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

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> str:
        return f"sm_{self.arch}, not there"  # its own entry among each kernel's devices

    def get_current_stream(self, _: Any) -> int:
        return 0


@contextlib.contextmanager
def compile_only(arch: int, each: Callable[[Kernel], None] | None = None) -> Iterator[dict[str, Kernel]]:
    """Within it launches on CPU tensors, with that architecture's tiles, are compiled for it and not run; gives the kernels as `listening`.

    Whole process. Raises ValueError for another architecture than the table's, RuntimeError under TRITON_INTERPRET.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("warmup: expected TRITON_INTERPRET not to be set: nothing would be compiled")
    launch = JITFunction.run

    def run(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        return launch(self, *arguments, grid=grid, warmup=True, **options)

    active = driver._active
    try:
        with configs.pretend(arch), mock.patch.object(JITFunction, "run", run), listening(each) as found:
            driver.set_active(_Driver(arch))
            yield found
    finally:
        driver._active = active
