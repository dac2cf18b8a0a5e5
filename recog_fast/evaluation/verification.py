"""1:1 verification: 10-fold accuracy, TAR at FAR, equal error rate, ROC (math.md section 6)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import ArrayLike

from recog_fast._arguments import is_choice, is_whole
from recog_fast.evaluation._arrays import (
    BoolArray,
    FloatArray,
    booleans,
    both_kinds,
    floats,
    scored_pairs,
    unit_rows,
)

FarRule = Literal["conservative", "nearest"]

# The LFW grid on squared distances of unit vectors: 0 = identical, 2 = orthogonal, 4 = opposite.
THRESHOLDS: FloatArray = np.arange(0, 4, 0.01, dtype=np.float64)


def verification_accuracy(
    emb1: ArrayLike | torch.Tensor,  # (P, D) raw or unit
    emb2: ArrayLike | torch.Tensor,  # (P, D)
    same: ArrayLike | torch.Tensor,  # (P,) bool
    folds: int = 10,
) -> tuple[float, float, FloatArray]:
    """LFW protocol accuracy -> (mean, standard deviation, per fold (folds,)), each in [0, 1].

    emb1, emb2 (P, D), same (P,) bool. Rows are L2-normalised here, so raw, flip-summed and unit embeddings are all welcome.
    A pair is accepted when its squared Euclidean distance is BELOW the threshold; for each contiguous fold the threshold of `arange(0, 4, 0.01)`
    with the best accuracy on the other folds (the lowest among equals) is applied to it. The first P mod folds folds
    hold one pair more. The standard deviation is the population one over folds (as LFW and InsightFace report it);
    it says little where folds hold pairs of one kind only (a file that lists all genuine pairs first). Pairs keep their
    order: shuffling them is another protocol.

    Distances are float64 whatever the embeddings' dtype: a pair that sits on a threshold then does not depend on the
    dtype.
    Raises ValueError for shapes that do not match, non-finite rows, fewer pairs than folds, folds < 2 or pairs of one
    kind.
    Source: Huang et al., Labeled Faces in the Wild, 2007 (View 2); InsightFace verification.py.
    """
    where = "verification_accuracy"
    first, second = floats(where, "emb1", emb1, 2), floats(where, "emb2", emb2, 2)
    if first.shape != second.shape:
        raise ValueError(f"{where}: expected emb2 of shape {first.shape} as emb1, got {second.shape}")
    mask = booleans(where, "same", same, (len(first),))
    if not is_whole(folds, 2, len(mask)):
        raise ValueError(f"{where}: expected folds between 2 and the number of pairs {len(mask)}, got {folds}")
    both_kinds(where, mask)
    distance: FloatArray = np.square(unit_rows(first) - unit_rows(second)).sum(axis=1)
    right = np.stack(
        [
            _right_by_threshold(d, m)
            for d, m in zip(np.array_split(distance, folds), np.array_split(mask, folds), strict=True)
        ]
    )
    sizes = np.array([len(part) for part in np.array_split(mask, folds)])
    # argmax takes the first maximum: the lowest threshold among equals, as InsightFace does.
    best = np.argmax(right.sum(axis=0) - right, axis=1)
    per_fold: FloatArray = right[np.arange(folds), best] / sizes
    return float(per_fold.mean()), float(per_fold.std()), per_fold


def _right_by_threshold(distance: FloatArray, same: BoolArray) -> np.ndarray:
    """(400,) number of pairs decided rightly at each threshold, from two sorted lists instead of a 400 x P
    comparison."""
    accepted_genuine = np.searchsorted(np.sort(distance[same]), THRESHOLDS, side="left")
    accepted_impostor = np.searchsorted(np.sort(distance[~same]), THRESHOLDS, side="left")
    right: np.ndarray = accepted_genuine + (np.count_nonzero(~same) - accepted_impostor)
    return right


def roc_curve(
    scores: ArrayLike | torch.Tensor,  # (P,) higher = more alike
    same: ArrayLike | torch.Tensor,  # (P,) bool
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Every operating point of "accept when score >= threshold" -> (far, tar, thresholds), each (U + 1,), thresholds
    falling.

    U = number of distinct scores; the first point is (0, 0) at threshold +inf, the last (1, 1) at the lowest score.
    scores (P,), same (P,) bool. Tied scores move together: no point lies inside a tie, none is dropped. far and tar never fall.
    Raises ValueError for shapes that do not match, NaN or infinite scores, and pairs of one kind only. Source: math.md 6.
    """
    checked, mask = scored_pairs("roc_curve", scores, same)
    return _roc(checked, mask)


def _roc(scores: FloatArray, same: BoolArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    thresholds, inverse = np.unique(scores, return_inverse=True)
    genuine = np.bincount(inverse[same], minlength=len(thresholds))[::-1].cumsum()
    impostor = np.bincount(inverse[~same], minlength=len(thresholds))[::-1].cumsum()
    far = np.concatenate([[0.0], impostor / impostor[-1]])
    tar = np.concatenate([[0.0], genuine / genuine[-1]])
    return far, tar, np.concatenate([[np.inf], thresholds[::-1]])


def tar_at_far(
    scores: ArrayLike | torch.Tensor,  # (P,) higher = more alike
    same: ArrayLike | torch.Tensor,  # (P,) bool
    fars: Sequence[float] | FloatArray,  # false accept rates asked for, each in [0, 1]
    rule: FarRule = "conservative",
) -> FloatArray:
    """True accept rate at each false accept rate, in the order asked: scores (P,), same (P,) bool -> (len(fars),) in [0, 1].

    conservative  the FAR is never above the target: accept score > the (k+1)-th highest impostor, k = floor(far *
                  impostors).
    nearest       InsightFace's: the ROC point whose FAR is closest to the target, the larger TAR among equals; its
                  real FAR may be above the target, so it reads a little higher.
    A FAR below 1 / impostors asks for a threshold above every impostor: it says little; the report marks such columns.
    Raises ValueError for shapes that do not match, NaN scores, pairs of one kind, a FAR outside [0, 1] or an unknown
    rule.
    """
    where = "tar_at_far"
    checked, mask = scored_pairs(where, scores, same)
    targets = floats(where, "fars", fars, 1)
    if ((targets < 0) | (targets > 1)).any():
        raise ValueError(f"{where}: expected fars in [0, 1], got {targets.tolist()}")
    if not is_choice(rule, ("conservative", "nearest")):
        raise ValueError(f'{where}: expected rule "conservative" or "nearest", got {rule!r}')
    if rule == "nearest":
        far, tar, _ = _roc(checked, mask)
        # tar never falls along the curve, so the last of the closest points has the largest one.
        closest = [len(far) - 1 - int(np.argmin(np.abs(far - target)[::-1])) for target in targets]
        nearest: FloatArray = tar[closest]
        return nearest
    genuine = np.sort(checked[mask])
    threshold = conservative_thresholds(checked[~mask], targets)
    accepted = len(genuine) - np.searchsorted(genuine, threshold, side="right")
    return np.asarray(accepted / len(genuine), dtype=np.float64)


def conservative_thresholds(impostors: FloatArray, targets: FloatArray) -> FloatArray:
    """The (k+1)-th highest of `impostors` (I,) for k = floor(target * I), -inf where k = I: accept a score ABOVE it."""
    falling = np.sort(impostors)[::-1]
    count = len(falling)
    # floor by comparison of k / count: 0.29 * 100 is 28.999999999999996 in floating point.
    allowed = np.searchsorted(np.arange(1, count + 1) / count, targets, side="right")
    limits: FloatArray = np.append(falling, -np.inf)[allowed]
    return limits


def equal_error_rate(
    scores: ArrayLike | torch.Tensor,  # (P,) higher = more alike
    same: ArrayLike | torch.Tensor,  # (P,) bool
) -> tuple[float, float]:
    """(eer, threshold): where the false accept rate equals the false reject rate, eer in [0, 1]. scores (P,), same (P,) bool.

    The two neighbouring ROC points around the crossing of FAR and FRR = 1 - TAR are joined by a straight line (in
    rates and in the threshold), so the rate does not jump with the number of pairs. Perfect separation gives 0 at the
    lowest genuine score, one constant score gives 0.5.
    Raises ValueError for shapes that do not match, NaN scores, and pairs of one kind only. Source: math.md 6.
    """
    checked, mask = scored_pairs("equal_error_rate", scores, same)
    far, tar, thresholds = _roc(checked, mask)
    gap = far + tar - 1.0  # FAR - FRR: rises from -1 to 1
    after = int(np.argmax(gap >= 0))
    before = after - 1
    share = float(-gap[before] / (gap[after] - gap[before]))
    eer = float(far[before] + share * (far[after] - far[before]))
    high = float(thresholds[before]) if np.isfinite(thresholds[before]) else float(thresholds[after])
    return eer, high + share * (float(thresholds[after]) - high)
