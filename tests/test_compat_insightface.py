"""arcface_torch's spellings against its own formulas, and its per-rank files in any split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import recog_fast as rf
from recog_fast.compat.insightface import CombinedMarginLoss, PartialFC_V2, head_shards, import_head, margin_from_list

C, D, N = 41, 20, 23


def arcface_torch(
    x: Tensor, w: Tensor, y: Tensor, s: float, margins: tuple[float, float, float], threshold: float
) -> Tensor:
    """Its CombinedMarginLoss, linear layer and cross entropy over all classes, written out; acos and cos take no gradient."""
    m1, m2, m3 = margins
    logits = (F.normalize(x, dim=1) @ F.normalize(w, dim=1).t()).clamp(-1, 1)
    rows = torch.arange(len(y))
    if threshold > 0:
        far = (logits <= threshold).to(logits.dtype)
        far[rows, y] = 1
        logits = logits * far
    if m1 == 1.0 and m3 == 0.0:
        with torch.no_grad():
            angles = logits.acos()
            angles[rows, y] += m2
            change = angles.cos() - logits
        logits = logits + change
    else:
        logits = logits.index_put((rows, y), logits[rows, y] - m3)
    return F.cross_entropy(s * logits, y)


@pytest.mark.parametrize("threshold", [0.0, 0.3])
@pytest.mark.parametrize("margins", [(1.0, 0.5, 0.0), (1.0, 0.0, 0.4), (1.0, 2.9, 0.0)])
def test_loss_and_gradients(margins: tuple[float, float, float], threshold: float) -> None:
    """Straight-through and without fallback: error against float64 at most twice PyTorch's in float32, plus 1e-6."""
    torch.manual_seed(0)
    head = PartialFC_V2(CombinedMarginLoss(30.0, *margins, threshold), D, C)
    assert head.weight.std().item() == pytest.approx(0.01, rel=0.1)
    x, y = torch.randn(N, D), torch.randint(C, (N,))
    results: dict[str, Any] = {}
    for kind, dtype in (("truth", torch.float64), ("torch", torch.float32)):
        leaf, w = x.to(dtype).clone().requires_grad_(), head.weight.detach().to(dtype).clone().requires_grad_()
        value = arcface_torch(leaf, w, y, 30.0, margins, threshold)
        value.backward()
        results[kind] = (value.detach(), leaf.grad, w.grad)
    leaf = x.clone().requires_grad_()
    value = head(leaf, y)
    value.backward()
    for truth, theirs, ours in zip(
        results["truth"], results["torch"], (value.detach(), leaf.grad, head.weight.grad), strict=True
    ):
        assert ours is not None
        assert (ours - truth).abs().max() <= 2 * (theirs - truth).abs().max() + 1e-6 * truth.abs().max()


def test_straight_through_is_another_gradient() -> None:
    """Ours by default is exact: the two differ by a third of their size on random rows, so the test above can fail."""
    torch.manual_seed(0)
    x, y = torch.randn(N, D), torch.randint(C, (N,))
    gradients = []
    for margin in (margin_from_list((1.0, 0.5, 0.0)), rf.ArcFace(0.5, fallback="none")):
        leaf = x.clone().requires_grad_()
        rf.margin_softmax_loss(
            leaf, torch.randn(C, D, generator=torch.Generator().manual_seed(1)), y, margin=margin
        ).backward()
        gradients.append(leaf.grad)
    a, b = gradients
    assert a is not None and b is not None
    assert (a - b).norm() > 0.03 * b.norm()


def test_margin_lists() -> None:
    assert margin_from_list([1.0, 0.5, 0.0]) == rf.ArcFace(0.5, "none", "straight_through")
    assert margin_from_list([1.0, 0.0, 0.4]) == rf.CosFace(0.4)
    assert margin_from_list([1.35, 0.0, 0.2]) == rf.CosFace(0.2), "m1 and m2 count for nothing beside m3, as there"
    for wrong in ([1.0, 0.5], [0.9, 0.4, 0.0], [1.0, 0.5, -0.1]):
        with pytest.raises(ValueError, match="margin_from_list: expected margin_list"):
            margin_from_list(wrong)
    with pytest.raises(ValueError, match="margin_list"):
        CombinedMarginLoss(64.0, 2.0, 0.0, 0.0)
    with pytest.raises(TypeError, match="CombinedMarginLoss, got function"):
        PartialFC_V2(lambda c, n: c, D, C)  # type: ignore[arg-type]


def test_training_script_of_arcface_torch() -> None:
    """Its loop: one optimizer over both, unlabelled rows, sampling, the state dict with nothing but a weight."""
    torch.manual_seed(0)
    backbone = torch.nn.Linear(12, D)
    module = PartialFC_V2(CombinedMarginLoss(16.0, 1.0, 0.2, 0.0), D, C, sample_rate=0.5)
    module.load_state_dict({"weight": torch.randn(C, D) * 0.01})
    optimizer = torch.optim.SGD(
        [{"params": backbone.parameters()}, {"params": module.parameters()}], lr=0.2, momentum=0.9
    )
    images, labels = torch.randn(N, 12), torch.randint(C, (N,))
    labels[3] = -1
    values = []
    for _ in range(40):
        loss = module(backbone(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        values.append(loss.item())
    assert values[-1] < 0.3 * values[0]


def shards(folder: Path, sizes: list[int], weight: Tensor, old: bool = False) -> Path:
    for rank, part in enumerate(torch.split(weight, sizes)):
        if old:
            torch.save(part.clone(), folder / f"rank_{rank}_softmax_weight.pt")
        else:
            torch.save(
                {
                    "epoch": 3,
                    "global_step": 7,
                    "state_dict_backbone": {"a": torch.zeros(1)},
                    "state_dict_softmax_fc": {"weight": part.clone()},
                },
                folder / f"checkpoint_gpu_{rank}.pt",
            )
    return folder


@pytest.mark.parametrize("sizes", [[3, 3, 2, 2], [3, 3, 3, 1], [10], [4, 0, 6], [1] * 10])
def test_head_files_in_any_split(tmp_path: Path, sizes: list[int]) -> None:
    """3, 3, 2, 2 is InsightFace's own split of 10 classes on 4 ranks, 3, 3, 3, 1 torch.chunk's: rows go by their number."""
    weight = torch.arange(10 * 4, dtype=torch.float32).reshape(10, 4)
    (tmp_path / "model.pt").write_bytes(b"the backbone lies beside them")
    head = rf.MarginHead(10, 4)
    before = head.prototypes().clone()
    placed = import_head(head, shards(tmp_path, sizes, weight))
    assert torch.equal(head.weight, weight) and [past - first for _, first, past in placed] == sizes
    assert [first for _, first, _ in placed] == [sum(sizes[:k]) for k in range(len(sizes))]
    assert not torch.equal(head.prototypes(), before), "no stale prototypes"


def test_old_head_files_and_more_than_ten_ranks(tmp_path: Path) -> None:
    weight = torch.randn(24, 3)
    folder = shards(tmp_path, [2] * 12, weight, old=True)
    assert [path.name for path in head_shards(folder)][9:11] == [
        "rank_9_softmax_weight.pt",
        "rank_10_softmax_weight.pt",
    ]
    head = rf.MarginHead(24, 3)
    import_head(head, list(reversed(head_shards(folder))))
    assert torch.equal(head.weight, weight)


def test_head_files_that_do_not_fit(tmp_path: Path) -> None:
    folder = shards(tmp_path, [5, 5], torch.randn(10, 4))
    head = rf.MarginHead(11, 4)
    kept = head.weight.detach().clone()
    with pytest.raises(ValueError, match=r"expected 11 classes in 2 files, got 10 \(5, 5\): a file is missing"):
        import_head(head, folder)
    with pytest.raises(ValueError, match="expected D = 5 in .*checkpoint_gpu_0.pt, got 4"):
        import_head(rf.MarginHead(10, 5), folder)
    (folder / "checkpoint_gpu_0.pt").rename(folder / "checkpoint_gpu_2.pt")
    with pytest.raises(ValueError, match=r"ranks 0 .. R-1 in .*, got ranks \[1, 2\]"):
        import_head(head, folder)
    with pytest.raises(ValueError, match="of distinct ranks, got .*other.pt"):
        head_shards([folder / "other.pt"])
    (folder / "checkpoint_gpu_0.pt").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="tensors only"):
        import_head(head, folder)
    torch.save({"weight": [1]}, folder / "checkpoint_gpu_0.pt")
    with pytest.raises(ValueError, match="expected state_dict_softmax_fc.weight"):
        import_head(head, folder)
    assert torch.equal(head.weight, kept)
