"""Ours: the reference, the compiled kernels with a dense gradient, with HeadSGD, and the modes that are not exact."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

import torch
from torch import Tensor

import recog_fast as rf

from .contenders import BF16_LIMIT, DECAY, FLOAT32_LIMIT, LR, MOMENTUM, Adam, Arena, Contender, Unsuitable
from .problems import MARGIN, SCALE

DROP_MASS = 0.001  # of the gradient's mass, where rows are dropped at all
DROP_ELEMENTS = 2.0**-16  # of its row's mass, below which an element is left out


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
    """MarginHead on the compiled kernels, with a dense weight.grad and torch's SGD(fused)."""

    name = "ours, native float32"
    same_bits = True
    cost = "recomputing"
    arithmetic = "float32"
    options: ClassVar[dict[str, Any]] = {}

    def __init__(self, arena: Arena) -> None:
        missing = sorted(set(self.options) - set(inspect.signature(rf.MarginHead).parameters))
        if missing:
            raise Unsuitable(f"MarginHead has no option {' or '.join(missing)} in recog_fast {rf.__version__}")
        self.head = rf.MarginHead(
            1, arena.weight.shape[1], margin=rf.ArcFace(MARGIN), scale=SCALE, compute_dtype=self.compute_dtype(),
            **self.options,
        )  # fmt: skip
        # the arena's weight instead of a second one of this size
        self.head.weight, self.head.num_classes = arena.weight, arena.weight.shape[0]
        super().__init__(arena)

    def compute_dtype(self) -> torch.dtype:
        """What is asked for; `recog_fast.backends()` names what runs."""
        return torch.float32 if self.arithmetic == "float32" else torch.bfloat16

    def forward(self) -> Tensor:
        loss, stats = self.head(self.arena.embeddings, self.arena.labels, return_stats=True)
        self.dropped = float(stats.dropped_mass.max())
        assert isinstance(loss, Tensor)
        return loss


class NativeKept(Native):
    """The sweep's exponentials kept in bf16 (2NC bytes) for the class sweep: 6NCD, the mode fp32-Ebf16, not exact."""

    name = "ours, native float32, kept exponentials"
    note = "exponentials stored in bf16"
    limit = BF16_LIMIT
    cost = "kept_exponentials"
    options: ClassVar[dict[str, Any]] = {"keep_exponentials": True}


class NativeBF16(Native):
    """16-bit operands; recomputing."""

    name = "ours, native bf16"
    limit = BF16_LIMIT
    arithmetic = "bfloat16"


class NativeBF16Kept(NativeKept):
    """16-bit operands, exponentials kept."""

    name = "ours, native bf16, kept exponentials"
    arithmetic = "bfloat16"


class NativeAdamW(Adam, Native):
    """The dense gradient into AdamW(fused): what HeadSGD cannot do."""

    name = "ours, native float32, AdamW"
    note = "AdamW"
    cost = ""


class FusedStep(Native):
    """MarginHead and HeadSGD: no gradient tensor; the class sweep runs in step()."""

    name = "ours, HeadSGD float32"
    cost = "fused_step"
    dense = False
    note = "dW is made in step()"

    def _optimizer(self) -> torch.optim.Optimizer:
        made = rf.HeadSGD(self.head, lr=LR, momentum=MOMENTUM, weight_decay=DECAY)
        made.state[self.arena.weight]["momentum_buffer"] = self.arena.velocity
        return made


class FusedStepKept(FusedStep):
    """fp32-Ebf16 with the step fused."""

    name = "ours, HeadSGD float32, kept exponentials"
    note = "exponentials stored in bf16"
    limit = BF16_LIMIT
    cost = "fused_step_kept"
    options: ClassVar[dict[str, Any]] = {"keep_exponentials": True}


class FusedStepKeptExact(FusedStepKept):
    """Exponentials kept in float32 (4NC bytes): nothing is lost."""

    name = "ours, HeadSGD float32, exponentials kept in float32"
    note = "4NC bytes"
    limit = FLOAT32_LIMIT
    cost = "fused_step_kept_exact"
    options: ClassVar[dict[str, Any]] = {"keep_exponentials": torch.float32}


class FusedStepBF16(FusedStep):
    """16-bit operands, recomputing, the step fused."""

    name = "ours, HeadSGD bf16"
    limit = BF16_LIMIT
    arithmetic = "bfloat16"


class FusedStepBF16Kept(FusedStepKept):
    """16-bit operands, exponentials kept, the step fused: the fastest that visits every class and row."""

    name = "ours, HeadSGD bf16, kept exponentials"
    arithmetic = "bfloat16"


class FusedStepDropped(FusedStep):
    """Rows of least gradient mass left out of the class sweep, up to 0.1 % of the mass; the dropped mass is in RowStats."""

    name = "ours, HeadSGD float32, drop_mass 0.001"
    note = "not exact: rows of least gradient dropped"
    limit = BF16_LIMIT
    cost = ""  # what it does depends on the data
    options: ClassVar[dict[str, Any]] = {"drop_mass": DROP_MASS}


class FusedStepBF16Dropped(FusedStepDropped):
    """The same with 16-bit operands; rows are dropped or exponentials kept, not both."""

    name = "ours, HeadSGD bf16, drop_mass 0.001"
    arithmetic = "bfloat16"


class FusedStepLists(FusedStep):
    """Single elements below 2^-16 of their row's mass left out: the backward pass walks lists (2NCD products)."""

    name = "ours, HeadSGD float32, drop_elements 2^-16"
    note = "not exact: elements of least gradient dropped"
    limit = BF16_LIMIT
    cost = ""
    options: ClassVar[dict[str, Any]] = {"drop_elements": DROP_ELEMENTS}


class FusedStepBF16Lists(FusedStepLists):
    """The same with 16-bit operands in the one product that is left."""

    name = "ours, HeadSGD bf16, drop_elements 2^-16"
    arithmetic = "bfloat16"


FUSED: tuple[type[Contender], ...] = (FusedStep, FusedStepKept, FusedStepKeptExact, FusedStepBF16, FusedStepBF16Kept)
DROPPED: tuple[type[Contender], ...] = (FusedStepDropped, FusedStepBF16Dropped)
LISTED: tuple[type[Contender], ...] = (FusedStepLists, FusedStepBF16Lists)
OURS: tuple[type[Contender], ...] = (
    Reference, Native, NativeKept, NativeBF16, NativeBF16Kept, NativeAdamW, *FUSED, *DROPPED, *LISTED,
)  # fmt: skip
