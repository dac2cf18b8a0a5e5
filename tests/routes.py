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
    """Working dtype, backend and, for the compiled kernels, the forced ISA."""

    name: str
    dtype: torch.dtype
    backend: str
    isa: str = ""
    compute_dtype: torch.dtype | None = None

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        if self.backend == "auto" and native.load()[0] is None:
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


FLOAT64 = Route("reference-float64", torch.float64, "reference")
ROUTES = [
    FLOAT64,
    Route("reference-float32", torch.float32, "reference"),
    Route("native-float32", torch.float32, "auto"),
    Route("native-bfloat16", torch.float32, "auto", compute_dtype=torch.bfloat16),
    Route("native-avx512", torch.float32, "auto", "avx512"),
    Route("native-avx2", torch.float32, "auto", "avx2"),
    Route("native-baseline", torch.float32, "auto", "baseline"),
]
NATIVE = [r for r in ROUTES if r.backend == "auto"]


def each(routes: list[Route]) -> pytest.MarkDecorator:
    """Parametrises a test over `route`."""
    return pytest.mark.parametrize("route", routes, ids=lambda r: r.name)


def isas() -> list[str]:
    """The ISAs of the compiled kernels that this CPU can run, and the emulated one, whose vectors are as wide as AVX-512's; the module that asks is skipped where there are none."""
    if not native.available_isas():
        pytest.skip(f"compiled kernels {native.load()[1]}", allow_module_level=True)
    return [*native.available_isas(), "emulated_bf16"]
