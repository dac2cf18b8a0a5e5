"""Block sizes of every kernel: one table by architecture, kernel, dtype and shape class. Nothing is tuned at run time.

`python -m recog_fast.triton_kernels.check` compiles each entry and asserts its budgets; tests/test_triton_interpreter.py runs the
entries of the interpreter.
"""

from __future__ import annotations

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
    """rows x classes of a tile of cosines, `depth` of D per step, pipeline stages; tma: tensor descriptors feed it."""

    rows: int
    classes: int
    depth: int
    warps: int = 8
    stages: int = 3
    tma: bool = False


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


# (architecture, kernel, dtype, shape class) -> tile
_HALF, _FLOAT = torch.bfloat16, torch.float32
_TINY = Tile(32, 32, 32, warps=4, stages=2)
TABLE: dict[tuple[int, str, torch.dtype, str], Tile] = {}


def _enter(arch: int, kernel: str, dtype: torch.dtype, small: Tile, large: Tile) -> None:
    TABLE[arch, kernel, dtype, "small"] = small
    TABLE[arch, kernel, dtype, "large"] = large


for _kernel in ("negative_logsumexp", "unknown_rejection", "class_gradient"):
    _enter(INTERPRETER, _kernel, _HALF, _TINY, _TINY)
    _enter(INTERPRETER, _kernel, _FLOAT, _TINY, _TINY)
    for _arch in ARCHITECTURES:
        # float32 has no tensor cores here (IEEE): plain multiply-adds, small tiles keep them in registers
        _enter(_arch, _kernel, _FLOAT, Tile(64, 64, 16, warps=8, stages=2), Tile(64, 64, 16, warps=8, stages=2))
    _enter(80, _kernel, _HALF, Tile(64, 128, 64, warps=4, stages=3), Tile(128, 128, 32, warps=8, stages=3))
    _enter(89, _kernel, _HALF, Tile(64, 128, 64, warps=4, stages=3), Tile(128, 128, 32, warps=8, stages=3))
    _enter(90, _kernel, _HALF, Tile(64, 128, 64, warps=4, stages=4, tma=True), Tile(128, 128, 64, warps=8, stages=3, tma=True))
    _enter(100, _kernel, _HALF, Tile(64, 128, 64, warps=4, stages=4, tma=True), Tile(128, 128, 64, warps=8, stages=3, tma=True))


def architecture(device: torch.device) -> int:
    """The column of the table for a device; tensors on the CPU go through Triton's interpreter.

    Compute capability 8.6, 8.7 and 12.x have the shared memory of 8.9 and take its entries.
    """
    if device.type != "cuda":
        return INTERPRETER
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) == (8, 0):
        return 80
    return {8: 89, 9: 90, 10: 100}.get(major, 89)


def choose(kernel: str, x: Tensor) -> Tile:
    """The tile of `kernel` for rows x (N, D) of this device and dtype."""
    return TABLE[architecture(x.device), kernel, x.dtype, "small" if x.shape[0] <= SMALL else "large"]


def takes_descriptors(tile: Tile, dimension: int, subcenters: int, itemsize: int, *addresses: int) -> bool:
    """Whether these operands can be read through tensor descriptors: 16-byte rows, and steps of D that end at D where K > 1."""
    aligned = dimension * itemsize % 16 == 0 and all(address % 16 == 0 for address in addresses)
    return tile.tma and aligned and (subcenters == 1 or dimension % tile.depth == 0)


def operands(x: Tensor, p: Tensor, tile: Tile) -> tuple[Any, Any, dict[str, Any]]:
    """(x (N, D), p (C, K, D)) as the kernels take them, pointers or descriptors, and the constants of the tile."""
    c, k, d = p.shape
    tma = takes_descriptors(tile, d, k, x.element_size(), x.data_ptr(), p.data_ptr())
    constants = {
        "D": d, "BN": tile.rows, "BC": tile.classes, "BK": tile.depth, "STAGES": tile.stages, "TMA": tma,
        "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip
    if not tma:
        return x, p, constants
    rows = TensorDescriptor(x, [x.shape[0], d], [d, 1], [tile.rows, tile.depth])
    return rows, TensorDescriptor(p, [c, k * d], [k * d, 1], [tile.classes, tile.depth]), constants


def row_block(dimension: int, device: torch.device) -> RowBlock:
    """About 4096 elements to a program of 4 warps, whole rows."""
    padded = max(triton.next_power_of_2(dimension), 16)
    rows = max(4096 // padded, 1) if device.type == "cuda" else 64
    return RowBlock(rows, padded, 4)


def merge_block(numel: int, device: torch.device) -> MergeBlock:
    """Row sums have few elements and many partials, pulls the other way round. The interpreter pays by the program."""
    if device.type != "cuda":
        return MergeBlock(ROW_PADDING if numel <= 8 * ROW_PADDING else 4096, 16)
    return MergeBlock(32, 64) if numel <= 1 << 16 else MergeBlock(1024, 1)
