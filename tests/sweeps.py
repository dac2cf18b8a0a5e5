"""Runs one registered operation several ways on the same arguments, and holds the results to their budgets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from budgets import ideal_bfloat16
from torch import Tensor

import recog_fast as rf

STEMS = ("effective_prototypes", "negative_logsumexp", "unknown_rejection", "class_gradient", "class_step")


def results(stem: str, arguments: tuple[Any, ...], operation: Callable[..., Any], convert: Callable[[Tensor], Tensor], **options: Any) -> tuple[Tensor, ...]:
    """What the operation returns for converted copies of the arguments, or W and velocity after the step."""
    taken = [convert(a) if isinstance(a, Tensor) else a for a in arguments]
    options = {name: convert(o) if isinstance(o, Tensor) else o for name, o in options.items()}
    out = operation(*taken, **options)
    if stem == "class_step":
        return tuple(t for t in taken[3:5] if t is not None)
    return out if isinstance(out, tuple) else (out,)


def double(t: Tensor) -> Tensor:
    """A copy, float64 where it is float32."""
    return t.double() if t.dtype == torch.float32 else t.clone()


def agree(ours: Tensor, plain: Tensor, truth: Tensor, worth: float, what: object) -> None:
    """Twice the error of PyTorch in float32, and `worth` of the largest value: test_ops' budget."""
    finite = torch.isfinite(truth)
    assert torch.equal(torch.isfinite(ours), finite), what
    if bool(finite.any()):
        most, error, own = (t.double()[finite].abs().max().item() for t in (truth, ours.double() - truth, plain.double() - truth))
        assert error <= 2 * own + worth * (most + 1), (what, error, own, most)


def check(stem: str, arguments: tuple[Any, ...], ours: Callable[..., Any], convert: Callable[[Tensor], Tensor], **options: Any) -> None:
    """`ours` on converted arguments against the reference: float32 within its budget of float64; bfloat16 within 2^-8 of the
    float64 reference that has x^ and P rounded too: what is left are exponentials or slopes, rounded to 2^-9 of themselves."""
    run = getattr(torch.ops.recog_fast, stem)
    with rf.ops.use_backend("reference"):
        truth = results(stem, arguments, run, double, **options)
        plain = results(stem, arguments, run, Tensor.clone, **options)
    found = [t.cpu() for t in results(stem, arguments, ours, convert, **options)]
    for a, b, c in zip(found, plain, truth, strict=True):
        if a.dtype.is_floating_point:
            agree(a, b, c, 2e-6, stem)
        else:
            assert torch.equal(a, c), stem
    if stem == "effective_prototypes":
        return
    with ideal_bfloat16():
        truth = results(stem, arguments, run, double, **options)
    found = [t.cpu() for t in results(stem, arguments, ours, convert, half=True, **options)]
    for a, c in zip(found, truth, strict=True):
        if a.dtype.is_floating_point:
            agree(a, c, c, 2**-8, f"{stem}, bfloat16")
