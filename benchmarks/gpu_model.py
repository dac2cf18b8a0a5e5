"""What a step must cost on a GPU, before anything is measured: flops, bytes, launches, and the time two measured rates give them.

D = 512 unless said. The schedule is that of `recog_fast/ops/chunks.py`: per chunk of classes the prototypes (W read, P written into
the L2), a tile kernel, a GEMM on its output, merges; then in the step the prototypes again, a tile kernel, a GEMM and the class
epilogue (W and v read and written). E, slopes, P and dP of a chunk stay in the L2 and cost no memory traffic.
"""

from __future__ import annotations

from dataclasses import dataclass

from . import cost_model
from .cost_model import Cost, Term

H200 = {"tflops": 790.0, "tbs": 4.3, "l2": 60e6, "multiprocessors": 132}  # bf16 GEMM and copy as measured on one; see performance.md
# Shares of the two rates the pieces are expected to reach, and what a launch costs the host without a graph: guesses until measured.
GEMM_SHARE, TILE_SHARE, COPY_SHARE = 0.75, 0.55, 0.8
LAUNCH_SECONDS, GRAPH_LAUNCH_SECONDS = 30e-6, 1.5e-6


def recomputing(rows: int, classes: int, dimension: int) -> Cost:
    """Ours with a dense gradient and torch's SGD(fused): 8NCD, 16 B per CD before SGD's 20."""
    nc, cd, ncd = rows * classes, classes * dimension, rows * classes * dimension
    return Cost((
        *_forward(nc, cd, ncd), *_slopes("backward", nc, cd, ncd),
        Term("backward", "chain: read W, write dW", 5 * cd, 8 * cd), Term("update", "SGD: read dW, W, v; write W, v", 6 * cd, 20 * cd),
    ))  # fmt: skip


def fused_step(rows: int, classes: int, dimension: int) -> Cost:
    """Ours with HeadSGD: 8NCD, 24 B per CD."""
    nc, cd, ncd = rows * classes, classes * dimension, rows * classes * dimension
    return Cost((
        *_forward(nc, cd, ncd), *_slopes("update", nc, cd, ncd), Term("update", "chain and SGD: read W, v; write W, v", 11 * cd, 16 * cd),
    ))  # fmt: skip


def _forward(nc: int, cd: int, ncd: int) -> tuple[Term, ...]:
    return (
        Term("forward", "P: read W, write into the L2", 3 * cd, 4 * cd),
        Term("forward", "tile: x^ P^T, exponentials, sums, maximum", 2 * ncd, 0, True),
        Term("forward", "scale, exp, sums", 6 * nc, 0),
        Term("forward", "pull += E P", 2 * ncd, 0, True),
    )


def _slopes(phase: str, nc: int, cd: int, ncd: int) -> tuple[Term, ...]:
    return (
        Term(phase, "P: read W, write into the L2", 3 * cd, 4 * cd),
        Term(phase, "tile: x^ P^T again, slopes", 2 * ncd, 0, True),
        Term(phase, "exp, slope", 5 * nc, 0),
        Term(phase, "dP = dZ^T x^", 2 * ncd, 0, True),
    )


# cost_model's name of a contender's schedule -> its cost here: the peers' passes are the same on any device
_HERE = {"recomputing": recomputing, "fused_step": fused_step}


def cost_of(schedule: str, rows: int, classes: int, dimension: int) -> Cost | None:
    """The cost of a contender's schedule; None where no model has it."""
    model = _HERE.get(schedule) or getattr(cost_model, schedule, None) if schedule else None
    return None if model is None else model(rows, classes, dimension)


def roofline_seconds(cost: Cost, phase: str, flops_rate: float, bytes_rate: float) -> float:
    """The least time of a step up to the end of `phase` with perfect overlap: products at one rate, bytes at the other."""
    return max(cost.flops(phase, matrix_only=True) / flops_rate, cost.bytes(phase) / bytes_rate)


@dataclass(frozen=True)
class Prediction:
    """One bf16 HeadSGD step: classes of a chunk, chunks, kernels, and seconds (nothing of it measured)."""

    chunk: int
    chunks: int
    kernels: int
    overlapped: float  # the roofline
    serial: float  # kernel after kernel at the expected shares, as one graph
    launched: float  # the same with every launch paid by the host


def predict(rows: int, classes: int, dimension: int, device: dict[str, float]) -> Prediction:
    """From the schedule's own chunk size (`chunks.plan_for`) on a device of these rates (TFLOP/s bf16, TB/s), L2 and multiprocessors."""
    per_class = 2 * (rows + dimension) + 4 * dimension
    chunk = max(int(device["l2"] // 2) // per_class // 128 * 128, 128)
    slabs = max(int(device["multiprocessors"]) // (-(-rows // 128) * -(-dimension // 128)), 1)
    slab = max(chunk // slabs // 128 * 128, 256)
    chunk -= chunk % slab if chunk > slab else 0
    count = -(-classes // chunk)
    last = classes - (count - 1) * chunk  # its rest beyond whole slabs is a GEMM of its own
    kernels = count * 9 + 2 * (last > slab and last % slab > 0)  # P, tile, merge, GEMM and add of the slabs; P, tile, GEMM, epilogue
    flops, speed = device["tflops"] * 1e12, device["tbs"] * 1e12
    cost = fused_step(rows, classes, dimension)
    products_flops = cost.flops(matrix_only=True) / 2
    serial = products_flops / (GEMM_SHARE * flops) + products_flops / (TILE_SHARE * flops) + cost.bytes() / (COPY_SHARE * speed)
    graph = serial + kernels * GRAPH_LAUNCH_SECONDS
    return Prediction(chunk, count, kernels, roofline_seconds(cost, "update", flops, speed), graph, max(graph, kernels * LAUNCH_SECONDS))
