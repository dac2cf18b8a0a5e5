"""The embedding recognizability score on real embeddings (LFW fold 5, clean / 16x16 / 8x8): rejecting by it lowers errors.

e = min(1 - <f_UI, f>, 1) (math.md 5); the UI centre is the mean of the unit 8x8 embeddings. Every image is there once,
clean, 16x16 or 8x8 with probability 0.55, 0.2, 0.25, drawn by the seed; all pairs of the fold's 737 images.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from numpy.typing import NDArray
from paths import data_dir

from recog_fast.evaluation import all_pairs, compare_qualities, equal_error_rate, pair_minimum, tar_at_far

SEEDS = (0, 1, 2)
REJECT = np.arange(7) / 10
Floats = NDArray[np.float64]


def unit(x: Floats) -> Floats:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@cache
def stored() -> tuple[dict[str, Floats], NDArray[np.int64], Floats]:
    """(condition -> embeddings, people, UI centre)."""
    path = data_dir() / "embeddings" / "lfw_fold05_mobilefacenet128.npz"
    if not path.is_file():
        pytest.skip(f"no stored embeddings: {path} is no file")
    with np.load(path) as arrays:
        rows = {name: arrays[name].astype(np.float64) for name in ("clean", "down16", "down8")}
        people = np.unique([str(n).split("/")[0] for n in arrays["names"]], return_inverse=True)[1]
    return rows, people, unit(unit(rows["down8"]).mean(axis=0))


@cache
def mixed(seed: int) -> tuple[Floats, Floats, NDArray[np.bool_], Floats]:
    """(embeddings, scores of all pairs, same, pair recognizability) of one draw."""
    rows, people, center = stored()
    level = np.random.default_rng(seed).choice(3, len(people), p=[0.55, 0.2, 0.25])
    x = np.stack([rows["clean"], rows["down16"], rows["down8"]])[level, np.arange(len(people))]
    first, second = np.triu_indices(len(people), 1)
    scores = (unit(x) @ unit(x).T)[first, second]
    ers = np.minimum(1 - unit(x) @ center, 1)
    return x, scores, people[first] == people[second], pair_minimum(ers, first, second)


def eers(scores: Floats, same: NDArray[np.bool_], quality: Floats) -> Floats:
    """EER of the pairs left after rejecting 0, 10, ... 60 % of lowest quality."""
    order = np.argsort(quality, kind="stable")
    kept = [order[int(np.floor(rate * len(order))) :] for rate in REJECT]
    return np.array([equal_error_rate(scores[rows], same[rows])[0] for rows in kept])


@pytest.mark.parametrize("seed", SEEDS)
def test_rejecting_the_least_recognizable_lowers_the_error(seed: int) -> None:
    _, scores, same, ers = mixed(seed)
    curve = eers(scores, same, ers)
    assert 0.25 < curve[0] < 0.35
    assert (np.diff(curve) < 0).all() and curve[-1] <= 0.10
    at_random = eers(scores, same, np.random.default_rng((seed, 1)).random(len(scores)))
    assert np.abs(at_random - at_random[0]).max() < 0.04


@pytest.mark.parametrize("seed", SEEDS)
def test_pair_decision_lowers_the_false_reject_rate(seed: int) -> None:
    """min(e1, e2) < 0.6 is a non-match: impostors of the UI cluster no longer set the threshold."""
    x, scores, same, ers = mixed(seed)
    before, after = (1 - tar_at_far(s, same, [1e-2, 1e-3]) for s in (scores, np.where(ers < 0.6, -1.0, scores)))
    assert (before - after >= [0.10, 0.12]).all()
    # The same rates from histograms, without the list of pairs.
    _, people, center = stored()
    quality = np.minimum(1 - unit(x) @ center, 1)
    tar, slack = all_pairs(x, people, quality=quality, gamma=0.6).tar_at_far([1e-2, 1e-3])
    assert (tar - 1e-9 <= 1 - after).all() and (1 - after <= tar + slack + 1e-9).all()


def test_scores_part_clean_from_8x8() -> None:
    rows, _, center = stored()
    clean, small = (1 - unit(rows[name]) @ center for name in ("clean", "down8"))
    higher = (clean[:, None] > small[None]).mean() + 0.5 * (clean[:, None] == small[None]).mean()
    assert higher >= 0.99


def test_fixed_threshold_is_called_misleading_here() -> None:
    """The cluster's genuine pairs pass the full set's threshold; re-estimated, ERS is worth its rejections."""
    _, scores, same, ers = mixed(0)
    fixed = compare_qualities(scores, same, {"ERS": ers}, 1e-2, reject=[0.0, 0.3, 0.6])
    assert len(fixed.warnings) == 1 and "ERS:" in fixed.warnings[0] and "re-estimate" in fixed.warnings[0]
    found = compare_qualities(scores, same, {"ERS": ers}, 1e-2, fixed_threshold=False, reject=[0.0, 0.3, 0.6])
    assert found.curves["ERS"][2] < 0.4 < 0.75 < found.curves["random"][2] and not found.warnings
