"""Memory for weight gradients that is used again: a new C x D tensor each step costs a page fault per 4 KB."""

from __future__ import annotations

import sys
import threading
from dataclasses import dataclass

import torch
from torch import Tensor

_KEPT = 2  # one for weight.grad, one for the gradient that is being added to it (accumulation, set_to_none=False)


def _holders(memory: Tensor) -> tuple[int, int]:
    """How many tensors share this memory, and how many names its Python storage object has."""
    storage = memory.untyped_storage()
    return torch._C._storage_Use_Count(storage._cdata), sys.getrefcount(storage)


@dataclass(frozen=True)
class _Buffer:
    memory: Tensor  # (C, D) or (C, K, D), handed out as other tensors of the same storage
    alone: tuple[int, int]  # `_holders` when nobody else had it

    def fits(self, weight: Tensor) -> bool:
        same = (self.memory.shape, self.memory.dtype, self.memory.device) == (weight.shape, weight.dtype, weight.device)
        return same and self.memory.untyped_storage().nbytes() == weight.numel() * weight.element_size()

    def free(self) -> bool:
        """Nobody but this pool can reach the memory: no gradient, view, NumPy array, storage, or other process."""
        return not self.memory.is_shared() and _holders(self.memory) == self.alone


class GradientBuffers:
    """The gradient memory of one weight, up to two buffers.

    A buffer is handed out only when nothing else refers to its storage (tensor, view, NumPy array, DLPack capsule,
    storage object) and no other process may map it: a gradient that somebody kept is never written again. It stays here
    when `zero_grad(set_to_none=True)` drops the gradient; `release` frees it.
    """

    def __init__(self) -> None:
        self._kept: list[_Buffer] = []
        self._lock = threading.Lock()  # backward passes of several threads must not find the same buffer free

    def __reduce__(self) -> tuple[type[GradientBuffers], tuple[()]]:
        """Copies and pickles start empty."""
        return GradientBuffers, ()

    def take(self, weight: Tensor) -> Tensor:
        """A contiguous tensor like weight with any contents; its memory may be that of a gradient dropped before."""
        with self._lock:
            kept = [buffer for buffer in self._kept if buffer.fits(weight)]
            chosen = next((buffer for buffer in kept if buffer.free()), None)
            if chosen is None:
                memory = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
                chosen = _Buffer(memory, _holders(memory))
            self._kept = [chosen, *(buffer for buffer in kept if buffer is not chosen)][:_KEPT]
            # Not a view: autograd takes a gradient over without a copy only where its tensor has no other owner.
            fresh = torch.empty(0, dtype=weight.dtype, device=weight.device)
            return fresh.set_(chosen.memory.untyped_storage(), 0, weight.shape, chosen.memory.stride())

    def release(self) -> None:
        """Lets go of all memory; what is in use elsewhere stays there."""
        with self._lock:
            self._kept = []

    @property
    def nbytes(self) -> int:
        """Bytes held here, in use or not."""
        return sum(buffer.memory.untyped_storage().nbytes() for buffer in self._kept)
