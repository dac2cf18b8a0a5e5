"""Which path runs, and why not the others."""

from __future__ import annotations

import importlib
import importlib.util

import torch

from . import native
from .ops import _dispatch, _graphs, _library


def _cpu() -> str:
    module, reason = native.load()
    if _library.backend() == "reference":
        return "reference (use_backend)"
    if module is None:
        return f"reference: compiled kernels {reason}"
    pairs = _dispatch.PAIR_FORMATS[module.active_isa()]
    return f"native {module.active_isa()} (float32; bfloat16 requests run in {pairs or 'float32'}), {torch.get_num_threads()} threads"


def _cuda() -> str:
    built = f"CUDA C++ kernels: {native.describe_cuda()}"
    if not torch.cuda.is_available():
        return f"not available: torch sees no CUDA device ({built})"
    device = f"{torch.cuda.get_device_name()} (CUDA {torch.version.cuda})"
    if _library.backend() == "reference":
        return f"reference on {device} (use_backend)"
    missing = _dispatch.triton_missing(torch.cuda.current_device())
    if missing is not None:
        return f"reference on {device}: {missing}"
    alone = native.cuda_missing(torch.cuda.current_device())
    rows = built if alone is None else f"no CUDA C++ kernels: {alone}"
    return f"Triton tiles and GEMMs on {device}; {rows}; {_graphs.describe()}"


def _triton() -> str:
    if importlib.util.find_spec("triton") is None:
        return "not installed"
    try:
        kernels = importlib.import_module(".triton_kernels", __package__)
    except ImportError as error:
        return f"kernels not installed ({error}): pip install -e ."
    return str(kernels.describe())


def backends() -> dict[str, str]:
    """ "cpu", "cuda", "triton" -> what runs (ISA, device, version) or why not; "dispatch" -> the table of which call runs
    where, first line that holds. `recog_fast.native.select_isa` forces another build of the CPU kernels."""
    return {"cpu": _cpu(), "cuda": _cuda(), "triton": _triton(), "dispatch": _dispatch.describe(_library.backend())}
