"""What tried to break the library once: each of these crashed, or was silently wrong."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from routes import FLOAT64, NATIVE, Route, each
from torch import Tensor

import recog_fast as rf


def inputs(n: int = 6, c: int = 20, d: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(n, d, generator=g), torch.randn(c, d, generator=g), torch.arange(n)


@each(NATIVE)
@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_torch_default_dtype_changes_nothing(route: Route, default: torch.dtype) -> None:
    x, w, labels = inputs(40, 100, 64)
    labels[3] = -1
    results = []
    try:
        for dtype in (torch.float32, default):
            torch.set_default_dtype(dtype)
            a, b = x.clone().requires_grad_(), w.clone().requires_grad_()
            with route():
                loss, stats = rf.margin_softmax_loss(a, b, labels, unknown_weight=0.1, return_stats=True)
                loss.backward()
            results.append([loss.detach(), *stats, a.grad, b.grad])
            assert rf.MarginHead(3, 4).weight.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(p, q) for p, q in zip(*results, strict=True))


def test_a_momentum_buffer_of_another_head_is_refused() -> None:
    big, small = rf.MarginHead(2000, 16), rf.MarginHead(10, 16)
    optimizer, other = rf.HeadSGD(big, lr=0.1), rf.HeadSGD(small, lr=0.1)
    x, _, labels = inputs()
    small(x.requires_grad_(), labels).backward()
    other.step()
    with pytest.raises(ValueError, match=r"momentum_buffer of shape \(2000, 16\), got \(10, 16\)"):
        optimizer.load_state_dict(other.state_dict())
    adam = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])
    with pytest.raises(ValueError, match="HeadSGD: expected one group with"):
        optimizer.load_state_dict(adam.state_dict())
    with pytest.raises(ValueError, match="HeadSGD: expected the head's weight alone"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})


BAD_STEPS = {
    "velocity": torch.zeros(2, 16), "terms": torch.zeros(5, 5), "targets": torch.arange(5), "rules": torch.zeros(12, 5),
    "unit_embeddings": torch.ones(6, 15), "weight": torch.randn(20, 16).bfloat16(), "slot": torch.zeros(3, dtype=torch.int32),
}  # fmt: skip


@pytest.mark.parametrize("name", list(BAD_STEPS))
def test_registered_operations_refuse_what_does_not_fit(name: str) -> None:
    x, w, labels = inputs()
    arguments = {
        "unit_embeddings": x, "targets": labels, "terms": torch.zeros(5, 6), "weight": w, "velocity": torch.zeros_like(w), "scale": 64.0,
        "rules": None, "memory_rows": torch.ones(4, 16), "strength": torch.ones(4), "slot": torch.zeros(20, dtype=torch.int32),
    }  # fmt: skip
    rest = (True, 0.1, 0.9, 0.0, False)
    torch.ops.recog_fast.class_step(*arguments.values(), *rest)
    with NATIVE[0](), pytest.raises(ValueError, match="expected"):
        torch.ops.recog_fast.class_step(*{**arguments, name: BAD_STEPS[name]}.values(), *rest)


def test_slots_outside_the_memory_are_never_read() -> None:
    _, w, _ = inputs()
    slot = torch.full((20,), 10**8, dtype=torch.int32)
    with NATIVE[0]():
        p = torch.ops.recog_fast.effective_prototypes(w, torch.ones(4, 16), torch.ones(4), slot, True)
    assert torch.equal(p, rf.effective_prototypes(w))


@each([FLOAT64, NATIVE[0]])
def test_gradients_of_the_embeddings_alone_leave_no_rows(route: Route) -> None:
    head = rf.MarginHead(20, 16).to(route.dtype)
    optimizer = rf.HeadSGD(head, lr=0.1)
    x, _, labels = inputs()
    a = x.to(route.dtype).requires_grad_()
    with route():
        torch.autograd.grad(head(a, labels), a)
        head(a, labels).backward(inputs=[a])
        torch.autograd.grad(head.cosine(a, labels).sum(), a)
        assert head.pending_rows == 0
        head(a, labels).backward()
        assert head.pending_rows == 6
        optimizer.step()


@each([FLOAT64, NATIVE[0]])
def test_weights_of_unlabelled_rows_do_not_count(route: Route) -> None:
    x, w, labels = (t.to(route.dtype) if t.is_floating_point() else t for t in inputs())
    labels[3] = -1
    weights = torch.ones(6, dtype=route.dtype)
    weights[3] = float("nan")
    a, b = x.requires_grad_(), w.requires_grad_()
    with route():
        rf.margin_softmax_loss(a, b, labels, sample_weight=weights).backward()
    assert a.grad is not None
    assert b.grad is not None
    assert bool(torch.isfinite(a.grad).all())
    assert bool(torch.isfinite(b.grad).all())


@each([FLOAT64, NATIVE[0]])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_diverged_target_reaches_the_loss(route: Route, value: float) -> None:
    x, w, labels = (t.to(route.dtype) if t.is_floating_point() else t for t in inputs())
    w[4, 3] = value
    with route():
        assert bool(torch.isnan(rf.margin_softmax_loss(x, w, labels, reduction="none")).all())
        assert bool(torch.isnan(rf.effective_prototypes(w)[4]).any())


def test_embeddings_that_overflow_float32_are_named() -> None:
    x, w, labels = inputs()
    huge = x.double()
    huge[2] *= 1e300
    with pytest.raises(ValueError, match="finite embeddings, got a non-finite value in row 2"):
        rf.margin_softmax_loss(huge, w, labels)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32])
def test_any_integer_labels(dtype: torch.dtype) -> None:
    x, w, labels = inputs(c=1000)
    assert torch.equal(rf.margin_softmax_loss(x, w, labels.to(dtype)), rf.margin_softmax_loss(x, w, labels))


@pytest.mark.parametrize("margin", [rf.ArcFace(), rf.MagFace(), rf.AdaFace(), rf.CurricularFace()], ids=lambda m: type(m).__name__)
def test_inference_mode(margin: object) -> None:
    x, _, labels = inputs()
    head = rf.MarginHead(20, 16, margin=margin).eval()  # type: ignore[arg-type]
    with torch.inference_mode():
        inside = head(x, labels)
        head.logits(x)
    assert torch.equal(inside, head(x, labels))
    a = x.clone().requires_grad_()
    head.logits(a).sum().backward()
    assert a.grad is not None


def test_copies_of_the_optimizer_keep_their_head() -> None:
    x, _, labels = inputs()
    head = rf.MarginHead(20, 16)
    optimizer = rf.HeadSGD(head, lr=0.1)
    head(x, labels).backward()
    optimizer.step()
    for twin, its in (copy.deepcopy((head, optimizer)), pickle.loads(pickle.dumps((head, optimizer)))):
        twin(x, labels).backward()
        its.step()
        assert its.head is twin
        assert not torch.equal(twin.weight, head.weight)


def test_cosines_below_minus_three_are_no_mask() -> None:
    """Without renormalize |U| may pass 1 by far."""
    x, w, _ = inputs()
    unit = torch.nn.functional.normalize(x, dim=1)
    far = rf.effective_prototypes(w, -unit[:1].expand(20, 16).contiguous(), torch.full((20,), 7.0), renormalize=False)
    results = []
    for backend in ("auto", "reference"):
        with rf.ops.use_backend(backend):
            results.append(rf.negative_logsumexp(unit[:1], far, torch.tensor([0]), 64.0))
    assert torch.allclose(results[0][0], results[1][0], rtol=1e-5)
    assert torch.allclose(results[0][1], results[1][1], rtol=1e-5)
    assert torch.equal(results[0][2], results[1][2])
    assert float(results[0][1]) < -3


def test_numpy_numbers_are_numbers() -> None:
    head = rf.MarginHead(np.int64(5), np.int32(4), scale=np.float32(16))  # type: ignore[arg-type]
    assert (head.num_classes, head.embedding_dim, head.scale) == (5, 4, 16.0)
    assert head.logits(torch.ones(0, 4)).shape == (0, 5)


def test_a_crash_between_the_renames_of_a_checkpoint_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    from recog_fast.checkpoint import checkpoint_path, latest_checkpoint, prune_checkpoints

    head = rf.MarginHead(5, 4)
    path = checkpoint_path(tmp_path, 1)
    rf.save_checkpoint(path, head=head, step=1)
    renames, real = [], os.replace

    def crash(source: object, target: object) -> None:
        renames.append(target)
        if len(renames) == 2:
            raise OSError("power cut")
        real(source, target)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(OSError, match="power cut"):
        rf.save_checkpoint(path, head=head, step=1)
    monkeypatch.undo()
    assert not path.exists()
    prune_checkpoints(tmp_path, 1)
    assert latest_checkpoint(tmp_path) == path
    assert rf.load_checkpoint(path, head=rf.MarginHead(5, 4))["step"] == 1


def test_checkpoint_names_that_meet_and_heads_that_do_not_fit(tmp_path: Path) -> None:
    more = {"a/b": torch.zeros(2), "a": {"b": torch.ones(2)}, 1: torch.full((2,), 2.0), "1": torch.full((2,), 3.0)}
    head = rf.MarginHead(5, 4)
    head.steps += 7
    rf.save_checkpoint(tmp_path / "c", head=head, step=1, more=more)
    loaded = rf.load_checkpoint(tmp_path / "c", head=rf.MarginHead(5, 4))["more"]
    assert [loaded["a/b"][0], loaded["a"]["b"][0], loaded[1][0], loaded["1"][0]] == [0, 1, 2, 3]
    other = rf.MarginHead(6, 4)
    with pytest.raises(ValueError, match=r"does not fit this head: expected weight of shape \(6, 4\), got \(5, 4\)"):
        rf.load_checkpoint(tmp_path / "c", head=other)
    assert int(other.steps) == 0
