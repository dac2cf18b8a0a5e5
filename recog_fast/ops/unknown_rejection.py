"""Unknown identity rejection (math.md 3): the excess of the double-softmax loss, exact in float32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from . import _checks, _chunked, _cpu, _library, _planes

_OPERANDS = 11  # arguments of the reference; what follows chooses the kernels' arithmetic
Sums = tuple[Tensor, Tensor, Tensor, Tensor]


def _cpu_kernel(
    unit_embeddings: Tensor,
    weight: Tensor,
    nearest: Tensor,
    lse: Tensor,
    first_mean: Tensor,
    scale: float,
    memory_rows: Tensor | None,
    strength: Tensor | None,
    slot: Tensor | None,
    unit: bool,
    renormalize: bool,
    half: bool = False,
    low: Tensor | None = None,
    residual: Tensor | None = None,
) -> Sums:
    module = _library.compiled(unit_embeddings, weight)
    if module is None:
        return _reference(
            unit_embeddings, weight, nearest, lse, first_mean, scale, memory_rows, strength, slot, unit, renormalize, half, low, residual
        )
    n, dimension = unit_embeddings.shape
    _checks.expect(lse.numel() == n and first_mean.numel() == n, "unknown_rejection", f"lse and first_mean of shape ({n},)", (tuple(lse.shape), tuple(first_mean.shape)))
    _checks.expect(low is None or low.shape == unit_embeddings.shape, "unknown_rejection", f"low of shape {(n, dimension)}", low)
    if residual is not None:
        _planes.check_planes(weight, residual, "unknown_rejection")
        _checks.expect(not unit, "unknown_rejection", "unit=False with residual", unit)
        return _chunked.unknown(
            _cpu_kernel, unit_embeddings, weight, residual, nearest, lse, first_mean, scale, (memory_rows, strength, slot), renormalize, half, low
        )
    operands = _cpu.Operands(module, weight, memory_rows, strength, slot, unit=unit, renormalize=renormalize)
    rows = operands.rows(unit_embeddings, nearest * operands.subcenters, None, scale, half)
    exact, first = lse.detach().double().contiguous(), _cpu.float_rows(first_mean)
    rounding = None if low is None else _cpu.float_rows(low)
    mass, remainder, mean = torch.empty(3, n, dtype=torch.float64).unbind()
    pull = torch.empty(n, dimension, dtype=torch.float32)
    module.unknown_sweep(
        operands.classes,
        rows,
        lse=exact.data_ptr(),
        first_mean=first.data_ptr(),
        mass=mass.data_ptr(),
        remainder=remainder.data_ptr(),
        mean=mean.data_ptr(),
        pull=pull.data_ptr(),
        threads=_cpu.threads(),
        low=_cpu.address(rounding),
    )
    return mass.clone(), remainder.clone(), mean.clone(), pull


def _reference(*arguments: Any) -> Sums:
    """Materialised; without the kernels' `half` and `low` (what rounding x^ to float32 lost)."""
    unit_embeddings, weight, *operands = arguments[:_OPERANDS]
    residual = arguments[_OPERANDS + 2] if len(arguments) > _OPERANDS + 2 else None
    return reference.unknown_rejection(unit_embeddings, _planes.whole(weight, residual, unit_embeddings), *operands)


def _fake(unit_embeddings: Tensor, *_: Any) -> Sums:
    n = unit_embeddings.shape[0]
    double = unit_embeddings.new_empty(n, dtype=torch.float64)
    return double, double.clone(), double.clone(), unit_embeddings.new_empty(unit_embeddings.shape)


_library.register("unknown_rejection", reference=_reference, fake=_fake, cpu=_cpu_kernel)


def excess_double(remainder: Tensor, classes: int) -> Tensor:
    """L - C log C = T - (A - C log1p(A/C)), A = 1 + T; the difference by its series where A/C < 1e-3. (N,) float64."""
    a = 1 + remainder.double()
    ratio = a / classes
    # A - C log1p(A/C) = A (r/2 - r^2/3 + r^3/4 - r^4/5 + ...), r = A/C
    series = a * ratio * (0.5 - ratio * (1 / 3 - ratio * (0.25 - ratio * 0.2)))
    return remainder.double() - torch.where(ratio < 1e-3, series, a - classes * torch.log1p(ratio))


def double_slope(remainder: Tensor, classes: int) -> Tensor:
    """C/S, S = C + A: dL/dz_k = (C/S) p_k (expm1(p_k) - E). (N,) float64."""
    return classes / (classes + 1 + remainder.double())
