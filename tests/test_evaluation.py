"""Verification, identification, templates, ERC and embedding against golden cases, brute force and hand-made cases."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import golden_dir

from recog_fast.evaluation import (
    equal_error_rate,
    error_versus_reject,
    identification,
    mean_average_precision,
    roc_curve,
    tar_at_far,
    template_embeddings,
    verification_accuracy,
    verification_result,
)

rng = np.random.default_rng(0)


def golden(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    case = np.load(golden_dir() / name)
    return {k: case[k] for k in case.files if k != "meta"}, json.loads(str(case["meta"]))["kwargs"]


# ---- golden


def test_verification_accuracy_golden() -> None:
    case, kwargs = golden("lfw_kfold__default.npz")
    mean, std, per_fold = verification_accuracy(case["in_e1"], case["in_e2"], case["in_issame"], kwargs["k"])
    np.testing.assert_allclose(per_fold, case["out_acc"], rtol=0, atol=1e-9)
    assert mean == pytest.approx(case["out_acc"].mean(), abs=1e-12)
    assert std == pytest.approx(case["out_acc"].std(), abs=1e-12)


def test_verification_accuracy_does_not_depend_on_norm_or_dtype() -> None:
    case, _ = golden("lfw_kfold__default.npz")
    scale = rng.uniform(0.1, 50, (len(case["in_e1"]), 1))
    _, _, scaled = verification_accuracy(case["in_e1"] * scale, case["in_e2"], case["in_issame"])
    _, _, single = verification_accuracy(
        torch.from_numpy(case["in_e1"]).float(),
        torch.from_numpy(case["in_e2"]).float(),
        torch.from_numpy(case["in_issame"]),
    )
    np.testing.assert_allclose(scaled, case["out_acc"], rtol=0, atol=1e-9)
    np.testing.assert_allclose(single, case["out_acc"], rtol=0, atol=1e-9)


def test_tar_at_far_golden() -> None:
    case, _ = golden("tar_at_far__ties.npz")
    inputs = case["in_score"], case["in_label"], case["in_fars"]
    np.testing.assert_allclose(tar_at_far(*inputs), case["out_tar"], rtol=0, atol=1e-9)
    np.testing.assert_allclose(tar_at_far(*inputs, rule="nearest"), case["out_tar_insightface"], rtol=0, atol=1e-9)


def test_identification_golden() -> None:
    case, kwargs = golden("identification__open.npz")
    rates, tpir = identification(case["in_S"], case["in_label_mat"], kwargs["ks"], kwargs["fpirs"], kwargs["rank"])
    np.testing.assert_allclose(rates, case["out_rank"], rtol=0, atol=1e-9)
    np.testing.assert_allclose(tpir, case["out_tpir"], rtol=0, atol=1e-9)


@pytest.mark.parametrize("fixed", [True, False])
def test_error_versus_reject_golden(fixed: bool) -> None:
    case, kwargs = golden(f"erc__fixed{fixed}.npz")
    curve, area = error_versus_reject(
        case["in_score"], case["in_label"], case["in_q"], kwargs["fmr"], kwargs["fixed_threshold"]
    )
    np.testing.assert_allclose(curve, case["out_fnmr"], rtol=0, atol=1e-9)
    assert area == pytest.approx(float(case["out_auc"]), abs=1e-9)


# ---- brute force and properties


def brute_accuracy(distance: np.ndarray, same: np.ndarray, folds: int) -> list[float]:
    """The LFW protocol as one would write it on paper."""
    parts = np.array_split(np.arange(len(same)), folds)
    accuracies = []
    for test in parts:
        train = np.setdiff1d(np.arange(len(same)), test)
        grid = np.arange(0, 4, 0.01)
        best = grid[int(np.argmax([((distance[train] < t) == same[train]).sum() for t in grid]))]
        accuracies.append(float(((distance[test] < best) == same[test]).mean()))
    return accuracies


@pytest.mark.parametrize(
    ("pairs", "folds"), [(50, 10), (53, 10), (7, 2), (9, 9)]
)  # even, uneven, smallest, one pair a fold
def test_verification_accuracy_is_the_protocol(pairs: int, folds: int) -> None:
    a, b = rng.normal(size=(pairs, 3)), rng.normal(size=(pairs, 3))
    same = np.arange(pairs) % 2 == 0
    b[same] += 2 * a[same]
    unit = [e / np.linalg.norm(e, axis=1, keepdims=True) for e in (a, b)]
    expected = brute_accuracy(((unit[0] - unit[1]) ** 2).sum(1), same, folds)
    mean, std, per_fold = verification_accuracy(a, b, same, folds)
    np.testing.assert_allclose(per_fold, expected, rtol=0, atol=1e-12)
    assert (mean, std) == (pytest.approx(np.mean(expected)), pytest.approx(np.std(expected)))


# Few distinct values, so ties within and across the two kinds are the rule.
tied_pairs = st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=40).filter(
    lambda pairs: len({same for _, same in pairs}) == 2
)


@settings(max_examples=150, deadline=None)
@given(tied_pairs, st.lists(st.sampled_from([0.0, 0.1, 0.29, 0.5, 0.75, 1.0]), min_size=1, max_size=4))
def test_tar_at_far_against_brute_force(pairs: list[tuple[int, bool]], fars: list[float]) -> None:
    scores, same = np.array([s for s, _ in pairs]) / 3, np.array([m for _, m in pairs])
    points = [(np.mean(scores[~same] >= t), np.mean(scores[same] >= t)) for t in (*np.unique(scores), np.inf)]
    conservative = [max(tar for far, tar in points if far <= wanted) for wanted in fars]
    np.testing.assert_allclose(tar_at_far(scores, same, fars), conservative, atol=1e-12)
    closest = [min(abs(far - wanted) for far, _ in points) for wanted in fars]
    nearest = [max(t for f, t in points if abs(f - wanted) == d) for wanted, d in zip(fars, closest, strict=True)]
    np.testing.assert_allclose(tar_at_far(scores, same, fars, rule="nearest"), nearest, atol=1e-12)


@settings(max_examples=100, deadline=None)
@given(tied_pairs)
def test_roc_and_eer_properties(pairs: list[tuple[int, bool]]) -> None:
    scores, same = np.array([s for s, _ in pairs], dtype=np.float64), np.array([m for _, m in pairs])
    far, tar, thresholds = roc_curve(scores, same)
    assert (far[0], tar[0], thresholds[0]) == (0, 0, np.inf)
    assert (far[-1], tar[-1]) == (1, 1)
    assert (np.diff(far) >= 0).all()
    assert (np.diff(tar) >= 0).all()
    assert (np.diff(thresholds) < 0).all()
    assert len(far) == len(np.unique(scores)) + 1
    np.testing.assert_allclose(far[1:], [(scores[~same] >= t).mean() for t in thresholds[1:]])
    eer, threshold = equal_error_rate(scores, same)
    below, _ = equal_error_rate(-scores, same)
    assert 0 <= eer <= 1
    assert scores.min() <= threshold <= scores.max()
    assert eer + below == pytest.approx(1, abs=1e-12)
    rising = tar_at_far(scores, same, [0, 0.1, 0.5, 1])
    assert (np.diff(rising) >= 0).all()
    assert rising[-1] == 1


def test_tar_at_far_does_not_lose_a_false_accept_to_rounding() -> None:
    # 0.29 * 100 is 28.999999999999996: 29 of 100 impostors are still FAR <= 0.29.
    scores = np.concatenate([np.arange(100.0), [70.5, 71.5]])
    same = np.arange(102) >= 100
    np.testing.assert_array_equal(tar_at_far(scores, same, [0.29, 0.28]), [1.0, 0.5])


def test_equal_error_rate_known_values() -> None:
    same = np.array([True, True, False, False])
    assert equal_error_rate(np.array([0.9, 0.8, 0.2, 0.1]), same) == (0.0, 0.8)
    assert equal_error_rate(np.array([0.1, 0.2, 0.8, 0.9]), same)[0] == 1.0
    assert equal_error_rate(np.zeros(4), same) == (0.5, 0.0)
    # One of two each on the wrong side of any threshold between 0.4 and 0.6.
    assert equal_error_rate(np.array([0.9, 0.4, 0.6, 0.1]), same)[0] == 0.5


def test_perfect_and_chance() -> None:
    base = rng.normal(size=(200, 8))
    same = rng.random(200) < 0.5
    perfect = verification_result(base, np.where(same[:, None], base, -base), same)
    assert (perfect.accuracy, perfect.std, perfect.eer, perfect.tar) == (1.0, 0.0, 0.0, (1.0, 1.0, 1.0))
    a, b = rng.normal(size=(2, 4000, 8))
    chance = verification_result(a, b, rng.random(4000) < 0.5)
    assert abs(chance.accuracy - 0.5) < 0.03
    assert abs(chance.eer - 0.5) < 0.03
    assert abs(chance.tar[0] - 0.1) < 0.04


def test_ties_on_a_threshold_and_zero_rows() -> None:
    # Identical vectors: distance 0 is not below the threshold 0 but below 0.01; a zero row is a distance 1 from any
    # unit row.
    a = np.array([[1.0, 0], [0, 1], [1, 0], [0, 0]])
    b = np.array([[2.0, 0], [0, 3], [0, 1], [5, 0]])
    _, _, per_fold = verification_accuracy(a, b, np.array([True, True, False, False]), folds=2)
    assert per_fold.shape == (2,)
    assert np.isfinite(per_fold).all()
    result = verification_result(a, b, np.array([True, True, False, False]), folds=2)
    np.testing.assert_allclose(result.scores, [1, 1, 0, 0])


def test_identification_by_hand() -> None:
    # Queries 0 and 1 have mates (gallery 0 and 1); query 2 has none and its best score is 0.6.
    similarity = np.array([[0.9, 0.2, 0.1], [0.7, 0.5, 0.3], [0.6, 0.1, 0.0]])
    mated = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 0]], dtype=bool)
    rates, tpir = identification(similarity, mated, ranks=(2, 1), fpirs=(0.0, 1.0), tpir_rank=1)
    np.testing.assert_allclose(rates, [1.0, 0.5])
    np.testing.assert_allclose(tpir, [0.5, 0.5])
    assert identification(similarity, mated)[1].shape == (0,)


def test_mean_average_precision_by_hand() -> None:
    similarity = np.array([[0.9, 0.8, 0.7, 0.6]])
    assert mean_average_precision(similarity, [1], [1, 2, 1, 3]) == pytest.approx((1 + 2 / 3) / 2)
    junk = np.array([[False, True, False, False]])
    assert mean_average_precision(similarity, [1], [1, 2, 1, 3], junk) == 1.0
    # A query without a relevant entry does not count.
    assert mean_average_precision(np.vstack([similarity, similarity]), [1, 9], [1, 2, 1, 3]) == pytest.approx(
        (1 + 2 / 3) / 2
    )


def test_template_embeddings_media_mean_then_sum() -> None:
    x = np.array([[1.0, 0], [3, 0], [0, 2], [0, 5], [4, 4]])
    ids, templates = template_embeddings(x, [7, 7, 7, 2, 2], media_ids=[1, 1, 2, 1, 1])
    np.testing.assert_array_equal(ids, [2, 7])
    second = np.array([2.0, 4.5]) / np.hypot(2, 4.5)
    np.testing.assert_allclose(templates, [second, [2**-0.5, 2**-0.5]], atol=1e-12)
    # Weighted sum of unit rows: the ERS template.
    _, weighted = template_embeddings(np.eye(2), [0, 0], weights=[0.6, 0.8])
    np.testing.assert_allclose(weighted, [[0.6, 0.8]], atol=1e-12)
    # All-zero weights: the plain mean.
    np.testing.assert_allclose(template_embeddings(np.eye(2), [0, 0], weights=[0, 0])[1], [[2**-0.5, 2**-0.5]])


def test_error_versus_reject_improves_with_a_perfect_quality() -> None:
    scores = np.concatenate([rng.normal(1, 1, 500), rng.normal(-1, 1, 5000)])
    same = np.arange(5500) < 500
    quality = np.where(same, scores, 10)
    curve, area = error_versus_reject(scores, same, quality, fmr=0.01, reject=[0.0, 0.02, 0.05])
    assert curve[0] > curve[1] > curve[2]
    assert area == pytest.approx(0.02 * (curve[0] + curve[1]) / 2 + 0.03 * (curve[1] + curve[2]) / 2)


# ---- bad input

SAME = np.array([True, False, True, False])
GOOD = np.array([0.9, 0.1, 0.8, 0.2])
E4 = np.eye(4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: verification_accuracy(E4, E4[:3], SAME), r"emb2 of shape \(4, 4\) as emb1, got \(3, 4\)"),
        (lambda: verification_accuracy(E4, E4, SAME[:3], 2), r"same of shape \(4,\), got \(3,\)"),
        (lambda: verification_accuracy(E4, E4, SAME), "folds between 2 and the number of pairs 4, got 10"),
        (lambda: verification_accuracy(E4, E4, SAME, 1), "folds between 2"),
        (lambda: verification_accuracy(E4 * np.nan, E4, SAME, 2), r"finite emb1, got nan at \(0, 0\)"),
        (lambda: verification_accuracy(E4, E4, np.ones(4, bool), 2), "no impostor one"),
        (lambda: verification_accuracy(E4[0], E4[0], SAME, 2), "emb1 with 2 dimensions"),
        (lambda: tar_at_far(GOOD, ~SAME & False, [0.1]), "tar_at_far: .* no genuine one"),
        (lambda: tar_at_far(GOOD, np.array([2, 0, 1, 0]), [0.1]), "same of booleans"),
        (lambda: tar_at_far([0.1, np.nan, 0.2, 0.3], SAME, [0.1]), "finite scores, got nan at 1"),
        (lambda: tar_at_far(GOOD, SAME, [1.5]), r"fars in \[0, 1\]"),
        (lambda: tar_at_far(GOOD, SAME, [0.1], rule="middle"), "expected rule"),  # type: ignore[arg-type]
        (lambda: equal_error_rate(GOOD, SAME[:2]), "equal_error_rate: expected same of shape"),
        (lambda: equal_error_rate([0.1, np.inf, 0.2, 0.3], SAME), "finite scores"),
        (lambda: roc_curve([], []), "no genuine one"),
        (lambda: identification(np.zeros((2, 3)), np.zeros((2, 3), bool)), "at least one query with a mate"),
        (lambda: identification(np.zeros((1, 1)), np.ones((1, 1), bool), fpirs=(0.1,)), "queries without a mate"),
        (lambda: identification(np.zeros((1, 1)), np.ones((1, 1), bool), ranks=(0,)), "ranks and tpir_rank >= 1"),
        (lambda: mean_average_precision(np.zeros((1, 2)), [1], [2, 3]), "at least one query with a relevant"),
        (lambda: mean_average_precision(np.zeros((1, 2)), [1], [2]), r"gallery_ids of shape \(2,\)"),
        (lambda: template_embeddings(E4, [1, 1, 1]), r"template_ids of shape \(4,\)"),
        (lambda: template_embeddings(E4, [1] * 4, weights=[1, 1, -1, 1]), "weights >= 0, got -1.0 at 2"),
        (lambda: template_embeddings(np.zeros((0, 4)), []), "at least one embedding"),
        (lambda: error_versus_reject(GOOD, SAME, GOOD[:2], 0.1), "pair_quality of shape"),
        (lambda: error_versus_reject(GOOD, SAME, GOOD, 2.0), r"fmr in \[0, 1\]"),
        (lambda: error_versus_reject(GOOD, SAME, GOOD, 0.1, reject=[0.5, 0.1]), "ascending"),
        (lambda: error_versus_reject(GOOD, SAME, GOOD, 0.1, False, reject=[0.75]), "impostor pairs left"),
    ],
)
def test_bad_input_is_a_clear_error(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_wrong_types_are_type_errors() -> None:
    with pytest.raises(TypeError, match="emb1 of real numbers"):
        verification_accuracy(np.array([["a"]]), np.array([["a"]]), [True])
    with pytest.raises(TypeError, match="template_ids of integers"):
        template_embeddings(E4, np.zeros(4))
