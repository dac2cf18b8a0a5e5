"""Triton's interpreter, made right for bfloat16. Import it before anything imports triton, in a process of its own.

Triton 3.6's interpreter keeps bfloat16 as uint16 and multiplies the bit patterns in `tl.dot`, and cuts float32 off instead of
rounding it: both are replaced here by what the hardware does. It needs numpy < 2.4 (constraints.txt). It does not notice reads
and writes out of bounds: here every address must lie in a tensor of the launch.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_create_dot = interpreter.InterpreterBuilder.create_dot
_cast = interpreter.InterpreterBuilder.cast_impl


def _widened(t: Any) -> Any:
    """bfloat16 bit patterns -> the float32 of the same value."""
    if t.dtype.scalar != tl.bfloat16:
        return t
    return interpreter.TensorHandle((t.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
    return _create_dot(self, _widened(a), _widened(b), d, input_precision, max_num_imprecise_acc)


def _rounding_cast(self: Any, source: Any, to: Any) -> Any:
    if source.dtype.scalar == tl.float32 and to.scalar == tl.bfloat16:
        rounded = torch.from_numpy(np.ascontiguousarray(source.data)).to(torch.bfloat16).view(torch.int16).numpy()
        return interpreter.TensorHandle(rounded.view(np.uint16), tl.bfloat16)
    return _cast(self, source, to)


_patched: set[int] = set()


def _call_within(self: Any, *arguments: Any, **options: Any) -> Any:
    """A jit function called from a kernel. The original patches triton.language anew for every call, a third of the time: the
    kernel has done it, but for `triton.language.core` of Triton's own functions, and that stays patched."""
    names = self.fn.__globals__
    if id(names) not in _patched and any(value is tl.core for value in names.values()):
        interpreter._patch_lang(self.fn)
    _patched.add(id(names))
    return self.rewrite()(*arguments, **options)


_ranges: list[tuple[int, int]] = []  # addresses of this launch's tensors
_take_arguments = interpreter.GridExecutor._init_args_hst
_load, _store = interpreter.InterpreterBuilder.create_masked_load, interpreter.InterpreterBuilder.create_masked_store


def _range(t: torch.Tensor) -> tuple[int, int]:
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)) if t.numel() else -1
    return t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()


def _noting_ranges(self: Any, arguments: Any, options: Any) -> Any:
    tensors = [getattr(a, "base", a) if type(a).__name__ == "TensorDescriptor" else a for a in (*arguments, *options.values())]
    _ranges[:] = [_range(t) for t in tensors if isinstance(t, torch.Tensor)]
    return _take_arguments(self, arguments, options)


def _check_addresses(pointers: Any, mask: Any) -> None:
    size = pointers.get_element_ty().primitive_bitwidth // 8
    used = pointers.data[np.asarray(getattr(mask, "data", mask)).astype(bool)].astype(np.int64)  # descriptors bring a bare array
    inside = np.zeros(used.shape, dtype=bool)
    for low, high in _ranges:
        inside |= (used >= low) & (used + size <= high)
    if not inside.all():
        raise IndexError(f"{(~inside).sum()} of {used.size} addresses lie in no tensor of the launch")


def _checked_load(self: Any, pointers: Any, mask: Any, *rest: Any, **named: Any) -> Any:
    _check_addresses(pointers, mask)
    return _load(self, pointers, mask, *rest, **named)


def _checked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
    _check_addresses(pointers, mask)
    return _store(self, pointers, value, mask, *rest)


interpreter.GridExecutor._init_args_hst = _noting_ranges
interpreter.InterpreterBuilder.create_masked_load = _checked_load
interpreter.InterpreterBuilder.create_masked_store = _checked_store
interpreter.InterpretedFunction.__call__ = _call_within
interpreter.InterpreterBuilder.create_dot = _dot
interpreter.InterpreterBuilder.cast_impl = _rounding_cast
