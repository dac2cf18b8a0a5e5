"""W of a MarginHead in its format, float32 or two 16-bit planes: what makes, moves, loads and hands it out (docs/math.md 1.5)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from .ops import _checks, _planes
from .ops._buffers import GradientBuffers

WeightFormat = Literal["float32", "split"]


class HeadWeight(nn.Module):
    """Holds `weight` (C, D) or (C, K, D) float32; split: `weight` bfloat16, the upper plane, and `weight_low` int16, the lower."""

    weight: nn.Parameter
    weight_low: Tensor | None

    def __init__(self, shape: tuple[int, ...], weight_format: WeightFormat, values: Tensor | None = None) -> None:
        """values: W as it starts (float32); None: drawn from N(0, 0.01), chunk by chunk."""
        super().__init__()
        _checks.expect(weight_format in ("float32", "split"), "MarginHead", "weight_format 'float32' or 'split'", repr(weight_format))
        split = weight_format == "split"
        made = torch.empty(shape, dtype=torch.bfloat16 if split else torch.float32) if values is None or split else values
        self.weight = nn.Parameter(made)
        self.register_buffer("weight_low", torch.empty(shape, dtype=torch.int16) if split else None)
        self._gradients = GradientBuffers()
        self._planes_known: tuple[tuple[int, int], tuple[int, int]] | None = None  # address and version of each when last in step
        with torch.no_grad():
            if not split and values is None:
                self.weight.normal_(0.0, 0.01)
            for start, stop in _planes.chunks(self.weight) if split else ():
                self._write(start, stop, torch.empty(stop - start, *shape[1:], dtype=torch.float32).normal_(0.0, 0.01))
        self.note_planes()

    def note_planes(self) -> None:
        """Both planes belong together as they are now: after whoever writes both (`HeadSGD.step`)."""
        if self.weight_low is not None:
            self._planes_known = _place(self.weight), _place(self.weight_low)

    def _settle_planes(self) -> None:
        """A split W whose upper plane alone was written in place (`weight.zero_()`, an EMA's copy_) is what was written, in bfloat16."""
        if self.weight_low is None:
            return
        now, known = (_place(self.weight), _place(self.weight_low)), self._planes_known
        if known is not None and now[0] != known[0] and now[1] == known[1]:
            with torch.no_grad():
                self.weight_low.zero_()
        self.note_planes()

    @property
    def weight_format(self) -> WeightFormat:
        """ "float32" (float64 after `.double()` too) or "split"."""
        return "float32" if self.weight_low is None else "split"

    def _write(self, start: int, stop: int, values: Tensor) -> None:
        """Classes start .. stop - 1 of W."""
        if self.weight_low is None:
            self.weight[start:stop] = values
        else:
            values = values.to(self.weight.device, torch.float32)
            _planes.split(values, self.weight.detach()[start:stop], self.weight_low[start:stop])

    @torch.no_grad()
    def full_weight(self) -> Tensor:
        """W (C, D) or (C, K, D) float32, a new tensor: of a split head every bit of it."""
        self._settle_planes()
        return self.weight.detach().clone() if self.weight_low is None else _planes.join(self.weight, self.weight_low)

    @torch.no_grad()
    def copy_weight(self, values: Tensor) -> None:
        """W from values (C, D) or (C, K, D), rounded to float32; `weight.copy_` on a split head rounds to bfloat16 (and leaves no residual).

        Raises ValueError for another shape.
        """
        _checks.expect_tensor(values, "MarginHead.copy_weight", "values")
        shape = tuple(self.weight.shape)
        _checks.expect(tuple(values.shape) == shape, "MarginHead.copy_weight", f"values of shape {shape}", tuple(values.shape))
        for start, stop in _planes.chunks(self.weight):
            self._write(start, stop, values[start:stop])
        if self.weight_low is not None:  # written through views of a detached tensor
            torch.autograd.graph.increment_version(self.weight)
        self.note_planes()

    @property
    def _shaped(self) -> Tensor:
        """A tensor of W's shape (of a shard without classes: with one) and dtype, for checks: W itself, or one without data."""
        if self.weight_low is None and self.weight.shape[0]:
            return self.weight
        shape = max(self.weight.shape[0], 1), *self.weight.shape[1:]
        return torch.empty(shape, dtype=self.weight.dtype if self.weight_low is None else torch.float32, device="meta")

    def _check_embeddings(self, embeddings: Tensor, where: str) -> None:
        """(N, D), beside a W that the sweeps take."""
        self._settle_planes()
        _checks.check_embeddings(embeddings, where)
        _checks.check_weight(self._shaped, embeddings.shape[1], where)

    def release_gradient_memory(self) -> None:
        """Frees what the head keeps of dropped gradients: with an ordinary optimizer up to two tensors like W on the CPU.

        `backward` writes dW into the memory of an earlier weight.grad once nothing else refers to it, which saves a new
        tensor's page faults each step; a gradient that somebody still holds is never written again.
        """
        self._gradients.release()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Planes move between devices and keep their dtypes: `.half()` on a model must not cost W its precision."""
        self.release_gradient_memory()  # of the former device or dtype
        if self.weight_low is None:
            return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for child in self.children() if recurse else ():
            child._apply(fn)
        planes = self.weight.dtype, self.weight_low.dtype

        def keep(t: Tensor) -> Tensor:
            moved = fn(t)
            return t.to(moved.device) if t.dtype in planes and moved.dtype != t.dtype else moved

        return super()._apply(keep, False)  # type: ignore[no-untyped-call]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Takes a head's state in either format: values are converted as far as shapes fit; a bfloat16 weight by itself has no residual."""
        high, low = (state_dict.get(prefix + name) for name in ("weight", "weight_low"))
        if isinstance(high, Tensor) and (low is None) != (self.weight_low is None):
            fits = high.shape == self.weight.shape and (low is None or low.shape == high.shape)
            if self.weight_low is None and low is not None:
                state_dict[prefix + "weight"] = _planes.join(high, low) if fits else high
                del state_dict[prefix + "weight_low"]
            elif self.weight_low is not None:
                if fits:
                    self.copy_weight(high)  # a chunk at a time, where it is to be
                state_dict[prefix + "weight"] = self.weight if fits else high
                state_dict[prefix + "weight_low"] = self.weight_low
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.note_planes()


def _place(t: Tensor) -> tuple[int, int]:
    """Moves with every write that autograd sees."""
    return t.data_ptr(), -1 if t.is_inference() else t._version
