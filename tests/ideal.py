"""The ideal 16-bit path: the operands of the sweeps rounded to bfloat16, everything else float64."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import recog_fast as rf
from recog_fast import reference


def rounded(t: Tensor) -> Tensor:
    """To the nearest bfloat16, dtype kept."""
    return t.to(torch.bfloat16).to(t.dtype)


@contextlib.contextmanager
def ideal_bfloat16() -> Iterator[None]:
    """Within it the reference's sweeps see x^ and P rounded to bfloat16: give them float64 to have nothing else rounded.

    The target cosine, the margin and the chain through the normalisations stay exact, as in the kernels.
    """

    def rounding(operation: Callable[..., Any]) -> Callable[..., Any]:
        return lambda unit_embeddings, *rest: operation(rounded(unit_embeddings), *rest)

    prototypes = reference._prototypes
    with pytest.MonkeyPatch.context() as patch, rf.ops.use_backend("reference"):
        patch.setattr(reference, "_prototypes", lambda *arguments: rounded(prototypes(*arguments)))
        for name in ("negative_logsumexp", "unknown_rejection", "class_gradient"):
            patch.setattr(reference, name, rounding(getattr(reference, name)))
        yield
