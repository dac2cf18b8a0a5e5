"""Input checks shared by the evaluation functions: everything becomes a plain NumPy array, or a clear error."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]


def to_numpy(value: ArrayLike | torch.Tensor) -> NDArray[Any]:
    """A NumPy array of a tensor (any device, any dtype, bf16 included), an array or a list."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        if value.dtype in (torch.bfloat16, torch.float16):
            value = value.float()
        return np.asarray(value.numpy())
    return np.asarray(value)


def array_of(where: str, name: str, value: ArrayLike | torch.Tensor) -> NDArray[Any]:
    """`to_numpy`, or a TypeError naming what is no array: a ragged list, a sparse tensor."""
    try:
        return to_numpy(value)
    except (ValueError, TypeError, RuntimeError, OverflowError):
        raise TypeError(f"{where}: expected {name} to be an array, a tensor or a list of numbers, got {type(value).__name__}") from None


def floats(where: str, name: str, value: ArrayLike | torch.Tensor, ndim: int, finite: bool = True) -> FloatArray:
    """`value` as float64 with `ndim` dimensions; ValueError names the first non-finite position."""
    array = array_of(where, name, value)
    if array.dtype.kind not in "fiub":
        raise TypeError(f"{where}: expected {name} of real numbers, got dtype {array.dtype}")
    if array.ndim != ndim:
        raise ValueError(f"{where}: expected {name} with {ndim} dimension{'s' * (ndim != 1)}, got shape {array.shape}")
    result = array.astype(np.float64)
    if finite and not np.isfinite(result).all():
        first = tuple(int(i) for i in np.argwhere(~np.isfinite(result))[0])
        at = first[0] if len(first) == 1 else first
        raise ValueError(f"{where}: expected finite {name}, got {result[first]} at {at}")
    return result


def integers(where: str, name: str, value: ArrayLike | torch.Tensor, length: int | None = None) -> IntArray:
    """`value` as (length,) int64."""
    array = array_of(where, name, value)
    if array.size and array.dtype.kind not in "iu":
        raise TypeError(f"{where}: expected {name} of integers, got dtype {array.dtype}")
    if array.ndim != 1 or (length is not None and len(array) != length):
        wanted = "(n,)" if length is None else f"({length},)"
        raise ValueError(f"{where}: expected {name} of shape {wanted}, got {array.shape}")
    return array.astype(np.int64)


def booleans(where: str, name: str, value: ArrayLike | torch.Tensor, shape: tuple[int, ...]) -> BoolArray:
    """`value` as a boolean array of `shape`; 0 and 1 are accepted, other numbers are not."""
    array = array_of(where, name, value)
    if array.shape != shape:
        raise ValueError(f"{where}: expected {name} of shape {shape}, got {array.shape}")
    if array.dtype == np.bool_:
        return array.copy()
    if array.dtype.kind not in "fiu" or not np.isin(array, (0, 1)).all():
        raise ValueError(
            f"{where}: expected {name} of booleans (or 0 and 1), got dtype {array.dtype} with other values"
        )
    return array.astype(np.bool_)


def scored_pairs(
    where: str,
    scores: ArrayLike | torch.Tensor,  # (P,) higher = more alike
    same: ArrayLike | torch.Tensor,  # (P,) bool
) -> tuple[FloatArray, BoolArray]:
    """Checked (scores, same) with at least one genuine and one impostor pair."""
    checked = floats(where, "scores", scores, 1)
    mask = booleans(where, "same", same, checked.shape)
    both_kinds(where, mask)
    return checked, mask


def both_kinds(where: str, same: BoolArray) -> None:
    """ValueError unless `same` holds a genuine (True) and an impostor (False) pair."""
    genuine = int(same.sum())
    if genuine == 0 or genuine == same.size:
        missing = "genuine" if genuine == 0 else "impostor"
        raise ValueError(
            f"{where}: expected same with genuine and impostor pairs, got {same.size} pairs and no {missing} one"
        )


def unit_rows(embeddings: FloatArray) -> FloatArray:
    """Rows divided by their L2 norm; a zero row stays zero (math.md 1, rules)."""
    norms = np.linalg.norm(embeddings, axis=1, keepdims=True)
    unit: FloatArray = np.divide(embeddings, norms, out=np.zeros_like(embeddings), where=norms > 1e-12)
    return unit
