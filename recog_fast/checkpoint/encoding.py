"""What is no tensor goes to JSON; tensors are put aside under their path."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def encode(value: Any, key: str, tensors: dict[str, Tensor]) -> Any:
    """JSON form of `value`; tensors are put into `tensors` under their path and referred to."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    while key in tensors:  # {"a/b": t, "a": {"b": u}} meet at one path
        key += "'"
    if isinstance(value, Tensor):
        tensors[key] = value.detach()
        return {"tensor": key}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        # As bytes: torch has no tensor of every numpy dtype, and the bits must come back.
        tensors[key] = (
            torch.frombuffer(bytearray(value.tobytes()), dtype=torch.uint8)
            if value.nbytes
            else torch.empty(0, dtype=torch.uint8)
        )
        return {"array": key, "dtype": value.dtype.str, "shape": list(value.shape)}
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    if isinstance(value, (list, tuple)):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [encode(item, f"{key}/{i}", tensors) for i, item in enumerate(value)]}
    if isinstance(value, dict):
        for name in value:
            if not isinstance(name, (str, int)):
                raise TypeError(
                    f"save_checkpoint: expected dict keys of type str or int at {key!r}, got {type(name).__name__}"
                )
        return {
            "dict": [
                [name, encode(item, f"{key}/{name}" if key else str(name), tensors)] for name, item in value.items()
            ]
        }
    raise TypeError(
        f"save_checkpoint: expected tensors, arrays and plain values, got {type(value).__name__} at {key!r}"
    )


def decode(value: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    kind = next(iter(value))
    if kind == "tensor":
        return tensors[value["tensor"]]
    if kind == "array":
        flat = np.frombuffer(tensors[value["array"]].numpy().tobytes(), dtype=np.dtype(value["dtype"]))
        return flat.reshape(value["shape"]).copy()
    if kind == "bytes":
        return bytes.fromhex(value["bytes"])
    if kind == "dict":
        return {name: decode(item, tensors) for name, item in value["dict"]}
    items = [decode(item, tensors) for item in value[kind]]
    return tuple(items) if kind == "tuple" else items


def tensor_keys(value: Any, found: set[str]) -> None:
    if isinstance(value, list):
        for item in value:
            tensor_keys(item, found)
    elif isinstance(value, dict):
        kind, inner = next(iter(value.items()))
        if kind in ("tensor", "array"):
            found.add(inner)
        else:
            tensor_keys(inner, found)


