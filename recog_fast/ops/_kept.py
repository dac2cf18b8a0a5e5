"""Buffers for exponentials kept between the two sweeps (performance.md: 6NCD instead of 8NCD operations), recycled."""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import native
from .._arguments import is_number
from . import _checks, _library

_POOLS = threading.Lock()  # taking a free buffer is one act
BUDGET = 256 * 2**20  # bytes


def _active() -> str:
    module, reason = native.load()
    return reason if module is None else str(module.active_isa())


class Lease:
    """A buffer in use; it goes back to its pool when the last row record or autograd node lets go of it."""

    def __init__(self, buffer: Tensor) -> None:
        self._buffer, self._isa = buffer, _active()

    @property
    def buffer(self) -> Tensor | None:
        """The buffer; None once another build of the kernels was chosen (`native.select_isa`): it lays its tiles out otherwise."""
        return self._buffer if self._isa == _active() else None


@dataclass
class KeptExponentials:
    """Pool of one buffer, up to `budget` bytes: the classes that fit. dtype bfloat16 (2NC bytes), float32 (4NC bytes), or int32:
    element lists (at most 4NC bytes; memory that no list reaches is never touched)."""

    dtype: torch.dtype
    budget: int = BUDGET
    _buffer: Tensor | None = None
    _user: weakref.ref[Lease] | None = None

    def lease(self, unit_embeddings: Tensor, weight: Tensor, half: bool, count: int) -> Lease | None:
        """Room for the sweep over these rows and `count` of the classes; None where no kernel would use it."""
        module = _library.compiled(unit_embeddings, weight)
        if module is None or unit_embeddings.shape[0] == 0:
            return None
        subcenters = weight.shape[1] if weight.dim() == 3 else 1
        classes = module.Classes(
            weight=0, memory_rows=0, strength=0, slot=0, C=count, K=subcenters, D=weight.shape[-1], S=0,
            unit=False, memory_bf16=False, renormalize=True,
        )  # fmt: skip
        size = self.dtype.itemsize
        lists = self.dtype == torch.int32
        needed = module.kept_bytes(classes, unit_embeddings.shape[0], half, keep_half=size == 2, lists=lists)
        return self._hand_out(min(needed, self.budget) // size)

    def _hand_out(self, numel: int) -> Lease:
        with _POOLS:
            free = self._user is None or self._user() is None
            buffer = self._buffer
            if buffer is None or buffer.numel() < numel or not free:
                buffer = torch.empty(numel, dtype=self.dtype)
            lease = Lease(buffer)
            if free:
                self._buffer, self._user = buffer, weakref.ref(lease)
            return lease

    def __getstate__(self) -> dict[str, object]:
        """Copies and pickles start without the buffer."""
        return {"dtype": self.dtype, "budget": self.budget, "_buffer": None, "_user": None}


def kept_exponentials(choice: bool | torch.dtype, budget: int, drop_mass: float, drop_elements: float) -> KeptExponentials | None:
    """The pool for MarginHead's `keep_exponentials` (True is bfloat16) or `drop_elements`; None where nothing is kept.

    Raises ValueError naming the argument, and where two of keep_exponentials, drop_mass and drop_elements are on.
    """
    where = "MarginHead"
    known = isinstance(choice, bool) or (isinstance(choice, torch.dtype) and choice in (torch.float32, torch.bfloat16))
    _checks.expect(known, where, "keep_exponentials False, True, torch.float32 or torch.bfloat16", choice)
    _checks.expect(isinstance(budget, int) and budget > 0, where, "keep_budget > 0 bytes", budget)
    for name, share in (("drop_mass", drop_mass), ("drop_elements", drop_elements)):
        _checks.expect(is_number(share, 0, 1, below=True), where, f"{name} in [0, 1)", repr(share))
    chosen = [choice is not False, float(drop_mass) > 0, float(drop_elements) > 0]
    options = f"keep_exponentials {choice}, drop_mass {drop_mass}, drop_elements {drop_elements}"
    _checks.expect(sum(chosen) <= 1, where, "at most one of keep_exponentials, drop_mass and drop_elements", options)
    if chosen[2]:
        return KeptExponentials(torch.int32, budget)
    return KeptExponentials(torch.bfloat16 if choice is True else choice, budget) if isinstance(choice, torch.dtype) or choice else None
