"""Where the tests marked `gpu` put their tensors: the CUDA device, or with RECOG_FAST_GPU_TESTS_ON=cpu the CPU, to try the tests themselves."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

DEVICE = os.environ.get("RECOG_FAST_GPU_TESTS_ON", "cuda")
GPU = [pytest.mark.gpu, pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="torch sees no CUDA device")]
ON_CUDA_ALONE = pytest.mark.skipif(DEVICE != "cuda", reason="RECOG_FAST_GPU_TESTS_ON asks for another device")


def there(t: Tensor) -> Tensor:
    """A copy on that device."""
    return t.to(DEVICE, copy=True)


def synchronize() -> None:
    """Waits for it; errors of its kernels are raised here."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
