"""One library, one schema table; `_dispatch.TABLE` says who runs what, `compiled` asks it.

Every operation has its reference on the fallback key (any device), the compiled CPU kernel on the CPU key, and a fake.
A CPU kernel hands over to the reference for float64, without the extension, or under `use_backend("reference")`;
a CUDA kernel likewise (`_cuda.py`).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import native
from . import _dispatch

_MEMORY = "Tensor? memory_rows, Tensor? strength, Tensor? slot"
_MEMBERS = "Tensor? members=None"
_RESIDUAL = "Tensor? residual=None"  # the lower plane of a bfloat16 weight (`_planes.py`)
_ROWS = "Tensor unit_embeddings, Tensor targets, Tensor terms"

SCHEMAS = {
    "effective_prototypes": f"(Tensor weight, {_MEMORY}, bool renormalize, {_RESIDUAL}) -> Tensor",
    "negative_logsumexp": f"(Tensor unit_embeddings, Tensor weight, Tensor labels, float scale, Tensor? rules, {_MEMORY}, "
    "bool unit, bool renormalize, bool half=False, bool want_pull=True, Tensor(a!)? kept=None, "
    f"{_MEMBERS}, Tensor? floor=None, Tensor(b!)? listed=None, bool bounded=False, {_RESIDUAL}) -> (Tensor, Tensor, Tensor, Tensor)",
    "unknown_rejection": "(Tensor unit_embeddings, Tensor weight, Tensor nearest, Tensor lse, Tensor first_mean, float scale, "
    f"{_MEMORY}, bool unit, bool renormalize, bool half=False, Tensor? low=None, {_RESIDUAL}) -> (Tensor, Tensor, Tensor, Tensor)",
    "class_gradient": f"({_ROWS}, Tensor weight, float scale, Tensor? rules, {_MEMORY}, bool unit, bool renormalize, "
    f"bool half=False, Tensor? kept=None, {_MEMBERS}) -> Tensor",
    "class_step": f"({_ROWS}, Tensor(a!) weight, Tensor(b!)? velocity, float scale, Tensor? rules, {_MEMORY}, "
    "bool renormalize, float lr, float momentum, float weight_decay, bool nesterov, "
    f"bool half=False, Tensor? kept=None, {_MEMBERS}, bool sparse=False, Tensor? rate=None, "
    "Tensor(c!)? residual=None, Tensor? rounding=None) -> ()",
    "memory_write": "(Tensor(a!) rows, Tensor(b!) row_strength, Tensor(c!) stamp, Tensor(d!) owner, Tensor(e!) slot, "
    "Tensor(f!) cursor, Tensor embeddings, Tensor labels, Tensor strengths, int step) -> Tensor",
}

_library = torch.library.Library("recog_fast", "DEF")
for _stem, _schema in SCHEMAS.items():
    _library.define(_stem + _schema, tags=(torch.Tag.pt2_compliant_tag,))

_state = threading.local()


def register(
    stem: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    cpu: Callable[..., Any] | None = None,
    autograd: Callable[..., Any] | None = None,
) -> None:
    """Attaches an operation's implementations to its schema."""
    _library.impl(stem, reference, "CompositeExplicitAutograd")
    if cpu is not None:
        _library.impl(stem, cpu, "CPU")
    if autograd is not None:
        _library.impl(stem, autograd, "Autograd")
    torch.library.register_fake(f"recog_fast::{stem}", fake, lib=_library)


def register_cuda(stem: str, kernel: Callable[..., Any]) -> None:
    """Attaches what an operation does on CUDA tensors (`_cuda.py`)."""
    _library.impl(stem, kernel, "CUDA")


def backend() -> str:
    """ "auto" or what `use_backend` chose in this thread."""
    return getattr(_state, "backend", "auto")


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within it every operation of this thread runs on `name`: "auto" or "reference" (tests, debugging).

    Backward passes use the choice their forward was made under. Raises ValueError for any other name.
    """
    if name not in ("auto", "reference"):
        raise ValueError(f"use_backend: expected 'auto' or 'reference', got {name!r}")
    before = backend()
    _state.backend = name
    try:
        yield
    finally:
        _state.backend = before


def compiled(*operands: Tensor | None) -> ModuleType | None:
    """The extension if these operands go to it (`_dispatch.TABLE`), else None: then the caller runs the reference."""
    call, module = _dispatch.call_of(backend(), operands)
    rule = _dispatch.choose(call)
    if rule.runs == _dispatch.REFERENCE:
        if rule is _dispatch.MISSING:
            native.warn_missing()
        return None
    return module


def below_autograd() -> Any:
    """Guard under which a call of an operation skips its Autograd key."""
    return torch._C._AutoDispatchBelowAutograd()
