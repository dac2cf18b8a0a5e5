"""Which path runs, and why not the others."""

from __future__ import annotations

import importlib
import importlib.util

import torch

from . import native
from .ops import _library


def _cpu() -> str:
    module, reason = native.load()
    if _library.backend() == "reference":
        return "reference (use_backend)"
    if module is None:
        return f"reference: compiled kernels {reason}"
    return f"native {module.active_isa()} (float32 arithmetic; bfloat16 requests run in it), {torch.get_num_threads()} threads"


def _cuda() -> str:
    if not torch.cuda.is_available():
        return "not available: torch sees no CUDA device"
    return f"reference on {torch.cuda.get_device_name()} (CUDA {torch.version.cuda}): no GPU kernels in this version"


def _triton() -> str:
    if importlib.util.find_spec("triton") is None:
        return "not installed"
    try:
        kernels = importlib.import_module(".triton_kernels", __package__)
    except ImportError as error:
        return f"kernels not installed ({error}): pip install -e ."
    return str(kernels.describe())


def backends() -> dict[str, str]:
    """ "cpu", "cuda", "triton" -> what runs (ISA, device, version) or why not."""
    return {"cpu": _cpu(), "cuda": _cuda(), "triton": _triton()}
