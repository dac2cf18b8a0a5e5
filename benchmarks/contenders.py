"""What a contender is: one way to do a head step on inputs that all contenders of a process share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from .problems import MARGIN, Problem

LR, MOMENTUM, DECAY = 0.1, 0.9, 5e-4
ADAM_LR, ADAM_EPS = 1e-3, 1e-8
FLOAT32_LIMIT = 1e-4
BF16_LIMIT = 1e-2  # ours, relative to float64
AUTOCAST_LIMIT = 5e-2  # peers whose products round to bf16: what they can hold, not what we promise


class Unsuitable(RuntimeError):
    """A contender that must not run here, and why."""


class Arena:
    """The one copy of the inputs all contenders of a process share, put back before each of their runs.

    weight (C, D), velocity (C, D), embeddings (N, D), labels (N,). restore=False keeps no second copy: state then drifts.
    """

    def __init__(self, problem: Problem, restore: bool = True) -> None:
        self.problem, self.restore = problem, restore
        self.labels = problem.labels
        self.embeddings = problem.embeddings.clone().requires_grad_()
        self.weight = nn.Parameter(problem.weight.clone() if restore else problem.weight)
        self.velocity = problem.velocity.clone() if restore else problem.velocity

    def reset(self) -> None:
        """The problem's values back into the tensors; gradients dropped."""
        self.embeddings.grad = self.weight.grad = None
        if self.restore:
            with torch.no_grad():
                self.weight.copy_(self.problem.weight)
                self.velocity.copy_(self.problem.velocity)


class Contender(ABC):
    """One way to do a head step on the arena: forward() -> loss, loss.backward(), update()."""

    name: ClassVar[str]
    margin: ClassVar[float] = MARGIN
    limit: ClassVar[float] = FLOAT32_LIMIT  # of the gate's relative errors
    same_bits: ClassVar[bool] = False  # whether equal bits between runs are promised
    note: ClassVar[str] = ""
    cost: ClassVar[str] = ""  # its function in cost_model, where the traffic is known term by term
    compiles: ClassVar[bool] = False  # its first call says nothing of the next ones
    adam: ClassVar[bool] = False  # keeps two more tensors of W's shape, allocated by its first step
    dense: ClassVar[bool] = True  # backward makes dW; False: update() does
    arithmetic: ClassVar[str] = ""  # of the micro-kernel it runs on, for `recog_fast._native.micro_kernel_rate`
    classes: Tensor | None = None  # (S,) the only classes that take part, after forward()
    dropped: float | None = None  # largest dropped mass of a row, after forward(), where the contender says

    def __init__(self, arena: Arena) -> None:
        self.arena = arena
        self.optimizer = self._optimizer()

    def _optimizer(self) -> torch.optim.Optimizer:
        return sgd(self.arena, fused=True)

    @abstractmethod
    def forward(self) -> Tensor:
        """The mean loss, 0-dim, with its graph."""

    def update(self) -> None:
        """The optimizer's step on the class centres."""
        self.optimizer.step()

    def restore(self) -> None:
        """Inputs and optimizer state as they were at first, gradients dropped; before each run, not timed."""
        self.arena.reset()

    def trained(self) -> Tensor:
        """The parameter the optimizer moves."""
        return self.arena.weight

    def result(self) -> Sequence[Tensor]:
        """What a full step leaves: the tensors two runs are compared by, W (C, D) and the optimizer's state of its shape."""
        return self.arena.weight.detach(), self.arena.velocity

    def gradient(self, sample: Tensor, weight: Tensor, velocity: Tensor) -> Tensor:
        """dW (S, D) float64 of the classes `sample` after a full step from `weight`, `velocity` (S, D) float64.

        Read from the velocity, v = mu v0 + dW + wd W0, so that a contender without a gradient tensor is judged alike.
        """
        return self.result()[1][sample].double() - MOMENTUM * velocity - DECAY * weight

    def stepped(self, gradient: Tensor, weight: Tensor, velocity: Tensor) -> Tensor:
        """W (S, D) float64 where the optimizer must have put it, given its own dW."""
        return weight - LR * (MOMENTUM * velocity + gradient + DECAY * weight)


def sgd(arena: Arena, fused: bool) -> torch.optim.SGD:
    """torch's SGD with momentum and weight decay on the arena, in its fused or its foreach form."""
    made = torch.optim.SGD(
        [arena.weight], lr=LR, momentum=MOMENTUM, weight_decay=DECAY, fused=fused or None, foreach=None if fused else True
    )
    made.state[arena.weight]["momentum_buffer"] = arena.velocity
    return made


class Adam(Contender):
    """Mixed into a contender: torch's fused AdamW over the dense gradient, from moments of 0; no arena velocity is used."""

    adam = True

    def _optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([self.arena.weight], lr=ADAM_LR, eps=ADAM_EPS, weight_decay=DECAY, fused=True)

    def restore(self) -> None:
        """Moments and step count back to 0 as well."""
        super().restore()
        for state in self.optimizer.state.values():
            for value in state.values():
                value.zero_()

    def result(self) -> Sequence[Tensor]:
        """W and dW."""
        assert self.arena.weight.grad is not None
        return self.arena.weight.detach(), self.arena.weight.grad

    def gradient(self, sample: Tensor, weight: Tensor, velocity: Tensor) -> Tensor:
        """dW as backward left it."""
        return self.result()[1][sample].double()

    def stepped(self, gradient: Tensor, weight: Tensor, velocity: Tensor) -> Tensor:
        """The first step from moments of 0: both bias corrections leave g/|g|."""
        return weight * (1 - ADAM_LR * DECAY) - ADAM_LR * gradient / (gradient.abs() + ADAM_EPS)
