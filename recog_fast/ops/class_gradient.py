"""The class sweep that writes a gradient: dP_j = sum_i (dloss/dc_ij) x^_i, carried through to dW (math.md 1, 2)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from . import _cpu, _library

PROTOTYPE_GRADIENT, WEIGHT_GRADIENT, STEP = 0, 1, 2


_OPERANDS = 11  # arguments of the reference; what follows chooses the kernels' arithmetic


def _cpu_kernel(
    unit_embeddings: Tensor,
    targets: Tensor,
    terms: Tensor,
    weight: Tensor,
    scale: float,
    rules: Tensor | None,
    memory_rows: Tensor | None,
    strength: Tensor | None,
    slot: Tensor | None,
    unit: bool,
    renormalize: bool,
    half: bool = False,
    kept: Tensor | None = None,
) -> Tensor:
    module = _library.compiled(unit_embeddings, weight)
    if module is None:
        return _reference(
            unit_embeddings, targets, terms, weight, scale, rules, memory_rows, strength, slot, unit, renormalize
        )
    operands = _cpu.Operands(module, weight, memory_rows, strength, slot, unit=unit, renormalize=renormalize)
    rows = operands.rows(unit_embeddings, targets, rules, scale, half)
    packed = _cpu.float_terms(terms, unit_embeddings.shape[0])
    gradient = torch.empty_like(operands.weight)
    module.class_sweep(
        operands.classes,
        rows,
        terms=packed.data_ptr(),
        mode=PROTOTYPE_GRADIENT if unit else WEIGHT_GRADIENT,
        gradient=gradient.data_ptr(),
        kept=_cpu.kept(module, kept),
        threads=_cpu.threads(),
    )
    return gradient


def _reference(*arguments: Any) -> Tensor:
    """Materialised; without the kernels' `half` and `kept`."""
    return reference.class_gradient(*arguments[:_OPERANDS])


def _fake(unit_embeddings: Tensor, targets: Tensor, terms: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(weight, memory_format=torch.contiguous_format)


_library.register("class_gradient", reference=_reference, fake=_fake, cpu=_cpu_kernel)
