"""Who is timed on a GPU: the contenders of the CPU benchmarks where they fit, those that exist only there, and ours as one graph."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .contenders import AUTOCAST_LIMIT, BF16_LIMIT, Arena, Contender, Unsuitable
from .ours import FusedStep, Native, Reference
from .peers import Compiled, CompiledBF16, Eager, EagerAutocast, LinearCrossEntropy, PartialFC, PartialFCSampled
from .problems import SCALE


class PartialFCBF16(PartialFC):
    """The same schedule with the logits of bf16 operands, in float32 from there on: "at bf16 GEMM speed"."""

    name = "Partial FC r=1, bf16 GEMM"
    limit = AUTOCAST_LIMIT

    def _cosine(self, rows: Tensor, weight: Tensor) -> Tensor:
        return F.linear(rows.bfloat16(), weight.bfloat16()).float()


class PartialFCSampledBF16(PartialFCSampled):
    """10 % of the classes, logits of bf16 operands."""

    name = "Partial FC r=0.1, bf16 GEMM"
    limit = AUTOCAST_LIMIT

    def _cosine(self, rows: Tensor, weight: Tensor) -> Tensor:
        return F.linear(rows.bfloat16(), weight.bfloat16()).float()


class CutCrossEntropy(Contender):
    """Apple's cut cross-entropy with float32 accumulation; no margin, bf16 operands, normalised by eager PyTorch."""

    name = "cut-cross-entropy (fp32 accumulation)"
    margin = 0.0
    limit = AUTOCAST_LIMIT
    note = "no margin"

    def __init__(self, arena: Arena) -> None:
        if importlib.util.find_spec("cut_cross_entropy") is None:
            raise Unsuitable("cut-cross-entropy is not installed")
        self._loss: Any = importlib.import_module("cut_cross_entropy").linear_cross_entropy
        super().__init__(arena)

    def forward(self) -> Tensor:
        rows, unit = (SCALE * F.normalize(self.arena.embeddings)).bfloat16(), F.normalize(self.arena.weight).bfloat16()
        loss: Tensor = self._loss(rows, unit, self.arena.labels, impl="cce", accum_e_fp32=True, accum_c_fp32=True)
        return loss.float()


class Liger(Contender):
    """Liger's fused linear cross-entropy, chunked over rows; no margin, bf16 operands, normalised by eager PyTorch."""

    name = "Liger fused linear cross-entropy"
    margin = 0.0
    limit = AUTOCAST_LIMIT
    note = "no margin"

    def __init__(self, arena: Arena) -> None:
        if importlib.util.find_spec("liger_kernel") is None:
            raise Unsuitable("liger-kernel is not installed")
        self._loss: Any = importlib.import_module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss()
        super().__init__(arena)

    def forward(self) -> Tensor:
        rows, unit = (SCALE * F.normalize(self.arena.embeddings)).bfloat16(), F.normalize(self.arena.weight).bfloat16()
        loss: Tensor = self._loss(unit, rows, self.arena.labels)
        return loss.float()


class _OnDevice(Native):
    """Ours without the statistics that the CPU benchmark reads: that would wait for the device in the middle of a step."""

    def __init__(self, arena: Arena) -> None:
        super().__init__(arena)
        self.head.to(arena.weight.device)  # its buffers, as in anyone's training; the weight is there already
        assert self.head.weight is arena.weight

    def forward(self) -> Tensor:
        return self.head(self.arena.embeddings, self.arena.labels)  # type: ignore[no-any-return]


class GpuReference(Reference):
    """The plain PyTorch fallback, materialised."""

    name = "ours, reference"


class GpuDense(_OnDevice):
    """Float32 sweeps, dense dW, torch's SGD(fused) beside them."""

    name = "ours, float32, separate SGD"


class GpuDenseBF16(_OnDevice):
    """bf16 sweeps, dense dW, torch's SGD(fused) beside them."""

    name = "ours, bf16, separate SGD"
    limit = BF16_LIMIT
    arithmetic = "bfloat16"


class GpuStep(_OnDevice, FusedStep):
    """Float32 sweeps (IEEE: no tensor cores), the step fused."""

    name = "ours, HeadSGD float32"


class GpuStepBF16(GpuStep):
    """bf16 sweeps, the step fused."""

    name = "ours, HeadSGD bf16"
    limit = BF16_LIMIT
    arithmetic = "bfloat16"


class GpuGraph(GpuStepBF16):
    """The whole step (forward, backward, HeadSGD) captured once as a CUDA graph and replayed."""

    name = "ours, HeadSGD bf16, CUDA graph"
    whole: ClassVar[bool] = True
    note = "replay of the whole step"
    _graph: Any = None

    def forward(self) -> Tensor:
        """Replays the step; its loss, detached. The first call captures: Unsuitable, with the error's text, where that cannot be."""
        if self._graph is None:
            self._capture()
            self.restore()  # capturing warmed up on W and velocity
        self._graph.replay()
        self.arena.embeddings.grad = self._gradient
        return self._loss

    def _step(self) -> Tensor:
        self.arena.embeddings.grad = None  # the graph's own memory holds it
        loss = super().forward()
        torch.autograd.backward(loss)
        self.optimizer.step()
        return loss.detach()

    def _capture(self) -> None:
        self._loss, self._graph = captured(self._step)
        assert self.arena.embeddings.grad is not None
        self._gradient = self.arena.embeddings.grad

    def update(self) -> None:
        """Is part of the graph."""


class Captures:
    """What is known of captures in this process: refused, in whose words; failed here, after which the allocator is not as it was."""

    refused = ""
    failed = False


def captured(step: Callable[[], Tensor], warm_up: int = 3) -> tuple[Tensor, Any]:
    """(what `step` returns, the CUDA graph of it), after `warm_up` calls on a side stream, as torch's notes on graphs ask for.

    Raises Unsuitable with the error's text where the step cannot be captured.
    """
    if Captures.refused or not torch.cuda.is_available():
        raise Unsuitable(Captures.refused or "not supported: no CUDA device")
    before, stream = torch.cuda.current_stream(), torch.cuda.Stream()
    stream.wait_stream(before)
    with torch.cuda.stream(stream):
        for _ in range(warm_up):
            step()
    before.wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            result = step()
    except torch.OutOfMemoryError:
        Captures.failed = True
        torch.cuda.set_stream(before)
        raise
    except Exception as error:  # whatever refuses a capture says so in words of its own
        Captures.failed = True
        torch.cuda.set_stream(before)  # torch.cuda.graph leaves its own where the end of the capture fails
        cause = error.__context__ or error  # that end has an error of its own, which hides the first
        text = (str(cause).strip().splitlines() or [""])[0][:300]
        Captures.refused = f"not supported: {type(cause).__name__}: {text}"
        raise Unsuitable(Captures.refused) from error
    return result, graph


OURS: tuple[type[Contender], ...] = (GpuReference, GpuDense, GpuDenseBF16, GpuStep, GpuStepBF16, GpuGraph)
FASTEST = (GpuGraph.name, GpuStepBF16.name)  # the better one is held to the targets
PEERS: tuple[type[Contender], ...] = (
    Eager, EagerAutocast, PartialFC, PartialFCBF16, PartialFCSampled, PartialFCSampledBF16, Compiled, CompiledBF16, LinearCrossEntropy,
    CutCrossEntropy, Liger,
)  # fmt: skip
COMPILED: tuple[type[Contender], ...] = (Compiled, CompiledBF16)
EVERY: tuple[type[Contender], ...] = (GpuGraph, GpuStepBF16, GpuDenseBF16, GpuStep, GpuDense, *PEERS, GpuReference)
# torch.compile takes half a minute a size, the reference ten tensors of N x C: the first case has them
MAIN = tuple(kind for kind in EVERY if kind not in (*COMPILED, GpuReference, EagerAutocast))
