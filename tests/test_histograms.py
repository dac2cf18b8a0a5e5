"""All-pairs score histograms against every pair listed: counts, rates, bounds, bounded memory."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch

from recog_fast.evaluation import ScoreHistograms, all_pairs, equal_error_rate, tar_at_far

rng = np.random.default_rng(3)
ROWS, OTHERS = rng.normal(size=(157, 6)), rng.normal(size=(91, 6))
IDS, OTHER_IDS = rng.integers(0, 12, 157), rng.integers(0, 12, 91)


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def listed(within: bool) -> tuple[np.ndarray, np.ndarray]:
    """(scores, same) of every pair."""
    if within:
        i, j = np.triu_indices(len(ROWS), 1)
        return (unit(ROWS)[i] * unit(ROWS)[j]).sum(1), IDS[i] == IDS[j]
    scores = unit(ROWS) @ unit(OTHERS).T
    return scores.ravel(), (IDS[:, None] == OTHER_IDS[None]).ravel()


@pytest.mark.parametrize("tile", [7, 64, 157, 1000])  # many ragged tiles, some, one exact, one larger
@pytest.mark.parametrize("within", [True, False])
def test_all_pairs_are_counted_once(within: bool, tile: int) -> None:
    found = all_pairs(ROWS, IDS, tile=tile) if within else all_pairs(ROWS, IDS, OTHERS, OTHER_IDS, tile=tile)
    scores, same = listed(within)
    assert found.genuine.sum() == same.sum() and found.impostor.sum() == (~same).sum()
    # float32 products: a score within 1e-6 of an edge may fall into the neighbouring bin.
    sums = np.cumsum(found.genuine)
    for at in range(1, found.bins, 4001):
        edge = found.edges[at]
        assert (scores[same] < edge - 1e-6).sum() <= sums[at - 1] <= (scores[same] < edge + 1e-6).sum()


@pytest.mark.parametrize("within", [True, False])
@pytest.mark.parametrize("bins", [50, 2**16])
def test_rates_lie_in_their_bounds(within: bool, bins: int) -> None:
    scores, same = listed(within)
    found = all_pairs(ROWS, IDS, bins=bins) if within else all_pairs(ROWS, IDS, OTHERS, OTHER_IDS, bins=bins)
    fars = [0.0, 1e-3, 1e-2, 0.29, 1.0]
    exact = tar_at_far(scores, same, fars)
    tar, slack = found.tar_at_far(fars)
    assert (tar <= exact + 1e-12).all() and (exact <= tar + slack + 1e-12).all()
    width = 1.0 if bins == 50 else 2 / same.sum()
    assert slack.max() <= width
    assert abs(found.equal_error_rate() - equal_error_rate(scores, same)[0]) < (0.05 if bins == 50 else 2e-3)


def test_cross_pairs_without_their_own_image() -> None:
    found = all_pairs(ROWS, IDS, ROWS + 0.1, IDS, skip_equal_index=True, tile=50)
    assert found.genuine.sum() + found.impostor.sum() == 157 * 156
    same = (IDS[:, None] == IDS[None]) & ~np.eye(157, dtype=bool)
    assert found.genuine.sum() == same.sum()


def test_rejected_pairs_score_minus_one() -> None:
    quality = rng.random(157)
    found = all_pairs(ROWS, IDS, quality=quality, gamma=0.4, tile=60)
    scores, same = listed(True)
    i, j = np.triu_indices(157, 1)
    decided = np.where(np.minimum(quality[i], quality[j]) < 0.4, -1.0, scores)
    tar, slack = found.tar_at_far([0.01, 0.1])
    exact = tar_at_far(decided, same, [0.01, 0.1])
    assert (tar <= exact + 1e-12).all() and (exact <= tar + slack + 1e-12).all()
    cross = all_pairs(ROWS, IDS, OTHERS, OTHER_IDS, quality=quality, other_quality=np.ones(91), gamma=0.4)
    assert cross.genuine[0] + cross.impostor[0] >= (quality < 0.4).sum() * 91


def test_memory_does_not_grow_with_the_pairs() -> None:
    x, who = rng.normal(size=(3000, 8)), rng.integers(0, 300, 3000)  # 4.5 million pairs
    all_pairs(x[:10], who[:10])
    tracemalloc.start()
    all_pairs(x, who, tile=512)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 24e6  # the scores alone would be 18 MB in float32 and 36 MB in float64, their places 36 MB


def test_known_values_and_adding() -> None:
    one = ScoreHistograms(4)
    one.add(torch.tensor([-1.0, 1.0, 1.5, 0.1]), [False, True, True, False])
    assert one.genuine.tolist() == [0, 0, 0, 2] and one.impostor.tolist() == [1, 0, 1, 0]
    assert one.tar_at_far([0.0, 1.0])[0].tolist() == [1.0, 1.0] and one.equal_error_rate() == 0.0
    swapped = ScoreHistograms(4)
    swapped.add([0.9, -0.9], [False, True])
    assert swapped.equal_error_rate() == 1.0


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="bins >= 2"):
        ScoreHistograms(1)
    with pytest.raises(ValueError, match="without NaN, got one at 1"):
        ScoreHistograms().add([0.1, np.nan], [True, False])
    with pytest.raises(ValueError, match="same of shape"):
        ScoreHistograms().add([0.1], [True, False])
    with pytest.raises(ValueError, match="genuine and impostor pairs, got 0 and 1"):
        all_pairs(ROWS[:2], [0, 1]).roc()
    with pytest.raises(ValueError, match=r"fars \(n,\) in \[0, 1\]"):
        all_pairs(ROWS, IDS).tar_at_far([2.0])
    for bad in ({"gamma": 0.5}, {"others": OTHERS}, {"quality": np.ones(157)}):
        with pytest.raises(ValueError, match="got one of them alone"):
            all_pairs(ROWS, IDS, **bad)
    with pytest.raises(ValueError, match="others of width 6, got 5"):
        all_pairs(ROWS, IDS, OTHERS[:, :5], OTHER_IDS)
    with pytest.raises(ValueError, match="a quality per row"):
        all_pairs(ROWS, IDS, quality=np.ones(3), gamma=0.5)
    with pytest.raises(ValueError, match=r"ids of shape \(157,\)"):
        all_pairs(ROWS, IDS[:3])
