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
    Source: docs/math.md 1.
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

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """One group, the head's weight: ValueError for any other (it would never be updated)."""
        own = not getattr(self, "param_groups", None)
        _checks.expect(own, "HeadSGD", "the head's weight alone: another optimizer for other parameters", "another group")
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch.optim; ValueError for the state of another optimizer or of a head of other shape."""
        groups = state_dict["param_groups"]
        known = len(groups) == 1 and set(self.defaults) <= set(groups[0])
        _checks.expect(known, "HeadSGD", f"one group with {sorted(self.defaults)}", [sorted(g) for g in groups])
        for buffers in state_dict["state"].values():
            shape = tuple(buffers["momentum_buffer"].shape)
            _checks.expect(shape == tuple(self.head.weight.shape), "HeadSGD", f"momentum_buffer of shape {tuple(self.head.weight.shape)}", shape)
        super().load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "head": self.head}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "head" in state:  # a copy or a pickle: its head is a copy too
            self.head.attach(self)

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
            group["nesterov"], batch.half, None if batch.kept is None else batch.kept.buffer,
        )  # fmt: skip
        torch.autograd.graph.increment_version(weight)
