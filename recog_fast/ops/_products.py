"""GEMMs of the chunk loop: bfloat16 operands with float32 results, float32 ones in IEEE arithmetic whatever torch's flags say."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

_FLAGS = threading.RLock()  # the flags belong to the process: two loops must not restore each other's


@contextlib.contextmanager
def ieee_float32() -> Iterator[None]:
    """Within it float32 products of CUDA tensors use no TF32, and sums of bfloat16 products no lower precision.

    torch has an older flag (`set_float32_matmul_precision`) and newer ones for each backend, refuses to read the older where
    they disagree, and changes the newer ones with the older: all are noted and put back.
    """
    backends: Any = torch.backends  # types know neither attribute
    cuda, cpu = backends.cuda.matmul, backends.mkldnn.matmul
    with _FLAGS:
        newer, reduced = (cuda.fp32_precision, cpu.fp32_precision), cuda.allow_bf16_reduced_precision_reduction
        cuda.fp32_precision = cpu.fp32_precision = "ieee"
        older = torch.get_float32_matmul_precision()
        try:
            cuda.allow_tf32 = False  # the older flag and cuda's newer one
            if reduced:
                cuda.allow_bf16_reduced_precision_reduction = False
            yield
        finally:
            torch.set_float32_matmul_precision(older)
            cuda.fp32_precision, cpu.fp32_precision = newer
            if reduced:
                cuda.allow_bf16_reduced_precision_reduction = True


def float32_product(a: Tensor, b: Tensor) -> Tensor:
    """a (M, K) @ b (K, N) in float32."""
    if a.dtype == torch.float32:
        return torch.mm(a, b)
    # out_dtype exists on CUDA alone
    return torch.mm(a, b, out_dtype=torch.float32) if a.device.type == "cuda" else torch.mm(a.float(), b.float())


def slab_products(a: Tensor, b: Tensor, slab: int) -> list[Tensor]:
    """a (N, W) @ b (W, D) as float32 partial results (S, N, D) of `slab` columns each, and (1, N, D) of what is left.

    One GEMM has too few output tiles for a GPU when N and D are small: fixed slabs of W fill it, and short float32 sums
    are the more exact.
    """
    whole = a.shape[1] // slab
    parts = []
    if whole:
        left = a[:, : whole * slab].unflatten(1, (whole, slab)).transpose(0, 1)
        right = b[: whole * slab].unflatten(0, (whole, slab))
        if a.dtype == torch.float32:
            parts.append(torch.bmm(left, right))
        elif a.device.type == "cuda":
            parts.append(torch.bmm(left, right, out_dtype=torch.float32))
        else:
            parts.append(torch.bmm(left.float(), right.float()))
    if whole * slab < a.shape[1]:
        parts.append(float32_product(a[:, whole * slab :], b[whole * slab :]).unsqueeze(0))
    return parts
