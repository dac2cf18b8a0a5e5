"""What the chunk loop reads: prototypes a chunk at a time, the batch's rows padded to whole tiles, sizes of chunks and slabs."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..rules import RULE_ROWS
from . import _checks
from ._cuda_native import run_prototype_rows
from ._planes import check_planes

_L2, _PROCESSORS = 32 << 20, 1  # of a device that does not say

Injection = tuple[Tensor, Tensor, Tensor]  # memory (S, D), strength (S,), slot (C K,) int32


@dataclass(frozen=True)
class Plan:
    """Classes of a chunk, columns of a slab of the pull's GEMM, and the tile (`triton_kernels.configs.Tile`)."""

    classes: int
    slab: int
    tile: Any

    def columns(self, classes: Classes) -> int:
        """Row length of E and slopes: whole tiles of classes."""
        width: int = self.tile.classes
        return -(-min(self.classes, classes.count) // width) * width * classes.subcenters


def plan_for(kernel: str, x: Tensor, subcenters: int, rules: bool = False) -> Plan:
    """Chunks of whole slabs, whose E or slopes, prototypes and dP stay in half the L2; slabs that fill the processors."""
    from ..triton_kernels import configs

    n, d = x.shape
    l2, processors = _L2, _PROCESSORS
    if x.device.type == "cuda":
        device = torch.cuda.get_device_properties(x.device)
        l2, processors = device.L2_cache_size, device.multi_processor_count
    per_class = subcenters * (x.element_size() * (n + d) + 4 * d)
    classes = max(l2 // 2 // per_class // 128 * 128, 128)
    slabs = max(processors // (-(-max(n, 1) // 128) * -(-d // 128)), 1)
    slab = max(classes * subcenters // slabs // 128 * 128, 256)
    if subcenters == 1 and classes > slab:  # whole slabs: what is left over would be a GEMM and a kernel of its own in every chunk
        classes -= classes % slab
    return Plan(classes, slab, configs.choose(kernel, x, rules or subcenters > 1))


@dataclass
class Classes:
    """The prototypes of a sweep, a chunk at a time: W normalised, injected and cast, or unit rows as they are."""

    weight: Tensor  # (C, D) or (C, K, D)
    memory_rows: Tensor | None
    strength: Tensor | None
    slot: Tensor | None
    unit: bool
    renormalize: bool
    dtype: torch.dtype = torch.float32
    residual: Tensor | None = None  # int16, shaped as a bfloat16 weight
    rows: Tensor = field(init=False)  # (C, K, D) float32, contiguous; bfloat16 with `low`
    low: Tensor | None = field(init=False, default=None)  # (C, K, D) int16
    injection: Injection | None = field(init=False)
    _buffer: Tensor | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        weight = self.weight.detach()
        _checks.expect(weight.dim() in (2, 3), "recog_fast", "weight of shape (C, D) or (C, K, D)", tuple(weight.shape))
        rows = weight.unsqueeze(1) if weight.dim() == 2 else weight
        if self.residual is None:
            self.rows = rows.to(torch.float32).contiguous()
        else:
            check_planes(weight, self.residual, "recog_fast")
            _checks.expect(not self.unit, "recog_fast", "unit=False with residual", self.unit)
            self.rows, self.low = rows, self.residual.view_as(rows)
        _checks.expect(self.rows.shape[0] * self.rows.shape[1] < 2**31, "recog_fast", "C K < 2^31", tuple(weight.shape))
        self.injection = None
        if self.memory_rows is not None and self.strength is not None and not self.unit:
            memory = self.memory_rows.detach().contiguous()
            memory = memory if memory.dtype == torch.bfloat16 else memory.float()
            slot = torch.arange(self.count, device=weight.device) if self.slot is None else self.slot
            slot = slot.to(torch.int32)
            slot = slot.repeat_interleave(self.subcenters) if self.subcenters > 1 else slot.contiguous()
            self.injection = memory, self.strength.detach().float().contiguous(), slot

    @property
    def count(self) -> int:
        return self.rows.shape[0]

    @property
    def subcenters(self) -> int:
        return self.rows.shape[1]

    def injection_of(self, start: int, stop: int) -> Injection | None:
        """The memory of these classes."""
        if self.injection is None:
            return None
        return *self.injection[:2], self.injection[2][start * self.subcenters : stop * self.subcenters]

    def low_of(self, start: int, stop: int) -> Tensor | None:
        """The lower plane (c K, D) of these classes."""
        return None if self.low is None else self.low[start:stop].flatten(0, 1)

    def chunk(self, start: int, stop: int) -> Tensor:
        """P (c, K, D) in the sweep's dtype; lies in a buffer that the next chunk overwrites."""
        rows = self.rows[start:stop]
        if self.unit and self.dtype == torch.float32:
            return rows
        if self._buffer is None or self._buffer.shape[0] < stop - start:
            self._buffer = torch.empty(stop - start, *self.rows.shape[1:], dtype=self.dtype, device=rows.device)
        chunk = self._buffer[: stop - start]
        if self.unit:
            return chunk.copy_(rows)
        run_prototype_rows(
            rows.flatten(0, 1), self.injection_of(start, stop), chunk.flatten(0, 1), renormalize=self.renormalize, residual=self.low_of(start, stop)
        )
        return chunk

    def longest(self) -> Tensor | float:
        """A bound of |P_j|."""
        if self.bounded:
            return 1.0
        if self.unit:
            longest: Tensor = torch.linalg.vector_norm(self.rows, dim=2).amax()
            return longest
        assert self.injection is not None
        memory, strength, _ = self.injection
        pushes: Tensor = strength.abs() * torch.linalg.vector_norm(memory, dim=1, dtype=torch.float32)
        return 1.0 + (pushes.amax() if pushes.numel() else 0.0)

    @property
    def strengths(self) -> Tensor | None:
        """(S,) of the memory: new at every step, where all else lies at fixed addresses."""
        return None if self.injection is None else self.injection[1]

    def with_strengths(self, strengths: Tensor | None) -> Classes:
        """The same classes reading their memory's strengths there."""
        if strengths is None or self.injection is None:
            return self
        twin = copy.copy(self)
        twin.injection = self.injection[0], strengths, self.injection[2]
        return twin

    def key(self) -> tuple[Any, ...]:
        """What a captured loop over these classes depends on."""
        memory = () if self.injection is None else (self.injection[0].data_ptr(), self.injection[0].dtype, self.injection[2].data_ptr())
        memory = (*memory, *(() if self.low is None else (self.low.data_ptr(),)))
        return (self.rows.data_ptr(), tuple(self.rows.shape), self.unit, self.renormalize, self.dtype, *memory)

    @property
    def bounded(self) -> bool:
        """Whether |P_j| <= 1 is known beforehand."""
        return not self.unit and (self.injection is None or self.renormalize)


@dataclass
class Rows:
    """A batch as the tile kernels read it: x^ in the sweep's dtype, vectors padded to a multiple of every tile."""

    x: Tensor  # (N, D)
    rules: Tensor | None  # (12, ld)
    ld: int

    @classmethod
    def of(cls, unit_embeddings: Tensor, rules: Tensor | None, dtype: torch.dtype) -> Rows:
        from ..triton_kernels import configs

        n = unit_embeddings.shape[0]
        ld = max(-(-n // configs.ROW_PADDING), 1) * configs.ROW_PADDING
        rows = cls(unit_embeddings.detach().to(dtype).contiguous(), None, ld)
        if rules is not None:
            _checks.expect(tuple(rules.shape) == (RULE_ROWS, n), "recog_fast", f"rules (12, N) = (12, {n})", tuple(rules.shape))
            rows.rules = rows.padded(rules.detach().float(), 0.0)
        return rows

    def padded(self, values: Tensor, fill: float) -> Tensor:
        """values (..., N) -> (..., ld)."""
        out = values.new_full((*values.shape[:-1], self.ld), fill)
        out[..., : values.shape[-1]] = values
        return out
