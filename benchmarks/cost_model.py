"""Flops and bytes of one head step, term by term: the one place benchmarks take them from.

Counts of the algorithm, not of a run: every tensor that does not fit in cache is read once per pass that needs it and written once per pass
that makes it; no write-allocate, no N x D terms in bytes unless they meet a C. N, C, D: rows, classes, embedding size; float32 everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

PHASES = ("forward", "backward", "update")


@dataclass(frozen=True)
class Term:
    """One pass: flops (multiply and add counted apart; an exp counts 1) and bytes of memory traffic."""

    phase: str
    what: str
    flops: int
    bytes: int
    matrix: bool = False


@dataclass(frozen=True)
class Cost:
    """Terms of a whole step (forward, backward, update)."""

    terms: tuple[Term, ...]

    def _upto(self, phase: str) -> list[Term]:
        last = PHASES.index(phase)
        return [t for t in self.terms if PHASES.index(t.phase) <= last]

    def flops(self, phase: str = "update", matrix_only: bool = False) -> int:
        """Flops from the start of the step to the end of `phase`."""
        return sum(t.flops for t in self._upto(phase) if t.matrix or not matrix_only)

    def bytes(self, phase: str = "update") -> int:
        """Bytes from the start of the step to the end of `phase`."""
        return sum(t.bytes for t in self._upto(phase))


CostModel = Callable[[int, int, int], Cost]


def least_flops(rows: int, classes: int, dimension: int, phase: str) -> int:
    """6NCD (2NCD forward alone): what an algorithm with stored logits must do; the yardstick of all contenders."""
    return (2 if phase == "forward" else 6) * rows * classes * dimension


def eager(rows: int, classes: int, dimension: int) -> Cost:
    """normalize, linear, gather/scatter margin, cross_entropy, SGD(fused=True) as eager PyTorch runs them."""
    nc, cd = rows * classes, classes * dimension
    f, b, _ = PHASES
    return Cost(
        (
            *_normalised_logits(rows, classes, dimension),
            Term(f, "scatter of the targets: read, write", 0, 8 * nc),
            Term(f, "times s: read, write", nc, 8 * nc),
            Term(f, "log_softmax: read, write", 3 * nc, 8 * nc),
            Term(b, "nll backward: write", 0, 4 * nc),
            Term(b, "log_softmax backward: read two, write", 3 * nc, 12 * nc),
            Term(b, "times s: read, write", nc, 8 * nc),
            Term(b, "scatter backward: read, write", 0, 8 * nc),
            Term(b, "gather backward: zeros, scatter into a copy, sum of both", nc, 24 * nc),
            *_normalised_logits_backward(rows, classes, dimension),
            _sgd(cd),
        )
    )


def partial_fc(rows: int, classes: int, dimension: int) -> Cost:
    """The Partial FC schedule, all classes: clamp, margin written into a copy, probabilities stored, SGD."""
    nc, cd = rows * classes, classes * dimension
    f, b, _ = PHASES
    return Cost(
        (
            *_normalised_logits(rows, classes, dimension),
            Term(f, "clamp: read, write", 2 * nc, 8 * nc),
            Term(f, "margin into a copy: read, write", 0, 8 * nc),
            Term(f, "times s: read, write", nc, 8 * nc),
            Term(f, "row maximum: read", nc, 4 * nc),
            Term(f, "minus maximum: read, write", nc, 8 * nc),
            Term(f, "exp in place: read, write", nc, 8 * nc),
            Term(f, "row sum: read", nc, 4 * nc),
            Term(f, "divide in place: read, write", nc, 8 * nc),
            Term(b, "copy of the probabilities: read, write", 0, 8 * nc),
            Term(b, "times upstream in place: read, write", nc, 8 * nc),
            Term(b, "times s: read, write", nc, 8 * nc),
            Term(b, "margin backward, targets zeroed in a copy: read, write", 0, 8 * nc),
            Term(b, "target gather backward: zeros, put into a copy, sum of both", nc, 24 * nc),
            Term(b, "clamp backward: two masks, their conjunction, where", 4 * nc, 22 * nc),
            *_normalised_logits_backward(rows, classes, dimension),
            _sgd(cd),
        )
    )


def partial_fc_sampled(rows: int, classes: int, dimension: int, rate: float = 0.1) -> Cost:
    """Partial FC on rate * C classes: gather of W, all of `partial_fc` on the sample, a dense gradient, SGD over all classes."""
    cd = classes * dimension
    taken = int(rate * classes)
    part = partial_fc(rows, taken, dimension).terms
    return Cost(
        (
            Term("forward", "gather of the sampled W: read, write", 0, 8 * taken * dimension),
            *(t for t in part if t.phase != "update"),
            Term("backward", "dense dW: zeros", 0, 4 * cd),
            Term("backward", "dense dW: put into a copy: read, write, the sample", 0, 8 * cd + 4 * taken * dimension),
            _sgd(cd),
        )
    )


def recomputing(rows: int, classes: int, dimension: int) -> Cost:
    """Ours with a dense gradient: two sweeps over W, logits recomputed in the second (8NCD), no N x C tensor in memory."""
    nc, cd, ncd = rows * classes, classes * dimension, rows * classes * dimension
    return Cost((*_forward_sweep(nc, cd, ncd), *_class_sweep("backward", nc, cd, ncd, 4 * cd), _sgd(cd)))


def fused_step(rows: int, classes: int, dimension: int) -> Cost:
    """Ours with HeadSGD: the second sweep runs in step() and updates W and v in place; no gradient tensor exists."""
    nc, cd, ncd = rows * classes, classes * dimension, rows * classes * dimension
    # v read, W and v written; W itself is read by the sweep
    return Cost((*_forward_sweep(nc, cd, ncd), *_class_sweep("update", nc, cd, ncd, 12 * cd, update_flops=6 * cd)))


def kept_exponentials(rows: int, classes: int, dimension: int) -> Cost:
    """`recomputing` with the exponentials of the first sweep kept in bf16: 6NCD, 2NC bytes written and read."""
    nc, cd, ncd = rows * classes, classes * dimension, rows * classes * dimension
    return Cost((*_keeping_sweep(nc, cd, ncd), *_kept_class_sweep("backward", nc, cd, ncd, 4 * cd), _sgd(cd)))


def fused_step_kept(rows: int, classes: int, dimension: int) -> Cost:
    """`fused_step` with the exponentials kept in bf16."""
    nc, cd, ncd = rows * classes, classes * dimension, rows * classes * dimension
    return Cost((*_keeping_sweep(nc, cd, ncd), *_kept_class_sweep("update", nc, cd, ncd, 12 * cd, update_flops=6 * cd)))


def fused_step_kept_exact(rows: int, classes: int, dimension: int) -> Cost:
    """`fused_step` with the exponentials kept in float32."""
    nc, cd, ncd = rows * classes, classes * dimension, rows * classes * dimension
    kept = _kept_class_sweep("update", nc, cd, ncd, 12 * cd, update_flops=6 * cd, width=4)
    return Cost((*_keeping_sweep(nc, cd, ncd, width=4), *kept))


def _normalised_logits(rows: int, classes: int, dimension: int) -> tuple[Term, ...]:
    nc, cd, nd, ncd = rows * classes, classes * dimension, rows * dimension, rows * classes * dimension
    return (
        Term("forward", "|W|: read W", 2 * cd, 4 * cd),
        Term("forward", "W/|W|: read W, write W^", cd, 8 * cd),
        Term("forward", "logits x^ W^T: read W^, write c", 2 * ncd, 4 * cd + 4 * nc + 4 * nd, True),
    )


def _normalised_logits_backward(rows: int, classes: int, dimension: int) -> tuple[Term, ...]:
    nc, cd, nd, ncd = rows * classes, classes * dimension, rows * dimension, rows * classes * dimension
    return (
        Term("backward", "dW^ = g^T x^: read g, write dW^", 2 * ncd, 4 * nc + 4 * cd + 4 * nd, True),
        Term("backward", "dx^ = g W^: read g, W^", 2 * ncd, 4 * nc + 4 * cd + 4 * nd, True),
        Term("backward", "dW^/|W|: read, write", cd, 8 * cd),
        Term("backward", "-dW^ W^/|W|: quotient, negation, product, row sums", 4 * cd, 32 * cd),
        Term("backward", "through |W|: W/|W|, its zeros masked, times a row factor, sum with dW^/|W|", 3 * cd, 36 * cd),
    )


def _sgd(cd: int) -> Term:
    return Term("update", "SGD: read dW, W, v; write W, v", 6 * cd, 20 * cd)


def _forward_sweep(nc: int, cd: int, ncd: int) -> tuple[Term, ...]:
    return (
        Term("forward", "|W_j| and logits x^ W^T: read W once, the tile stays in cache", 2 * ncd, 4 * cd, True),
        Term("forward", "|W_j|", 2 * cd, 0),
        Term("forward", "scale, exp, sums, maximum", 6 * nc, 0),
        Term("forward", "pull += E W: the same tile", 2 * ncd, 0, True),
    )


def _class_sweep(phase: str, nc: int, cd: int, ncd: int, written: int, update_flops: int = 0) -> tuple[Term, ...]:
    return (
        Term(phase, "|W_j| and logits again: read W", 2 * ncd, 4 * cd, True),
        Term(phase, "|W_j|", 2 * cd, 0),
        Term(phase, "exp, slope", 5 * nc, 0),
        Term(phase, "dP = G^T x^: in cache", 2 * ncd, 0, True),
        Term(phase, "chain through |W_j|, result", 5 * cd + update_flops, written),
    )


def _keeping_sweep(nc: int, cd: int, ncd: int, width: int = 2) -> tuple[Term, ...]:
    return (*_forward_sweep(nc, cd, ncd), Term("forward", "exponentials: write", 0, width * nc))


def _kept_class_sweep(
    phase: str, nc: int, cd: int, ncd: int, written: int, update_flops: int = 0, width: int = 2
) -> tuple[Term, ...]:
    return (
        Term(phase, "|W_j|, chain: read W", 2 * cd, 4 * cd),
        Term(phase, "exponentials: read; slope", 2 * nc, width * nc),
        Term(phase, "dP = G^T x^: in cache", 2 * ncd, 0, True),
        Term(phase, "chain through |W_j|, result", 5 * cd + update_flops, written),
    )
