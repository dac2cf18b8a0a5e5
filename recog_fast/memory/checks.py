"""What a prototype memory refuses, and in which words."""

from __future__ import annotations

import operator
from typing import SupportsIndex

import torch
from torch import Tensor

from .._arguments import is_whole
from ..ops.memory_write import MAX_STEP

_MAX_CLASSES = torch.iinfo(torch.int32).max
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def check_sizes(num_classes: int, embedding_dim: int, capacity: int | None, dtype: torch.dtype) -> None:
    """Sizes and dtype of a memory."""
    for name, value in (("num_classes", num_classes), ("embedding_dim", embedding_dim), ("capacity", capacity)):
        if not is_whole(value, 1) and not (name == "capacity" and value is None):
            raise ValueError(f"PrototypeMemory: expected {name} as an integer >= 1, got {value!r}")
    if num_classes > _MAX_CLASSES:
        raise ValueError(f"PrototypeMemory: expected num_classes <= {_MAX_CLASSES} (int32 slots), got {num_classes}")
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"PrototypeMemory: expected a floating dtype, got {dtype}")


def check_step(name: str, step: SupportsIndex) -> int:
    """`step` as an int in [0, 2^31)."""
    try:
        value = operator.index(step)
    except TypeError:
        raise TypeError(f"{name}: expected step as an int, got {type(step).__name__}") from None
    if not 0 <= value <= MAX_STEP:
        raise ValueError(f"{name}: expected step in [0, {MAX_STEP}], got {value}")
    return value


def check_batch(embeddings: Tensor, labels: Tensor, dim: int, device: torch.device) -> None:
    """Types, shapes and devices of a batch: embeddings (N, dim) floating, labels (N,) integer."""
    if not isinstance(embeddings, Tensor) or not embeddings.is_floating_point():
        raise TypeError(f"PrototypeMemory.write: expected embeddings as a floating tensor, got {_kind(embeddings)}")
    if embeddings.dim() != 2 or embeddings.shape[1] != dim:
        raise ValueError(
            f"PrototypeMemory.write: expected embeddings of shape (N, D) = (N, {dim}), got {tuple(embeddings.shape)}"
        )
    count = embeddings.shape[0]
    if not isinstance(labels, Tensor) or labels.dtype not in _INTEGERS:
        raise TypeError(f"PrototypeMemory.write: expected labels as an integer tensor, got {_kind(labels)}")
    if tuple(labels.shape) != (count,):
        raise ValueError(
            f"PrototypeMemory.write: expected labels of shape (N,) = ({count},), got {tuple(labels.shape)}"
        )
    for name, value in (("embeddings", embeddings), ("labels", labels)):
        if value.device != device:
            raise ValueError(f"PrototypeMemory.write: expected {name} on {device}, got {value.device}")


def check_ids(ids: Tensor, classes: int) -> None:
    """Class ids (M,) in [0, classes); on CUDA the range is not looked at (that would wait for the device)."""
    if not isinstance(ids, Tensor) or ids.dtype not in _INTEGERS:
        raise TypeError(f"PrototypeMemory.gather: expected ids as an integer tensor, got {_kind(ids)}")
    if ids.dim() != 1:
        raise ValueError(f"PrototypeMemory.gather: expected ids of shape (M,), got {tuple(ids.shape)}")
    if ids.device.type == "cuda":
        return
    bad = (ids < 0) | (ids >= classes)
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"PrototypeMemory.gather: expected ids in [0, C) = [0, {classes}), got {int(ids[row])} at row {row}"
        )


def check_entries(ids: Tensor, rows: Tensor, strength: Tensor, stamp: Tensor, classes: int, dim: int) -> None:
    """Entries by class: ids (E,) strictly ascending in [0, classes), rows (E, dim), strength (E,), stamp (E,) >= 0."""
    where = "PrototypeMemory.load_entries"
    count = ids.numel()
    for name, value, shape in (
        ("rows", rows, (count, dim)),
        ("strength", strength, (count,)),
        ("stamp", stamp, (count,)),
    ):
        if tuple(value.shape) != shape:
            raise ValueError(f"{where}: expected {name} of shape {shape}, got {tuple(value.shape)}")
    if count and (int(ids.min()) < 0 or int(ids.max()) >= classes or bool((ids[1:] <= ids[:-1]).any())):
        raise ValueError(f"{where}: expected ids strictly ascending in [0, C) = [0, {classes}), got others")
    if count and int(stamp.min()) < 0:
        raise ValueError(f"{where}: expected stamp >= 0, got {int(stamp.min())}")


def bad_rows(norms: Tensor, labels: Tensor, classes: int) -> Tensor:
    """(N,) bool: labels outside [-1, classes), and labelled rows that are not finite."""
    return (labels < -1) | (labels >= classes) | ((labels >= 0) & ~torch.isfinite(norms))


def normalised(norms: Tensor, labels: Tensor) -> bool:
    """Whether two or more labelled rows came and all of them have norm 1 within 1 %: somebody normalised them before."""
    known = norms[labels >= 0]
    return known.numel() > 1 and bool(((known - 1).abs() < 1e-2).all())


def complaint(row: int, label: int, classes: int) -> str:
    """The error text for the first bad row."""
    if -1 <= label < classes:
        return f"PrototypeMemory.write: expected finite embeddings, got a non-finite row {row} (label {label})"
    return f"PrototypeMemory.write: expected labels in [-1, C) = [-1, {classes}), got {label} at row {row}"


def _kind(value: object) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
