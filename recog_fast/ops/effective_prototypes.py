"""P_j = normalize(normalize(W_j) + lam_j M_j) (math.md 2)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from . import _checks, _chunked, _cpu, _library, _planes


def _reference(
    weight: Tensor, memory_rows: Tensor | None, strength: Tensor | None, slot: Tensor | None, renormalize: bool, residual: Tensor | None = None
) -> Tensor:
    rows = weight if residual is None else _planes.join(weight, residual)
    return reference.effective_prototypes(rows, memory_rows, strength, slot, renormalize)


def _cpu_kernel(
    weight: Tensor, memory_rows: Tensor | None, strength: Tensor | None, slot: Tensor | None, renormalize: bool, residual: Tensor | None = None
) -> Tensor:
    module = _library.compiled(weight)
    if module is None:
        return _reference(weight, memory_rows, strength, slot, renormalize, residual)
    if residual is not None:
        _planes.check_planes(weight, residual, "effective_prototypes")
        return _chunked.prototypes(_cpu_kernel, weight, residual, (memory_rows, strength, slot), renormalize)
    operands = _cpu.Operands(module, weight, memory_rows, strength, slot, renormalize=renormalize)
    prototypes = torch.empty_like(operands.weight)
    module.effective_prototypes(operands.classes, prototypes=prototypes.data_ptr(), threads=_cpu.threads())
    return prototypes


def _fake(
    weight: Tensor, memory_rows: Tensor | None, strength: Tensor | None, slot: Tensor | None, renormalize: bool, residual: Tensor | None = None
) -> Tensor:
    return torch.empty_like(weight, dtype=None if residual is None else torch.float32, memory_format=torch.contiguous_format)


class _EffectivePrototypes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, memory_rows: Tensor | None, strength: Tensor | None, slot: Tensor | None, renormalize: bool) -> Tensor:
        ctx.save_for_backward(weight, memory_rows, strength, slot)
        ctx.renormalize = renormalize
        with _library.below_autograd():
            return torch.ops.recog_fast.effective_prototypes(weight, memory_rows, strength, slot, renormalize)  # type: ignore[no-any-return]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_prototypes: Tensor) -> tuple[Tensor | None, ...]:
        weight, memory_rows, strength, slot = ctx.saved_tensors
        return reference.prototype_chain(d_prototypes, weight, memory_rows, strength, slot, ctx.renormalize), None, None, None, None


def _autograd(
    weight: Tensor, memory_rows: Tensor | None, strength: Tensor | None, slot: Tensor | None, renormalize: bool, residual: Tensor | None = None
) -> Tensor:
    if residual is not None:  # of a split head: no gradient of a plane
        with torch.no_grad(), _library.below_autograd():
            return torch.ops.recog_fast.effective_prototypes(weight, memory_rows, strength, slot, renormalize, residual)  # type: ignore[no-any-return]
    return _EffectivePrototypes.apply(weight, memory_rows, strength, slot, renormalize)  # type: ignore[no-any-return]


_library.register("effective_prototypes", reference=_reference, fake=_fake, cpu=_cpu_kernel, autograd=_autograd)


def effective_prototypes(
    weight: Tensor,  # (C, D) or (C, K, D)
    memory_rows: Tensor | None = None,  # (S, D)
    strength: Tensor | None = None,  # (S,)
    slot: Tensor | None = None,  # (C,) int32
    *,
    renormalize: bool = True,
) -> Tensor:
    """Unit prototypes with memory injection: P_j = U/|U|, U = W_j/|W_j| + lam_j M_j (VPL eq. 5, QAFace eq. 6).

    weight (C, D) or (C, K, D) float32 or float64, raw; memory_rows (S, D) of any float dtype; strength (S,) is lam;
    slot (C,) is each class's memory row, -1 none (None: S = C). Returns P, shaped and typed as weight. Classes
    without memory or with lam = 0 get W/|W|; a zero row stays 0; |U| < 1e-4 (cancellation) falls back to W/|W|.
    `renormalize=False` returns U itself. Differentiable in weight once, through both normalisations; not in the memory.

    Raises ValueError naming the argument, TypeError for what is no tensor.
    """
    where = "effective_prototypes"
    _checks.expect_tensor(weight, where, "weight")
    _checks.check_weight(weight, weight.shape[-1] if weight.dim() else 0, where)
    _checks.check_memory(weight, memory_rows, strength, slot, where)
    return torch.ops.recog_fast.effective_prototypes(weight, memory_rows, strength, slot, renormalize)  # type: ignore[no-any-return]
