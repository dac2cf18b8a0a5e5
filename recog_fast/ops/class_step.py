"""The class sweep that trains: gradient, chain rule and SGD with momentum in one pass, no gradient tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from . import _checks, _cpu, _library
from .class_gradient import STEP

_RATE = 11  # where lr is among them
_OPERANDS = 15  # arguments of the reference; what follows chooses the kernels' arithmetic


def _check_in_place(t: Tensor, weight: Tensor, name: str) -> None:
    _checks.expect(t.shape == weight.shape, "class_step", f"{name} of shape {tuple(weight.shape)}", tuple(t.shape))
    _checks.expect(t.dtype == torch.float32 and t.device == weight.device, "class_step", f"a float32 {name} beside weight", (t.dtype, t.device))
    _checks.expect(t.is_contiguous(), "class_step", f"a contiguous {name} (it is updated in place)", f"strides {t.stride()}")


def _reference(*arguments: Any) -> None:
    """Materialised; without the kernels' `half` and `kept`, which come between the operands and the sampled classes."""
    operands, rest = list(arguments[:_OPERANDS]), arguments[_OPERANDS + 2 :]
    if len(rest) > 2:  # the learning rate as a tensor
        operands[_RATE] = operands[_RATE] if rest[2] is None else float(rest[2])
    with torch.no_grad():
        reference.class_step(*operands, *rest[:2])


def _cpu_kernel(
    unit_embeddings: Tensor,
    targets: Tensor,
    terms: Tensor,
    weight: Tensor,
    velocity: Tensor | None,
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
    members: Tensor | None = None,
    sparse: bool = False,
    rate: Tensor | None = None,  # lr where it is a tensor
) -> None:
    lr = lr if rate is None else float(rate)
    _checks.expect(velocity is not None or momentum == 0, "class_step", "velocity with momentum > 0", None)
    module = _library.compiled(unit_embeddings, weight, velocity)
    if module is None:
        return _reference(
            unit_embeddings, targets, terms, weight, velocity, scale, rules, memory_rows, strength, slot,
            renormalize, lr, momentum, weight_decay, nesterov, half, kept, members, sparse,
        )  # fmt: skip
    _check_in_place(weight, weight, "weight")
    if velocity is not None:
        _check_in_place(velocity, weight, "velocity")
    packed = _cpu.float_terms(terms, unit_embeddings.shape[0])
    visited, seen = _cpu.class_sweep_members(members, targets, packed, weight)
    operands = _cpu.Operands(module, weight, memory_rows, strength, slot, renormalize=renormalize, members=visited, seen=seen)
    rows = operands.rows(unit_embeddings, targets, rules, scale, half)
    module.class_sweep(
        operands.classes,
        rows,
        terms=packed.data_ptr(),
        mode=STEP,
        weight=weight.data_ptr(),
        velocity=_cpu.address(velocity),
        lr=lr,
        momentum=momentum,
        weight_decay=weight_decay,
        nesterov=nesterov,
        sparse=sparse,
        kept=_cpu.kept(module, _cpu.kept_of(kept, members, visited)),
        threads=_cpu.threads(),
    )
    return None


def _fake(*_: Any) -> None:
    return None


_library.register("class_step", reference=_reference, fake=_fake, cpu=_cpu_kernel)
