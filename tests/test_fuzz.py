"""Every operation on every ISA that runs here, on random shapes and options, against the reference in float64.

RECOG_FAST_FUZZ=1000 pytest tests/test_fuzz.py runs that many random examples of each test instead of the usual few.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from fuzz import CLEAR, Problem, Shape, examples, make, run, shapes, terms
from hypothesis import example, given
from routes import isas
from torch import Tensor

import recog_fast as rf
from recog_fast import native

# The three sizes at their ends together, one panel and one slice past a full one.
LARGEST = Shape(130, 5000, 640, 1, 64.0, "curricular", True, "bfloat16", True, False, 2, 0)


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Within it the kernels use that many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def each_isa(shape: Shape) -> Iterator[str]:
    """Every ISA in turn, selected, with the shape's threads; the emulated one, which is slow, for small problems only."""
    small = shape.n * shape.c * shape.k * shape.d <= 1e6
    for isa in isas():
        if isa in native.available_isas() or small:
            native.select_isa(isa)
            try:
                with threads(shape.threads):
                    yield isa
            finally:
                native.select_isa()


def agree(ours: Tensor, plain: Tensor, truth: Tensor, worth: float, floor: float, what: object) -> None:
    """Error at most twice that of PyTorch in float32, `worth` of the largest value and an epsilon: the budget of test_ops."""
    finite = torch.isfinite(truth)
    assert torch.equal(torch.isfinite(ours), finite), what
    if not bool(finite.any()):
        return
    most, error, own = (t.double()[finite].abs().max().item() for t in (truth, ours.double() - truth, plain.double() - truth))
    assert error <= 2 * own + worth * most + floor, (what, error, own, most)


def worth(p: Problem) -> float:
    """What the roundings of a cosine are worth, of p and any sum of it: 2e-6 (test_ops, s = 8) to 5e-5 (the golden gradients).

    A cosine is a sum of D products in slices of 256; where x lies along P all are of one sign and the roundings, half of
    2^-23 of the sum each, walk: 2^-24 sqrt(min(D, 256)) |c|, and s times that in the exponent.
    """
    largest = max(1.0, p.cosine.abs().max().item() if p.cosine.numel() else 1.0)  # without renormalize not a cosine
    return min(5e-5, max(2e-6, 2**-24 * min(p.shape.d, 256) ** 0.5 * largest * p.shape.scale))


def floor(p: Problem) -> float:
    """2e-6; with one dimension the gradient's truth is 0 and what is left is the rounding of slopes up to 4 C."""
    return 4e-6 * p.weight.shape[0] if p.shape.d == 1 else 2e-6


def check(p: Problem, stem: str, arguments: tuple[Any, ...]) -> None:
    """All floating results of one operation on every ISA; a nearest index by the cosine it has in float64."""
    truth, plain = run(stem, "reference", arguments, exact=True), run(stem, "reference", arguments)
    for isa in each_isa(p.shape):
        ours = run(stem, "auto", arguments)
        for i, (a, b, t) in enumerate(zip(ours, plain, truth, strict=True)):
            if t.dtype.is_floating_point:
                agree(a, b, t, 2e-6 if stem == "effective_prototypes" else worth(p), floor(p), (isa, stem, i))
            else:
                there = a >= 0
                assert torch.equal(there, t >= 0), (isa, stem)
                assert not bool((a == p.labels)[there].any()), (isa, stem, "a row's own class")
                chosen = p.cosine.gather(1, a.clamp_min(0).unsqueeze(1)).squeeze(1)
                assert bool(((chosen - truth[1]).abs() <= CLEAR * truth[1].abs().clamp_min(1))[there].all()), (isa, stem, "nearest index")


@examples(25)
@given(shapes())
@example(LARGEST)
def test_forward_sweep_and_prototypes(shape: Shape) -> None:
    p = make(shape)
    check(p, "effective_prototypes", (p.weight, *p.memory, shape.renormalize))
    check(p, "negative_logsumexp", (p.unit_embeddings, p.weight, p.labels, shape.scale, p.rules, *p.memory, shape.unit, shape.renormalize))


@examples(25)
@given(shapes())
@example(LARGEST)
def test_class_sweeps(shape: Shape) -> None:
    p, g = make(shape), torch.Generator().manual_seed(shape.seed)
    forward = (p.unit_embeddings, p.weight, p.labels, shape.scale, p.rules, *p.memory, shape.unit, shape.renormalize)
    packed = terms(p, run("negative_logsumexp", "reference", forward, exact=True)[0], g)
    rows = (p.unit_embeddings, p.targets, packed)
    check(p, "class_gradient", (*rows, p.weight, shape.scale, p.rules, *p.memory, shape.unit, shape.renormalize))
    if not shape.unit:
        velocity = torch.randn(p.weight.shape, generator=g)
        momentum, decay = (0.9, 5e-4) if shape.seed % 2 else (0.0, 0.0)
        check(p, "class_step", (*rows, p.weight, velocity, shape.scale, p.rules, *p.memory, shape.renormalize, 0.1, momentum, decay, shape.seed % 3 == 0))


@examples(15)
@given(shapes())
def test_unknown_rejection(shape: Shape) -> None:
    p = make(shape)
    everyone = torch.full_like(p.labels, -1)
    forward = (p.unit_embeddings, p.weight, everyone, shape.scale, None, *p.memory, shape.unit, shape.renormalize)
    lse, nearest, index, _ = run("negative_logsumexp", "reference", forward, exact=True)
    top = torch.exp(shape.scale * nearest - lse).clamp_max(1.0)
    first_mean = (top * torch.expm1(top)).float()
    check(p, "unknown_rejection", (p.unit_embeddings, p.weight, index, lse, first_mean, shape.scale, *p.memory, shape.unit, shape.renormalize))


MARGINS: list[Any] = [
    rf.Softmax(), rf.CosFace(), rf.ArcFace(), rf.ArcFace(gradient="straight_through"), rf.CurricularFace(), rf.MVSoftmax("am"),
    rf.MVSoftmax("arc"), rf.CircleMargin(), rf.InterclassFilter(rf.CosFace(), 0.1), rf.InterclassFilter(rf.ArcFace(), 0.0),
    rf.AdaFace(), rf.MagFace(),
]  # fmt: skip


def clear_labels(p: Problem, margin: Any) -> Tensor:
    """The labels, -1 for rows at a jump: a cosine at the rule's threshold or the clamp, a target at a fallback's edge or at +-1."""
    target = p.cosine.gather(1, p.labels.clamp_min(0).unsqueeze(1)).squeeze(1)
    bad = (target.abs() > 0.999) | (target.abs() < CLEAR)
    if hasattr(margin, "rule"):
        bad |= ((p.cosine - margin.rule(target)[1].unsqueeze(1)).abs() < CLEAR).any(dim=1)
    bad |= ((p.cosine.abs() - getattr(margin, "clamp", 2.0)).abs() < CLEAR).any(dim=1)
    return torch.where(bad, torch.full_like(p.labels, -1), p.labels)


def whole_loss(p: Problem, margin: Any, labels: Tensor, norms: Tensor, dtype: torch.dtype, backend: str) -> list[Tensor]:
    """Rows' losses, statistics, dx and dW."""
    margin = copy.deepcopy(margin)
    if isinstance(margin, torch.nn.Module):
        margin.to(dtype)
    x = (p.unit_embeddings * norms.unsqueeze(1)).to(dtype).requires_grad_()
    w = p.weight.to(dtype).requires_grad_()
    rows, strength, slot = p.memory if p.shape.k == 1 else (None, None, None)
    with rf.ops.use_backend(backend):
        loss, stats = rf.margin_softmax_loss(
            x, w, labels, margin=margin, scale=p.shape.scale, unknown_weight=0.3, sample_weight=norms.to(dtype), reduction="none",
            memory_rows=rows, strength=strength, slot=slot, return_stats=True,
        )  # fmt: skip
        d_x, d_w = torch.autograd.grad((loss * torch.linspace(-1, 1, len(loss), dtype=dtype)).sum(), (x, w))
    kept = stats.lse, stats.target_cosine, stats.nearest_cosine, stats.target_probability, stats.max_probability
    return [loss.detach(), *kept, d_x, d_w]


@examples(25)
@given(shapes())
def test_margin_softmax_loss(shape: Shape) -> None:
    p = make(shape)
    margin = MARGINS[shape.seed % len(MARGINS)]
    labels = clear_labels(p, margin)
    norms = 1 + 30 * torch.rand(shape.n, generator=torch.Generator().manual_seed(shape.seed))
    truth, plain = (whole_loss(p, margin, labels, norms, dtype, "reference") for dtype in (torch.float64, torch.float32))
    for isa in each_isa(shape):
        ours = whole_loss(p, margin, labels, norms, torch.float32, "auto")
        error = (ours[0].double() - truth[0]).abs()
        # the golden cases' budget of a row's loss, times its weight
        assert bool((error <= norms * (1e-6 * truth[0].abs() + 2e-6 * shape.scale)).all()), (isa, margin, error.max())
        for i, (a, b, t) in enumerate(zip(ours[1:], plain[1:], truth[1:], strict=True)):
            agree(a, b, t, worth(p), floor(p), (isa, margin, i))
