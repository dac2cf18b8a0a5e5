"""What people use: eager PyTorch, torch.compile, the Partial-FC schedule, F.linear_cross_entropy, pytorch-metric-learning."""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import machine
from .contenders import AUTOCAST_LIMIT, DECAY, LR, MOMENTUM, Adam, Arena, Contender, Unsuitable, sgd
from .problems import MARGIN, SCALE, arcface

# N C D beyond which bf16 without instructions for it is not worth waiting for: 8 s a step (eager), minutes above
_EMULATED_EAGER = 64 * 32_768 * 512
_EMULATED_COMPILED = 64 * 100_000 * 512


def _refuse_emulated_bf16(arena: Arena, most: int) -> None:
    if not arena.labels.is_cuda and math.prod(arena.problem.shape) > most and not machine.has_bf16():
        raise Unsuitable("this CPU has no bf16 instructions: emulated, tens of seconds a step at this size")


def eager_loss(embeddings: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """What a reader of the ArcFace paper writes: normalise, linear, margin on the target by scatter, cross_entropy."""
    cosine = F.linear(F.normalize(embeddings), F.normalize(weight)).float()
    at = labels.unsqueeze(1)
    target = arcface(cosine.gather(1, at), MARGIN)
    return F.cross_entropy(SCALE * cosine.scatter(1, at, target), labels)


def bf16_operand_loss(embeddings: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """`eager_loss` whose matrix products take bf16 operands; norms, margin and softmax in float32."""
    rows, unit = F.normalize(embeddings).bfloat16(), F.normalize(weight).bfloat16()
    cosine = F.linear(rows, unit).float()
    at = labels.unsqueeze(1)
    target = arcface(cosine.gather(1, at), MARGIN)
    return F.cross_entropy(SCALE * cosine.scatter(1, at, target), labels)


class Eager(Contender):
    """Eager PyTorch in float32 with SGD(fused=True): the baseline of every ratio."""

    name = "eager float32"
    cost = "eager"

    def forward(self) -> Tensor:
        return eager_loss(self.arena.embeddings, self.arena.weight, self.arena.labels)


class EagerForeach(Eager):
    """The same with SGD(foreach=True), torch's default form."""

    name = "eager float32, SGD(foreach)"
    cost = ""

    def _optimizer(self) -> torch.optim.Optimizer:
        return sgd(self.arena, fused=False)


class EagerAdamW(Adam, Eager):
    """The same with AdamW(fused=True)."""

    name = "eager float32, AdamW"
    cost = ""
    note = "AdamW"


class EagerAutocast(Contender):
    """The same under bfloat16 autocast: the matrix products round their operands and results to bf16."""

    name = "eager bf16 autocast"
    limit = AUTOCAST_LIMIT

    def __init__(self, arena: Arena) -> None:
        _refuse_emulated_bf16(arena, _EMULATED_EAGER)
        super().__init__(arena)

    def forward(self) -> Tensor:
        with torch.autocast(self.arena.labels.device.type, dtype=torch.bfloat16):
            return eager_loss(self.arena.embeddings, self.arena.weight, self.arena.labels)


class Compiled(Contender):
    """torch.compile of eager; compiled code for the forward and backward, SGD(fused) beside it."""

    name = "torch.compile of eager"
    compiles = True
    source: ClassVar[Callable[..., Tensor]] = staticmethod(eager_loss)

    def __init__(self, arena: Arena) -> None:
        super().__init__(arena)
        self._loss: Callable[..., Tensor] = torch.compile(self.source, dynamic=False)

    def forward(self) -> Tensor:
        return self._loss(self.arena.embeddings, self.arena.weight, self.arena.labels)


class CompiledBF16(Compiled):
    """torch.compile with bf16 operands and SGD(fused): the strongest exact peer where the CPU has bf16 instructions."""

    name = "torch.compile, bf16 operands"
    limit = AUTOCAST_LIMIT
    source = staticmethod(bf16_operand_loss)

    def __init__(self, arena: Arena) -> None:
        _refuse_emulated_bf16(arena, _EMULATED_COMPILED)
        super().__init__(arena)


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
        logits[torch.arange(labels.numel(), device=labels.device), labels] -= 1
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
        cosine = self._cosine(F.normalize(arena.embeddings), F.normalize(weight)).clamp(-1, 1)
        at = torch.arange(labels.numel(), device=labels.device)
        logits = cosine.index_put((at, labels), arcface(cosine[at, labels], MARGIN)) * SCALE
        return _DistributedCrossEntropy.apply(logits, labels)  # type: ignore[no-any-return, no-untyped-call]

    def _cosine(self, rows: Tensor, weight: Tensor) -> Tensor:
        """<x^, W^> (N, S) of unit rows."""
        return F.linear(rows, weight)

    def _draw(self, classes: int) -> Tensor:
        """Positives and random others up to rate * C, sorted; the same draw every run."""
        device = self.arena.labels.device
        score = torch.rand(classes, generator=torch.Generator(device).manual_seed(7), device=device)
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
            raise Unsuitable(f"torch {torch.__version__} has no F.linear_cross_entropy")
        arena = self.arena
        options = torch.nn.LinearCrossEntropyOptions()
        unit, rows = F.normalize(arena.weight), SCALE * F.normalize(arena.embeddings)
        return F.linear_cross_entropy(rows, unit, arena.labels, options=options)


class MetricLearning(Contender):
    """ArcFaceLoss of pytorch-metric-learning with its own W of shape (D, C); SGD(fused) on it."""

    name = "pytorch-metric-learning"
    note = "W (D, C)"

    def __init__(self, arena: Arena) -> None:
        if importlib.util.find_spec("pytorch_metric_learning") is None:
            raise Unsuitable("pytorch-metric-learning is not installed")
        _, classes, dimension = arena.problem.shape
        losses = importlib.import_module("pytorch_metric_learning.losses")
        self._loss = losses.ArcFaceLoss(1, dimension, margin=math.degrees(MARGIN), scale=SCALE)
        self._loss.num_classes = classes
        self._loss.W = nn.Parameter(arena.problem.weight.t().contiguous())  # no second draw of this size
        self._velocity = arena.problem.velocity.t().contiguous()
        super().__init__(arena)

    def _optimizer(self) -> torch.optim.Optimizer:
        made = torch.optim.SGD([self._loss.W], lr=LR, momentum=MOMENTUM, weight_decay=DECAY, fused=True)
        made.state[self._loss.W]["momentum_buffer"] = self._velocity
        return made

    def forward(self) -> Tensor:
        return self._loss(self.arena.embeddings, self.arena.labels)  # type: ignore[no-any-return]

    def restore(self) -> None:
        super().restore()
        self._loss.W.grad = None
        if self.arena.restore:
            with torch.no_grad():
                self._loss.W.copy_(self.arena.problem.weight.t())
                self._velocity.copy_(self.arena.problem.velocity.t())

    def trained(self) -> Tensor:
        return self._loss.W  # type: ignore[no-any-return]

    def result(self) -> Sequence[Tensor]:
        return self._loss.W.detach().t(), self._velocity.t()


PEERS: tuple[type[Contender], ...] = (
    Eager, EagerForeach, EagerAdamW, EagerAutocast, Compiled, CompiledBF16, PartialFC, PartialFCSampled, LinearCrossEntropy,
    MetricLearning,
)  # fmt: skip
