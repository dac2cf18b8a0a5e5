"""16-bit sweeps: shapes, hostile values, realistic sizes against the ideal path, and nothing else in 16 bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from budgets import against_ideal, budget, ideal_bfloat16, relative
from hypothesis import given, settings
from hypothesis import strategies as st
from routes import FLOAT64, HALF, NATIVE, Route, each, pair_format
from test_ops import calls, sample
from torch import Tensor

import recog_fast as rf
from recog_fast import native, reference
from recog_fast.rules import NegativeRule, pack_rules

# f and g of the quadratic meet at the threshold 0.1: rounding a cosine over it changes nothing much
SMOOTH = NegativeRule(above=(1.0, 0.8, 0.01, 2.0, 0.8))


def cosine_error(route: Route, dimension: int) -> float:
    """A bound on |error| of a 16-bit cosine of unit rows: sum |x_d p_d| 2^-8, or int16 steps of 1/32767 in sum |x_d| <= sqrt(D)."""
    return 2.0**-8 if pair_format(route) == "bfloat16" else dimension**0.5 / 32767


def check_ops(route: Route, s: dict[str, Any]) -> None:
    """Every sweep with half=True against the float64 reference, within worst-case bounds from the cosines' error."""
    dimension = s["unit"].shape[1]
    largest_slope = 1.0 if s["rules"] is None else 2.8  # f' of SMOOTH at c = 1
    share = 2 * s["scale"] * largest_slope * cosine_error(route, dimension) + 2.0**-7  # of a p, and of an operand
    for stem, arguments in calls(s).items():
        if stem == "effective_prototypes":
            continue
        results = {}
        for kind in ("native", "float64"):
            taken = [a.clone() if isinstance(a, Tensor) else a for a in arguments]
            if kind == "float64":
                taken = [a.double() if isinstance(a, Tensor) and a.dtype == torch.float32 else a for a in taken]
            with route(), rf.ops.use_backend("auto" if kind == "native" else "reference"):
                out = getattr(torch.ops.recog_fast, stem)(*taken, half=True)
            results[kind] = (taken[3], taken[4]) if stem == "class_step" else out if isinstance(out, tuple) else (out,)
        scales = _scales(stem, s, results["float64"])
        for ours, truth, scale in zip(results["native"], results["float64"], scales, strict=True):
            if not truth.dtype.is_floating_point:
                continue
            finite = torch.isfinite(truth)
            assert torch.equal(torch.isfinite(ours), finite), stem
            error = (ours.double() - truth)[finite].abs().max().item() if bool(finite.any()) else 0.0
            assert error <= share * scale + 1e-5, (stem, error, share * scale)


def _scales(stem: str, s: dict[str, Any], truth: tuple[Tensor, ...]) -> tuple[float, ...]:
    """What a relative error of the p is relative to, for each result of an operation."""
    g = 1.0 if s["rules"] is None else 2.8
    largest = [float(t.abs().max()) if t.numel() else 0.0 for t in truth]
    if stem == "negative_logsumexp":
        return 1.0, 1.0, 0.0, g
    if stem == "unknown_rejection":
        return largest[0], 2 * largest[1] + largest[0], 2 * largest[2] + largest[0], 3 * largest[0]
    # |dW_j| <= sum_i |dL/dc_ij| / |W_j|
    gradient = float(sum_of_slopes(s).max()) / float(s["weight"].norm(dim=-1).min()) if s["unit"].numel() else 0.0
    return (gradient,) if stem == "class_gradient" else (0.2 * gradient, gradient)


def sum_of_slopes(s: dict[str, Any]) -> Tensor:
    """sum_i |dL/dc_ij| bounded: (C,), the p of every row at most e^{s f - lse}."""
    unit, prototypes = s["unit"].double(), reference.effective_prototypes(s["weight"].double(), *s["memory"])
    cosine = (unit @ prototypes.reshape(-1, unit.shape[1]).t()).unflatten(1, (len(s["weight"]), -1)).amax(2)
    f, g = reference._apply_rules(cosine, s["rules"])
    lse, negative, target, mean, _ = s["terms"].double().unsqueeze(2)
    p = torch.exp(s["scale"] * f - lse)
    return (negative.abs() * (p * g.abs() + p.clamp_max(1) * (2 + mean.abs()) + p * len(s["weight"]) + 1) + target.abs()).sum(0)


def half_sample(n: int, c: int, d: int, k: int, seed: int, rules: bool, memory: bool) -> dict[str, Any]:
    s = sample(n, c, d, k, seed=seed, rules=False, memory=memory)
    if rules:
        s["rules"] = pack_rules(s["labels"], SMOOTH, torch.full((n,), 0.1), 1.0, torch.float32)
    return s


# D: odd, at and past a panel, 2047; N: up to three times the int32 sum of 512 rows; C: around tiles (96) and blocks (960)
@each(HALF)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    n=st.sampled_from([0, 1, 2, 3, 16, 17, 33, 130]),
    c=st.sampled_from([1, 2, 95, 96, 97, 961]),
    d=st.sampled_from([1, 2, 15, 16, 33, 64, 257]),
    k=st.sampled_from([1, 1, 1, 2, 5, 97]),
    rules=st.booleans(),
    memory=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_fuzzed_shapes(route: Route, n: int, c: int, d: int, k: int, rules: bool, memory: bool, seed: int) -> None:
    if route.isa in ("emulated_bf16", "emulated_amx") and n * c * d > 300_000:
        n = 3
    check_ops(route, half_sample(n, max(1, min(c, 1000 // k)), d, k, seed, rules, memory))


@each(HALF)
@pytest.mark.parametrize(("n", "c", "d"), [(3, 7, 2047), (1000, 50, 24), (1, 1, 1), (1000, 3, 1), (513, 200, 512)])
def test_extreme_shapes(route: Route, n: int, c: int, d: int) -> None:
    check_ops(route, half_sample(n, c, d, 1, n, False, False))


@each(HALF)
@pytest.mark.parametrize("n", [1, 40, 1100])
def test_equal_one_hot_rows_do_not_overflow(route: Route, n: int) -> None:
    """All mass of every sum in one coordinate, with one sign: the largest int32 sums there are."""
    classes, dimension = 300, 64
    x, w = torch.zeros(n, dimension), torch.zeros(classes, dimension)
    x[:, 5] = 1.0
    w[:, 5] = -3.0
    labels = torch.zeros(n, dtype=torch.int64)
    grads, losses = [], []
    for dtype, where in ((torch.float64, FLOAT64), (torch.float32, route)):
        a, b = x.to(dtype).requires_grad_(), w.to(dtype).requires_grad_()
        with where():
            loss, stats = rf.margin_softmax_loss(
                a, b, labels, margin=rf.Softmax(), scale=16.0, reduction="none", compute_dtype=where.compute_dtype, return_stats=True
            )
            unit, prototypes = x.to(dtype), torch.nn.functional.normalize(w.to(dtype), dim=1)
            lse, _, index, pull = torch.ops.recog_fast.negative_logsumexp(
                unit, prototypes, labels, 16.0, None, None, None, None, True, True, where.half
            )
            terms = torch.stack([lse.to(dtype), *torch.ones(1, n, dtype=dtype), *torch.zeros(3, n, dtype=dtype)])
            d_p = torch.ops.recog_fast.class_gradient(unit, labels, terms, prototypes, 16.0, None, None, None, None, True, True, where.half)
        losses.append(loss.detach())
        grads.append((pull, d_p))
        assert stats.nearest_index.tolist() == [1] * n and index.tolist() == [1] * n
    assert (losses[1].double() - losses[0]).abs().max() <= 16 * 2.0**-12
    for ours, truth in zip(grads[1], grads[0], strict=True):
        assert relative(ours, truth) <= 2.0**-8


@each(HALF)
@pytest.mark.parametrize("size", [1e-30, 1e-14, 1e14, 1e30])
def test_huge_and_tiny_rows(route: Route, size: float) -> None:
    """Rows of W and x of any magnitude: unit rows are what is rounded; below 1e-12 a row counts as zero."""
    torch.manual_seed(11)
    x, w = torch.randn(9, 40) * size, torch.randn(130, 40)
    w[3:7] *= size
    w[8] = 0
    labels = torch.arange(9)
    a, b = x.double().requires_grad_(), w.double().requires_grad_()
    truth = rf.margin_softmax_loss(a, b, labels)
    truth.backward()
    c, d = x.clone().requires_grad_(), w.clone().requires_grad_()
    with route():
        loss = rf.margin_softmax_loss(c, d, labels, compute_dtype=torch.bfloat16)
        loss.backward()
    limits = budget(route, 64.0, 40)
    assert abs(loss.item() - truth.item()) <= limits.loss_absolute
    assert a.grad is not None and b.grad is not None and c.grad is not None and d.grad is not None
    assert bool(torch.isfinite(c.grad).all()) and bool(torch.isfinite(d.grad).all())
    if size > 1e-12:
        assert relative(c.grad * size, a.grad * size) <= limits.gradient
    moderate = torch.tensor([0, 1, 2, *range(9, 130)])
    assert relative(d.grad[moderate], b.grad[moderate]) <= limits.gradient
    if 1e-12 < size < 1e20:
        assert relative(d.grad[3:7].double() * size, b.grad[3:7] * size) <= limits.gradient
    assert not bool(d.grad[8].any())


@each(HALF)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_weights_reach_gradients(route: Route, value: float) -> None:
    """As in float32: a diverged row of W is not smoothed over by the packing."""
    torch.manual_seed(12)
    x, w, labels = torch.randn(5, 24), torch.randn(200, 24), torch.tensor([0, 1, 2, 150, -1])
    w[150, 7] = value
    found = []
    for compute_dtype in (torch.float32, torch.bfloat16):
        a, b = x.clone().requires_grad_(), w.clone().requires_grad_()
        with route():
            loss, stats = rf.margin_softmax_loss(a, b, labels, reduction="none", unknown_weight=0.1, compute_dtype=compute_dtype, return_stats=True)
            loss.sum().backward()
        assert a.grad is not None and b.grad is not None
        found.append((torch.isfinite(loss), torch.isfinite(stats.lse), torch.isfinite(a.grad).all(1), torch.isfinite(b.grad[150]).any()))
    assert all(torch.equal(p, q) for p, q in zip(*found, strict=True))
    assert not bool(found[1][0].any())


@each(HALF)
def test_a_non_finite_row_of_the_batch_spoils_no_other(route: Route) -> None:
    """The registered operation with a NaN row of x: the others' results are float32's (the public functions refuse it)."""
    s = sample(6, 50, 32, rules=False, memory=False)
    unit = s["unit"].clone()
    unit[2, 5] = float("nan")
    arguments = (s["weight"], s["labels"], s["scale"], None, None, None, None, False, True)
    with route():
        lse, *_ = torch.ops.recog_fast.negative_logsumexp(unit, *arguments, half=True)
        truth, *_ = torch.ops.recog_fast.negative_logsumexp(s["unit"], *arguments)
    assert bool(torch.isnan(lse[2]))
    others = torch.tensor([0, 1, 3, 4, 5])
    assert (lse - truth)[others].abs().max() <= 1e-6


def realistic(n: int, classes: int, dimension: int) -> tuple[Tensor, Tensor, Tensor]:
    """A batch in mid-training: embeddings near their centres, every fourth row unlabelled."""
    g = torch.Generator().manual_seed(3)
    w = torch.randn(classes, dimension, generator=g)
    labels = torch.randint(0, classes, (n,), generator=g)
    x = torch.nn.functional.normalize(w[labels], dim=1) + 1.4 * torch.randn(n, dimension, generator=g) / dimension**0.5
    return x, w, torch.where(torch.arange(n) % 4 == 3, -1, labels)


@each(HALF)
@pytest.mark.parametrize("unknown", [0.0, 1.0])
def test_realistic_sizes_against_the_ideal_path(route: Route, unknown: float) -> None:
    """D = 512: the golden budget as it is stated, and the ideal path's error."""
    x, w, labels = realistic(96, 1200, 512)
    labels = labels if unknown == 0 else torch.full_like(labels, -1)
    margin = rf.ArcFace()
    outcomes = []
    for dtype, where, ideal in ((torch.float64, FLOAT64, False), (torch.float64, FLOAT64, True), (torch.float32, route, False)):
        a, b = x.to(dtype).requires_grad_(), w.to(dtype).requires_grad_()
        with where():
            options: dict[str, Any] = {"margin": margin, "unknown_weight": unknown, "compute_dtype": where.compute_dtype, "return_stats": True}
            if ideal:
                with ideal_bfloat16():
                    loss, stats = rf.margin_softmax_loss(a, b, labels, reduction="none", **options)
                    grads = torch.autograd.grad(loss.sum(), (a, b))
            else:
                loss, stats = rf.margin_softmax_loss(a, b, labels, reduction="none", **options)
                grads = torch.autograd.grad(loss.sum(), (a, b))
        outcomes.append((loss.detach(), stats, *grads))
    truth, ideal_outcome, ours = outcomes
    limits = budget(route, 64.0, 512)
    assert (ours[0].double() - truth[0]).abs().max() <= limits.loss_absolute
    for at in (2, 3):
        error = relative(ours[at], truth[at])
        assert error <= (limits.unknown_gradient if unknown else limits.gradient)
        assert against_ideal(route, error, relative(ideal_outcome[at], truth[at])), (error, relative(ideal_outcome[at], truth[at]))


@each(HALF)
@pytest.mark.parametrize("n", [64, 512, 3000])
def test_the_class_gradient_does_not_coarsen_with_the_batch(route: Route, n: int) -> None:
    """int16: the step of a class's slopes follows the largest sum of 512 rows, not of all: 1e-3 of dW of classes that are
    nobody's target at any N. bfloat16: 5e-3 sqrt(512/D)."""
    g = torch.Generator().manual_seed(8)
    x, w, labels = torch.randn(n, 64, generator=g), torch.randn(300, 64, generator=g), torch.randint(0, 10, (n,), generator=g)
    exact = w.double().requires_grad_()
    rf.margin_softmax_loss(x.double(), exact, labels, scale=16.0).backward()
    ours = w.clone().requires_grad_()
    with route():
        rf.margin_softmax_loss(x, ours, labels, scale=16.0, compute_dtype=torch.bfloat16).backward()
    allowed = 1e-3 if pair_format(route) == "int16" else 5e-3 * (512 / 64) ** 0.5
    assert exact.grad is not None and ours.grad is not None
    assert relative(ours.grad[10:], exact.grad[10:]) <= allowed


@each(HALF)
def test_nearest_negatives_of_many_rows(route: Route) -> None:
    """Random unit rows, the hardest case for a nearest neighbour: >= 99 % of rows at D = 512."""
    torch.manual_seed(13)
    x, w = torch.randn(400, 512), torch.randn(1000, 512)
    labels = torch.arange(400)
    with torch.no_grad(), route():
        _, ours = rf.margin_softmax_loss(x, w, labels, compute_dtype=torch.bfloat16, return_stats=True)
    _, truth = rf.margin_softmax_loss(x.double(), w.double(), labels, return_stats=True)
    assert (ours.nearest_index == truth.nearest_index).double().mean() >= 0.99
    assert (ours.nearest_cosine.double() - truth.nearest_cosine).abs().max() <= 1e-3


@each(HALF)
def test_head_steps_in_16_bits(route: Route) -> None:
    """Three steps of HeadSGD (memory, unlabelled rows) stay within the gradient budget of the float64 steps' length."""
    torch.manual_seed(14)
    start, ends = torch.randn(300, 64), []
    for dtype, where in ((torch.float64, FLOAT64), (torch.float32, route)):
        memory = rf.PrototypeMemory(300, 64, rf.VPL(start=0), dtype=dtype)
        head = rf.MarginHead(300, 64, memory=memory, unknown_weight=0.1, compute_dtype=where.compute_dtype).to(dtype)
        head.weight.data.copy_(start)
        optimizer = rf.HeadSGD(head, lr=0.5)
        g = torch.Generator().manual_seed(1)
        with where():
            for _ in range(3):
                x, labels = torch.randn(32, 64, generator=g).to(dtype), torch.randint(-1, 300, (32,), generator=g)
                head(x.requires_grad_(), labels, keys=x.detach()).backward()
                optimizer.step()
        ends.append(head.weight.detach().double() - start)
    assert relative(ends[1], ends[0]) <= budget(route, 64.0, 64).gradient


def test_baseline_answers_16_bit_requests_in_float32() -> None:
    x, w, labels = torch.randn(7, 30), torch.randn(90, 30), torch.arange(7)
    with Route("baseline", torch.float32, "auto", "baseline")():
        results = [rf.margin_softmax_loss(x, w, labels, reduction="none", compute_dtype=d) for d in (torch.float32, torch.bfloat16)]
    assert torch.equal(*results)


@each(HALF)
def test_public_negative_logsumexp_is_float32_under_autocast(route: Route) -> None:
    """It has no compute_dtype: prototypes of norm 3 or autocast change nothing about its arithmetic."""
    torch.manual_seed(15)
    x, p, labels = torch.nn.functional.normalize(torch.randn(4, 20), dim=1), 3 * torch.nn.functional.normalize(torch.randn(70, 20), dim=1), torch.arange(4)
    exact = [t.double() for t in rf.negative_logsumexp(x.double(), p.double(), labels, 4.0)[:2]]
    with route(), torch.autocast("cpu", torch.bfloat16):
        ours = rf.negative_logsumexp(x, p, labels, 4.0)[:2]
    for a, b in zip(ours, exact, strict=True):
        assert (a.double() - b).abs().max() <= 1e-5


@each(HALF)
def test_16_bit_operations_take_rows_of_any_norm(route: Route) -> None:
    """x up to norm 5 and prototypes of norm 3 (unit=True): nothing wraps, errors grow with the norms only."""
    torch.manual_seed(16)
    x, p = 5 * torch.nn.functional.normalize(torch.randn(40, 48), dim=1), 3 * torch.nn.functional.normalize(torch.randn(200, 48), dim=1)
    labels = torch.arange(40)
    arguments = (labels, 2.0, None, None, None, None, True, True)
    lse, cosine, _, pull = torch.ops.recog_fast.negative_logsumexp(x.double(), p.double(), *arguments)
    terms = torch.stack([lse, *torch.randn(2, 40, dtype=torch.float64), *torch.zeros(2, 40, dtype=torch.float64)])
    truth = torch.ops.recog_fast.class_gradient(x.double(), labels, terms, p.double(), 2.0, None, None, None, None, True, True)
    with route():
        ours = torch.ops.recog_fast.negative_logsumexp(x, p, *arguments, half=True)
        d_p = torch.ops.recog_fast.class_gradient(x, labels, terms.float(), p, 2.0, None, None, None, None, True, True, True)
    bound = 15 * cosine_error(route, 48)
    assert (ours[0] - lse).abs().max() <= 2 * bound
    assert (ours[1].double() - cosine).abs().max() <= bound
    assert relative(ours[3], pull) <= 2 * bound + 2.0**-8
    assert relative(d_p, truth) <= 2 * bound + 2.0**-8


def test_the_reference_ignores_half() -> None:
    for stem, arguments in calls(sample()).items():
        if stem != "effective_prototypes":
            with rf.ops.use_backend("reference"):
                a, b = ([t.clone() if isinstance(t, Tensor) else t for t in arguments] for _ in range(2))
                plain = getattr(torch.ops.recog_fast, stem)(*a)
                half = getattr(torch.ops.recog_fast, stem)(*b, half=True)
            if stem == "class_step":
                plain, half = (a[3], a[4]), (b[3], b[4])
            elif not isinstance(plain, tuple):
                plain, half = (plain,), (half,)
            assert all(torch.equal(p, q) for p, q in zip(plain, half, strict=True))


def test_every_16_bit_build_is_listed() -> None:
    """The routes cover each ISA of this CPU that has a 16-bit format."""
    module = native.load()[0]
    if module is None:
        pytest.skip(f"compiled kernels {native.load()[1]}")
    formats = {}
    for route in [*NATIVE, *HALF]:
        if not route.isa or module.runs_isa(route.isa):
            with route():
                formats[module.active_isa()] = module.pair_format()
    assert formats["baseline"] is None
    assert formats["emulated_bf16"] == formats["emulated_amx"] == "bfloat16"
    assert {isa for isa, kind in formats.items() if kind is not None} == {module_isa(r, module) for r in HALF}


def module_isa(route: Route, module: Any) -> str:
    with route():
        return str(module.active_isa())
