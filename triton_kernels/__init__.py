"""Triton kernels of recog_fast: one file per sweep, installed as `recog_fast.triton_kernels`.

No sweep runs on Triton yet: CUDA tensors take the reference. `describe` says what this installation could run.
"""

from __future__ import annotations


def describe() -> str:
    """Triton's version and the device it would compile for, or why there is none."""
    import torch
    import triton  # type: ignore[import-untyped]

    if not torch.cuda.is_available():
        return f"{triton.__version__}, no device: kernels cannot be launched"
    major, minor = torch.cuda.get_device_capability()
    return f"{triton.__version__} for sm_{major}{minor}: no kernels in this version"
