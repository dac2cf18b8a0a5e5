"""The compiled kernels, or why they are not there. Importing never fails: operations then fall back to the reference."""

from __future__ import annotations

import functools
import warnings
from types import ModuleType

ISAS = ("amx_bf16", "avx512_bf16", "avx512_vnni", "avx512", "avx2", "baseline")  # the best first


@functools.cache
def load() -> tuple[ModuleType | None, str]:
    """(extension module or None, ISA that runs or the reason it is missing)."""
    try:
        from . import _native
    except ImportError as error:
        return None, f"not built ({error})"
    return _native, str(_native.active_isa())


@functools.cache
def cuda_missing(index: int = 0) -> str | None:
    """Why the CUDA device of that number cannot run the extension's CUDA C++ kernels; None where it can."""
    module, reason = load()
    if module is None:
        return f"extension {reason}"
    if module.cuda_built() is None:
        return f"the extension was built without CUDA kernels: {module.CUDA_MISSING}"
    return str(module.cuda_missing(index)) or None


def describe_cuda() -> str:
    """The compiler's version and the architectures of the CUDA C++ kernels, or why there are none."""
    module, _ = load()
    built = None if module is None else module.cuda_built()
    if built is None:
        return f"none: {cuda_missing()}"
    version, architectures = built
    return f"CUDA {version} for {architectures}"


@functools.cache
def warn_missing() -> None:
    """Says once, when an operation first runs, that it runs on the slow reference."""
    module, reason = load()
    if module is None:
        warnings.warn(
            f"recog_fast: compiled CPU kernels {reason}; running the plain PyTorch reference, which stores N x C "
            "tensors. Build them with `pip install -e .`",
            RuntimeWarning,
            stacklevel=4,
        )


def select_isa(name: str = "") -> str:
    """Forces the build of the CPU kernels, one of `available_isas()`, or "" for the best one here; returns what runs.

    For the whole process, until the next call: `select_isa("avx2")` masks AVX-512 off. Not while another thread is in a
    kernel. "emulated_bf16" and "emulated_amx" are the 16-bit arithmetic of avx512_bf16 and amx_bf16 in plain vectors, slow, for tests.

    Raises ValueError where this CPU lacks it, RuntimeError where the extension is not built.
    """
    module, reason = load()
    if module is None:
        raise RuntimeError(f"select_isa: compiled CPU kernels {reason}")
    return str(module.select_isa(name))


def available_isas() -> tuple[str, ...]:
    """The builds of the CPU kernels that this CPU can run, best first; empty where the extension is not built."""
    module, _ = load()
    return () if module is None else tuple(name for name in ISAS if module.runs_isa(name))
