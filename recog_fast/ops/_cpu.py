"""Tensors -> pointers for the compiled CPU kernels. Shapes were checked by the public functions."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor


def float_rows(t: Tensor) -> Tensor:
    """Contiguous float32 (no copy where it already is)."""
    return t.detach().to(torch.float32).contiguous()


def address(t: Tensor | None) -> int:
    """Where the data lies; 0 for None."""
    return 0 if t is None else t.data_ptr()


class Operands:
    """The extension's views of the classes and rows of one call; keeps the tensors behind them alive."""

    def __init__(
        self,
        module: ModuleType,
        weight: Tensor,
        memory_rows: Tensor | None,
        strength: Tensor | None,
        slot: Tensor | None,
        *,
        unit: bool = False,
        renormalize: bool = True,
    ) -> None:
        self.module = module
        self.weight = float_rows(weight)
        self.memory = self._memory(memory_rows, strength, slot)
        self.subcenters = weight.shape[1] if weight.dim() == 3 else 1
        rows, lam, at = self.memory
        self.classes: Any = module.Classes(
            weight=address(self.weight),
            memory_rows=address(rows),
            strength=address(lam),
            slot=address(at),
            C=weight.shape[0],
            K=self.subcenters,
            D=weight.shape[-1],
            unit=unit,
            memory_bf16=rows is not None and rows.dtype == torch.bfloat16,
            renormalize=renormalize,
        )

    def _memory(
        self, memory_rows: Tensor | None, strength: Tensor | None, slot: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        if memory_rows is None or strength is None:
            return None, None, None
        if slot is None:
            slot = torch.arange(self.weight.shape[0], dtype=torch.int32)
        rows = memory_rows.detach().contiguous()
        if rows.dtype != torch.bfloat16:
            rows = rows.to(torch.float32)
        return rows, float_rows(strength), slot.to(torch.int32).contiguous()

    def rows(self, unit_embeddings: Tensor, targets: Tensor, rules: Tensor | None, scale: float) -> Any:
        """The extension's Rows; `targets` are rows of W (class * K + sub-center)."""
        self.unit_embeddings = float_rows(unit_embeddings)
        self.targets = targets.to(torch.int64).contiguous()
        self.rules = None if rules is None else float_rows(rules)
        return self.module.Rows(
            unit_embeddings=address(self.unit_embeddings),
            target=address(self.targets),
            rules=address(self.rules),
            N=unit_embeddings.shape[0],
            scale=scale,
        )


def threads() -> int:
    """As many threads as torch uses; results do not depend on it."""
    return torch.get_num_threads()
