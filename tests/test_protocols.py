"""ERC comparison, subgroups, CMC, templates' forms and the published protocols, against brute force and hand-made cases."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from paths import data_dir

from recog_fast.data import degradations, read_tinyface
from recog_fast.evaluation import (
    compare_qualities,
    cumulative_match,
    erc_protocol,
    error_versus_reject,
    four_forms,
    identification,
    mean_average_precision,
    pair_minimum,
    post_processing,
    robustness,
    scface,
    subgroup_report,
    survface_identification,
    survface_verification,
    tar_at_far,
    template_scores,
    tinyface_identification,
    tinyface_pairs,
    ytf,
)

rng = np.random.default_rng(5)
SAME = np.arange(4000) % 2 == 0
SCORES = rng.normal(size=4000) + SAME
E4 = np.eye(4)


# ---- error-versus-reject


def collapsed() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(scores, same, quality): the worst third of the pairs all look alike, genuine or not."""
    scores, quality = SCORES.copy(), rng.random(4000)
    scores[quality < 1 / 3] = 5 + 0.1 * rng.random((quality < 1 / 3).sum())
    return scores, SAME, quality


def test_fixed_threshold_warns_where_bad_pairs_pass_it() -> None:
    scores, same, quality = collapsed()
    with pytest.warns(
        UserWarning, match=r"\d\d % of the genuine pairs among the 25 % of lowest quality, \d % of the others, score"
    ):
        error_versus_reject(scores, same, quality, 0.2)
    # Only the impostors of the worst images look alike: they set the threshold, whoever is rejected.
    alike = np.where(~same & (quality < 0.1), 4.0, SCORES)
    with pytest.warns(
        UserWarning, match=r"\d\d % of the impostor pairs among the 25 % of lowest quality, \d\S* % of the"
    ):
        error_versus_reject(alike, same, quality, 0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        error_versus_reject(scores, same, quality, 0.2, fixed_threshold=False)
        error_versus_reject(SCORES, SAME, quality, 0.2)  # a quality that knows nothing
        error_versus_reject(SCORES, SAME, np.where(SAME, SCORES, 0.0), 0.2)  # a good one


def test_compared_qualities_share_one_protocol() -> None:
    scores, same, quality = collapsed()
    found = compare_qualities(scores, same, {"good": quality}, 0.05, fixed_threshold=False, reject=[0.0, 0.2, 0.5])
    assert list(found.curves) == list(found.areas) == ["good", "random"]
    curve, area = error_versus_reject(scores, same, quality, 0.05, False, [0.0, 0.2, 0.5])
    np.testing.assert_array_equal(found.curves["good"], curve)
    assert found.areas["good"] == area and found.warnings == ()
    assert found.curves["good"][-1] < found.curves["random"][-1] - 0.1
    assert found.protocol == erc_protocol(0.05, False) and "re-estimated" in found.protocol
    fixed = compare_qualities(scores, same, {"good": quality}, 0.05, random_seed=None)
    assert "fixed on the full set" in fixed.protocol and len(fixed.warnings) == 1 and "good:" in fixed.warnings[0]
    assert list(fixed.curves) == ["good"] and len(fixed.reject) == 20


def test_pair_minimum() -> None:
    np.testing.assert_array_equal(pair_minimum([0.5, 0.1, 0.9], [0, 2], [1, 0]), [0.1, 0.5])


# ---- subgroups


def test_subgroups_against_brute_force() -> None:
    groups = np.where(np.arange(4000) % 3 == 0, "a", "b")
    fars = [0.1, 0.01]
    own = subgroup_report(SCORES, SAME, groups, fars)
    for row, name in enumerate(("a", "b")):
        mine = groups == name
        np.testing.assert_allclose(own.frr[row], 1 - tar_at_far(SCORES[mine], SAME[mine], fars), atol=1e-12)
        assert (own.genuine[row], own.impostor[row]) == ((mine & SAME).sum(), (mine & ~SAME).sum())
    assert own.names == ("a", "b") and (own.far <= fars).all()
    np.testing.assert_allclose(own.pooled, 1 - tar_at_far(SCORES, SAME, fars), atol=1e-12)
    np.testing.assert_allclose(own.mean, own.frr.mean(0))
    common = subgroup_report(SCORES, SAME, torch.tensor(np.arange(4000) % 3), fars, "pooled")
    weights = np.array(common.genuine) / sum(common.genuine)
    np.testing.assert_allclose(weights @ common.frr, common.pooled, atol=1e-12)
    assert "FRR@0.01" in str(common) and "pooled" in str(common) and len(str(common).splitlines()) == 6


# ---- re-identification


def test_cumulative_match_against_brute_force() -> None:
    similarity = rng.integers(0, 6, (20, 15)) / 5  # ties
    queries, gallery = rng.integers(0, 4, 20), rng.integers(0, 4, 15)
    junk = rng.random((20, 15)) < 0.2
    hits, precisions = [], []
    for q in range(20):
        ranked = [g for g in sorted(range(15), key=lambda g: -similarity[q, g]) if not junk[q, g]]
        right = [gallery[g] == queries[q] for g in ranked]
        if any(right):
            hits.append([any(right[:k]) for k in (1, 5, 10)])
            precisions.append(np.mean([sum(right[: i + 1]) / (i + 1) for i in range(len(right)) if right[i]]))
    np.testing.assert_allclose(cumulative_match(similarity, queries, gallery, junk), np.mean(hits, 0), atol=1e-12)
    assert mean_average_precision(similarity, queries, gallery, junk) == pytest.approx(np.mean(precisions), abs=1e-12)


# ---- templates and protocols


def test_four_forms_are_the_named_ones() -> None:
    plain, mirrored = rng.normal(size=(2, 5, 3))
    forms = four_forms(plain, mirrored)
    assert set(forms) == {post_processing(flip, norm) for flip in (True, False) for norm in (True, False)}
    np.testing.assert_array_equal(forms[post_processing(False, False)], plain)
    np.testing.assert_array_equal(forms[post_processing(True, False)], plain + mirrored)
    for flip in (True, False):
        unit = forms[post_processing(flip, True)]
        kept = forms[post_processing(flip, False)]
        np.testing.assert_allclose(unit * np.linalg.norm(kept, axis=1, keepdims=True), kept, atol=1e-12)


def test_template_scores_by_id() -> None:
    scores = template_scores([3, 7, 9], [[1.0, 0], [0, 2], [3, 3]], [3, 9], [7, 9])
    np.testing.assert_allclose(scores, [0, 1], atol=1e-12)


def test_ytf_templates_and_weights() -> None:
    """A bad frame spoils the plain average of one video; weight 0 takes it out."""
    frames = np.array([[1.0, 0], [-0.9, 0.9], [1, 0.1], [0, 1], [0.1, 1]])
    videos = [10, 10, 11, 12, 13]
    pairs = {"first": [10, 12, 10, 11], "second": [11, 13, 12, 13], "same": [True, True, False, False]}
    plain = ytf(frames, videos, **pairs, folds=2)
    weighted = ytf(frames, videos, **pairs, weights=[1, 0, 1, 1, 1], folds=2)
    assert plain.scores[0] < 0.5 < weighted.scores[0] and weighted.eer == 0.0


def test_scface_distances() -> None:
    gallery = np.eye(3)
    probes = np.array([[1, 0.1, 0], [0, 1, 0], [0, 1, 0.9], [1, 0, 0.5]])
    found = scface(probes, [0, 1, 2, 0], [1.0, 4.2, 4.2, 1.0], gallery, [0, 1, 2])
    assert found == {"4.2 m": 0.5, "1 m": 1.0, "average": 0.75}


def test_survface_protocols() -> None:
    tpr = survface_verification(SCORES, SAME)
    assert list(tpr) == [0.3, 0.1, 0.01, 0.001] and tpr[0.01] == tar_at_far(SCORES, SAME, [0.01])[0]
    similarity = rng.normal(size=(30, 40))
    mated = np.zeros((30, 40), dtype=bool)
    mated[np.arange(20), np.arange(20)] = True
    similarity[mated] += 1.5
    _, tpir = identification(similarity, mated, fpirs=[0.3, 0.2, 0.1])
    assert list(survface_identification(similarity, mated).values()) == tpir.tolist()


def test_tinyface_distractors_only_add_wrong_answers() -> None:
    gallery, probes = rng.normal(size=(40, 8)), rng.normal(size=(60, 8))
    who = rng.integers(0, 50, 60)
    probes += 1.2 * np.vstack([gallery, rng.normal(size=(10, 8))])[who]
    distractors = rng.normal(size=(5000, 8))  # more than one block
    ids = np.arange(40)
    without = tinyface_identification(probes, who, gallery, ids)
    found = tinyface_identification(probes, who, gallery, ids, distractors)
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (probes, np.vstack([gallery, distractors]))]
    mated = who[:, None] == np.concatenate([ids, np.full(5000, -1)])[None]
    expected, _ = identification(unit[0] @ unit[1].T, mated, ranks=(1, 5, 20))
    np.testing.assert_allclose(list(found.values()), expected, atol=1e-12)
    assert all(found[k] <= without[k] for k in (1, 5, 20)) and found[1] < without[1]


def test_tinyface_pairs_of_the_protocol() -> None:
    folder = data_dir() / "tinyface_protocol"
    ids = np.concatenate(
        [read_tinyface(folder / name)[1] for name in ("probe_img_ID_pairs.mat", "gallery_match_img_ID_pairs.mat")]
    )
    first, second, same = tinyface_pairs(ids, seed=3)
    assert same.sum() == 20_888 and (~same).sum() == 50_000
    np.testing.assert_array_equal(ids[first] == ids[second], same)
    assert len(set(zip(first.tolist(), second.tolist(), strict=True))) == 70_888 and (first != second).all()
    again = tinyface_pairs(ids, seed=3)
    assert all(np.array_equal(a, b) for a, b in zip((first, second, same), again, strict=True))
    assert not np.array_equal(tinyface_pairs(ids, seed=4)[0], first)


def test_robustness_sets() -> None:
    images = list(rng.integers(0, 256, (40, 16, 16, 3), dtype=np.uint8))
    same = [i % 2 == 0 for i in range(20)]
    for i in range(0, 40, 4):
        images[i + 1] = images[i]
    results = robustness(lambda x: x.flatten(1), (images, same), degradations.down_up, (8, 4), folds=2, flip=False)
    assert list(results) == ["full size", "8x8", "4x4"]
    assert results["full size"].scores[0] == pytest.approx(1)
    for name, size in (("8x8", 8), ("4x4", 4)):
        rows = np.stack([degradations.down_up(image, size).ravel() for image in images]) / 127.5 - 1
        unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        np.testing.assert_allclose(results[name].scores, (unit[0::2] * unit[1::2]).sum(1), atol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: compare_qualities(SCORES, SAME, {}, 0.1), "at least one quality measure"),
        (lambda: compare_qualities(SCORES, SAME, {"random": SCORES}, 0.1), "no measure called 'random'"),
        (lambda: subgroup_report(SCORES, SAME, ["a"]), r"groups of shape \(4000,\)"),
        (
            lambda: subgroup_report(SCORES, SAME, SAME),
            "genuine and impostor pairs in every subgroup, got 0 and 2000 in False",
        ),
        (lambda: subgroup_report(SCORES, SAME, SAME, [2.0]), r"fars \(n,\) in \[0, 1\]"),
        (lambda: subgroup_report(SCORES, SAME, SAME, threshold="mine"), "'own' or 'pooled'"),  # type: ignore[arg-type]
        (lambda: cumulative_match(np.zeros((1, 1)), [0], [0], ranks=[0]), "ranks >= 1"),
        (lambda: cumulative_match(np.zeros((1, 1)), [0], [1]), "cumulative_match: .* at least one query"),
        (lambda: four_forms(E4, E4[:3]), r"mirrored of shape \(4, 4\)"),
        (lambda: template_scores([1, 2], E4[:2], [1], [5]), "template ids of second among ids, got 5"),
        (lambda: ytf(E4, [0, 1, 2, 3], [0, 9], [1, 2], [True, False], folds=2), "first among video_ids, got 9"),
        (lambda: scface(E4, [0, 1, 2, 9], [1, 1, 2, 2], E4, [0, 1, 2, 3]), "a mate in the gallery .* identity 9"),
        (lambda: scface(E4, [0, 1, 2, 3], [1, 1], E4, [0, 1, 2, 3]), r"distances of shape \(4,\)"),
        (lambda: tinyface_pairs([0, 0, 1], impostors=3), "at least 3 impostor pairs, got 1 and 2"),
        (lambda: tinyface_identification(E4, [9] * 4, E4, [0, 1, 2, 3], E4), "a probe with a mate"),
    ],
)
def test_bad_input_is_a_clear_error(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
