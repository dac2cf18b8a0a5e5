"""Every Triton kernel and the chunk loop in Triton's interpreter, on CPU tensors, against the reference in float64.

`test_triton_interpreter.py` runs this file in a process of its own: TRITON_INTERPRET must be set before triton is imported.
"""

from __future__ import annotations

import triton_interpreter  # isort: skip  # first: it sets TRITON_INTERPRET and mends the interpreter

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import emulated_cuda
import golden
import pytest
import sweeps
import test_margin_softmax_golden
import test_ops
import torch
from recog_fast.triton_kernels import configs
from recog_fast.triton_kernels.merge import run_add_partials, run_merge_tiles
from routes import Route
from sweeps import STEMS, results
from test_ops import calls, sample
from torch import Tensor

import recog_fast as rf
from recog_fast import reference
from recog_fast.ops import _cuda, _cuda_native, chunks

assert triton_interpreter.interpreter
torch.utils.deterministic.fill_uninitialized_memory = True

OPERATIONS: dict[str, Callable[..., Any]] = {
    "effective_prototypes": _cuda.prototypes, "negative_logsumexp": _cuda.forward, "unknown_rejection": _cuda.unknown,
    "class_gradient": _cuda.gradient, "class_step": _cuda.step,
}  # fmt: skip
POINTERS = configs.Tile(64, 64, 32, warps=4, stages=2)
DESCRIPTORS = dataclasses.replace(POINTERS, tma=True)
EAGER = dataclasses.replace(DESCRIPTORS, lazy_index=False)
# several chunks, the last ragged, their borders inside a tile of the whole; several slabs, the last narrower
PLAN = chunks.Plan(96, 40, POINTERS)
BOTH = {"cuda_effective_prototypes", "cuda_class_step"}
WHOLE = chunks.Plan(4096, 4096, dataclasses.replace(POINTERS, rows=32, classes=128))


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """torch.empty is filled with NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def inside_nan(t: Tensor) -> Tensor:
    """The same values with NaN before and behind them in memory, whoever reads there; `triton_interpreter` refuses it too."""
    if not t.dtype.is_floating_point or t.dim() == 0:
        return t.clone()
    margin = 64 * t[:1].numel()
    memory = torch.full((2 * margin + t.numel(),), float("nan"), dtype=t.dtype)
    memory[margin : margin + t.numel()] = t.reshape(-1)
    return memory[margin : margin + t.numel()].view(t.shape)


def check(stem: str, arguments: tuple[Any, ...], plan: chunks.Plan = PLAN, **options: Any) -> None:
    """The chunk loop in that plan against the reference, operands amid NaN."""

    def ours(*taken: Any, **chosen: Any) -> Any:
        return OPERATIONS[stem](*taken, **chosen, **({} if stem == "effective_prototypes" else {"plan": plan}))

    sweeps.check(stem, arguments, ours, inside_nan, **options)


# N: below, above a tile and past the padding; C: three chunks, the last ragged, and one of 4 classes; D: a multiple of the step, an odd one
@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize(("n", "c", "d", "plan"), [
    (37, 200, 64, PLAN), (130, 100, 33, PLAN), (64, 290, 128, WHOLE),
    (41, 200, 64, chunks.Plan(100, 64, DESCRIPTORS)), (41, 200, 64, chunks.Plan(64, 64, EAGER)),
])  # fmt: skip
def test_every_sweep(stem: str, n: int, c: int, d: int, plan: chunks.Plan) -> None:
    """Rules, clamp, memory, margin and unknown rows in one batch, labels -1 and -2."""
    s = sample(n, c, d, seed=n)
    s["labels"][3:5] = -2
    s["targets"] = s["labels"].clone()
    check(stem, calls(s)[stem], plan)


@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize(("k", "plan"), [(3, PLAN), (2, chunks.Plan(50, 64, DESCRIPTORS))])
def test_sub_centers(stem: str, k: int, plan: chunks.Plan) -> None:
    check(stem, calls(sample(40, 110, 32, k, seed=k))[stem], plan)


@pytest.mark.parametrize(("stem", "launches"), [("effective_prototypes", {"cuda_effective_prototypes"}), ("class_gradient", BOTH), ("class_step", BOTH)])
@pytest.mark.parametrize("k", [1, 3])
def test_rows_of_w_by_the_cuda_kernels(stem: str, launches: set[str], k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The chunk loop with csrc/cuda's kernels, emulated, in place of Triton's element-wise ones."""
    emulated_cuda.take_over(monkeypatch)
    module, seen = emulated_cuda.module(), set()

    class Spy:
        def __getattr__(self, name: str) -> Any:
            seen.add(name)
            return getattr(module, name)

    monkeypatch.setattr(_cuda_native, "_extension", lambda t: Spy())
    check(stem, calls(sample(40, 110, 32, k, seed=k))[stem])
    assert seen >= launches


@pytest.mark.parametrize("stem", STEMS)
def test_plain_rows(stem: str) -> None:
    """No rule, no memory: the kernels' other constants."""
    s = sample(37, 130, 32, rules=False, memory=False)
    s["terms"][4] = 0
    check(stem, calls(s)[stem])


@pytest.mark.parametrize("kind", [reference.UNKNOWN_DOUBLE, reference.UNKNOWN_SINGLE])
def test_slopes_of_one_kind(kind: int) -> None:
    s = sample(20, 100, 32, rules=False)
    s["terms"][4] = kind
    check("class_gradient", calls(s)["class_gradient"])


def test_loss_only_equals_the_full_forward() -> None:
    arguments = calls(sample(40, 130, 64))["negative_logsumexp"]
    full = _cuda.forward(*arguments, plan=PLAN)
    short = _cuda.forward(*arguments, want_pull=False, plan=PLAN)
    assert all(torch.equal(a, b) for a, b in zip(full[:3], short[:3], strict=True)) and short[3].shape == (0, 64)


def test_the_same_bits_again_and_for_other_chunks_the_same_index() -> None:
    arguments = calls(sample(37, 130, 32))["negative_logsumexp"]
    first, second = (_cuda.forward(*arguments, half=True, plan=PLAN) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    for plan in (WHOLE, chunks.Plan(70, 7, POINTERS)):
        assert torch.equal(_cuda.forward(*arguments, half=True, plan=plan)[2], first[2])


def test_ties_take_the_lowest_class() -> None:
    """Across tiles and chunks, in float32 and bfloat16."""
    p = torch.full((250, 64), 0.125)  # sums that nothing rounds, in whatever order NumPy adds
    for half in (False, True):
        for tile in (POINTERS, EAGER):
            plan = chunks.Plan(96, 96, tile)
            _, _, index, _ = _cuda.forward(p[:4], p, torch.tensor([0, 5, -1, 249]), 64.0, None, None, None, None, True, True, half, plan=plan)
            assert index.tolist() == [1, 0, 0, 0]


@pytest.fixture
def followed(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """A mark for each forward loop: whether its offsets follow the maximum."""
    marks: list[bool] = []
    run = chunks._Forward.run

    def noting(self: chunks._Forward, offsets: Tensor | None) -> Tensor:
        marks.append(offsets is None)
        return run(self, offsets)

    monkeypatch.setattr(chunks._Forward, "run", noting)
    return marks


@pytest.mark.parametrize(("scale", "rule"), [
    (100.0, None),  # redone: e^(64 - 200) is no float32
    (64.0, rf.InterclassFilter(rf.Softmax(), 0.1)),  # redone: sums of e^-64
    (256.0, rf.CircleMargin()),  # follows the maximum from the start
])  # fmt: skip
def test_rows_far_from_every_class(scale: float, rule: Any, followed: list[bool]) -> None:
    """Rows opposite to all classes beside ordinary ones: sums that leave float32's range under the fixed offset."""
    g = torch.Generator().manual_seed(1)
    center = torch.nn.functional.normalize(torch.randn(1, 32, generator=g), dim=1)
    weight = center + torch.linspace(0.01, 0.1, 150).unsqueeze(1) * torch.randn(150, 32, generator=g)  # the nearest in the last chunk
    unit = torch.nn.functional.normalize(torch.cat([-center.expand(5, 32), torch.randn(6, 32, generator=g)]) + 0.01 * torch.randn(11, 32, generator=g), dim=1)
    labels = torch.tensor([0, 1, -1, -2, 4, 5, 6, 7, -1, 9, 149])
    its, thresholds = rule.rule(torch.full((11,), 0.3)) if rule is not None else (None, None)
    rules = rf.rules.pack_rules(labels, its, thresholds, 1.0, torch.float32)
    check("negative_logsumexp", (unit, weight, labels, scale, rules, None, None, None, False, True))
    assert followed == ([True] * 2 if scale == 256 else [False, True] * 2)


def test_the_offset_knows_the_largest_exponent(followed: list[bool]) -> None:
    """Rows on top of a negative: under a rule with f_max = 2, and with prototypes 3 long, one loop is enough."""
    s = sample(20, 130, 32, rules=False, memory=False)
    unit = torch.nn.functional.normalize(s["weight"][30:50], dim=1)
    rule = rf.NegativeRule(above=(1.0, 1.0, 0.0, 2.0, 1.0), f_max=2.0)
    rules = rf.rules.pack_rules(s["labels"], rule, torch.zeros(20), 1.0, torch.float32)
    check("negative_logsumexp", (unit, s["weight"], s["labels"], 64.0, rules, None, None, None, False, True))
    rule = rf.NegativeRule(above=(-1.0, 1.0, 1.0, -2.0, 1.0), below=(0.0, 0.0, 0.0, 0.0, 0.0), f_max=1.25)  # its vertex at 0.5
    rules = rf.rules.pack_rules(s["labels"], rule, torch.zeros(20), 1.0, torch.float32)
    check("negative_logsumexp", (unit, s["weight"], s["labels"], 64.0, rules, None, None, None, False, True))
    long = 3 * torch.nn.functional.normalize(s["weight"], dim=1)
    check("negative_logsumexp", (unit, long, s["labels"], 60.0, None, None, None, None, True, True))
    assert followed == [False] * 6


def test_the_low_part_of_lse_counts() -> None:
    """p = 2^(96 - 100 - 3e-6), from operands that float32 holds exactly."""
    unit, prototypes = torch.zeros(1, 32), torch.zeros(1, 32)
    unit[0, 0], prototypes[0, 0] = 1.0, 0.75
    lse = torch.tensor([(100 + 3e-6) * chunks.LN2], dtype=torch.float64)
    mass = _cuda.unknown(unit, prototypes, torch.tensor([-1]), lse, torch.zeros(1), 128 * chunks.LN2, None, None, None, True, True)[0]
    assert abs(mass.item() / 2 ** (-4 - 3e-6) - 1) <= 2e-7


def test_prototypes_longer_than_one() -> None:
    """unit=True takes rows as they are; renormalize=False lengthens them: the offset knows their length."""
    s = sample(20, 130, 32, rules=False, memory=False)
    long = 4 * torch.nn.functional.normalize(s["weight"], dim=1)
    check("negative_logsumexp", (s["unit"], long, s["labels"], 60.0, None, None, None, None, True, True))
    check("class_gradient", (s["unit"], s["targets"], s["terms"], long, 8.0, None, None, None, None, True, True))
    s = sample(20, 130, 32, rules=False)
    for stem in ("negative_logsumexp", "class_gradient", "unknown_rejection"):
        check(stem, (*calls(s)[stem][:-1], False))


def test_one_class_and_no_rows() -> None:
    unit, weight = torch.nn.functional.normalize(torch.randn(3, 32), dim=1), torch.randn(1, 32)
    check("negative_logsumexp", (unit, weight, torch.tensor([0, -1, 0]), 64.0, None, None, None, None, False, True))
    lse, cosine, index, pull = _cuda.forward(unit[:0], weight, torch.zeros(0, dtype=torch.int64), 64.0, None, None, None, None, False, True)
    assert (lse.shape, cosine.shape, index.shape, pull.shape) == ((0,), (0,), (0,), (0, 32)) and lse.dtype == torch.float64
    nothing = torch.zeros(5, 0)
    d_weight = _cuda.gradient(unit[:0], torch.zeros(0, dtype=torch.int64), nothing, weight, 64.0, None, None, None, None, False, True)
    assert torch.equal(d_weight, torch.zeros_like(weight))


def test_zero_and_huge_rows_and_cancelled_injection() -> None:
    weight = torch.randn(70, 40)
    weight[0], weight[1], weight[2] = 0.0, 1e30, 1e-30
    memory = torch.randn(70, 40)
    memory[3], weight[4] = -weight[3] / weight[3].norm(), memory[4]
    check("effective_prototypes", (weight, memory, torch.ones(70), None, True))
    s = sample(20, 70, 40)
    s["weight"], s["memory"] = weight, (memory, torch.ones(70), None)
    for stem in ("class_gradient", "class_step"):
        arguments = calls(s)[stem]
        ours = results(stem, arguments, OPERATIONS[stem], Tensor.clone, plan=PLAN)
        assert all(bool(torch.isfinite(t).all()) for t in ours)
        if stem == "class_gradient":
            assert not bool(ours[0][0].any())


def test_a_bad_row_spoils_only_itself() -> None:
    s = sample(40, 130, 32, rules=False, memory=False)
    clean = _cuda.forward(*calls(s)["negative_logsumexp"], plan=PLAN)
    s["unit"][7, 3] = float("nan")
    lse, cosine, _, pull = _cuda.forward(*calls(s)["negative_logsumexp"], plan=PLAN)
    others = torch.arange(40) != 7
    assert torch.equal(lse[others], clean[0][others]) and torch.equal(cosine[others], clean[1][others]) and torch.equal(pull[others], clean[3][others])
    assert bool(torch.isnan(lse[7]))


MEMBERS = torch.tensor([0, 3, 4, 50, 51, 96, 97, 128, 129])


@pytest.mark.parametrize("unknown", [False, True])
@pytest.mark.parametrize("sparse", [False, True])
def test_sampled_classes(unknown: bool, sparse: bool) -> None:
    """Margin rows see the members, targets may be any class, rows labelled -1 see all; steps dense and sparse."""
    s = sample(30, 130, 32, seed=3)
    if not unknown:
        s["terms"][4] = 0
        s["labels"] = torch.where(s["labels"] == -1, -2, s["labels"])
    check("class_step", calls(s)["class_step"], members=MEMBERS, sparse=sparse)
    if not sparse:
        check("class_gradient", calls(s)["class_gradient"], members=MEMBERS)
        check("negative_logsumexp", calls(s)["negative_logsumexp"], members=MEMBERS)


def test_merging() -> None:
    """Partial sums in float64 and in order; the larger cosine, then the lower class; more partials than are read at once."""
    g = torch.Generator().manual_seed(0)
    partials = torch.rand(70, 300, generator=g)
    total = torch.rand(300, generator=g, dtype=torch.float64)
    expected = total + partials[:66].double().sum(0)
    run_add_partials(partials, total, 66)
    assert (total - expected).abs().max() <= 1e-13
    cosines = torch.randint(0, 9, (70, 128), generator=g).float()
    indices = torch.arange(70, dtype=torch.int32).unsqueeze(1).repeat(1, 128)
    nearest, index = torch.full((128,), 7.0), torch.full((128,), 5)
    sums, whole = torch.rand(70, 128, generator=g), torch.rand(128, generator=g, dtype=torch.float64)
    expected = whole + sums[:60].double().sum(0)
    run_merge_tiles((sums, cosines, indices), whole, nearest, index, 60, 1000)
    assert (whole - expected).abs().max() <= 1e-13
    best = cosines[:60].max(0).values
    lowest = (cosines[:60] == best).to(torch.int8).argmax(0)
    assert torch.equal(nearest, best.clamp_min(7.0)) and torch.equal(index, torch.where(best > 7, lowest + 1000, 5))


def test_step_without_velocity_and_plain_momentum() -> None:
    s = sample(20, 130, 32)
    arguments = calls(s)["class_step"]
    check("class_step", (*arguments[:4], None, *arguments[5:12], 0.0, *arguments[13:]))
    check("class_step", (*arguments[:14], False))


def test_fallback_goes_to_the_reference() -> None:
    """What `backends()` says of float64 and kept exponentials; this process has no CUDA device, so everything does."""
    arguments = calls(sample())["negative_logsumexp"]
    ours = _cuda.KERNELS["negative_logsumexp"](*arguments)
    with rf.ops.use_backend("reference"):
        truth = torch.ops.recog_fast.negative_logsumexp(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(ours, truth, strict=True))


# The whole chain: the registered operations of CPU tensors taken over by the CUDA ones.
FLOAT32 = Route("interpreter-float32", torch.float32, "auto")
HALF = Route("interpreter-bfloat16", torch.float32, "auto", compute_dtype=torch.bfloat16, pairs="bfloat16")


@pytest.fixture(scope="module")
def taken_over() -> Iterator[None]:
    """torch.ops.recog_fast.* on CPU tensors run the chunk loop."""

    def runs(operation: str, *operands: Tensor | None, kept: Tensor | None = None) -> bool:
        ours = rf.ops._library.backend() == "auto" and kept is None
        return ours and all(t is None or t.dtype != torch.float64 for t in operands)

    library = torch.library.Library("recog_fast", "IMPL")
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        patch.setattr(_cuda, "_runs", runs)
        patch.setattr(chunks, "plan_for", lambda kernel, x, subcenters, rules=False: WHOLE)
        for stem, kernel in _cuda.KERNELS.items():
            library.impl(stem, kernel, "CPU", allow_override=True)
        stack.callback(library._destroy)
        yield


def small_golden(op: str, *tags: str) -> list[Any]:
    """Golden cases of that operation but the middle-sized ones, which take seconds each here; of those every fifth."""
    found = golden.cases(op, *tags, without=("norm passed separately",))
    middle = [p for p in found if str(p.values[0]).endswith("_m")]
    return [p for p in found if p not in middle or middle.index(p) % 5 == 0]


@pytest.mark.parametrize("name", small_golden("margin_softmax"))
def test_golden_margin_softmax(taken_over: None, name: str) -> None:
    test_margin_softmax_golden.test_golden(name, FLOAT32)


@pytest.mark.parametrize("name", small_golden("margin_softmax")[::3])
def test_golden_margin_softmax_in_bfloat16(taken_over: None, name: str) -> None:
    test_margin_softmax_golden.test_golden(name, HALF)


@pytest.mark.parametrize("name", golden.cases("inject_margin"))
def test_golden_injected(taken_over: None, name: str) -> None:
    test_margin_softmax_golden.test_golden_injected(name, FLOAT32)


@pytest.mark.parametrize("route", [FLOAT32, HALF], ids=lambda r: r.name)
@pytest.mark.parametrize("name", golden.cases("uir"))
def test_golden_unknown_rejection(taken_over: None, name: str, route: Route) -> None:
    test_ops.test_golden_unknown_rejection(name, route)


@pytest.mark.parametrize("name", golden.cases("inject"))
def test_golden_inject(taken_over: None, name: str) -> None:
    test_ops.test_golden_inject(name, FLOAT32)


@pytest.mark.parametrize("name", golden.cases("shard"))
def test_golden_shards(taken_over: None, name: str) -> None:
    test_margin_softmax_golden.test_golden_shards(name, FLOAT32)
