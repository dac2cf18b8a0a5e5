"""Compiles every entry of the configuration table ahead of time, without a GPU, and holds it to its budgets.

    python -m recog_fast.triton_kernels.check [--arch 90] [--kernel class_gradient] [--jobs 2]

One line per kernel: registers, stack and spills (LDL/STL), shared memory against the architecture's limit, tensor-core
instructions, seconds. Exit code 1 where a budget is broken: spills, too much shared memory, or a bfloat16 tile without tensor cores.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import class_gradient, class_step, configs, effective_prototypes, merge, negative_logsumexp, unknown_rejection

DIMENSION, UNALIGNED = 512, 500
TENSOR_CORES = {80: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
_ROWS = {  # scalars and row vectors of the tile kernels
    "N": "i32", "C": "i32", "first": "i32", "ld": "i32", "ld_e": "i32", "k2": "fp32", "count": "fp32",
    "labels": "*i32", "targets": "*i32", "indices": "*i32", "seen": "*i8",
}  # fmt: skip
_ALIGNED = ("ld", "ld_e")  # multiples of 16
_NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Job:
    """One kernel to compile: constants and argument types by name."""

    arch: int
    kernel: str
    variant: str
    module: str
    function: str
    types: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    warps: int
    stages: int
    tensor_cores: bool


@dataclass(frozen=True)
class Line:
    """What the compiler made of a job."""

    job: Job
    registers: int
    stack: int
    spills: int
    shared: int
    tensor_cores: int
    seconds: float

    def broken(self) -> list[str]:
        """The budgets it breaks."""
        limit = configs.SHARED_MEMORY[self.job.arch]
        return [
            text
            for text, bad in (
                (f"{self.spills} spills", self.spills > 0 or self.stack > 0),
                (f"{self.shared} of {limit} bytes of shared memory", self.shared > limit),
                (f"no {TENSOR_CORES[self.job.arch]}", self.job.tensor_cores and self.tensor_cores == 0),
            )
            if bad
        ]


# kernel -> (module, function, variants of its own constants)
_TILES: dict[str, tuple[str, str, dict[str, dict[str, Any]]]] = {
    "negative_logsumexp": ("negative_logsumexp", "forward_tile", {
        "loss only": {"RULES": False, "MODE": negative_logsumexp.SUMS},
        "E": {"RULES": False, "MODE": negative_logsumexp.EXPONENTIALS},
        "E, rules": {"RULES": True, "MODE": negative_logsumexp.EXPONENTIALS},
        "peaks, rules": {"RULES": True, "MODE": negative_logsumexp.PEAKS},
    }),
    "unknown_rejection": ("unknown_rejection", "unknown_tile", {"": {}}),
    "class_gradient": ("class_gradient", "slope_tile", {
        "": {"RULES": False, "SEEN": False},
        "rules, sampled": {"RULES": True, "SEEN": True},
    }),
}  # fmt: skip
_HEAVIEST = {"negative_logsumexp": "E, rules", "unknown_rejection": "", "class_gradient": "rules, sampled"}
_MODULES = {m.__name__.split(".")[-1]: m for m in (class_gradient, class_step, effective_prototypes, merge, negative_logsumexp, unknown_rejection)}


def _tile_jobs(arch: int) -> Iterator[Job]:
    """Every tile of the table and of its alternatives with the variants that run on it; a tile that serves two shape classes once."""
    seen = set()
    others = [entry for tiles in configs.ALTERNATIVES.values() for entry in tiles.items()]
    for (of, kernel, dtype, shape), tile in (*configs.TABLE.items(), *others):
        module, function, variants = _TILES[kernel]
        heavy, half = shape.endswith("heavy"), dtype == torch.bfloat16
        for variant, own in variants.items():
            for subcenters in (1, 3) if heavy else (1,):
                runs = of == arch and (heavy if own.get("RULES") or subcenters > 1 else not heavy or not variants[variant])
                # sub-centers and float32 stand or fall with the heaviest variant
                if not runs or (subcenters > 1 and variant != _HEAVIEST[kernel]) or (not half and variant != _HEAVIEST[kernel]):
                    continue
                # without descriptors where the table has them: rows of D elements that are no multiple of 16 bytes
                for dimension in (DIMENSION, UNALIGNED) if tile.tma and variant in ("E", _HEAVIEST[kernel]) and subcenters == 1 else (DIMENSION,):
                    job = _tile_job(arch, kernel, dtype, tile, dimension, subcenters, variant, own, module, function)
                    if job not in seen:
                        seen.add(job)
                        yield job


def _tile_job(
    arch: int, kernel: str, dtype: torch.dtype, tile: configs.Tile, dimension: int, subcenters: int, variant: str, own: dict[str, Any],
    module: str, function: str,
) -> Job:  # fmt: skip
    name = _NAMES[dtype]
    tma = configs.takes_descriptors(tile, dimension, subcenters, dtype.itemsize)
    operand = {"x": tile.rows, "p": tile.classes}
    types = {**_ROWS, "exponentials": f"*{name}", "slopes": f"*{name}"}
    types.update({o: f"tensordesc<{name}[{b}, {tile.depth}]>" if tma else f"*{name}" for o, b in operand.items()})
    constants = {
        "D": dimension, "K": subcenters, "BN": tile.rows, "BC": tile.classes, "BK": tile.depth, "TMA": tma, "LAZY": tile.lazy_index, **own
    }  # fmt: skip
    named = getattr(_MODULES[module], function).arg_names
    parts = (
        name, f"{tile.rows}x{tile.classes}x{tile.depth}", f"{tile.stages} stages" if tile.stages > 3 else "",
        f"K={subcenters}" if subcenters > 1 else "", f"D={dimension}" if dimension != DIMENSION else "", variant,
    )  # fmt: skip
    label = ", ".join(filter(None, parts))
    return Job(
        arch, kernel, f"{label}{' TMA' if tma else ''}", module, function, tuple(types.items()), tuple((name, value) for name, value in constants.items() if name in named),
        tile.warps, tile.stages, dtype == torch.bfloat16,
    )  # fmt: skip


def _row_jobs(arch: int) -> Iterator[Job]:
    """The element-wise kernels: whole rows of W, and the merging of partial results."""
    device = torch.device("cuda")
    block = configs.row_block(DIMENSION, device)
    rows = {"D": DIMENSION, "BD": block.dimension, "BR": block.rows, "MEMORY": True, "RENORMALIZE": True, "SPLIT": False}
    planes = {"weight": "*i16", "low": "*i16"}
    memory = {"memory": "*bf16", "slot": "*i32", "R": "i32", "prototypes": "*bf16"}
    step = {**rows, "STEP": True, "VELOCITY": True, "NESTEROV": True, "CHANCE": False, "NUMBERED": False}
    chance = {"velocity": "*i16", "rounding": "*i64", "numbers": "*i64", "first": "i32"}
    for name, types, own in (
        ("", memory | {"first": "i32"}, {}),
        (", split", memory | planes | {"first": "i32"}, {"SPLIT": True}),
        (", split, bf16 velocity", memory | planes | chance, {"SPLIT": True, "CHANCE": True, "NUMBERED": True}),
    ):
        if "CHANCE" not in own:
            yield Job(arch, "effective_prototypes", f"memory{name}", "effective_prototypes", "prototype_rows", tuple(types.items()), tuple({**rows, **own}.items()), block.warps, 3, False)
        yield Job(arch, "class_step", f"memory, Nesterov{name}", "class_step", "class_epilogue", tuple(types.items()), tuple({**step, **own}.items()), block.warps, 3, False)
    for numel in (1024, 1024 * DIMENSION):
        merging = configs.merge_block(numel, device)
        adds = {"BS": merging.partials, "B": merging.elements}
        types = {"total": "*fp64", "S": "i32", "M": "i32", "stride": "i32"}
        yield Job(arch, "merge", f"add {merging.partials}x{merging.elements}", "merge", "add_partials", tuple(types.items()), tuple(adds.items()), merging.warps, 3, False)
    merging = configs.merge_block(1024, device)
    types = {"indices": "*i32", "index": "*i64", "total": "*fp64", "T": "i32", "ld": "i32", "first": "i32"}
    yield Job(arch, "merge", "tiles", "merge", "merge_tiles", tuple(types.items()), (("BT", merging.partials), ("BN", merging.elements)), merging.warps, 3, False)


def jobs(archs: tuple[int, ...] = configs.ARCHITECTURES, kernel: str | None = None) -> list[Job]:
    """What is to be compiled."""
    every = [job for arch in archs for source in (_tile_jobs, _row_jobs) for job in source(arch)]
    return [job for job in every if kernel is None or job.kernel == kernel]


@functools.cache
def _tool() -> str:
    return str(triton.knobs.nvidia.cuobjdump.path)


def compile_job(job: Job) -> Line:
    """Compiles it and reads the machine code."""
    function = getattr(_MODULES[job.module], job.function)
    types, constants = dict(job.types), dict(job.constants)
    signature = {name: "constexpr" if name in constants else types.get(name, "*fp32") for name in function.arg_names}
    at = {name: (place,) for place, name in enumerate(function.arg_names)}
    aligned = [name for name, kind in signature.items() if kind.startswith("*") or name in _ALIGNED]
    source = ASTSource(
        function, signature, {at[name]: value for name, value in constants.items()}, {at[name]: [["tt.divisibility", 16]] for name in aligned}
    )
    began = time.perf_counter()
    made = triton.compile(source, target=GPUTarget("cuda", job.arch, 32), options={"num_warps": job.warps, "num_stages": job.stages})
    seconds = time.perf_counter() - began
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage, code = (subprocess.check_output([_tool(), what, file.name], text=True, stderr=subprocess.STDOUT) for what in ("-res-usage", "-sass"))
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"check: expected REG and STACK from cuobjdump, got {usage!r}")
    spills = len(re.findall(r"\b(?:LDL|STL)\b", code))
    tensor_cores = len(re.findall(rf"\b{TENSOR_CORES[job.arch]}\b", code))
    return Line(job, int(found[1]), int(found[2]), spills, made.metadata.shared, tensor_cores, seconds)


def _table(lines: list[Line]) -> Iterator[str]:
    yield f"{'arch':6} {'kernel':20} {'variant':44} {'warps':>5} {'regs':>5} {'spills':>6} {'shared/limit KiB':>16} {'MMA':>11} {'s':>5}"
    for line in lines:
        job, limit = line.job, configs.SHARED_MEMORY[line.job.arch] >> 10
        cores = f"{line.tensor_cores} {TENSOR_CORES[job.arch]}" if line.tensor_cores else "-"
        shared = f"{line.shared / 1024:.1f}/{limit}"
        bad = "".join(f"  BROKEN: {text}" for text in line.broken())
        yield f"sm_{job.arch:<3} {job.kernel:20} {job.variant:44} {job.warps:5} {line.registers:5} {line.spills:6} {shared:>16} {cores:>11} {line.seconds:5.1f}{bad}"


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m recog_fast.triton_kernels.check", description="Compile the configuration table and assert its budgets.")
    parser.add_argument("--arch", type=int, action="append", choices=configs.ARCHITECTURES, help="only this architecture (can be repeated)")
    parser.add_argument("--kernel", choices=sorted({job.kernel for job in jobs()}), help="only this kernel")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: one per usable core)")
    options = parser.parse_args(arguments)
    if triton.knobs.runtime.interpret:
        print("check: TRITON_INTERPRET is set: nothing would be compiled", file=sys.stderr)
        return 2
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="recog-fast-check-") as cache:
        os.environ["TRITON_CACHE_DIR"] = cache  # every entry is compiled, and nothing stays
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(options.jobs, mp_context=context) as pool:
            lines = list(pool.map(compile_job, jobs(tuple(options.arch or configs.ARCHITECTURES), options.kernel)))
    print("\n".join(_table(lines)))
    broken = sum(bool(line.broken()) for line in lines)
    print(f"triton {triton.__version__}, D = {DIMENSION}: {len(lines)} kernels, {broken} over budget, {time.perf_counter() - began:.0f} s")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
