"""Error budgets of a route (the golden cases' README), and the ideal 16-bit path the kernels are measured against."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from routes import Route, pair_format
from torch import Tensor

import recog_fast as rf
from recog_fast import reference


def relative(value: Tensor, truth: Tensor) -> float:
    """Frobenius-relative error; absolute where the truth is 0."""
    scale = truth.norm().item()
    return (value.double() - truth.double()).norm().item() / (scale if scale > 0 else 1.0)


@dataclass(frozen=True)
class Budget:
    """loss: `loss_relative` |loss| + `loss_absolute` per row; gradients Frobenius-relative; nearest cosine absolute."""

    loss_relative: float
    loss_absolute: float
    gradient: float
    unknown_gradient: float
    nearest: float


def budget(route: Route, scale: float, dimension: int) -> Budget:
    """What the golden README allows: 16-bit operands 3e-2 at s = 64, 5e-3, 2e-2 (UIR) and 1e-3 at D = 512, elsewhere
    times sqrt(512/D) (the loss in proportion to s)."""
    if route.dtype == torch.float64:
        return Budget(1e-9, 1e-9 * scale, 1e-9, 1e-9, 1e-9)
    if not route.half:
        return Budget(1e-6, 2e-6 * scale, 5e-5, 5e-5, 1e-6)
    share = (512 / dimension) ** 0.5
    return Budget(1e-6, 3e-2 * scale / 64 * share, 5e-3 * share, 2e-2 * share, 1e-3 * share)


def against_ideal(route: Route, error: float, ideal: float) -> bool:
    """Whether an error of 16-bit sweeps stays in its share of the ideal path's (inputs rounded to bfloat16).

    int16: a tenth, and float32's own budget. bfloat16: 1.5 times, and half an ulp (2^-9) for the exponentials and
    slopes, which are 16-bit operands of the second product too and which the ideal path leaves alone.
    """
    if pair_format(route) == "int16":
        return error <= 0.1 * ideal + 5e-5
    return error <= 1.5 * ideal + 2**-9


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
