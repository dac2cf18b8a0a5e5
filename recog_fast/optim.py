"""HeadSGD: the head's SGD with momentum, fused with its gradient into one sweep over the classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .heads import MarginHead
from .ops import _checks
from .ops._rows import join


class HeadSGD(torch.optim.Optimizer):
    """SGD with momentum for a `MarginHead`'s weight that never makes a gradient tensor.

    v <- mu v + (dW + wd W);  W <- W - lr v  (Nesterov: W <- W - lr (g + mu v)), as torch.optim.SGD without dampening, where dW is
    the sum of the gradients of all backward passes since the last step: recomputed from row records, chunk by chunk,
    and applied while on chip. Extra memory beyond W and v: a few MB, whatever C is.

    `step()` runs over the rows backward left on the head; it raises RuntimeError if W, the memory or the clock changed
    since they were made. Without rows nothing moves but the clock, as SGD does with grad None. Learning rate schedulers
    work as usual (`param_groups`); the state is `momentum_buffer`. weight.grad stays None: gradient clipping and
    GradScaler see no gradient (train in bf16, clip the backbone). A margin's own parameters want another optimizer.

    Args: head; lr >= 0; momentum in [0, 1); weight_decay >= 0; nesterov (needs momentum > 0). Raises ValueError, TypeError.
    Source: math.md 1, performance.md (fused step).
    """

    def __init__(self, head: MarginHead, lr: float, momentum: float = 0.9, weight_decay: float = 5e-4, nesterov: bool = False) -> None:
        if not isinstance(head, MarginHead):
            raise TypeError(f"HeadSGD: expected head to be a MarginHead, got {type(head).__name__}")
        _checks.expect(0 <= float(lr) < float("inf"), "HeadSGD", "lr >= 0", lr)
        _checks.expect(0 <= momentum < 1, "HeadSGD", "momentum in [0, 1)", momentum)
        _checks.expect(0 <= weight_decay < float("inf"), "HeadSGD", "weight_decay >= 0", weight_decay)
        _checks.expect(not nesterov or momentum > 0, "HeadSGD", "momentum > 0 with nesterov", momentum)
        self.head = head
        super().__init__([head.weight], {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov})
        head.attach(self)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Discards pending rows (and weight.grad, should another loss have made one)."""
        super().zero_grad(set_to_none)
        self.head.discard_rows()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update from all pending rows; returns the closure's loss if one is given.

        Raises RuntimeError for stale rows, for a dense weight.grad (it would be lost) and where another HeadSGD took over.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check()
        rows = self.head.take_rows()
        if rows:
            self._update(rows)
        self.head.end_step()
        return loss

    def _check(self) -> None:
        if self.head.fused_optimizer is not self:
            raise RuntimeError("HeadSGD: expected to be the optimizer of its head, got a head another HeadSGD was made for")
        if self.head.weight.grad is not None:
            raise RuntimeError(
                "HeadSGD: expected weight.grad to be None, got a dense gradient (another loss uses head.weight directly): "
                "use head.cosine for attached cosines, or torch.optim.SGD for the head"
            )

    def _update(self, rows: list[Any]) -> None:
        group = self.param_groups[0]
        weight = self.head.weight
        state = self.state[weight]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(weight, memory_format=torch.contiguous_format)
        batch = join(rows)
        torch.ops.recog_fast.class_step(
            batch.unit_embeddings, batch.targets, batch.terms, weight.detach(), state["momentum_buffer"], batch.scale,
            batch.rules, *batch.injection.arguments(), True, float(group["lr"]), group["momentum"], group["weight_decay"],
            group["nesterov"],
        )  # fmt: skip
        torch.autograd.graph.increment_version(weight)
