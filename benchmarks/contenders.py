"""Who runs: eager PyTorch, the materialised Partial-FC schedule, torch.compile, F.linear_cross_entropy, and ours."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import recog_fast as rf

from . import machine
from .problems import MARGIN, SCALE, Problem, arcface

LR, MOMENTUM, DECAY = 0.1, 0.9, 5e-4
FLOAT32_LIMIT = 1e-4
BF16_LIMIT = 1e-2  # ours, relative to float64
AUTOCAST_LIMIT = 5e-2  # eager under autocast: what it can hold, not what we promise


_EMULATED_BF16 = 1 << 24  # elements of W beyond which bf16 without instructions for it is not worth waiting for


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
    dense: ClassVar[bool] = True  # backward makes dW; False: update() does
    classes: Tensor | None = None  # (S,) the only classes that take part, after forward()
    dropped: float | None = None  # largest dropped mass of a row, after forward(), where the contender says

    def __init__(self, arena: Arena) -> None:
        self.arena = arena
        self.optimizer = self._optimizer()

    def _optimizer(self) -> torch.optim.Optimizer:
        made = torch.optim.SGD([self.arena.weight], lr=LR, momentum=MOMENTUM, weight_decay=DECAY, fused=True)
        made.state[self.arena.weight]["momentum_buffer"] = self.arena.velocity
        return made

    @abstractmethod
    def forward(self) -> Tensor:
        """The mean loss, 0-dim, with its graph."""

    def update(self) -> None:
        """SGD with momentum on the class centres."""
        self.optimizer.step()


def eager_loss(embeddings: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """What a reader of the ArcFace paper writes: normalise, linear, margin on the target by scatter, cross_entropy."""
    cosine = F.linear(F.normalize(embeddings), F.normalize(weight)).float()
    at = labels.unsqueeze(1)
    target = arcface(cosine.gather(1, at), MARGIN)
    return F.cross_entropy(SCALE * cosine.scatter(1, at, target), labels)


class Eager(Contender):
    """Eager PyTorch in float32: the baseline of every ratio."""

    name = "eager float32"
    cost = "eager"

    def forward(self) -> Tensor:
        return eager_loss(self.arena.embeddings, self.arena.weight, self.arena.labels)


class EagerAutocast(Contender):
    """The same under bfloat16 autocast: the matrix products round their operands and results to bf16."""

    name = "eager bf16 autocast"
    limit = AUTOCAST_LIMIT

    def __init__(self, arena: Arena) -> None:
        if arena.weight.numel() > _EMULATED_BF16 and not machine.has_bf16():
            raise Unsuitable("this CPU has no bf16 instructions: emulated, 48 s a step at 64 x 100k")
        super().__init__(arena)

    def forward(self) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return eager_loss(self.arena.embeddings, self.arena.weight, self.arena.labels)


class Compiled(Contender):
    """torch.compile of eager; compiled code for the forward and backward, SGD(fused) beside it."""

    name = "torch.compile of eager"
    compiles = True

    def __init__(self, arena: Arena) -> None:
        super().__init__(arena)
        torch.compiler.reset()
        self._loss: Callable[..., Tensor] = torch.compile(eager_loss, dynamic=False)

    def forward(self) -> Tensor:
        return self._loss(self.arena.embeddings, self.arena.weight, self.arena.labels)


class _DistributedCrossEntropy(torch.autograd.Function):
    """Partial FC's own cross entropy on one rank: probabilities stored, gradient made from them."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        largest = logits.max(dim=1, keepdim=True).values
        logits = (logits - largest).exp_()
        logits.div_(logits.sum(dim=1, keepdim=True))
        ctx.save_for_backward(logits, labels)
        return logits.gather(1, labels.unsqueeze(1)).clamp_min(1e-30).log().mean().neg()

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor, None]:
        logits, labels = ctx.saved_tensors
        logits = logits.clone()  # the original subtracts in place; a second backward would then be wrong
        logits[torch.arange(labels.numel()), labels] -= 1
        return logits.mul_(d_loss / labels.numel()), None


class PartialFC(Contender):
    """The schedule of Partial FC v2 on one rank, all classes: clamp, margin written into the logits, stored probabilities."""

    name = "Partial FC r=1"
    cost = "partial_fc"
    rate: ClassVar[float] = 1.0

    def forward(self) -> Tensor:
        arena = self.arena
        weight: Tensor = arena.weight
        labels = arena.labels
        if self.rate < 1:
            self.classes = self._draw(weight.shape[0])
            weight = weight[self.classes]
            labels = torch.searchsorted(self.classes, labels)
        cosine = F.linear(F.normalize(arena.embeddings), F.normalize(weight)).clamp(-1, 1)
        at = torch.arange(labels.numel())
        logits = cosine.index_put((at, labels), arcface(cosine[at, labels], MARGIN)) * SCALE
        return _DistributedCrossEntropy.apply(logits, labels)  # type: ignore[no-any-return, no-untyped-call]

    def _draw(self, classes: int) -> Tensor:
        """Positives and random others up to rate * C, sorted; the same draw every run."""
        score = torch.rand(classes, generator=torch.Generator().manual_seed(7))
        positives = torch.unique(self.arena.labels)
        score[positives] = 2.0
        return score.topk(max(int(self.rate * classes), positives.numel())).indices.sort().values


class PartialFCSampled(PartialFC):
    """10 % of the classes: another loss, gated against float64 on its own sample; SGD still passes over all classes."""

    name = "Partial FC r=0.1"
    rate = 0.1
    note = "not exact: 10 % of the classes"
    cost = "partial_fc_sampled"


class LinearCrossEntropy(Contender):
    """torch's chunked linear_cross_entropy on normalised rows; it has no margin, so it solves an easier problem."""

    name = "F.linear_cross_entropy (auto)"
    margin = 0.0
    note = "no margin"

    def forward(self) -> Tensor:
        if not hasattr(F, "linear_cross_entropy"):
            raise RuntimeError(f"torch {torch.__version__} has no F.linear_cross_entropy")
        arena = self.arena
        options = torch.nn.LinearCrossEntropyOptions()
        unit, rows = F.normalize(arena.weight), SCALE * F.normalize(arena.embeddings)
        return F.linear_cross_entropy(rows, unit, arena.labels, options=options)


class Reference(Contender):
    """Ours on the plain PyTorch reference, as without a compiled extension."""

    name = "ours, reference"

    def forward(self) -> Tensor:
        arena = self.arena
        with rf.ops.use_backend("reference"):
            return rf.margin_softmax_loss(
                arena.embeddings, arena.weight, arena.labels, margin=rf.ArcFace(MARGIN), scale=SCALE
            )


class Native(Contender):
    """Ours with a dense weight.grad and torch's SGD."""

    name = "ours, native float32"
    same_bits = True
    compute_dtype: ClassVar[torch.dtype | None] = torch.float32
    cost = "recomputing"

    def forward(self) -> Tensor:
        arena = self.arena
        loss, stats = rf.margin_softmax_loss(
            arena.embeddings, arena.weight, arena.labels,
            margin=rf.ArcFace(MARGIN), scale=SCALE, compute_dtype=self.compute_dtype, return_stats=True,
        )  # fmt: skip
        self.dropped = float(stats.dropped_mass.max())
        return loss


class NativeBF16(Native):
    """The same asked to compute in bfloat16 (see `recog_fast.backends()` for what then runs)."""

    name = "ours, native bf16"
    limit = BF16_LIMIT
    compute_dtype = torch.bfloat16


class FusedStep(Contender):
    """Ours with MarginHead and HeadSGD: no gradient tensor; the class sweep runs in step()."""

    name = "ours, HeadSGD float32"
    same_bits = True
    compute_dtype: ClassVar[torch.dtype | None] = torch.float32
    cost = "fused_step"
    dense = False
    note = "dW is made in step()"

    def _optimizer(self) -> torch.optim.Optimizer:
        dimension = self.arena.weight.shape[1]
        self.head = rf.MarginHead(
            1, dimension, margin=rf.ArcFace(MARGIN), scale=SCALE, compute_dtype=self.compute_dtype
        )
        # the arena's weight instead of a second one of this size
        self.head.weight, self.head.num_classes = self.arena.weight, self.arena.weight.shape[0]
        made = rf.HeadSGD(self.head, lr=LR, momentum=MOMENTUM, weight_decay=DECAY)
        made.state[self.arena.weight]["momentum_buffer"] = self.arena.velocity
        return made

    def forward(self) -> Tensor:
        loss, stats = self.head(self.arena.embeddings, self.arena.labels, return_stats=True)
        self.dropped = float(stats.dropped_mass.max())
        assert isinstance(loss, Tensor)
        return loss


class FusedStepBF16(FusedStep):
    """The same asked to compute in bfloat16."""

    name = "ours, HeadSGD bf16"
    limit = BF16_LIMIT
    compute_dtype = torch.bfloat16


BASELINE = Eager
OURS: tuple[type[Contender], ...] = (Native, NativeBF16, FusedStep, FusedStepBF16)
ALL: tuple[type[Contender], ...] = (
    Eager, EagerAutocast, Compiled, PartialFC, PartialFCSampled, LinearCrossEntropy, Reference, *OURS,
)  # fmt: skip
