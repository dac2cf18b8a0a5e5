"""What the public functions refuse, in one wording: `<function>: expected <argument> ..., got ...`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .._arguments import is_number

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def expect(condition: bool, where: str, expected: str, got: object) -> None:
    """ValueError unless the condition holds."""
    if not condition:
        raise ValueError(f"{where}: expected {expected}, got {got}")


def expect_tensor(value: object, where: str, name: str) -> Tensor:
    """TypeError unless it is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{where}: expected {name} to be a torch.Tensor, got {type(value).__name__}")
    if value.layout != torch.strided:
        raise TypeError(f"{where}: expected {name} to be a dense torch.Tensor, got layout {value.layout}")
    return value


def as_tensor(value: object, where: str, name: str) -> Tensor:
    """A dense tensor of a tensor, an array or a list of real numbers; TypeError for anything else."""
    try:
        tensor = torch.as_tensor(value)
    except (RuntimeError, TypeError, ValueError, OverflowError):
        raise TypeError(f"{where}: expected {name} to be a tensor, an array or a list of numbers, got {type(value).__name__}") from None
    if tensor.is_complex():
        raise TypeError(f"{where}: expected {name} of real numbers, got dtype {tensor.dtype}")
    return expect_tensor(tensor, where, name)


def listed(values: Iterable[Any], where: str, name: str) -> list[Any]:
    """The elements of what can be walked through; TypeError for what cannot."""
    try:
        return list(values)
    except (TypeError, RuntimeError):
        raise TypeError(f"{where}: expected {name} as a sequence of numbers, got {type(values).__name__}") from None


def check_embeddings(x: Tensor, where: str, name: str = "embeddings") -> None:
    """(N, D) floating point."""
    expect_tensor(x, where, name)
    expect(x.dim() == 2, where, f"{name} of shape (N, D)", f"shape {tuple(x.shape)}")
    expect(x.dtype in FLOATS, where, f"{name} of a floating point dtype", str(x.dtype))
    expect(x.shape[1] > 0, where, f"{name} of shape (N, D) with D >= 1", f"shape {tuple(x.shape)}")


def check_weight(weight: Tensor, dimension: int, where: str, name: str = "weight") -> None:
    """(C, D) or (C, K, D), float32 or float64, C, K, D >= 1."""
    expect_tensor(weight, where, name)
    expect(weight.dim() in (2, 3), where, f"{name} of shape (C, D) or (C, K, D)", f"shape {tuple(weight.shape)}")
    expect(weight.dtype in (torch.float32, torch.float64), where, f"{name} of dtype float32 or float64", str(weight.dtype))
    expect(weight.shape[-1] == dimension, where, f"{name} with D = {dimension} as the embeddings have", f"shape {tuple(weight.shape)}")
    expect(min(weight.shape) >= 1, where, f"{name} with C, K, D >= 1", f"shape {tuple(weight.shape)}")


def check_label_tensor(labels: Tensor, rows: int, where: str, name: str = "labels") -> None:
    """(N,) integer, whatever the values."""
    expect_tensor(labels, where, name)
    expect(tuple(labels.shape) == (rows,), where, f"{name} of shape (N,) = ({rows},)", f"shape {tuple(labels.shape)}")
    integer = not labels.dtype.is_floating_point and not labels.dtype.is_complex and labels.dtype != torch.bool
    expect(integer, where, f"{name} of an integer dtype", str(labels.dtype))


def check_labels(labels: Tensor, rows: int, classes: int, where: str, *, low: int = -1, name: str = "labels") -> None:
    """(N,) integer with values in [low, C); names the first bad row. Waits for the device they are on."""
    check_label_tensor(labels, rows, where, name)
    labels = labels.long()  # a narrow or unsigned dtype cannot hold -1 or C
    bad = ((labels < low) | (labels >= classes)).nonzero()
    if bad.numel():
        row = int(bad[0])
        expect(False, where, f"{name} in [{low}, C) = [{low}, {classes})", f"{int(labels[row])} in row {row} ({bad.shape[0]} bad rows)")


def check_finite_rows(x: Tensor, where: str, name: str = "embeddings") -> None:
    """Every element finite; names the first bad row."""
    finite = torch.isfinite(x).all(dim=1)
    if not bool(finite.all()):
        bad = (~finite).nonzero()
        expect(False, where, f"finite {name}", f"a non-finite value in row {int(bad[0])} ({bad.shape[0]} bad rows)")


def check_vector(value: Tensor | None, rows: int, where: str, name: str) -> None:
    """(N,) or None."""
    if value is not None:
        expect_tensor(value, where, name)
        expect(tuple(value.shape) == (rows,), where, f"{name} of shape (N,) = ({rows},)", f"shape {tuple(value.shape)}")


def check_scale(scale: float, where: str) -> None:
    """A finite positive number."""
    expect(is_number(scale, 0, above=True), where, "scale > 0 and finite", repr(scale))


def check_margin(margin: object, where: str) -> None:
    """A callable, and no class (`margin=ArcFace` for `margin=ArcFace()`)."""
    expect(not isinstance(margin, type), where, "margin to be a margin, not its class", f"the class {getattr(margin, '__name__', margin)}: call it")
    expect(callable(margin), where, "margin to be callable: (cosine, norms) -> target logit / s", repr(margin))


def check_memory(
    weight: Tensor, memory_rows: Tensor | None, strength: Tensor | None, slot: Tensor | None, where: str
) -> None:
    """memory_rows (S, D), strength (S,), slot (C,) in [-1, S) or None with S = C: all or none of the first two. On CUDA the
    values of slot are not looked at: that would wait for the device."""
    if memory_rows is None and strength is None and slot is None:
        return
    expect(memory_rows is not None and strength is not None, where, "memory_rows and strength together", "only one of them")
    rows, lam = expect_tensor(memory_rows, where, "memory_rows"), expect_tensor(strength, where, "strength")
    expect(weight.dim() == 2, where, "weight of shape (C, D): a memory with sub-centers is not defined", f"shape {tuple(weight.shape)}")
    expect(rows.dim() == 2 and rows.shape[1] == weight.shape[1], where, f"memory_rows of shape (S, D = {weight.shape[1]})", f"shape {tuple(rows.shape)}")
    check_vector(lam, rows.shape[0], where, "strength")
    if slot is None:
        expect(rows.shape[0] == weight.shape[0], where, f"memory_rows with S = C = {weight.shape[0]} rows when slot is None", f"{rows.shape[0]} rows")
        return
    check_vector(expect_tensor(slot, where, "slot"), weight.shape[0], where, "slot")
    expect(not slot.dtype.is_floating_point, where, "slot of an integer dtype", str(slot.dtype))
    if slot.is_cuda:
        return
    slot = slot.long()
    outside = ((slot < -1) | (slot >= rows.shape[0])).nonzero()
    if outside.numel():
        at = int(outside[0])
        expect(False, where, f"slot in [-1, S) = [-1, {rows.shape[0]})", f"{int(slot[at])} for class {at}")
