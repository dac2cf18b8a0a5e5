"""HeadSGD: the head's SGD with momentum, fused with its gradient into one sweep over the classes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from ._arguments import is_choice, is_number
from .heads import MarginHead
from .ops import _checks
from .ops._rows import RowRecords, join


class HeadSGD(torch.optim.Optimizer):
    """SGD with momentum for a `MarginHead`'s weight, (C, D) or (C, K, D), that never makes a gradient tensor.

    v <- mu v + (dW + wd W);  W <- W - lr v  (Nesterov: W <- W - lr (g + mu v)), as torch.optim.SGD without dampening, where dW is
    the sum of the gradients of all backward passes since the last step: recomputed from row records, chunk by chunk,
    and applied while on chip. Extra memory beyond W and v (none with momentum 0): a few MB, whatever C is.

    `step()` runs over the rows backward left on the head; it raises RuntimeError if W, the memory, the clock or the sampled
    classes changed since they were made. Without rows nothing moves but the clock, as SGD does with grad None. It is a
    torch.optim.Optimizer: learning rate schedulers, step hooks and closures work as usual (`param_groups`). Its state is
    `momentum_buffer`, and its state_dict is one of torch.optim.SGD: each loads the other's.

    unsampled: what a step does to the classes a sampled head left out: "dense" moves them by momentum and weight decay,
    as Partial FC v2; "sparse" leaves weight and momentum alone (a class first touched starts from momentum 0).

    momentum_dtype: torch.bfloat16 halves the velocity: v is rounded up or down by chance, unbiased (to nearest, momentum 0.9 would lose
    steps below 2^-9 of v), after W has taken the step with the v not rounded. The chance is a hash of (head.sample_seed, head.steps,
    element of W): the same bits on every run, for any number of threads. A state loaded is converted, to the nearest.
    W and v then have 6 bytes for each element instead of 8, in either weight_format. Not with keep_exponentials or drop_elements.

    weight.grad stays None. So `clip_grad_norm_` does nothing to the head: clip the backbone alone. GradScaler is refused
    (its scaled rows could not be unscaled): train in bf16. A margin's own parameters want another optimizer.

    Args: head; lr >= 0; momentum in [0, 1); weight_decay >= 0; nesterov (needs momentum > 0); unsampled; dampening and
    maximize are there to be refused by name: 0 and False. Raises ValueError, TypeError. Source: docs/math.md 1, 1.3.
    """

    momentum_dtype = torch.float32  # of optimizers pickled before there was another

    # GradScaler hands over its scale instead of looking for gradients; `step` then refuses in words of its own.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        head: MarginHead,
        lr: float | Tensor,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        nesterov: bool = False,
        unsampled: Literal["dense", "sparse"] = "dense",
        *,
        momentum_dtype: torch.dtype = torch.float32,
        dampening: float = 0.0,
        maximize: bool = False,
    ) -> None:
        if not isinstance(head, MarginHead):
            raise TypeError(f"HeadSGD: expected head to be a MarginHead, got {type(head).__name__}")
        group = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "unsampled": unsampled,
        }
        _check_group(group)
        known = is_choice(momentum_dtype, (torch.float32, torch.bfloat16))
        _checks.expect(known, "HeadSGD", "momentum_dtype torch.float32 or torch.bfloat16", momentum_dtype)
        kept = head.keep is not None and momentum_dtype == torch.bfloat16
        _checks.expect(not kept, "HeadSGD", "momentum_dtype torch.float32 with keep_exponentials or drop_elements", momentum_dtype)
        self.momentum_dtype = momentum_dtype
        self.head = head
        super().__init__([head.weight], group)
        head.attach(self)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """One group, the head's weight: ValueError for any other (it would never be updated)."""
        own = not getattr(self, "param_groups", None)
        _checks.expect(own, "HeadSGD", "the head's weight alone: another optimizer for other parameters", "another group")
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Of a HeadSGD or a torch.optim.SGD; ValueError for any other, for options refused here and for a head of other shape."""
        groups = state_dict["param_groups"]
        needed = set(self.defaults) - {"unsampled", "maximize"}  # SGD has no such thing; SGDs of old have no maximize
        known = len(groups) == 1 and needed <= set(groups[0])
        _checks.expect(known, "HeadSGD", f"one group with {sorted(needed)}", [sorted(g) for g in groups])
        group = {"unsampled": self.param_groups[0]["unsampled"], "maximize": False, **groups[0]}
        _check_group(group)
        velocities = []
        for buffers in state_dict["state"].values():
            velocity = buffers.get("momentum_buffer")
            if velocity is None:  # SGD without momentum
                continue
            _checks.expect_tensor(velocity, "HeadSGD", "momentum_buffer")
            shape = tuple(velocity.shape)
            _checks.expect(shape == tuple(self.head.weight.shape), "HeadSGD", f"momentum_buffer of shape {tuple(self.head.weight.shape)}", shape)
            velocities.append(velocity)
        super().load_state_dict({**state_dict, "state": {}, "param_groups": [copy.copy(group)]})
        for velocity in velocities:  # not through torch, which would make it the weight's dtype: that of a plane
            own = torch.empty_like(self.head.weight, dtype=self._velocity_dtype(), memory_format=torch.contiguous_format)
            self.state[self.head.weight] = {"momentum_buffer": own.copy_(velocity.detach())}

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "head": self.head, "momentum_dtype": self.momentum_dtype}

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

        Raises ValueError for rows a CUDA batch had to leave out (`MarginHead.check_rows`; the others stay pending), RuntimeError for stale rows,
        a dense weight.grad (it would be lost), a GradScaler, a weight other than the one this was made for, and where
        another HeadSGD took over; ValueError for options set in `param_groups` that are refused.
        """
        self._refuse_scaler()
        if self.head.shards is None:  # ranks raise together, at the next forward
            self.head.check_rows(replays=False)
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

    def _refuse_scaler(self) -> None:
        scaled = [self.__dict__.pop(name) for name in ("grad_scale", "found_inf") if name in self.__dict__]
        if scaled:
            raise RuntimeError(
                "HeadSGD: expected no GradScaler, got a scaled step: pending rows hold scaled gradients that nothing can "
                "unscale or check for inf; they were kept: zero_grad() drops them. Train in bf16, which needs no scaler"
            )

    def _check(self) -> None:
        head = self.head
        if head.fused_optimizer is not self:
            raise RuntimeError("HeadSGD: expected to be the optimizer of its head, got a head another HeadSGD was made for")
        if head.weight is not self.param_groups[0]["params"][0]:
            raise RuntimeError("HeadSGD: expected the head to keep the weight this was made for, got another Parameter: make a new HeadSGD")
        if head.weight.grad is not None:
            raise RuntimeError(
                "HeadSGD: expected weight.grad to be None, got a dense gradient (another loss uses head.weight directly): "
                "use head.cosine for attached cosines, or torch.optim.SGD for the head"
            )
        _check_group(self.param_groups[0])

    def _update(self, rows: list[RowRecords]) -> None:
        group = self.param_groups[0]
        weight = self.head.weight
        if weight.shape[0] == 0:  # a shard without classes: its state is as empty
            self._velocity(weight, group)
            return
        batch = join(rows)
        rate = group["lr"] if isinstance(group["lr"], Tensor) else None
        members = batch.members
        if members is None and self.head.sample_rate < 1:  # attached cosines alone: they reach their own classes
            members = (batch.targets[batch.targets >= 0] // self.head.subcenters).unique()
            if members.numel() == 0:  # of no rows: a gradient of 0
                if group["unsampled"] == "sparse":
                    return
                members = None
        velocity = self._velocity(weight, group)
        torch.ops.recog_fast.class_step(
            batch.unit_embeddings, batch.targets, batch.terms, weight.detach(), velocity, batch.scale,
            batch.rules, *batch.injection.arguments(), True, 0.0 if rate is not None else float(group["lr"]), group["momentum"],
            group["weight_decay"], group["nesterov"], batch.half, None if batch.kept is None else batch.kept.buffer,
            members, group["unsampled"] == "sparse", rate, self.head.weight_low, self._rounding(velocity),
        )  # fmt: skip
        torch.autograd.graph.increment_version(weight)
        self.head.note_planes()

    def _velocity_dtype(self) -> torch.dtype:
        float64 = self.head.weight.dtype == torch.float64 and self.momentum_dtype == torch.float32
        return torch.float64 if float64 else self.momentum_dtype

    def _rounding(self, velocity: Tensor | None) -> Tensor | None:
        """(3,) int64 seed, step, first row of W, on the device: what chance is a hash of, with each element's place."""
        if velocity is None or velocity.dtype != torch.bfloat16:
            return None
        seed, step = self.head.sample_seed, self.head.steps
        return torch.stack([seed, step, torch.full_like(step, self.head.first_class * self.head.subcenters)])

    def _velocity(self, weight: Tensor, group: dict[str, Any]) -> Tensor | None:
        """The momentum buffer, made at first need; None with momentum 0 (SGD leaves it alone then, and so does this)."""
        if group["momentum"] == 0:
            return None
        state = self.state[weight]
        if state.get("momentum_buffer") is None:
            state["momentum_buffer"] = torch.zeros_like(weight, dtype=self._velocity_dtype(), memory_format=torch.contiguous_format)
        velocity: Tensor = state["momentum_buffer"]
        dtype = self._velocity_dtype()
        fits = (velocity.device, velocity.dtype) == (weight.device, dtype)
        like = "like the weight" if dtype == weight.dtype else "(momentum_dtype)"
        _checks.expect(fits, "HeadSGD", f"momentum_buffer on {weight.device} as {dtype} {like}", (velocity.device, velocity.dtype))
        return velocity


def _check_group(group: dict[str, Any]) -> None:
    """ValueError for options this optimizer does not have; checked at every step, since schedulers and users set them."""
    lr, momentum, decay = group["lr"], group["momentum"], group["weight_decay"]
    _checks.expect(not isinstance(lr, Tensor) or lr.numel() == 1, "HeadSGD", "lr of one element", lr)
    if not (isinstance(lr, Tensor) and lr.is_cuda):  # a device's value is not waited for: a CUDA graph reads it at each replay
        _checks.expect(is_number(lr.reshape(()) if isinstance(lr, Tensor) else lr, 0), "HeadSGD", "lr >= 0", repr(lr))
    _checks.expect(is_number(momentum, 0, 1, below=True), "HeadSGD", "momentum in [0, 1)", repr(momentum))
    _checks.expect(is_number(decay, 0), "HeadSGD", "weight_decay >= 0", repr(decay))
    _checks.expect(not group["nesterov"] or momentum > 0, "HeadSGD", "momentum > 0 with nesterov", momentum)
    _checks.expect(is_choice(group["unsampled"], ("dense", "sparse")), "HeadSGD", "unsampled 'dense' or 'sparse'", repr(group["unsampled"]))
    _checks.expect(is_number(group["dampening"], 0, 0), "HeadSGD", "dampening = 0 (it has none)", group["dampening"])
    _checks.expect(not group["maximize"], "HeadSGD", "maximize = False (negate the loss)", group["maximize"])
    _checks.expect(not group.get("differentiable"), "HeadSGD", "differentiable = False", group.get("differentiable"))
