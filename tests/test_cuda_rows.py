"""class_step's epilogue and effective_prototypes of csrc/cuda, emulated on the CPU, against the reference in float64."""

from __future__ import annotations

import itertools
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from emulated_cuda import ORDERS, Guard, build, module, take_over
from sweeps import agree
from torch import Tensor

from recog_fast import reference
from recog_fast.ops import _cuda_native

ROWS = 14
SHORT, SHORTNESS = 11, 0.1  # a row with that |U|: rounding W^ moves U/|U| by 1/|U| of it


@dataclass
class Sgd:
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    nesterov: bool = False


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    take_over(monkeypatch)


def problem(columns: int, dtype: torch.dtype | None, seed: int = 0, rows: int = ROWS) -> dict[str, Tensor]:
    """Rows of W of every kind: ordinary, 0, huge, overflowing, tiny, with U near 0, NaN, infinite; dP, velocity, memory (dtype None: none)."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=g)
    weight = weight + 0.3 * weight.sign()
    memory = torch.nn.functional.normalize(torch.randn(rows, columns, generator=g), dim=1)
    strength, slot = torch.rand(rows, generator=g) + 0.1, torch.randperm(rows, generator=g).int()
    weight[1] = 0
    weight[2] *= 1e17
    weight[3] *= 1e30
    weight[4] *= 1e-30
    weight[5] *= 1e-6
    weight[6, columns // 2] = float("nan")
    weight[7, -1] = float("inf")
    strength[slot[8].item()] = 0.0
    slot[9] = -1
    weight[10] = torch.nn.functional.one_hot(torch.tensor(columns - 1), columns).float()
    for row, lam in ((10, 1.0), (SHORT, 1 - SHORTNESS)):  # |U| = 0 exactly, and short
        memory[slot[row]] = -weight[row] / weight[row].norm()
        strength[slot[row]] = lam
    out = {"weight": weight, "d": torch.randn(rows, columns, generator=g), "velocity": torch.randn(rows, columns, generator=g)}
    return out if dtype is None else out | {"rows": memory.to(dtype), "strength": strength, "slot": slot}


def injection(p: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor] | None:
    return (p["rows"], p["strength"], p["slot"]) if "rows" in p else None


def double(t: Tensor) -> Tensor:
    return t.double() if t.dtype in (torch.float32, torch.bfloat16) else t


def rates_of(sgd: Sgd | None, device: torch.device | str = "cpu") -> dict[str, Any]:
    """As the epilogue takes a step."""
    return {} if sgd is None else {"rates": torch.tensor([sgd.lr, sgd.momentum, sgd.weight_decay], device=device), "nesterov": sgd.nesterov}


def after(p: dict[str, Tensor], renormalize: bool, sgd: Sgd | None, velocity: bool, wide: bool) -> list[Tensor]:
    """[dW], or W and velocity after the step, by the reference in float64 (wide) or float32."""
    q = {name: (double(t) if wide else t.float() if t.dtype == torch.bfloat16 else t).clone() for name, t in p.items()}
    d = reference.prototype_chain(q["d"], q["weight"], *(injection(q) or ()), renormalize=renormalize)
    if sgd is None:
        return [d]
    speed = q["velocity"] if velocity else None
    reference.sgd_update(q["weight"], speed, d, sgd.lr, sgd.momentum, sgd.weight_decay, sgd.nesterov)
    return [q["weight"]] if speed is None else [q["weight"], speed]


def epilogue(
    p: dict[str, Tensor], renormalize: bool, sgd: Sgd | None, velocity: bool, shift: int = 0, device: str = "cpu",
    run: Callable[..., None] = _cuda_native.run_class_epilogue,
) -> list[Tensor]:  # fmt: skip
    """The same by the kernel; nothing outside its tensors is read (it would be NaN) or written."""
    guard = Guard(shift, device)
    q = {name: guard(t) for name, t in p.items()}
    gradient = guard(torch.full_like(p["weight"], float("nan"))) if sgd is None else None
    speed = q["velocity"] if velocity else None
    run(q["d"], q["weight"], injection(q), renormalize=renormalize, gradient=gradient, velocity=speed, **rates_of(sgd, q["weight"].device))
    guard.check()
    if gradient is not None:
        assert all(torch.equal(q[name].cpu().nan_to_num(7.0), p[name].nan_to_num(7.0)) for name in ("weight", "velocity"))
        return [gradient.cpu()]
    return [q["weight"].cpu()] if speed is None else [q["weight"].cpu(), speed.cpu()]


def by_row(ours: list[Tensor], plain: list[Tensor], truth: list[Tensor], what: object) -> None:
    """Each row by itself: the huge ones must not hide the others."""
    for a, b, c in zip(ours, plain, truth, strict=True):
        for row in range(len(a)):
            agree(a[row], b[row], c[row], 2e-6 / SHORTNESS if row == SHORT else 2e-6, (what, row))


# one warp, its last vector cut short; odd; several warps a row, the last of them partly idle; the most
SIZES = [1, 3, 4, 33, 128, 500, 512, 516, 1023, 2048, 4096]


def test_the_emulation_finds_what_it_promises() -> None:
    """Missing barriers, warps whose threads do not meet: tests/native/emulated/check.cpp."""
    done = subprocess.run([build("emulation_check") / "emulation_check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("memory", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", SIZES)
def test_epilogue_agrees_with_the_reference(columns: int, memory: torch.dtype | None) -> None:
    p = problem(columns, memory, columns)
    for renormalize, sgd, velocity in (
        (True, None, False), (True, Sgd(), True), (True, Sgd(nesterov=True), True), (True, Sgd(momentum=0.0), False), (False, Sgd(), True),
    ):  # fmt: skip
        arguments = renormalize, sgd, velocity
        by_row(epilogue(p, *arguments), after(p, *arguments, False), after(p, *arguments, True), arguments)


@pytest.mark.usefixtures("emulated")
def test_zero_rows_have_no_gradient_and_only_decay() -> None:
    p = problem(64, torch.bfloat16)
    (gradient,) = epilogue(p, True, None, False)
    assert not bool(gradient[1].any())
    weight, velocity = epilogue(p, True, Sgd(momentum=0.5), True)
    assert torch.equal(velocity[1], 0.5 * p["velocity"][1]) and torch.equal(weight[1], -0.1 * velocity[1])


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("columns", [64, 512, 1024])
def test_addresses_off_a_multiple_of_16_bytes(columns: int) -> None:
    """One by one instead of four at a time: the same sums in another order."""
    p = problem(columns, torch.bfloat16)
    arguments = True, Sgd(nesterov=True), True
    by_row(epilogue(p, *arguments, shift=1), after(p, *arguments, False), after(p, *arguments, True), columns)


def prototypes(
    p: dict[str, Tensor], renormalize: bool, dtype: torch.dtype, shift: int = 0, device: str = "cpu",
    run: Callable[..., None] = _cuda_native.run_prototype_rows,
) -> Tensor:  # fmt: skip
    guard = Guard(shift, device)
    q = {name: guard(t) for name, t in p.items()}
    out = guard(torch.full_like(p["weight"], float("nan"), dtype=dtype))
    run(q["weight"], injection(q), out, renormalize=renormalize)
    guard.check()
    return out.cpu()


def exact_prototypes(p: dict[str, Tensor], renormalize: bool, wide: bool) -> Tensor:
    """The reference's, in float64 (wide) or float32."""
    taken = (p["weight"], *(injection(p) or ()))
    return reference.effective_prototypes(*((double(t) if wide else t.float() if t.dtype == torch.bfloat16 else t) for t in taken), renormalize=renormalize)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("memory", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", SIZES)
def test_prototypes_agree_with_the_reference(columns: int, memory: torch.dtype | None) -> None:
    p = problem(columns, memory, columns)
    for renormalize in (True, False):
        ours = prototypes(p, renormalize, torch.float32)
        by_row([ours], [exact_prototypes(p, renormalize, False)], [exact_prototypes(p, renormalize, True)], renormalize)
        half, rounded = prototypes(p, renormalize, torch.bfloat16), ours.bfloat16()
        assert torch.equal(torch.isnan(half), torch.isnan(rounded)) and torch.equal(half.nan_to_num(7.0), rounded.nan_to_num(7.0))


@pytest.mark.usefixtures("emulated")
def test_rounding_to_bfloat16_is_torchs() -> None:
    """Ties, subnormals, the largest, on values that pass through unchanged: renormalize=False, W = 0, lam = 1."""
    bits = torch.randint(0, 2**31, (16, 4096), generator=torch.Generator().manual_seed(0)).int()
    bits[:8] = bits[:8] & ~0xFFFF | 0x8000  # ties
    bits[8] = bits[8] & 0x007FFFFF  # subnormal
    values = bits.view(torch.float32) * torch.tensor([1.0, -1.0]).repeat(2048)
    values = torch.where(torch.isfinite(values), values, 1.0)
    out = torch.empty(16, 4096, dtype=torch.bfloat16)
    memory = values, torch.ones(16), torch.arange(16, dtype=torch.int32)
    _cuda_native.run_prototype_rows(torch.zeros(16, 4096), memory, out, renormalize=False)
    assert torch.equal(out.view(torch.int16), (values + 0.0).bfloat16().view(torch.int16))


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [33, 512, 1024])
def test_the_next_prototypes_are_those_of_the_new_weight(columns: int, dtype: torch.dtype) -> None:
    """Same bits as a pass of their own, with another memory than the step's."""
    p, later = problem(columns, torch.bfloat16), problem(columns, torch.bfloat16, seed=5)
    p["weight"] = p["weight"].nan_to_num(1.0, 1.0)
    guard = Guard()
    q, out = {name: guard(t) for name, t in p.items()}, guard(torch.zeros(ROWS, columns, dtype=dtype))
    _cuda_native.run_class_epilogue(
        q["d"], q["weight"], injection(q), renormalize=True, velocity=q["velocity"], **rates_of(Sgd()), prototypes=out, next_injection=injection(later)
    )  # fmt: skip
    guard.check()
    plain = epilogue(p, True, Sgd(), True)
    assert torch.equal(q["weight"], plain[0]) and torch.equal(q["velocity"], plain[1])
    again = torch.empty_like(out)
    _cuda_native.run_prototype_rows(q["weight"], injection(later), again, renormalize=True)
    assert torch.equal(out.nan_to_num(7.0), again.nan_to_num(7.0)) and bool(torch.isfinite(out).any())


@pytest.mark.parametrize("columns", [96, 512, 1030])
def test_no_order_of_threads_shows(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks and threads forward, backward and mixed: the same bits, so none needs another's work before a barrier."""
    p, results = problem(columns, torch.bfloat16), []
    for order in ORDERS:
        take_over(monkeypatch, order)
        results.append([*epilogue(p, True, Sgd(nesterov=True), True), prototypes(p, True, torch.float32)])
    for other in results[1:]:
        assert all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(results[0], other, strict=True))


@pytest.mark.usefixtures("emulated")
def test_no_rows_and_rows_too_long() -> None:
    empty = torch.zeros(0, 8)
    _cuda_native.run_prototype_rows(empty, None, empty, renormalize=True)
    emulated = module()
    for columns, stem in itertools.product((0, 4097), ("cuda_effective_prototypes", "cuda_class_step")):
        extra = {"prototypes": 0, "bfloat16": False} if stem == "cuda_effective_prototypes" else {"d_prototypes": 0}
        with pytest.raises(ValueError, match=f"{stem}: expected 1 <= D <= 4096, got {columns}"):
            getattr(emulated, stem)(weight=0, memory=emulated.CudaInjection(), R=1, D=columns, stream=0, device=0, **extra)


@pytest.mark.usefixtures("emulated")
def test_a_failed_launch_raises_with_the_kernels_name(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.ones(3, 8)
    monkeypatch.setenv("RECOG_FAST_EMULATED_ERROR", "35")
    with pytest.raises(RuntimeError, match=r"effective_prototypes: no driver \(emulated\) \(cudaErrorInsufficientDriver\)"):
        _cuda_native.run_prototype_rows(weight, None, torch.empty_like(weight), renormalize=True)
    with pytest.raises(RuntimeError, match="class_step: no driver"):
        _cuda_native.run_class_epilogue(weight, weight, None, renormalize=True, **rates_of(Sgd()))
    monkeypatch.delenv("RECOG_FAST_EMULATED_ERROR")
    out = torch.empty_like(weight)
    _cuda_native.run_prototype_rows(weight, None, out, renormalize=True)
    assert torch.allclose(out, torch.full_like(out, 8**-0.5))
