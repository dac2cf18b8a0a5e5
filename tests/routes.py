"""The ways an operation can run here, as pytest parameters: reference in float64 and float32, compiled kernels per ISA."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

import recog_fast as rf
from recog_fast import native


@dataclass(frozen=True)
class Route:
    """Working dtype, backend and, for the compiled kernels, the forced ISA; pairs: format of 16-bit operands where no ISA says;
    device: where the tensors lie."""

    name: str
    dtype: torch.dtype
    backend: str
    isa: str = ""
    compute_dtype: torch.dtype | None = None
    pairs: str | None = None
    device: str = "cpu"

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        if self.device == "cpu" and self.backend == "auto" and native.load()[0] is None:
            pytest.skip(f"compiled kernels {native.load()[1]}")
        if self.isa:
            try:
                native.select_isa(self.isa)
            except ValueError:
                pytest.skip(f"this CPU has no {self.isa}")
        try:
            with rf.ops.use_backend(self.backend):
                yield
        finally:
            if self.isa:
                native.select_isa("")

    @property
    def half(self) -> bool:
        """Whether the sweeps are asked for 16-bit operands."""
        return self.compute_dtype == torch.bfloat16


PAIR_ISAS = ("amx_bf16", "avx512_bf16", "avx512_vnni", "avx512", "avx2", "emulated_bf16", "emulated_amx")  # builds with 16-bit operands


def _half_routes() -> list[Route]:
    """16-bit sweeps of the ISA that runs by itself and of the others this CPU can run."""
    module, running = native.load()
    others = [] if module is None else [isa for isa in PAIR_ISAS if isa != running and module.runs_isa(isa)]
    named = [("native-bfloat16", ""), *((f"{isa}-bfloat16", isa) for isa in others)]
    return [Route(name, torch.float32, "auto", isa, torch.bfloat16) for name, isa in named]


FLOAT64 = Route("reference-float64", torch.float64, "reference")
NATIVE = [
    Route("native-float32", torch.float32, "auto"),
    Route("native-avx512", torch.float32, "auto", "avx512"),
    Route("native-avx2", torch.float32, "auto", "avx2"),
    Route("native-baseline", torch.float32, "auto", "baseline"),
]
HALF = _half_routes()
GPU = [
    Route("cuda-float32", torch.float32, "auto", device="cuda"),
    Route("cuda-bfloat16", torch.float32, "auto", compute_dtype=torch.bfloat16, pairs="bfloat16", device="cuda"),
]
ROUTES = [FLOAT64, Route("reference-float32", torch.float32, "reference"), *NATIVE, *HALF]


def each(routes: list[Route]) -> pytest.MarkDecorator:
    """Parametrises a test over `route`; those on a GPU have the marker `gpu`, and are skipped without one."""
    gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")]
    marked = [pytest.param(r, id=r.name, marks=gpu if r.device == "cuda" else []) for r in routes]
    return pytest.mark.parametrize("route", marked)


def isas() -> list[str]:
    """The ISAs of the compiled kernels that this CPU can run, and the emulated one, whose vectors are as wide as AVX-512's; the module that
    asks is skipped where there are none."""
    if not native.available_isas():
        pytest.skip(f"compiled kernels {native.load()[1]}", allow_module_level=True)
    return [*native.available_isas(), "emulated_bf16"]


def pair_format(route: Route) -> str | None:
    """ "int16" or "bfloat16" where the route's sweeps take 16-bit operands, else None."""
    if not route.half or route.pairs is not None:
        return route.pairs
    with route():
        module = native.load()[0]
        assert module is not None
        found: str | None = module.pair_format()
        return found
