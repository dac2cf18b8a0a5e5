"""The registered operations: golden cases, opcheck, twins, fuzzed shapes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from budgets import budget, relative
from golden import cases, load
from hypothesis import given, settings
from hypothesis import strategies as st
from routes import FLOAT64, GPU, NATIVE, ROUTES, Route, each
from torch import Tensor

import recog_fast as rf
from recog_fast import native, reference
from recog_fast.rules import pack_rules

INJECT = {"vpl": True, "add_norm": True, "add": False}


@each([r for r in [*ROUTES, *GPU] if not r.half])
@pytest.mark.parametrize("name", cases("inject"))
def test_golden_inject(name: str, route: Route) -> None:
    case = load(name)
    mode = case.kwargs["mode"]
    lam, memory = case["in_lam"], case["in_M"]
    strength = lam / (1 - lam) if mode == "vpl" else lam
    w = case["in_W"].to(route.device, route.dtype).requires_grad_()
    with route():
        p = rf.effective_prototypes(w, memory.to(w), strength.to(w), renormalize=INJECT[mode])
        (d_w,) = torch.autograd.grad(p, w, case["in_gWe"].to(w))
    p, d_w = p.cpu(), d_w.cpu()
    truth, d_truth = case["out_We"], case["grad_dW"]
    rows = torch.ones(len(truth), dtype=torch.bool)
    if "cancel" in name:  # row 0 cancels exactly: the guard gives W^_0, its gradient is only finite
        truth = truth.index_copy(0, torch.tensor([0]), torch.nn.functional.normalize(case["in_W"][:1], dim=1))
        rows[0] = False
        assert bool(torch.isfinite(d_w).all())
    exact = route.dtype == torch.float64
    assert (p.double() - truth).abs().max() <= (1e-9 if exact else 1e-6)
    assert relative(d_w[rows], d_truth[rows]) <= (1e-9 if exact else 5e-5)


@each([*ROUTES, *GPU])
@pytest.mark.parametrize("name", cases("uir"))
def test_golden_unknown_rejection(name: str, route: Route) -> None:
    case = load(name)
    x, w = (case[key].to(route.device, route.dtype).requires_grad_() for key in ("in_X", "in_W"))
    variant = case.kwargs["variant"]
    limits = budget(route, case.kwargs["s"], x.shape[1])
    with route(), torch.autocast(route.device, torch.bfloat16, enabled=route.half):
        loss, stats = rf.unknown_rejection_loss(x, w, scale=case.kwargs["s"], softmax=variant, reduction="none", return_stats=True)
        d_x, d_w = (t.cpu() for t in torch.autograd.grad((loss * case["in_gout"].to(loss)).sum(), (x, w)))
    loss, stats = loss.detach().cpu(), rf.RowStats(*(t.cpu() for t in stats))
    exact = route.dtype == torch.float64
    sixteen = route.half and variant == "double"  # the single softmax is float32 whatever is asked for
    size = case["out_excess"].abs()
    # float32: the page's 1e-6 |loss| + 2e-6 s; the double excess better still: a cosine is worth s 1.2e-7 of p
    page = 1e-6 * size + 2e-6 * case.kwargs["s"]
    allowed = page if variant == "single" else torch.minimum(page, 2e-8 + 2 * 1.2e-7 * case.kwargs["s"] * size)
    allowed = 1e-9 + 1e-12 * size if exact else allowed + limits.loss_absolute if sixteen else allowed
    assert bool(((loss.double() - case["out_excess"]).abs() <= allowed).all())
    lse_allowed = 2e-6 * case.kwargs["s"] + 1e-6 * case["out_lse"].abs() + (limits.loss_absolute if sixteen else 0.0)
    assert bool(((stats.lse.double() - case["out_lse"]).abs() <= lse_allowed).all())
    assert stats.max_probability.max() <= 1 + 1e-5
    # the nearest class's logit is float32 in 16-bit sweeps too: |dp/dlse| <= 1/4
    assert (stats.max_probability.double() - case["out_pmax"]).abs().max() <= 1e-5 + (limits.loss_absolute / 4 if sixteen else 0.0)
    # two files, where every row saturates (1 - p ~ 6e-8), are themselves off by 2.2e-8 and 9.5e-9: see the test below
    own = {"uir__double_n1": 3e-8, "uir__double_c2": 1.2e-8}.get(name, 1e-9)
    gradient = own if exact else limits.unknown_gradient if sixteen else 5e-5
    assert relative(d_x, case["grad_dX"]) <= gradient
    assert relative(d_w, case["grad_dW"]) <= gradient


def exact_unknown_gradient(x: Tensor, w: Tensor, upstream: Tensor, scale: float) -> Tensor:
    """d excess / d x of the double softmax by the naive formula in extended precision."""
    rows, centres = (t.numpy().astype(np.longdouble) for t in (x, w))
    norms = np.sqrt((rows**2).sum(1, keepdims=True))
    unit = rows / np.where(norms > 1e-12, norms, 1)
    lengths = np.sqrt((centres**2).sum(1, keepdims=True))
    prototypes = np.where(lengths > 1e-12, centres / np.where(lengths > 1e-12, lengths, 1), 0)
    z = scale * unit @ prototypes.T
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    h = np.expm1(p)
    slope = len(w) / (len(w) + h.sum(1, keepdims=True))
    d_unit = scale * slope * (p * (h - (p * h).sum(1, keepdims=True))) @ prototypes
    tangent = d_unit - (d_unit * unit).sum(1, keepdims=True) * unit
    d_x = np.where(norms > 1e-12, tangent / np.where(norms > 1e-12, norms, 1), 0) * upstream.numpy()[:, None]
    return torch.from_numpy(d_x.astype(np.float64))


@each([*ROUTES, *GPU])
@pytest.mark.parametrize("name", cases("uir"))
def test_saturated_unknown_rows_keep_their_gradient(name: str, route: Route) -> None:
    """1e-8 small gradients of rows with p close to 1: 1e-9 relative in float64, 5e-5 in float32, the UIR budget in 16 bits."""
    case = load(name)
    if case.kwargs["variant"] != "double":
        pytest.skip("the single softmax does not saturate")
    x, w = case["in_X"].to(route.device, route.dtype).requires_grad_(), case["in_W"].to(route.device, route.dtype)
    with route(), torch.autocast(route.device, torch.bfloat16, enabled=route.half):
        loss = rf.unknown_rejection_loss(x, w, scale=case.kwargs["s"], reduction="none")
        (d_x,) = torch.autograd.grad((loss * case["in_gout"].to(loss)).sum(), x)
    truth = exact_unknown_gradient(case["in_X"], case["in_W"], case["in_gout"], case.kwargs["s"])
    assert relative(d_x.cpu(), truth) <= budget(route, case.kwargs["s"], x.shape[1]).unknown_gradient


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", cases("center_sparsity"))
def test_golden_center_sparsity(name: str, dtype: torch.dtype) -> None:
    case = load(name)
    assert rf.center_sparsity(case["in_W"].to(dtype)).item() == pytest.approx(case["out_d"].item(), rel=1e-9 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", cases("sgd"))
def test_golden_sgd(name: str, dtype: torch.dtype) -> None:
    case = load(name)
    weight, velocity = case["in_w"].to(dtype), torch.zeros_like(case["in_w"], dtype=dtype)
    rows = case.get("in_rows", torch.arange(len(weight)))
    assert rows is not None
    for k in range(case.kwargs["steps"]):
        part, speed = weight[rows], velocity[rows]
        reference.sgd_update(part, speed, case[f"in_g{k}"][rows].to(dtype), case.kwargs["lr"], case.kwargs["momentum"], case.kwargs["wd"])
        weight[rows], velocity[rows] = part, speed
        tolerance = 1e-12 if dtype == torch.float64 else 1e-6
        assert (weight.double() - case[f"out_w{k}"]).abs().max() <= tolerance
        assert (velocity.double() - case[f"out_buf{k}"]).abs().max() <= tolerance


def sample(n: int = 5, c: int = 9, d: int = 6, k: int = 1, *, seed: int = 0, rules: bool = True, memory: bool = True) -> dict[str, Any]:
    """Inputs of every operation, float32, labels with -1 and duplicates."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    labels = torch.randint(-1, c, (n,), generator=g)
    unit = torch.nn.functional.normalize(normal(n, d), dim=1)
    weight = normal(c, d) if k == 1 else normal(c, k, d)
    weight = weight + 0.3 * weight.sign()  # 1/|W| multiplies the rounding of a gradient: keep it below 4
    rule, thresholds = rf.CurricularFace().rule(torch.full((n,), 0.1)) if rules else (None, None)
    has_memory = memory and k == 1
    terms = torch.stack([8 + normal(n).abs(), normal(n), normal(n), normal(n).abs() / 10, torch.randint(0, 3, (n,), generator=g).float()])
    return {
        "unit": unit, "weight": weight, "labels": labels, "scale": 8.0,
        "targets": torch.where(labels >= 0, labels * k + labels % k, labels),
        "rules": pack_rules(labels, rule, thresholds, 0.999 if rules else 1.0, torch.float32),
        "memory": (normal(3, d), torch.tensor([0.5, 0.0, 2.0]), torch.randint(-1, 3, (c,), generator=g).int()) if has_memory else (None, None, None),
        "terms": terms,
    }  # fmt: skip


def calls(s: dict[str, Any]) -> dict[str, tuple[Any, ...]]:
    """Arguments of every sweep, by stem."""
    rows = (s["unit"], s["targets"], s["terms"])
    return {
        "effective_prototypes": (s["weight"], *s["memory"], True),
        "negative_logsumexp": (s["unit"], s["weight"], s["labels"], s["scale"], s["rules"], *s["memory"], False, True),
        "unknown_rejection": (s["unit"], s["weight"], s["labels"], torch.full((len(s["unit"]),), 12.0, dtype=torch.float64), s["unit"][:, 0].abs(), s["scale"], *s["memory"], False, True),
        "class_gradient": (*rows, s["weight"], s["scale"], s["rules"], *s["memory"], False, True),
        "class_step": (*rows, s["weight"].clone(), torch.rand_like(s["weight"]), s["scale"], s["rules"], *s["memory"], True, 0.1, 0.9, 5e-4, True),
    }  # fmt: skip


@pytest.mark.parametrize("stem", ["effective_prototypes", "negative_logsumexp", "unknown_rejection", "class_gradient", "class_step"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("subcenters", [1, 2])
def test_opcheck(stem: str, backend: str, subcenters: int) -> None:
    arguments = calls(sample(k=subcenters))[stem]
    if stem in ("effective_prototypes", "negative_logsumexp"):
        arguments = tuple(a.requires_grad_() if isinstance(a, Tensor) and i < 2 and a.dtype == torch.float32 and (stem != "effective_prototypes" or i == 0) else a for i, a in enumerate(arguments))
    with rf.ops.use_backend(backend):
        torch.library.opcheck(getattr(torch.ops.recog_fast, stem).default, arguments)


def test_opcheck_memory_write() -> None:
    memory = rf.PrototypeMemory(9, 6, rf.VPL(), capacity=4, dtype=torch.float32)
    state = (memory.ring, memory.ring_strength, memory.stamp, memory.owner, memory.slot, memory.cursor)
    s = sample()
    torch.library.opcheck(torch.ops.recog_fast.memory_write.default, (*state, s["unit"], s["labels"], torch.ones(5), 3))


def compare(s: dict[str, Any], operations: dict[str, tuple[Any, ...]] | None = None) -> None:
    """Compiled kernels against the float64 reference, within twice the float32 reference's error and an epsilon.

    operations: arguments by stem, made from `s`; None: `calls(s)`.
    """
    if native.load()[0] is None:
        pytest.skip(f"compiled kernels {native.load()[1]}")
    for stem, arguments in (operations or calls(s)).items():
        run = getattr(torch.ops.recog_fast, stem)
        results = {}
        for kind in ("native", "float32", "float64"):
            taken = [a.clone() if isinstance(a, Tensor) else a for a in arguments]
            if kind == "float64":
                taken = [a.double() if isinstance(a, Tensor) and a.dtype == torch.float32 else a for a in taken]
            with rf.ops.use_backend("auto" if kind == "native" else "reference"):
                out = run(*taken)
            results[kind] = (taken[3], taken[4]) if stem == "class_step" else out if isinstance(out, tuple) else (out,)
        for ours, plain, truth in zip(results["native"], results["float32"], results["float64"], strict=True):
            if not truth.dtype.is_floating_point:
                continue  # an index may differ where two cosines are equal in one precision; the cosine is compared
            finite = torch.isfinite(truth)
            assert torch.equal(torch.isfinite(ours), finite), stem
            scale = truth[finite].abs().max().item() if bool(finite.any()) else 0.0
            error = (ours.double() - truth)[finite].abs().max().item() if bool(finite.any()) else 0.0
            own = (plain.double() - truth)[finite].abs().max().item() if bool(finite.any()) else 0.0
            # with D = 1 the gradient's truth is 0: what is left is the rounding of slopes up to 4 C
            floor = 4e-6 * len(s["weight"]) if s["unit"].shape[1] == 1 else 2e-6
            assert error <= 2 * own + 2e-6 * scale + floor, (stem, error, own, scale)


# N: 0, one lane, around a panel (16), past a tile; C: 1, below and above the tile (48) and the block (960); D: 1, odd, around a panel
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    n=st.sampled_from([0, 1, 3, 15, 16, 17, 33, 130]),
    c=st.sampled_from([1, 2, 47, 48, 49, 961, 2000]),
    d=st.sampled_from([1, 2, 7, 15, 16, 17, 64, 257]),
    k=st.sampled_from([1, 1, 2, 5, 48, 49, 100]),  # sub-centers: below, at and above a tile
    rules=st.booleans(),
    memory=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_fuzzed_shapes_agree_with_the_reference(n: int, c: int, d: int, k: int, rules: bool, memory: bool, seed: int) -> None:
    if k > 1 and c * k > 2000:
        c = max(1, 2000 // k)
    compare(sample(n, c, d, k, seed=seed, rules=rules, memory=memory))


@each(NATIVE)
def test_every_isa_agrees_with_the_reference(route: Route) -> None:
    with route():
        for n, c, d, k in ((17, 1000, 33, 1), (64, 500, 128, 1), (5, 70, 16, 3)):
            compare(sample(n, c, d, k, seed=n))


@each([FLOAT64, NATIVE[0]])
def test_negative_logsumexp_is_differentiable_in_lse(route: Route) -> None:
    torch.manual_seed(0)
    x = torch.nn.functional.normalize(torch.randn(6, 8, dtype=route.dtype), dim=1).requires_grad_()
    p = torch.nn.functional.normalize(torch.randn(20, 8, dtype=route.dtype), dim=1).requires_grad_()
    labels = torch.tensor([0, 1, -1, 19, 1, 5])
    with route():
        lse, cosine, index = rf.negative_logsumexp(x, p, labels, 16.0)
        ours = torch.autograd.grad((lse * torch.arange(6)).sum(), (x, p))
    z = 16.0 * (x @ p.t())
    z = z.masked_fill(torch.arange(20) == labels.unsqueeze(1), float("-inf"))
    truth = torch.autograd.grad((torch.logsumexp(z, 1) * torch.arange(6)).sum(), (x, p))
    assert (lse - torch.logsumexp(z, 1)).abs().max() <= (1e-9 if route.dtype == torch.float64 else 1e-5)
    assert torch.equal(index, z.argmax(1))
    assert not cosine.requires_grad
    for a, b in zip(ours, truth, strict=True):
        assert relative(a, b) <= (1e-9 if route.dtype == torch.float64 else 5e-5)


def test_ties_take_the_lowest_class() -> None:
    p = torch.nn.functional.normalize(torch.randn(1, 8), dim=1).expand(2500, 8).contiguous()
    for backend in ("auto", "reference"):
        with rf.ops.use_backend(backend):
            _, _, index = rf.negative_logsumexp(p[:3], p, torch.tensor([0, 5, -1]), 64.0)
        assert index.tolist() == [1, 0, 0]


def test_unknown_excess_keeps_its_precision_at_many_classes() -> None:
    """Plain float32 errs by more than the value itself here."""
    torch.manual_seed(1)
    classes = 100_000
    w = torch.randn(classes, 32)
    x = torch.nn.functional.normalize(w[:4], dim=1) + 0.25 * torch.randn(4, 32)
    exact = rf.unknown_rejection_loss(x.double(), w.double(), reduction="none")
    ours = rf.unknown_rejection_loss(x, w, reduction="none")
    # a float32 cosine is worth s * 1e-7 of p, so of the excess: 2 s 1e-7 relative
    assert bool(((ours.double() - exact).abs() <= 1e-8 + 2 * 64 * 1.2e-7 * exact).all())


def test_use_backend_refuses_other_names() -> None:
    with pytest.raises(ValueError, match="use_backend: expected 'auto' or 'reference', got 'cuda'"), rf.ops.use_backend("cuda"):
        pass
