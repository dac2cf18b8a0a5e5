"""Refuses what would make the host wait for a device, on tensors of any device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_WAITS = ("_local_scalar_dense", "is_nonzero", "nonzero", "unique", "_unique2", "masked_select", "item", "equal")


class _NoWaiting(TorchDispatchMode):
    """Values read on the host, and shapes that depend on values (nonzero, indexing by a mask)."""

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        name = function._schema.name.removeprefix("aten::")
        masks = [a for a in (arguments[1] if name in ("index", "index_put_", "index_put") else ()) if a is not None and a.dtype == torch.bool]
        if name in _WAITS or masks:
            raise AssertionError(f"{name} would wait for the device")
        return function(*arguments, **(options or {}))


@contextlib.contextmanager
def no_waiting(wanted: bool = True) -> Iterator[None]:
    """AssertionError for any such operation within it."""
    with _NoWaiting() if wanted else contextlib.nullcontext():
        yield
