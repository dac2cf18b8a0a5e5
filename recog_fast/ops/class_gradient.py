"""The class sweep that writes a gradient: dP_j = sum_i (dloss/dc_ij) x^_i, carried through to dW (math.md 1, 2)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from .. import reference
from . import _cpu, _library
from ._buffers import GradientBuffers

PROTOTYPE_GRADIENT, WEIGHT_GRADIENT, STEP = 0, 1, 2


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
    members: Tensor | None = None,
    gradient: Tensor | None = None,  # written and returned, where the kernel runs
) -> Tensor:
    module = _library.compiled(unit_embeddings, weight)
    if module is None:
        return _reference(
            unit_embeddings, targets, terms, weight, scale, rules, memory_rows, strength, slot, unit, renormalize,
            half, kept, members,
        )  # fmt: skip
    packed = _cpu.float_terms(terms, unit_embeddings.shape[0])
    visited, seen = _cpu.class_sweep_members(members, targets, packed, weight)
    operands = _cpu.Operands(
        module, weight, memory_rows, strength, slot, unit=unit, renormalize=renormalize, members=visited, seen=seen
    )
    rows = operands.rows(unit_embeddings, targets, rules, scale, half)
    if gradient is None:
        gradient = torch.empty_like(operands.weight)
    module.class_sweep(
        operands.classes,
        rows,
        terms=packed.data_ptr(),
        mode=PROTOTYPE_GRADIENT if unit else WEIGHT_GRADIENT,
        gradient=gradient.data_ptr(),
        kept=_cpu.kept(module, _cpu.kept_of(kept, members, visited)),
        threads=_cpu.threads(),
    )
    return gradient


def _reference(
    unit_embeddings: Tensor, targets: Tensor, terms: Tensor, weight: Tensor, scale: float, rules: Tensor | None,
    memory_rows: Tensor | None, strength: Tensor | None, slot: Tensor | None, unit: bool, renormalize: bool,
    half: bool = False, kept: Tensor | None = None, members: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Materialised; without the kernels' `half` and `kept`."""
    return reference.class_gradient(
        unit_embeddings, targets, terms, weight, scale, rules, memory_rows, strength, slot, unit, renormalize, members
    )


def recycled_class_gradient(buffers: GradientBuffers, weight: Tensor, arguments: tuple[Any, ...]) -> Tensor:
    """`class_gradient(*arguments)` in memory of `buffers` where the compiled CPU kernel makes it, else in new memory."""
    if weight.device.type != "cpu" or _library.compiled(weight) is None:
        return torch.ops.recog_fast.class_gradient(*arguments)  # type: ignore[no-any-return]
    sweep = cast("Callable[..., Tensor]", _cpu_kernel)
    return sweep(*arguments, gradient=buffers.take(weight))


def _fake(unit_embeddings: Tensor, targets: Tensor, terms: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(weight, memory_format=torch.contiguous_format)


_library.register("class_gradient", reference=_reference, fake=_fake, cpu=_cpu_kernel)
