"""The dispatch table against what really runs."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from routes import NATIVE, PAIR_ISAS
from test_ops import calls, sample
from torch import Tensor

import recog_fast as rf
from recog_fast import native
from recog_fast.ops import _dispatch, _library

SWEEPS = {"effective_prototypes", "row_sweep", "unknown_sweep", "class_sweep"}


class Spy:
    """The extension, writing down which sweeps run and in what arithmetic they were asked for."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.seen: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name in SWEEPS:
            self.seen.append(name)
        return getattr(self.module, name)


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Spy:
    module, reason = native.load()
    if module is None:
        pytest.skip(f"compiled kernels {reason}")
    watched = Spy(module)
    monkeypatch.setattr(native, "load", lambda: (watched, reason))
    return watched


def run(stem: str, dtype: torch.dtype, half: bool) -> list[Tensor]:
    torch.manual_seed(0)  # the velocity
    arguments = [a.clone() if isinstance(a, Tensor) else a for a in calls(sample())[stem]]
    arguments = [a.to(dtype) if isinstance(a, Tensor) and a.dtype == torch.float32 else a for a in arguments]
    options = {} if stem == "effective_prototypes" else {"half": half}
    out = getattr(torch.ops.recog_fast, stem)(*arguments, **options)
    return [arguments[3], arguments[4]] if stem == "class_step" else list(out) if isinstance(out, tuple) else [out]


STEMS = {"effective_prototypes": "effective_prototypes", "negative_logsumexp": "row_sweep", "unknown_rejection": "unknown_sweep", "class_gradient": "class_sweep", "class_step": "class_sweep"}


@pytest.mark.parametrize("isa", ["", *_dispatch.PAIR_FORMATS])
@pytest.mark.parametrize("stem", list(STEMS))
def test_what_runs_is_what_the_table_says(spy: Spy, stem: str, isa: str) -> None:
    """Every operation, dtype, backend and ISA: whether a kernel ran, and whether asking for 16 bits changed its bits."""
    if isa and not spy.module.runs_isa(isa):
        pytest.skip(f"this CPU has no {isa}")
    try:
        spy.module.select_isa(isa)
        for backend in ("auto", "reference"):
            for dtype in (torch.float32, torch.float64):
                with rf.ops.use_backend(backend):
                    results = {}
                    for half in (False, True):
                        spy.seen.clear()
                        results[half] = run(stem, dtype, half)
                        call = _dispatch.Call(backend, frozenset({"cpu"}), frozenset({dtype}), spy.module.active_isa(), half, stem)
                        runs = _dispatch.choose(call).runs
                        assert spy.seen == ([] if runs == _dispatch.REFERENCE else [STEMS[stem]]), (backend, dtype, half)
                    same = all(torch.equal(a, b) for a, b in zip(results[False], results[True], strict=True))
                    assert same == (runs != _dispatch.NATIVE_HALF), (backend, dtype)
    finally:
        spy.module.select_isa("")


@pytest.mark.parametrize("isa", list(_dispatch.PAIR_FORMATS))
def test_formats_are_the_extensions(spy: Spy, isa: str) -> None:
    if not spy.module.runs_isa(isa):
        pytest.skip(f"this CPU has no {isa}")
    try:
        assert spy.module.select_isa(isa) == isa
        assert spy.module.pair_format() == _dispatch.PAIR_FORMATS[isa]
        shown = rf.backends()
        assert f"native {isa}" in shown["cpu"] and (_dispatch.PAIR_FORMATS[isa] or "in float32") in shown["cpu"]
        lines = dict(line.split(": ", 1) for line in shown["dispatch"].splitlines())
        half = lines.get("bfloat16 asked for, ISA with 16-bit operands")
        assert half == (None if _dispatch.PAIR_FORMATS[isa] is None else f"{isa}, {_dispatch.PAIR_FORMATS[isa]}")
        assert lines["anything else"] == f"{isa}, float32"
    finally:
        spy.module.select_isa("")


def test_every_16_bit_isa_has_a_route() -> None:
    assert {isa for isa, kind in _dispatch.PAIR_FORMATS.items() if kind is not None} == set(PAIR_ISAS)


def test_without_the_extension_the_reference_runs_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "load", lambda: (None, "not built (test)"))
    monkeypatch.setattr(native, "warn_missing", lambda: warned.append(True))
    warned: list[bool] = []
    x, w = torch.randn(3, 8), torch.randn(20, 8)
    ours = rf.margin_softmax_loss(x, w, torch.arange(3), compute_dtype=torch.bfloat16)
    assert warned
    warned.clear()
    with rf.ops.use_backend("reference"):
        assert torch.equal(ours, rf.margin_softmax_loss(x, w, torch.arange(3)))
    rf.margin_softmax_loss(x.double(), w.double(), torch.arange(3))
    assert not warned  # the reference was asked for: nothing is missing
    shown = rf.backends()
    assert "not built (test)" in shown["cpu"] and "extension not built: reference <- now (not built (test))" in shown["dispatch"]


def test_the_table_is_total_and_each_line_decides_something() -> None:
    """Every call finds a line, and no line is shadowed by those above it."""
    decided = set()
    for backend in ("auto", "reference"):
        for device in ("cpu", "cuda"):
            for dtype in (torch.float32, torch.float64):
                for isa in (None, *_dispatch.PAIR_FORMATS):
                    for half in (False, True):
                        for stem, triton, cuda in itertools.product(_library.SCHEMAS, (False, True), (False, True)):
                            call = _dispatch.Call(backend, frozenset({device}), frozenset({dtype}), isa, half, stem, triton, cuda=cuda)
                            decided.add(_dispatch.choose(call))
    assert decided == set(_dispatch.TABLE)


def test_other_devices_go_to_the_reference() -> None:
    meta = torch.empty(2, 2, device="meta")
    with NATIVE[0]():
        assert _library.compiled(meta) is None
        assert _library.compiled(torch.empty(2, 2), meta) is None
        assert _library.compiled(torch.empty(2, 2)) is not None


@pytest.mark.parametrize("missing", [None, "triton is not installed"])
def test_cuda_tensors_go_to_triton_or_the_reference(missing: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 and 16-bit requests to the Triton kernels where the device can run them; float64, kept exponentials and mixed
    devices never; and `backends()` says so."""
    monkeypatch.setattr(_dispatch, "triton_missing", lambda index=0: missing)
    monkeypatch.setattr(_dispatch, "cuda_missing", lambda: "an old driver")

    def runs(backend: str = "auto", devices: tuple[str, ...] = ("cuda",), dtype: torch.dtype = torch.float32, kept: bool = False, stem: str = "class_gradient") -> str:
        call = dataclasses.replace(_dispatch.call_of_device(backend, [], operation=stem, kept=kept), devices=frozenset(devices), dtypes=frozenset({dtype}))
        return _dispatch.choose(call).runs

    ours = _dispatch.TRITON if missing is None else _dispatch.REFERENCE
    assert {runs(stem=stem) for stem in STEMS} == {ours} and runs(dtype=torch.bfloat16) == ours
    for other in (runs("reference"), runs(dtype=torch.float64), runs(kept=True), runs(devices=("cuda", "cpu")), runs(stem="memory_write"), runs(devices=("meta",))):
        assert other == _dispatch.REFERENCE
    line = next(text for text in _dispatch.describe("auto").splitlines() if text.startswith("CUDA tensors: "))
    assert line == f"CUDA tensors: {ours}; rows of W: Triton (an old driver)" if missing is None else missing in line


@pytest.mark.parametrize("missing", [None, "an old driver"])
def test_the_memory_of_a_cuda_device_goes_to_cuda_or_torch(missing: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 and bfloat16 rings to the CUDA C++ kernel where the device can run it, with or without Triton; the rest never."""
    monkeypatch.setattr(native, "cuda_missing", lambda index=0: missing)
    monkeypatch.setattr(_dispatch, "cuda_missing", lambda: missing)

    def runs(backend: str = "auto", device: str = "cuda", *dtypes: torch.dtype, stem: str = "memory_write") -> str:
        call = _dispatch.call_of_device(backend, [], operation=stem, kept=False)
        return _dispatch.choose(dataclasses.replace(call, devices=frozenset({device}), dtypes=frozenset(dtypes))).runs

    ours = _dispatch.CUDA_NATIVE if missing is None else _dispatch.REFERENCE
    assert runs("auto", "cuda", torch.float32) == runs("auto", "cuda", torch.bfloat16, torch.float32) == ours
    for other in (runs("reference"), runs("auto", "cpu"), runs("auto", "cuda", torch.float64), runs("auto", "cuda", torch.float16, torch.float32)):
        assert other == _dispatch.REFERENCE
    line = next(text for text in _dispatch.describe("auto").splitlines() if text.startswith("memory_write of"))
    assert line.endswith(f": {ours}") if missing is None else missing in line


def test_backends_has_its_keys() -> None:
    shown = rf.backends()
    assert list(shown) == ["cpu", "cuda", "triton", "dispatch"]
    assert all(isinstance(text, str) for text in shown.values())
    with rf.ops.use_backend("reference"):
        assert rf.backends()["cpu"] == "reference (use_backend)"
        assert 'use_backend("reference"): reference <- now' in rf.backends()["dispatch"]
