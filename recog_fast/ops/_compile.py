"""What torch.compile does with a public function of ours: one graph break, and the function itself runs as it is."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def outside_graphs(function: Callable[P, R]) -> Callable[P, R]:
    """`function` runs eagerly inside a compiled one: it checks values, keeps state and has kernels of its own, nothing that a
    compiler could fuse. (torch.compiler.disable itself would cost every `import recog_fast` the import of the compiler.)"""
    disabled: list[Callable[P, R]] = []

    @functools.wraps(function)
    def run(*arguments: P.args, **options: P.kwargs) -> R:
        if not torch.compiler.is_compiling() and "torch._dynamo" not in sys.modules:
            return function(*arguments, **options)
        if not disabled:
            disabled.append(torch.compiler.disable(function))
        return disabled[0](*arguments, **options)

    return run
