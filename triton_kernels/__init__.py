"""Triton kernels of recog_fast: one file per sweep, kernel and launcher, installed as `recog_fast.triton_kernels`.

`recog_fast/ops/chunks.py` drives them. Importing this package imports no triton; `reason_missing` says whether a device can run them.
"""

from __future__ import annotations

import functools
import importlib.util

OLDEST = (8, 0)  # compute capability: bfloat16 tensor cores


@functools.cache
def reason_missing(index: int = 0) -> str | None:
    """Why the CUDA device of that number cannot run these kernels; None where it can."""
    import torch

    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    capability = torch.cuda.get_device_capability(index)
    return None if capability >= OLDEST else f"compute capability {capability[0]}.{capability[1]} is below 8.0"


def describe() -> str:
    """Triton's version and the device it compiles for, or why there is none."""
    import torch

    if importlib.util.find_spec("triton") is None:
        return "not installed"
    import triton

    reason = reason_missing()
    if reason is not None:
        return f"{triton.__version__}, kernels cannot be launched: {reason}"
    major, minor = torch.cuda.get_device_capability()
    return f"{triton.__version__} for sm_{major}{minor}"
