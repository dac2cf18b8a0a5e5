"""Error-versus-reject curves: what a quality measure is worth (math.md section 6)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike

from recog_fast._arguments import is_number, is_whole
from recog_fast.evaluation._arrays import BoolArray, FloatArray, floats, integers, scored_pairs
from recog_fast.evaluation.verification import conservative_thresholds

# The warning looks at this share of the pairs, of lowest quality. It speaks where their genuine pairs pass the threshold
# more often than the others' by so many standard errors (and there are so many), or their impostors so many times as often.
LOW_SHARE, LOW_PAIRS, SURE, TIMES = 0.25, 10, 3.0, 5.0


def error_versus_reject(
    scores: ArrayLike | torch.Tensor,  # (P,) higher = more alike
    same: ArrayLike | torch.Tensor,  # (P,) bool
    pair_quality: ArrayLike | torch.Tensor,  # (P,) usually the lower of the two images' qualities
    fmr: float,
    fixed_threshold: bool = True,
    reject: ArrayLike | None = None,  # (R,) rates in [0, 1), ascending; None: 0, .05, ... .95
) -> tuple[FloatArray, float]:
    """(curve (R,), area): false non-match rate of the pairs left after rejecting the floor(r P) of lowest quality.

    The threshold is the conservative one at false match rate `fmr`: on the full set (`fixed_threshold=True`, the
    usual ERC) or re-estimated on the pairs left. State which (`erc_protocol` says it in words). Fixed misleads where
    low-quality images look alike: their genuine pairs pass any threshold, and their impostors, long rejected, still set
    it; a UserWarning says so where either is seen. Equal qualities are rejected in their given order (stable). area =
    trapezoid over the reject rates, not normalised. A point without a genuine pair left is NaN and makes the area NaN.
    Raises ValueError for shapes that do not match, NaN scores or qualities, pairs of one kind, rates outside their
    ranges, and (re-estimated) a rejection that leaves no impostor pair.
    Source: Grother and Tabassi, Performance of Biometric Quality Measures, 2007.
    """
    where = "error_versus_reject"
    checked, mask = scored_pairs(where, scores, same)
    quality = floats(where, "pair_quality", pair_quality, 1)
    if quality.shape != checked.shape:
        raise ValueError(f"{where}: expected pair_quality of shape {checked.shape}, got {quality.shape}")
    _check_rate(where, fmr)
    rates = _rates(where, reject)
    target = np.array([fmr])
    threshold = conservative_thresholds(checked[~mask], target)[0]
    order = np.argsort(quality, kind="stable")
    if fixed_threshold and (reason := _misleading(checked[order], mask[order], threshold)):
        warnings.warn(f"{where}: {reason}", UserWarning, stacklevel=2)
    curve = np.full(len(rates), np.nan)
    for i, rate in enumerate(rates):
        kept = order[int(np.floor(rate * len(order))) :]
        genuine, impostor = checked[kept][mask[kept]], checked[kept][~mask[kept]]
        if not fixed_threshold:
            if impostor.size == 0:
                raise ValueError(f"{where}: expected impostor pairs left at every reject rate, got none at {rate:.2f}")
            threshold = conservative_thresholds(impostor, target)[0]
        if genuine.size:
            curve[i] = (genuine <= threshold).mean()
    # Written out: NumPy renamed its own trapezoid between 1.26 and 2.0.
    return curve, float((np.diff(rates) * (curve[1:] + curve[:-1]) / 2).sum())


def _rates(where: str, reject: ArrayLike | None) -> FloatArray:
    rates: FloatArray = np.arange(20, dtype=np.float64) * 0.05 if reject is None else floats(where, "reject", reject, 1)
    if rates.size == 0 or rates[0] < 0 or rates[-1] >= 1 or (np.diff(rates) <= 0).any():
        raise ValueError(f"{where}: expected reject rates ascending in [0, 1), got {rates.tolist()}")
    return rates


def _misleading(scores: FloatArray, same: BoolArray, threshold: float) -> str:
    """Why a fixed threshold misleads for pairs in rising order of quality; "" where it does not."""
    low = int(LOW_SHARE * len(scores))
    passed = scores > threshold
    worst, rest = passed[:low][same[:low]], passed[low:][same[low:]]
    false, others = passed[:low][~same[:low]], passed[low:][~same[low:]]
    what = f"the {100 * LOW_SHARE:.0f} % of lowest quality"
    advice = (
        f"the fixed threshold {threshold:.3f}: low-quality images look alike; re-estimate it (fixed_threshold=False)"
    )
    if len(worst) >= LOW_PAIRS and len(rest) >= LOW_PAIRS:
        share = float(np.concatenate([worst, rest]).mean())
        error = np.sqrt(share * (1 - share) * (1 / len(worst) + 1 / len(rest)))
        if worst.mean() - rest.mean() > SURE * error:
            return (
                f"{100 * worst.mean():.0f} % of the genuine pairs among {what}, {100 * rest.mean():.0f} % of the others, "
                f"score above {advice}"
            )
    if false.sum() >= LOW_PAIRS and len(others) and false.mean() > TIMES * others.mean():
        return (
            f"{100 * false.mean():.2g} % of the impostor pairs among {what}, {100 * others.mean():.2g} % of the others, "
            f"score above {advice}"
        )
    return ""


def _check_rate(where: str, fmr: float) -> None:
    if not is_number(fmr, 0, 1):
        raise ValueError(f"{where}: expected fmr in [0, 1], got {fmr!r}")


def erc_protocol(fmr: float, fixed_threshold: bool = True) -> str:
    """The protocol in words, for captions: two ERCs compare only where it is the same. Raises ValueError for an fmr outside [0, 1]."""
    how = "fixed on the full set" if fixed_threshold else "re-estimated on the pairs left"
    _check_rate("erc_protocol", fmr)
    return f"FNMR at FMR {fmr:g}, threshold {how}, pair quality = the lower of the two"


@dataclass(frozen=True)
class QualityComparison:
    """Several quality measures of the same pairs on one error-versus-reject plot (`figures.erc_plot`).

    protocol  `erc_protocol` in words        reject  (R,) rates
    curves    measure -> FNMR (R,)           areas   measure -> area under it
    warnings  what `error_versus_reject` warned of
    """

    protocol: str
    reject: FloatArray
    curves: dict[str, FloatArray]
    areas: dict[str, float]
    warnings: tuple[str, ...] = ()


def compare_qualities(
    scores: ArrayLike | torch.Tensor,  # (P,)
    same: ArrayLike | torch.Tensor,  # (P,) bool
    pair_qualities: Mapping[str, ArrayLike | torch.Tensor],  # measure (ERS, RI, feature norm, ...) -> (P,)
    fmr: float,
    *,
    fixed_threshold: bool = True,
    reject: ArrayLike | None = None,
    random_seed: int | None = 0,  # adds the curve "random", what rejecting without looking gives; None: no
) -> QualityComparison:
    """`error_versus_reject` of each measure under one protocol, and of random rejection.

    scores, same and each measure's qualities (P,); reject (R,) -> curves (R,).
    Raises what `error_versus_reject` raises, ValueError without a measure or for one called "random" beside the random one, and
    TypeError for pair_qualities that are no mapping.
    """
    where = "compare_qualities"
    if not isinstance(pair_qualities, Mapping):
        raise TypeError(f"{where}: expected pair_qualities as {{measure: qualities}}, got {type(pair_qualities).__name__}")
    named = dict(pair_qualities)
    if not named:
        raise ValueError(f"{where}: expected at least one quality measure, got none")
    if random_seed is not None and not is_whole(random_seed, 0):
        raise ValueError(f"{where}: expected random_seed >= 0, an integer, or None, got {random_seed!r}")
    if random_seed is not None:
        if "random" in named:
            raise ValueError(f"{where}: expected no measure called 'random' with random_seed={random_seed}, got one")
        named["random"] = np.random.default_rng(random_seed).random(len(floats(where, "scores", scores, 1)))
    curves, areas, heard = {}, {}, []
    for name, quality in named.items():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            curves[name], areas[name] = error_versus_reject(scores, same, quality, fmr, fixed_threshold, reject)
        heard += [f"{name}: {warning.message}" for warning in caught]
    return QualityComparison(erc_protocol(fmr, fixed_threshold), _rates(where, reject), curves, areas, tuple(heard))


def pair_minimum(
    quality: ArrayLike | torch.Tensor,  # (M,) of images
    first: ArrayLike | torch.Tensor,  # (P,) int rows
    second: ArrayLike | torch.Tensor,  # (P,)
) -> FloatArray:
    """(P,) quality of each pair: the lower of its two images' (math.md 6). ValueError for a row that is not there."""
    where = "pair_minimum"
    values = floats(where, "quality", quality, 1)
    rows = integers(where, "first", first)
    others = integers(where, "second", second, len(rows))
    for name, asked in (("first", rows), ("second", others)):
        if asked.size and not (0 <= asked.min() and asked.max() < len(values)):
            raise ValueError(f"{where}: expected {name} in [0, M) = [0, {len(values)}), got {asked.min()} to {asked.max()}")
    lower: FloatArray = np.minimum(values[rows], values[others])
    return lower
