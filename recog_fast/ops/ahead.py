"""The operations on CPU tensors as a GPU would run them, compiled and not launched (`triton_kernels.ahead`)."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING
from unittest import mock

import torch
from torch import Tensor

from . import _cuda, _library

if TYPE_CHECKING:
    from ..triton_kernels.ahead import Kernel


@contextlib.contextmanager
def compiling_for(arch: int, each: Callable[[Kernel], None] | None = None) -> Iterator[dict[str, Kernel]]:
    """Within it the operations on CPU tensors make the launches of a GPU of compute capability arch (80, 89, 90, 100), which are compiled
    and not run: results are whatever lay in memory. Whole process; gives the kernels by their key in Triton's cache,
    and calls `each` with every one.

    Raises ValueError for another architecture, RuntimeError under TRITON_INTERPRET.
    """
    from ..triton_kernels.ahead import compile_only

    def runs(_: str, *operands: Tensor | None, kept: Tensor | None = None) -> bool:
        return _library.backend() == "auto" and kept is None and all(t is None or t.dtype != torch.float64 for t in operands)

    library = torch.library.Library("recog_fast", "IMPL")
    try:
        with compile_only(arch, each) as found, mock.patch.object(_cuda, "_runs", runs):
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Warning only once for all operators")
                for stem, kernel in _cuda.KERNELS.items():
                    library.impl(stem, kernel, "CPU", allow_override=True)
            yield found
    finally:
        library._destroy()
