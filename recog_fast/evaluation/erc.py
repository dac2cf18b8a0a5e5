"""Error-versus-reject curve: what a quality measure is worth (math.md section 6)."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike

from recog_fast.evaluation._arrays import FloatArray, floats, scored_pairs
from recog_fast.evaluation.verification import conservative_thresholds


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
    usual ERC) or re-estimated on the pairs left. State which: fixed misleads where low-quality impostors score high,
    because those pairs pass any threshold. Equal qualities are rejected in their given order (stable). area =
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
    if not 0 <= fmr <= 1:
        raise ValueError(f"{where}: expected fmr in [0, 1], got {fmr}")
    rates = np.arange(0, 1, 0.05) if reject is None else floats(where, "reject", reject, 1)
    if rates.size == 0 or rates[0] < 0 or rates[-1] >= 1 or (np.diff(rates) <= 0).any():
        raise ValueError(f"{where}: expected reject rates ascending in [0, 1), got {rates.tolist()}")
    target = np.array([fmr])
    threshold = conservative_thresholds(checked[~mask], target)[0]
    order = np.argsort(quality, kind="stable")
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
