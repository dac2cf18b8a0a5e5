"""ERS and the centre of unrecognizable faces: golden cases, exactness of the tiles, real embeddings (math.md 5)."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from golden import cases, load
from paths import data_dir
from torch import Tensor

from recog_fast import recognizability as rec
from recog_fast.evaluation import equal_error_rate, tar_at_far, template_embeddings
from recog_fast.recognizability import ui_center

F64 = torch.float64
TOLERANCE = {F64: 1e-9, torch.float32: 1e-6}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", cases("ers"))
def test_golden_ers(name: str, dtype: torch.dtype) -> None:
    case = load(name)
    x, u = case["in_F"].to(dtype), case["in_u"].to(dtype)
    close = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype], "check_dtype": False}
    score = rec.embedding_recognizability(x, u)
    assert score.dtype == dtype
    torch.testing.assert_close(score, case["out_e"], **close)
    torch.testing.assert_close(rec.embedding_recognizability(x, u, cap=False), case["out_e_uncapped"], **close)
    # The score is the weight templates take.
    ids, templates = template_embeddings(torch.nn.functional.normalize(x, dim=1), case["in_groups"], weights=score)
    np.testing.assert_array_equal(ids, case["out_ids"].numpy())
    np.testing.assert_allclose(templates, case["out_templates"].numpy(), rtol=0, atol=10 * TOLERANCE[dtype])
    pairs = case["out_pair"].numel()
    decided = rec.pair_decision(case["in_sim"][:pairs], score[:pairs], score[pairs:], case.kwargs["gamma"])
    torch.testing.assert_close(decided, case["out_pair"], **close)


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("name", cases("ui_cluster"))
def test_golden_cluster(name: str, tiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    case = load(name)
    if tiled:
        monkeypatch.setattr(ui_center, "SMALL", 1)
        monkeypatch.setattr(ui_center.components, "__defaults__", (7,))
    labels = rec.cluster_labels(case["in_F"], case.kwargs["t"])
    truth = case["out_labels"].numpy()
    # The same partition, whatever the numbers.
    assert len(np.unique(np.stack([labels, truth]), axis=1).T) == len(np.unique(truth)) == labels.max() + 1
    np.testing.assert_array_equal(np.bincount(labels), np.sort(case["out_sizes"].numpy())[::-1])
    center, mask = rec.unrecognizable_center(case["in_F"], "cluster", case.kwargs["t"])
    assert torch.equal(mask, case["out_ui_mask"])
    torch.testing.assert_close(center, case["out_center"], rtol=1e-9, atol=1e-9)


# Chains across tiles (sorted along a line), a cluster larger than a tile, none, and one row.
@pytest.mark.parametrize(
    ("rows", "spread", "threshold"), [(300, 0.02, 0.05), (300, 0.3, 0.6), (200, 3.0, 0.2), (1, 1.0, 1.0)]
)
@pytest.mark.parametrize("tile", [1, 64, 512])
def test_tiles_are_single_linkage(rows: int, spread: float, threshold: float, tile: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    angle = torch.linspace(0, 3, rows, dtype=F64)
    noise = spread * torch.randn(rows, 6, generator=generator, dtype=F64)
    x = torch.nn.functional.normalize(torch.cat([angle.cos()[:, None], angle.sin()[:, None], noise], dim=1), dim=1)
    found = ui_center.components(x[torch.randperm(rows, generator=generator)], threshold, tile)
    generator.manual_seed(rows)
    torch.randn(rows, 6, generator=generator, dtype=F64)
    again = x[torch.randperm(rows, generator=generator)]
    truth = ui_center._linkage(again, threshold) if rows > 1 else np.zeros(1)
    pairs = np.unique(np.stack([found, truth.astype(np.int64)]), axis=1)
    assert pairs.shape[1] == len(np.unique(found)) == len(np.unique(truth))


def test_equally_large_clusters_take_the_lowest_row() -> None:
    x = torch.eye(3, dtype=F64)[[2, 0, 1, 0, 2]]
    assert rec.cluster_labels(x, 0.1).tolist() == [0, 1, 2, 1, 0]


def test_mean_is_of_unit_rows_and_names_what_it_cannot_do() -> None:
    x = torch.tensor([[10.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    center, mask = rec.unrecognizable_center(x)
    torch.testing.assert_close(center, torch.tensor([0.5, 0.5]).sqrt())
    assert center.dtype == torch.float32 and mask.tolist() == [True] * 3
    for bad, message in (
        (x[:0], "at least one embedding"),
        (torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), "a mean direction, got a mean of norm 0.0e+00 over 2 rows"),
        (torch.tensor([[1.0, float("nan")]]), "finite embeddings, got a non-finite value in row 0"),
        (x[0], "shape (N, D)"),
    ):
        with pytest.raises(ValueError, match="^unrecognizable_center: expected ") as error:
            rec.unrecognizable_center(bad)
        assert message in str(error.value)
    with pytest.raises(ValueError, match="method 'mean' or 'cluster', got 'median'"):
        rec.unrecognizable_center(x, "median")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"threshold in \[0, 2\]"):
        rec.cluster_labels(x, 3.0)


def test_score_has_its_bounds_and_gradient() -> None:
    center = torch.tensor([3.0, 0.0], dtype=F64)
    x = torch.tensor([[5.0, 0.0], [-1.0, 0.0], [0.0, 0.0], [1.0, 1.0]], dtype=F64, requires_grad=True)
    torch.testing.assert_close(rec.embedding_recognizability(x, center).tolist(), [0.0, 1.0, 1.0, 1 - 0.5**0.5])
    torch.testing.assert_close(
        rec.embedding_recognizability(x, center, cap=False).tolist(), [0.0, 2.0, 1.0, 1 - 0.5**0.5]
    )
    assert torch.autograd.gradcheck(rec.embedding_recognizability, (x[3:].detach().requires_grad_(), center))
    assert rec.embedding_recognizability(x.detach().half(), center.half()).dtype == torch.float32
    for bad in (torch.zeros(2), torch.ones(3), torch.tensor([float("inf"), 1.0])):
        with pytest.raises(ValueError, match="^embedding_recognizability: expected .*center"):
            rec.embedding_recognizability(x, bad)


def test_all_pairs_rejected_is_a_number() -> None:
    """Nothing can be accepted: every pair scores -1 and FRR is 1 at every FAR."""
    scores, same = torch.tensor([0.9, 0.1, 0.8, 0.2]), torch.tensor([True, True, False, False])
    e = torch.full((4,), 0.3)
    assert rec.pair_decision(scores, e, e, 0.6).tolist() == [-1.0] * 4
    (row,) = rec.threshold_table(scores, same, e, e, gammas=[0.6])
    assert row == (0.6, 1.0, 1.0, (1.0, 1.0))
    with pytest.raises(ValueError, match=r"e2 of shape \(N,\) = \(4,\)"):
        rec.pair_decision(scores, e, e[:3])
    with pytest.raises(ValueError, match="genuine and impostor pairs, got 4 genuine of 4"):
        rec.threshold_table(scores, torch.ones(4, dtype=torch.bool), e, e)


def test_threshold_table_is_the_conservative_rule_of_evaluation() -> None:
    generator = torch.Generator().manual_seed(0)
    same = torch.rand(500, generator=generator) < 0.5
    scores = torch.randn(500, generator=generator) * 0.3 + 0.4 * same
    e1, e2 = torch.rand(2, 500, generator=generator)
    fars = (0.0, 0.01, 0.29, 1.0)
    for row in rec.threshold_table(scores, same, e1, e2, gammas=(0.0, 0.3), fars=fars):
        decided = rec.pair_decision(scores.double(), e1, e2, row.gamma)
        tar = tar_at_far(decided, same, list(fars))
        # At FAR 1 the evaluation accepts all pairs, the table all but those recognizability rejects.
        np.testing.assert_allclose(row.frr[:3], 1 - tar[:3], rtol=0, atol=1e-12)
        assert row.frr[3] == pytest.approx(row.rejected_genuine)
        assert row.rejected_genuine == pytest.approx(float((torch.minimum(e1, e2)[same] < row.gamma).double().mean()))


# --- real embeddings ------------------------------------------------------------------------------------------------


def _mixed(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(embeddings (737, 128), UI centre, pairs' similarities, same): every image once, clean / 16 / 8 with .55 / .2 / .25."""
    with np.load(data_dir() / "embeddings" / "lfw_fold05_mobilefacenet128.npz") as file:
        levels = torch.stack([torch.from_numpy(file[name]).double() for name in ("clean", "down16", "down8")])
        people = np.array([str(name).split("/")[0] for name in file["names"]])
    which = torch.from_numpy(np.random.default_rng(seed).choice(3, len(people), p=[0.55, 0.2, 0.25]))
    chosen = levels[which, torch.arange(len(people))]
    center, _ = rec.unrecognizable_center(levels[2])
    unit = torch.nn.functional.normalize(chosen, dim=1)
    first, second = torch.triu_indices(len(people), len(people), 1)
    same = torch.from_numpy(people[first.numpy()] == people[second.numpy()])
    return chosen, center, (unit[first] * unit[second]).sum(1), same


def test_rejecting_the_least_recognizable_lowers_the_error_on_real_embeddings() -> None:
    chosen, center, scores, same = _mixed()
    score = rec.embedding_recognizability(chosen, center, cap=False)
    first, second = torch.triu_indices(len(chosen), len(chosen), 1)
    quality = torch.minimum(score[first], score[second])

    def errors(order: Tensor) -> list[float]:
        """EER without the first 0, 10, ... 60 % of the pairs in `order`."""
        return [
            equal_error_rate(scores[order[round(r * len(order) / 10) :]], same[order[round(r * len(order) / 10) :]])[0]
            for r in range(7)
        ]

    by_score = errors(quality.argsort(stable=True))
    at_random = errors(torch.randperm(len(scores), generator=torch.Generator().manual_seed(0)))
    assert by_score[0] == pytest.approx(0.3, abs=0.05)
    assert all(b < a for a, b in itertools.pairwise(by_score)), by_score
    assert by_score[-1] <= 0.10, by_score
    assert min(at_random) > by_score[0] - 0.02, at_random


def test_clean_and_8x8_faces_are_told_apart() -> None:
    with np.load(data_dir() / "embeddings" / "lfw_fold05_mobilefacenet128.npz") as file:
        clean, low = (torch.from_numpy(file[name]).double() for name in ("clean", "down8"))
    center, _ = rec.unrecognizable_center(low)
    good, bad = (rec.embedding_recognizability(x, center, cap=False) for x in (clean, low))
    area = (good[:, None] > bad[None, :]).double().mean()
    assert area >= 0.99


def test_clustered_center_is_the_direct_one() -> None:
    """Severe corruption (8x8) among clean faces: found without labels, purity >= .98, <= .0135 from the direct centre at t = 0.9."""
    with np.load(data_dir() / "embeddings" / "lfw_fold05_mobilefacenet128.npz") as file:
        clean, low = (torch.from_numpy(file[name]).double() for name in ("clean", "down8"))
    mixed = torch.cat([clean, low[::2]])
    direct, _ = rec.unrecognizable_center(low)
    center, mask = rec.unrecognizable_center(mixed, "cluster", 0.9)
    assert mask[len(clean) :].sum() / mask.sum() >= 0.98
    assert 1 - center @ direct <= 0.0135
    table = rec.cluster_table(mixed, direct=direct)
    (row,) = [row for row in table if row.threshold == 0.9]
    assert row.largest == mask.sum() and row.distance == pytest.approx(float(1 - center @ direct))
    assert [row.clusters for row in table] == sorted((row.clusters for row in table), reverse=True)
