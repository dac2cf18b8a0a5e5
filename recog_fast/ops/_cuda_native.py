"""The CUDA C++ kernels of csrc/cuda, one function each. What they do not take goes to Triton (rows of W) or torch (memory).

They take contiguous tensors on one CUDA device that `native.cuda_missing` has nothing against, launch on torch's current stream of that
device and wait for nothing. `use_backend("reference")` never gets here, or is asked for here (the memory's).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import native
from . import _dispatch, _library
from .memory_write import reference_memory_write

Injected = tuple[Tensor, Tensor, Tensor]  # memory (S, D), strength (S,) float32, slot (R,) int32
_HALF_OR_FLOAT = (torch.bfloat16, torch.float32)


def _extension(t: Tensor) -> ModuleType | None:
    """The extension where it has CUDA kernels for the device of `t`."""
    if t.device.type != "cuda" or native.cuda_missing(t.device.index) is not None:
        return None
    return native.load()[0]


def _launch(t: Tensor) -> dict[str, int]:
    """Where a kernel on `t` runs."""
    return {"stream": torch.cuda.current_stream(t.device).cuda_stream, "device": t.device.index}


def _guard(t: Tensor) -> AbstractContextManager[object]:
    """Makes the device of `t` torch's current one; `_cuda.py` has done so for the rows of W."""
    return torch.cuda.device(t.device) if t.device.type == "cuda" else nullcontext()


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _memory(module: ModuleType, injection: Injected | None, renormalize: bool) -> Any:
    """The binding's injection."""
    if injection is None:
        return module.CudaInjection()
    rows, strength, slot = injection
    half = rows.dtype == torch.bfloat16
    return module.CudaInjection(rows=_address(rows), strength=_address(strength), slot=_address(slot), bfloat16=half, renormalize=renormalize)


def _takes_rows(module: ModuleType, weight: Tensor, *injections: Injected | None, out: Tensor | None = None) -> bool:
    """Whether the kernels over rows of W take these: dtypes, row length, layout."""
    floats = [weight, *(t for i in injections if i is not None for t in i[1:2])]
    halves = [t for t in (out, *(i[0] for i in injections if i is not None)) if t is not None]
    slots = [i[2] for i in injections if i is not None]
    return (
        all(t.dtype == torch.float32 for t in floats)
        and all(t.dtype in _HALF_OR_FLOAT for t in halves)
        and all(t.dtype == torch.int32 for t in slots)
        and all(t.is_contiguous() and t.device == weight.device for t in (*floats, *halves, *slots))
        and 1 <= weight.shape[1] <= int(module.CUDA_MOST_COLUMNS)
    )


def run_prototype_rows(
    weight: Tensor, injection: Injected | None, prototypes: Tensor, *, renormalize: bool, residual: Tensor | None = None
) -> None:
    """`triton_kernels.effective_prototypes.run_prototype_rows`: P of rows of weight (R, D), float32 or bfloat16, into prototypes."""
    module = _extension(weight)
    if module is None or not _takes_rows(module, weight, injection, out=prototypes):
        from ..triton_kernels.effective_prototypes import run_prototype_rows as run

        run(weight, injection, prototypes, renormalize=renormalize, residual=residual)
        return
    module.cuda_effective_prototypes(
        weight=_address(weight), memory=_memory(module, injection, renormalize), prototypes=_address(prototypes),
        bfloat16=prototypes.dtype == torch.bfloat16, R=weight.shape[0], D=weight.shape[1], **_launch(weight),
    )  # fmt: skip


def run_class_epilogue(
    d_prototypes: Tensor,
    weight: Tensor,
    injection: Injected | None,
    *,
    renormalize: bool,
    gradient: Tensor | None = None,
    velocity: Tensor | None = None,
    rates: Tensor | None = None,
    nesterov: bool = False,
    residual: Tensor | None = None,
    rounding: Tensor | None = None,
    numbers: Tensor | None = None,
    first: int = 0,
    prototypes: Tensor | None = None,  # (R, D) float32 or bfloat16, out: P of the stepped weight
    next_injection: Injected | None = None,  # with this memory
) -> None:
    """`triton_kernels.class_step.run_class_epilogue`, and with `prototypes` the next P in the same pass."""
    module = _extension(weight)
    others = [t for t in (d_prototypes, gradient, velocity, rates) if t is not None]
    if (
        module is None
        or not _takes_rows(module, weight, injection, next_injection, out=prototypes)
        or not all(t.is_contiguous() and t.dtype == torch.float32 for t in others)
    ):
        from ..triton_kernels.class_step import run_class_epilogue as run

        run(
            d_prototypes, weight, injection, renormalize=renormalize, gradient=gradient, velocity=velocity, rates=rates, nesterov=nesterov,
            residual=residual, rounding=rounding, numbers=numbers, first=first,
        )  # fmt: skip
        if prototypes is not None:
            run_prototype_rows(weight, next_injection, prototypes, renormalize=renormalize)
        return
    module.cuda_class_step(
        d_prototypes=_address(d_prototypes), weight=_address(weight), memory=_memory(module, injection, renormalize),
        R=weight.shape[0], D=weight.shape[1], velocity=_address(velocity), gradient=_address(gradient) if rates is None else 0,
        rates=_address(rates), nesterov=nesterov,
        prototypes=_address(prototypes), prototypes_bfloat16=prototypes is not None and prototypes.dtype == torch.bfloat16,
        next_memory=_memory(module, next_injection, renormalize), **_launch(weight),
    )  # fmt: skip


def memory_write(
    rows: Tensor, row_strength: Tensor, stamp: Tensor, owner: Tensor, slot: Tensor, cursor: Tensor,
    embeddings: Tensor, labels: Tensor, strengths: Tensor, step: int,
) -> Tensor:  # fmt: skip
    """`ops.memory_write.reference_memory_write` without a synchronisation: the same integers and rows, to the bit.

    To torch go state that is not contiguous, more than 65536 rows at a time, and what `_dispatch.TABLE` says.
    """
    state = rows, row_strength, stamp, owner, slot, cursor
    call = _dispatch.call_of_device(_library.backend(), (rows, row_strength, embeddings), operation="memory_write", kept=False)
    module = _extension(rows) if _dispatch.choose(call).runs == _dispatch.CUDA_NATIVE else None
    takes = all(t.is_contiguous() for t in state) and row_strength.dtype == torch.float32 and rows.shape[0] < 2**31
    if module is None or not takes or embeddings.shape[0] > int(module.CUDA_MOST_WRITTEN):
        return reference_memory_write(*state, embeddings, labels, strengths, step)
    x, y = embeddings.contiguous(), labels.contiguous()
    lam = strengths.contiguous() if strengths.dtype in (torch.float32, torch.float64) else strengths.float().contiguous()
    n, size = x.shape[0], rows.shape[0]
    scratch = torch.empty(module.cuda_memory_write_scratch(n, size), dtype=torch.int32, device=rows.device)
    evicted = torch.empty((), dtype=torch.int64, device=rows.device)
    ring = module.CudaRing(
        rows=_address(rows), strength=_address(row_strength), stamp=_address(stamp), owner=_address(owner), slot=_address(slot),
        cursor=_address(cursor), S=size, C=slot.shape[0], D=rows.shape[1], bfloat16=rows.dtype == torch.bfloat16,
    )  # fmt: skip
    with _guard(rows):
        module.cuda_memory_write(
            ring, embeddings=_address(x), labels=_address(y), strengths=_address(lam), N=n, step=step,
            bfloat16=x.dtype == torch.bfloat16, strengths_double=lam.dtype == torch.float64, scratch=_address(scratch),
            evicted=_address(evicted), **_launch(rows),
        )  # fmt: skip
    return evicted


def norm_statistics(
    norms: Tensor,  # (N,) float32 or float64
    labelled: Tensor,  # (N,) bool
    mean: Tensor,  # () float64
    std: Tensor,  # () float64
    batches: Tensor,  # () int64
    old: float,  # weight of the old value
) -> tuple[Tensor, Tensor, Tensor] | None:
    """(mean, std, batches) after the batch, as `memory.policies.QAFace.update`; None where no kernel takes it."""
    module = _extension(norms) if _library.backend() == "auto" else None
    takes = norms.dtype in (torch.float32, torch.float64) and labelled.dtype == torch.bool and mean.dtype == std.dtype == torch.float64
    if module is None or not takes or any(t.device != norms.device for t in (labelled, mean, std, batches)):
        return None
    norms, labelled = norms.contiguous(), labelled.contiguous()
    new_mean, new_std, new_batches = torch.empty_like(mean), torch.empty_like(std), torch.empty_like(batches)
    with _guard(norms):
        module.cuda_norm_statistics(
            norms=_address(norms), labelled=_address(labelled), N=norms.shape[0], norms_double=norms.dtype == torch.float64, old=old,
            mean=_address(mean), std=_address(std), batches=_address(batches), new_mean=_address(new_mean), new_std=_address(new_std),
            new_batches=_address(new_batches), **_launch(norms),
        )  # fmt: skip
    return new_mean, new_std, new_batches


_library.register_cuda("memory_write", memory_write)
