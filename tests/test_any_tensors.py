"""The public losses and operations on tensors of any layout, dtype and size: drawn by hypothesis, equal to the reference on plain copies."""

from __future__ import annotations

import copy
from typing import Any

import torch
from fuzz import examples
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import recog_fast as rf
from recog_fast import recognizability as quality

MARGINS: list[Any] = [
    rf.Softmax(), rf.SphereFace(), rf.CosFace(), rf.ArcFace(), rf.ArcFace(fallback="easy"), rf.CombinedMargin(1.0, 0.3, 0.2), rf.MagFace(), rf.AdaFace(),
    rf.CurricularFace(), rf.MVSoftmax("arc"), rf.CircleMargin(), rf.InterclassFilter(rf.CosFace(), 0.2),
]  # fmt: skip
LAYOUTS = ("plain", "transposed", "strided", "offset", "expanded")
LABELS = (torch.int64, torch.int32, torch.int16)


def laid_out(t: Tensor, layout: str) -> Tensor:
    """The same values in another layout; expanded: the first row for all."""
    if layout == "transposed":
        return t.t().contiguous().t()
    if layout == "strided":
        return torch.stack([t, torch.full_like(t, float("nan"))], dim=-1)[..., 0]
    if layout == "offset":
        return torch.cat([torch.full((1, *t.shape[1:]), float("nan"), dtype=t.dtype), t])[1:]
    if layout == "expanded" and t.shape[0]:
        return t[:1].expand_as(t)
    return t


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    n, c, d = draw(st.integers(0, 20)), draw(st.integers(1, 70)), draw(st.integers(1, 40))
    return {
        "n": n, "c": c, "d": d, "seed": draw(st.integers(0, 2**31)), "x": draw(st.sampled_from(LAYOUTS)), "w": draw(st.sampled_from(LAYOUTS[:4])),
        "dtype": draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64])), "labels": draw(st.sampled_from(LABELS)),
        "size": draw(st.sampled_from([1e-18, 1e-3, 1.0, 30.0, 1e4])), "margin": draw(st.sampled_from(range(len(MARGINS)))), "zero": draw(st.booleans()),
        "reduction": draw(st.sampled_from(["mean", "sum", "none"])), "unknown": draw(st.sampled_from([0.0, 0.3])),
    }  # fmt: skip


def tensors(p: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(p["seed"])
    x = p["size"] * torch.randn(p["n"], p["d"], generator=g)
    if p["zero"] and p["n"]:
        x[-1] = 0
    return x.to(p["dtype"]), torch.randn(p["c"], p["d"], generator=g), torch.randint(-1, p["c"], (p["n"],), generator=g).to(p["labels"])


def loss_of(p: dict[str, Any], x: Tensor, w: Tensor, labels: Tensor, backend: str) -> list[Tensor]:
    """Loss, its statistics and both gradients; float32 sweeps."""
    x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
    with rf.ops.use_backend(backend):
        loss, stats = rf.margin_softmax_loss(
            x, w, labels, margin=copy.deepcopy(MARGINS[p["margin"]]), scale=16.0, unknown_weight=p["unknown"], reduction=p["reduction"],
            compute_dtype=torch.float32, return_stats=True,
        )  # fmt: skip
        grads = torch.autograd.grad(loss.sum(), (x, w)) if loss.numel() else ()
    return [loss.detach(), stats.lse, stats.target_cosine, stats.nearest_cosine, *grads]


@examples(60)
@given(problems())
def test_layout_is_nothing_and_results_are_the_references(p: dict[str, Any]) -> None:
    """The same bits from any layout; finite; against the reference where no cosine can lie on a jump (d > 1, |x| > 0)."""
    x, w, labels = tensors(p)
    odd_x, odd_w = laid_out(x, p["x"]), laid_out(w, p["w"])
    before = odd_x.clone(), odd_w.clone(), labels.clone()
    ours = loss_of(p, odd_x, odd_w, torch.stack([labels, labels], dim=1)[:, 0], "auto")
    plain = loss_of(p, odd_x.contiguous().clone(), odd_w.contiguous().clone(), labels, "auto")
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True)), p
    assert all(torch.equal(a, b) for a, b in zip(before, (odd_x, odd_w, labels), strict=True)), "arguments are left alone"
    assert ours[0].shape == (() if p["reduction"] != "none" else (p["n"],))
    assert bool(torch.isfinite(ours[0]).all()) and not any(bool(torch.isnan(g).any()) for g in ours[4:]), p
    if p["dtype"] != torch.float16:  # dx grows as 1 / |x|, beyond 65504 for short rows
        assert all(bool(torch.isfinite(g).all()) for g in ours[4:]), p
    if p["d"] > 1 and p["c"] > 1:
        theirs = loss_of(p, odd_x.contiguous().clone(), odd_w.contiguous().clone(), labels, "reference")
        for a, b in zip(ours[:4], theirs[:4], strict=True):
            a, b = a.double(), b.double()
            assert torch.equal(torch.isfinite(a), torch.isfinite(b)), p
            assert bool(((a - b).abs() <= 2e-4 * b.abs() + 2e-4)[torch.isfinite(b)].all()), (p, (a - b).abs().max())


@examples(30)
@given(problems())
def test_questions_of_a_head_do_not_depend_on_the_layout(p: dict[str, Any]) -> None:
    x, w, labels = tensors(p)
    x = x.float()
    head = rf.MarginHead(p["c"], p["d"]).eval()
    head.weight.data.copy_(w)
    head.invalidate()
    odd = laid_out(x, p["x"])
    with torch.no_grad():
        plain = odd.contiguous().clone()
        assert torch.equal(head(odd, labels.long(), reduction="none"), head(plain, labels.long(), reduction="none")), p
        # products by torch's BLAS, whose order of summation may depend on the layout
        for ask, worth in ((head.logits, 64 * 1e-6), (lambda e: head.topk(e, min(3, p["c"]))[0], 1e-6)):
            assert torch.allclose(ask(odd), ask(plain), rtol=0, atol=worth), p
    assert head.logits(odd).shape == (p["n"], p["c"])
    assert bool((head.logits(odd).abs() <= 64.001).all())


@examples(30)
@given(problems())
def test_recognizability_does_not_depend_on_the_layout(p: dict[str, Any]) -> None:
    x, w, _ = tensors({**p, "dtype": torch.float32})
    center = w[0] if bool(w[0].any()) else torch.ones(p["d"])
    odd = laid_out(x, p["x"])
    score = quality.embedding_recognizability(odd, center)
    assert torch.allclose(score, quality.embedding_recognizability(odd.contiguous().clone(), center), rtol=0, atol=1e-6)
    assert score.shape == (p["n"],) and bool(((score >= 0) & (score <= 1)).all())
    assert bool(torch.isfinite(quality.project_away(odd, center)).all())
