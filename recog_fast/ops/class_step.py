"""The class sweep that trains: gradient, chain rule and SGD with momentum in one pass, no gradient tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from .. import reference
from . import _checks, _chunked, _cpu, _library, _planes, _stochastic
from .class_gradient import STEP

_WEIGHT = 3  # where weight and velocity are among the arguments
_RATE = 11  # where lr is among them
_OPERANDS = 15  # arguments of the reference; what follows chooses the kernels' arithmetic


def _check_in_place(t: Tensor, weight: Tensor, name: str) -> None:
    _checks.expect(t.shape == weight.shape, "class_step", f"{name} of shape {tuple(weight.shape)}", tuple(t.shape))
    _checks.expect(t.dtype == torch.float32 and t.device == weight.device, "class_step", f"a float32 {name} beside weight", (t.dtype, t.device))
    _checks.expect(t.is_contiguous(), "class_step", f"a contiguous {name} (it is updated in place)", f"strides {t.stride()}")


def check_formats(weight: Tensor, velocity: Tensor | None, residual: Tensor | None, rounding: Tensor | None) -> None:
    """Planes that fit each other, and what a velocity in bfloat16 is rounded by."""
    if residual is not None:
        _planes.check_planes(weight, residual, "class_step")
    if velocity is not None and velocity.dtype == torch.bfloat16:
        fits = rounding is not None and tuple(rounding.shape) == (3,) and rounding.dtype == torch.int64
        _checks.expect(fits, "class_step", "rounding (3,) int64 (seed, step, first row of W) with a bfloat16 velocity", rounding)
        _checks.expect(velocity.shape == weight.shape and velocity.is_contiguous(), "class_step", f"a contiguous velocity of shape {tuple(weight.shape)}", tuple(velocity.shape))


def _reference(*arguments: Any) -> None:
    """Materialised; without the kernels' `half` and `kept`, which come between the operands and the sampled classes."""
    operands, rest = list(arguments[:_OPERANDS]), arguments[_OPERANDS + 2 :]
    if len(rest) > 2:  # the learning rate as a tensor
        operands[_RATE] = operands[_RATE] if rest[2] is None else float(rest[2])
    residual, rounding = (*rest[3:], None, None)[:2]
    weight, velocity = operands[_WEIGHT : _WEIGHT + 2]
    with torch.no_grad():
        if residual is None and not _stochastic.wanted(velocity):
            return reference.class_step(*operands, *rest[:2])
        check_formats(weight, velocity, residual, rounding)
        operands[_WEIGHT] = _planes.whole(weight, residual, operands[0])
        operands[_WEIGHT + 1] = velocity if velocity is None or velocity.dtype == operands[0].dtype else velocity.to(operands[0].dtype)
        reference.class_step(*operands, *rest[:2])
        if residual is not None:
            _planes.split(operands[_WEIGHT].float(), weight, residual)
        if _stochastic.wanted(velocity):
            _stochastic.round_into(operands[_WEIGHT + 1].float(), velocity, rounding)
        elif velocity is not operands[_WEIGHT + 1]:
            velocity.copy_(operands[_WEIGHT + 1])


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
    residual: Tensor | None = None,  # int16 plane of a bfloat16 weight, updated in place
    rounding: Tensor | None = None,  # (3,) int64 seed, step, first row: for a velocity in bfloat16
) -> None:
    lr = lr if rate is None else float(rate)
    _checks.expect(velocity is not None or momentum == 0, "class_step", "velocity with momentum > 0", None)
    module = _library.compiled(unit_embeddings, weight, velocity)
    if module is None:
        return _reference(
            unit_embeddings, targets, terms, weight, velocity, scale, rules, memory_rows, strength, slot,
            renormalize, lr, momentum, weight_decay, nesterov, half, kept, members, sparse, None, residual, rounding,
        )  # fmt: skip
    if residual is not None or _stochastic.wanted(velocity):
        check_formats(weight, velocity, residual, rounding)
        _checks.expect(kept is None, "class_step", "no kept with a residual or a velocity in bfloat16", "kept")
        members = None if members is None else _cpu.check_members(members, weight.shape[0])
        sgd = renormalize, lr, momentum, weight_decay, nesterov
        with torch.no_grad():
            return _chunked.step(
                cast("Callable[..., None]", _cpu_kernel), unit_embeddings, targets, terms, weight, residual, velocity, rounding, scale, rules,
                (memory_rows, strength, slot), sgd, half, members, sparse,
            )  # fmt: skip
    _check_in_place(weight, weight, "weight")
    if velocity is not None:
        _check_in_place(velocity, weight, "velocity")
    packed = _cpu.float_terms(terms, unit_embeddings.shape[0])
    visited, seen = _cpu.class_sweep_members(members, targets, packed, weight)
    operands = _cpu.Operands(module, weight, memory_rows, strength, slot, renormalize=renormalize, members=visited, seen=seen)
    rows = operands.rows(unit_embeddings, targets, rules, scale, half)
    module.class_sweep(
        operands.classes, rows, terms=packed.data_ptr(), mode=STEP, weight=weight.data_ptr(), velocity=_cpu.address(velocity),
        lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov, sparse=sparse,
        kept=_cpu.kept(module, _cpu.kept_of(kept, members, visited)), threads=_cpu.threads(),
    )  # fmt: skip
    return None


def _fake(*_: Any) -> None:
    return None


_library.register("class_step", reference=_reference, fake=_fake, cpu=_cpu_kernel)
