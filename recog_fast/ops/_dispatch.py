"""The dispatch table: which operands, dtype and ISA run which code. `recog_fast.backends()["dispatch"]` prints it, every
operation asks it, tests compare it with what runs.

Shapes choose nothing: the kernels take every N >= 0 and C, K, D >= 1 (tails are padded), and below 4e6 multiply-adds
one thread.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import ModuleType

import torch

from .. import native

REFERENCE, NATIVE_FLOAT32, NATIVE_HALF, TRITON = "reference", "native float32", "native 16-bit", "Triton tiles and GEMMs"
CUDA_NATIVE = "CUDA C++"

# Format of the 16-bit operands of each build of the kernels; None: 16-bit requests run in float32.
PAIR_FORMATS: dict[str, str | None] = {
    "amx_bf16": "bfloat16",
    "avx512_bf16": "bfloat16",
    "avx512_vnni": "int16",
    "avx512": "int16",
    "avx2": "int16",
    "baseline": None,
    "emulated_bf16": "bfloat16",  # never chosen by itself: the logic of avx512_bf16 in plain vectors, for tests
    "emulated_amx": "bfloat16",  # and that of amx_bf16
}
WITHOUT_HALF = ("effective_prototypes",)  # operations whose kernels are float32 whatever is asked for
TORCH_ONLY = ("memory_write",)  # operations whose reference is a few torch calls, and no CPU kernel


@dataclass(frozen=True)
class Call:
    """What the choice depends on. isa: the kernels' build that would run, None where there is none."""

    backend: str  # of `use_backend`
    devices: frozenset[str]
    dtypes: frozenset[torch.dtype]
    isa: str | None
    half: bool = False  # 16-bit operands asked for
    operation: str = ""
    triton: bool = False  # the CUDA device can run the Triton kernels
    kept: bool = False  # exponentials are to be kept between the sweeps
    cuda: bool = False  # the CUDA device can run the extension's CUDA C++ kernels


@dataclass(frozen=True)
class Rule:
    """One line of the table."""

    when: str
    runs: str
    holds: Callable[[Call], bool]


MISSING = Rule("extension not built", REFERENCE, lambda c: c.isa is None)
# The first that holds decides.
TABLE: tuple[Rule, ...] = (
    Rule(
        "memory_write of float32 or bfloat16, CUDA tensors", CUDA_NATIVE,
        lambda c: c.operation in TORCH_ONLY and c.cuda and c.backend != "reference" and c.devices == {"cuda"}
        and c.dtypes <= {torch.float32, torch.bfloat16},
    ),
    Rule("memory_write", REFERENCE, lambda c: c.operation in TORCH_ONLY),
    Rule('use_backend("reference")', REFERENCE, lambda c: c.backend == "reference"),
    Rule(
        "CUDA tensors with a float64 operand or kept exponentials", REFERENCE,
        lambda c: c.devices == {"cuda"} and (torch.float64 in c.dtypes or c.kept),
    ),
    Rule("CUDA tensors", TRITON, lambda c: c.devices == {"cuda"} and c.triton),
    Rule("a tensor on another device than the CPU", REFERENCE, lambda c: c.devices != {"cpu"}),
    Rule("a float64 operand", REFERENCE, lambda c: torch.float64 in c.dtypes),
    MISSING,
    Rule("effective_prototypes", NATIVE_FLOAT32, lambda c: c.operation in WITHOUT_HALF),
    Rule("bfloat16 asked for, ISA with 16-bit operands", NATIVE_HALF, lambda c: c.half and PAIR_FORMATS[str(c.isa)] is not None),
    Rule("anything else", NATIVE_FLOAT32, lambda c: True),
)


def choose(call: Call) -> Rule:
    """The line of the table that decides this call."""
    return next(rule for rule in TABLE if rule.holds(call))


def call_of(
    backend: str, operands: Iterable[torch.Tensor | None], *, half: bool = False, operation: str = ""
) -> tuple[Call, ModuleType | None]:
    """The call these operands make, and the extension."""
    module, _ = native.load()
    there = [t for t in operands if t is not None]
    isa = None if module is None else str(module.active_isa())
    devices, dtypes = frozenset(t.device.type for t in there), frozenset(t.dtype for t in there)
    return Call(backend, devices or frozenset({"cpu"}), dtypes, isa, half, operation), module


def triton_missing(index: int = 0) -> str | None:
    """Why a CUDA device cannot run the Triton kernels; None where it can."""
    try:
        kernels = importlib.import_module("..triton_kernels", __package__)
    except ImportError as error:
        return f"kernels not installed ({error})"
    reason: str | None = kernels.reason_missing(index)
    return reason


def cuda_missing() -> str | None:
    """Why torch's current CUDA device cannot run the extension's CUDA C++ kernels; None where it can. Touches no other device."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return native.cuda_missing(torch.cuda.current_device())


def call_of_device(backend: str, operands: Iterable[torch.Tensor | None], *, operation: str, kept: bool) -> Call:
    """The call that these operands on a CUDA device make."""
    there = [t for t in operands if t is not None]
    index = next((t.device.index or 0 for t in there if t.device.type == "cuda"), 0)
    devices, dtypes = frozenset(t.device.type for t in there), frozenset(t.dtype for t in there)
    return Call(backend, devices, dtypes, None, False, operation, triton_missing(index) is None, kept, native.cuda_missing(index) is None)


def describe(backend: str) -> str:
    """The lines of the table that can hold here, with this machine's ISA; "<- now" marks a line that holds for every call."""
    module, reason = native.load()
    isa = None if module is None else str(module.active_isa())
    lines = []
    for rule in TABLE:
        if rule.runs == TRITON:
            missing, alone = triton_missing(), cuda_missing()
            rows = f"; rows of W: {CUDA_NATIVE if alone is None else f'Triton ({alone})'}"
            lines.append(f"{rule.when}: {TRITON + rows if missing is None else f'the line below ({missing})'}")
        elif rule.runs == CUDA_NATIVE:
            missing = cuda_missing()
            lines.append(f"{rule.when}: {CUDA_NATIVE if missing is None else f'the line below ({missing})'}")
        elif rule.runs == REFERENCE:
            now = (rule is MISSING and isa is None) or rule.holds(Call(backend, frozenset({"cpu"}), frozenset(), "baseline"))
            if rule is not MISSING or isa is None:
                lines.append(f"{rule.when}: {REFERENCE}{' <- now' if now else ''}{f' ({reason})' if rule is MISSING else ''}")
        elif isa is not None and (rule.runs == NATIVE_FLOAT32 or PAIR_FORMATS[isa] is not None):
            lines.append(f"{rule.when}: {isa}, {'float32' if rule.runs == NATIVE_FLOAT32 else PAIR_FORMATS[isa]}")
    return "\n".join(lines)
