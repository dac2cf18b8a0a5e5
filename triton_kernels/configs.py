"""Block sizes of every kernel: one table by architecture, kernel, dtype and shape class. Nothing is tuned at run time.

`python -m recog_fast.triton_kernels.check` compiles each entry and asserts its budgets; tests/test_triton_interpreter.py runs the
entries of the interpreter.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

INTERPRETER = 0
ARCHITECTURES = (80, 89, 90, 100)
SHARED_MEMORY = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes one program may have
ROW_PADDING = 128  # vectors over rows are padded to this: a multiple of every tile's rows
SMALL = 64  # rows: up to here a batch is of the class "small"


@dataclass(frozen=True)
class Tile:
    """rows x classes of a tile of cosines, `depth` of D per step, pipeline stages; tma: tensor descriptors feed it.

    lazy_index: the nearest negative's index is searched only where it can change. Triton 3.6 fails on it for sm_100 (an
    assertion of its pass over tensor memory, on a scalar that depends on the accumulator).
    """

    rows: int
    classes: int
    depth: int
    warps: int = 8
    stages: int = 3
    tma: bool = False
    lazy_index: bool = True


@dataclass(frozen=True)
class RowBlock:
    """Whole rows of W to a program of the element-wise kernels."""

    rows: int
    dimension: int
    warps: int


@dataclass(frozen=True)
class MergeBlock:
    """Elements of a program that adds partial results, and the partials it reads at once."""

    elements: int
    partials: int
    warps: int = 4


_HALF, _FLOAT = torch.bfloat16, torch.float32
SHAPES = ("small", "large", "small heavy", "large heavy")
KERNELS = ("negative_logsumexp", "unknown_rejection", "class_gradient")


def _entries() -> dict[tuple[int, str, torch.dtype, str], Tile]:
    """(architecture, kernel, dtype, shape class) -> tile.

    Tiles of 128 x 128 with 8 warps leave 128 registers to a thread where two programs share a processor, so that one's epilogue
    runs under the other's products; "heavy" (a rule, or sub-centers) needs more registers: half the classes.
    """
    table = {}
    wide, narrow = Tile(128, 128, 64, tma=True), Tile(128, 64, 64, tma=True)
    small, thin = Tile(64, 128, 64, warps=4, stages=4, tma=True), Tile(64, 64, 64, warps=4, stages=4, tma=True)
    for kernel in KERNELS:
        for shape in SHAPES:
            table[INTERPRETER, kernel, _HALF, shape] = table[INTERPRETER, kernel, _FLOAT, shape] = Tile(64, 64, 32, warps=4, stages=2)
            for arch in ARCHITECTURES:
                # float32 has no tensor cores (IEEE): plain multiply-adds, and small tiles to keep them in registers
                table[arch, kernel, _FLOAT, shape] = Tile(64, 64, 16, stages=2)
                table[arch, kernel, _HALF, shape] = {"small": small, "large": wide, "small heavy": thin, "large heavy": narrow}[shape]
        for arch in (80, 89):  # no descriptors
            table[arch, kernel, _HALF, "small"], table[arch, kernel, _HALF, "small heavy"] = Tile(64, 64, 64, warps=4), Tile(64, 64, 32, stages=4)
            table[arch, kernel, _HALF, "large"] = table[arch, kernel, _HALF, "large heavy"] = Tile(128, 64, 64)
    for arch in (80, 89):
        table[arch, "negative_logsumexp", _HALF, "large"] = Tile(128, 128, 32)
    for key, tile in table.items():
        if key[0] == 100:
            table[key] = dataclasses.replace(tile, lazy_index=False)
    table[90, "unknown_rejection", _HALF, "large"] = table[100, "unknown_rejection", _HALF, "large"] = narrow
    table[100, "class_gradient", _HALF, "large"] = narrow
    return table


TABLE = _entries()

# Tiles that may be better than the table's, by name: compiled by check.py as the table is; benchmarks/gpu_tuning.py measures such.
ALTERNATIVES: dict[str, dict[tuple[int, str, torch.dtype, str], Tile]] = {
    # 25 % less L2 traffic than 128 x 128, but one program to a processor: nothing runs under its epilogue; slopes of that size spill
    "128x256": {(90, "negative_logsumexp", _HALF, "large"): Tile(128, 256, 64, tma=True)},
    # half the registers of 128 x 128 with as many programs again
    "128x64": {(90, kernel, _HALF, "large"): Tile(128, 64, 64, tma=True) for kernel in KERNELS},
    # deeper pipeline: longer waits for L2 are hidden, one program less may fit
    "4 stages": {(90, kernel, _HALF, "large"): Tile(128, 128, 64, stages=4, tma=True) for kernel in ("negative_logsumexp", "class_gradient")},
}
_pretended: list[int] = []  # the last one is the architecture that CPU tensors are compiled for


@contextlib.contextmanager
def pretend(arch: int) -> Iterator[None]:
    """Within it CPU tensors take the entries of an architecture, in every thread: for who compiles and does not launch."""
    if arch not in ARCHITECTURES:
        raise ValueError(f"configs: expected an architecture in {ARCHITECTURES}, got {arch}")
    _pretended.append(arch)
    try:
        yield
    finally:
        _pretended.pop()


def architecture(device: torch.device) -> int:
    """The column of the table for a device; tensors on the CPU go through Triton's interpreter.

    Compute capability 8.6, 8.7 and 12.x have the shared memory of 8.9 and take its entries.
    """
    if device.type != "cuda":
        return _pretended[-1] if _pretended else INTERPRETER
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) == (8, 0):
        return 80
    return {8: 89, 9: 90, 10: 100}.get(major, 89)


def _compiled(device: torch.device) -> bool:
    """Whether kernels on its tensors are compiled; else they are interpreted."""
    return device.type == "cuda" or bool(_pretended)


def choose(kernel: str, x: Tensor, heavy: bool) -> Tile:
    """The tile of `kernel` for rows x (N, D) of this device and dtype; heavy: with a negative rule or sub-centers."""
    shape = "small" if x.shape[0] <= SMALL else "large"
    key = architecture(x.device), kernel, x.dtype, f"{shape} heavy" if heavy else shape
    return TABLE[key]


def takes_descriptors(tile: Tile, dimension: int, subcenters: int, itemsize: int, *addresses: int) -> bool:
    """Whether these operands can be read through tensor descriptors: 16-byte rows, and steps of D that end at D where K > 1."""
    aligned = dimension * itemsize % 16 == 0 and all(address % 16 == 0 for address in addresses)
    return tile.tma and aligned and (subcenters == 1 or dimension % tile.depth == 0)


def operands(x: Tensor, p: Tensor, tile: Tile) -> tuple[Any, Any, dict[str, Any]]:
    """(x (N, D), p (C, K, D)) as the kernels take them, pointers or descriptors, and the constants of the tile."""
    c, k, d = p.shape
    tma = takes_descriptors(tile, d, k, x.element_size(), x.data_ptr(), p.data_ptr())
    constants = {
        "D": d, "BN": tile.rows, "BC": tile.classes, "BK": tile.depth, "TMA": tma,
        "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip
    if not tma:
        return x, p, constants
    rows = TensorDescriptor(x, [x.shape[0], d], [d, 1], [tile.rows, tile.depth])
    return rows, TensorDescriptor(p, [c, k * d], [k * d, 1], [tile.classes, tile.depth]), constants


def row_block(dimension: int, device: torch.device) -> RowBlock:
    """About 4096 elements to a program of 4 warps, whole rows."""
    padded = max(triton.next_power_of_2(dimension), 16)
    rows = max(4096 // padded, 1) if _compiled(device) else 64
    return RowBlock(rows, padded, 4)


def merge_block(numel: int, device: torch.device) -> MergeBlock:
    """Row sums have few elements and many partials, pulls the other way round. The interpreter pays by the program."""
    if not _compiled(device):
        return MergeBlock(ROW_PADDING if numel <= 8 * ROW_PADDING else 4096, 16)
    return MergeBlock(32, 64) if numel <= 1 << 16 else MergeBlock(1024, 1)
