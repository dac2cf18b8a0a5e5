"""The class sweep that trains: gradient, chain rule and SGD with momentum in one pass, no gradient tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from . import _checks, _cpu, _library
from .class_gradient import STEP

_OPERANDS = 15  # arguments of the reference; what follows chooses the kernels' arithmetic


def _check_in_place(t: Tensor, weight: Tensor, name: str) -> None:
    _checks.expect(t.shape == weight.shape, "class_step", f"{name} of shape {tuple(weight.shape)}", tuple(t.shape))
    _checks.expect(t.dtype == torch.float32 and t.device == weight.device, "class_step", f"a float32 {name} beside weight", (t.dtype, t.device))
    _checks.expect(t.is_contiguous(), "class_step", f"a contiguous {name} (it is updated in place)", f"strides {t.stride()}")


def _reference(*arguments: Any) -> None:
    with torch.no_grad():
        reference.class_step(*arguments[:_OPERANDS])


def _cpu_kernel(
    unit_embeddings: Tensor,
    targets: Tensor,
    terms: Tensor,
    weight: Tensor,
    velocity: Tensor,
    scale: float,
    rules: Tensor | None,
    memory_rows: Tensor | None,
    strength: Tensor | None,
    slot: Tensor | None,
    renormalize: bool,
    lr: float,
    momentum: float,
    weight_decay: float,
    nesterov: bool,
    half: bool = False,
    kept: Tensor | None = None,
) -> None:
    module = _library.compiled(unit_embeddings, weight, velocity)
    if module is None:
        return _reference(
            unit_embeddings, targets, terms, weight, velocity, scale, rules, memory_rows, strength, slot,
            renormalize, lr, momentum, weight_decay, nesterov,
        )  # fmt: skip
    _check_in_place(weight, weight, "weight")
    _check_in_place(velocity, weight, "velocity")
    operands = _cpu.Operands(module, weight, memory_rows, strength, slot, renormalize=renormalize)
    rows = operands.rows(unit_embeddings, targets, rules, scale, half)
    packed = _cpu.float_terms(terms, unit_embeddings.shape[0])
    module.class_sweep(
        operands.classes,
        rows,
        terms=packed.data_ptr(),
        mode=STEP,
        weight=weight.data_ptr(),
        velocity=velocity.data_ptr(),
        lr=lr,
        momentum=momentum,
        weight_decay=weight_decay,
        nesterov=nesterov,
        kept=_cpu.kept(module, kept),
        threads=_cpu.threads(),
    )
    return None


def _fake(*_: Any) -> None:
    return None


_library.register("class_step", reference=_reference, fake=_fake, cpu=_cpu_kernel)
