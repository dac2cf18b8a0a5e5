"""The embedding recognizability score: how far an embedding lies from the centre of unrecognizable faces (math.md 5)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._arguments import is_number
from ..ops import _checks
from ..reference import unit_rows

_GRID = tuple(step / 20 for step in range(6, 20))  # 0.30, 0.35, ... 0.95
REJECTED = -1.0  # the score of a pair that recognizability rejects: below every accepted cosine


def unit_center(center: Any, dimension: int, where: str) -> Tensor:
    """(D,) normalised, in its own dtype. Raises ValueError for another shape, a non-finite value or a zero vector."""
    u = _checks.as_tensor(center, where, "center")
    _checks.expect(u.dtype in _checks.FLOATS, where, "center of a floating point dtype", str(u.dtype))
    _checks.expect(
        tuple(u.shape) == (dimension,), where, f"center of shape (D,) = ({dimension},)", f"shape {tuple(u.shape)}"
    )
    unit, norm = unit_rows(u.double())
    _checks.expect(
        math.isfinite(float(norm)) and float(norm) > 1e-12,
        where,
        "a finite center that is not zero",
        f"norm {float(norm):g}",
    )
    return unit.to(u.dtype)


def embedding_recognizability(
    embeddings: Any,  # (N, D) raw or unit
    center: Any,  # (D,)
    cap: bool = True,
) -> Tensor:
    """e_i = min(1 - <u^, x_i / |x_i|>, 1), (N,), in [0, 1]; without the cap in [0, 2] (for histograms of distances).

    Near 0: the embedding lies where unrecognizable faces lie. A zero row has the unit vector 0, so e = 1. Computed in
    float64, returned in the embeddings' dtype (float32 for 16-bit ones); differentiable in both arguments. `center` need
    not be normalised.

    Raises ValueError naming the argument. Source: Deng et al., Harnessing Unrecognizable Faces (ERS), eq. 1.
    """
    where = "embedding_recognizability"
    x = _checks.as_tensor(embeddings, where, "embeddings")
    _checks.check_embeddings(x, where)
    _checks.check_finite_rows(x, where)
    u = unit_center(center, x.shape[1], where)
    unit, _ = unit_rows(x.double())
    score = (1 - unit @ u.to(unit)).clamp(0.0, 1.0 if cap else 2.0)
    return score.to(torch.promote_types(x.dtype, torch.float32))


def pair_decision(
    scores: Any,  # (P,) cosines
    e1: Any,  # (P,) recognizability of the first image of each pair
    e2: Any,  # (P,)
    gamma: float = 0.6,
) -> Tensor:
    """Scores (P,) of pairs, -1 (no match at any threshold above it) where min(e1, e2) < gamma or is NaN.

    gamma: 0.60 for faces, 0.70 for persons (re-ID), the paper's choices; `threshold_table` shows others.
    Raises ValueError for shapes that differ and a gamma that is not finite. Source: Harnessing Unrecognizable Faces (math.md 5).
    """
    where = "pair_decision"
    s = _checks.as_tensor(scores, where, "scores")
    first, second = _checks.as_tensor(e1, where, "e1"), _checks.as_tensor(e2, where, "e2")
    _checks.expect(
        s.dim() == 1 and s.dtype in _checks.FLOATS,
        where,
        "scores (P,) of a floating point dtype",
        (tuple(s.shape), s.dtype),
    )
    for name, value in (("e1", first), ("e2", second)):
        _checks.check_vector(value, s.numel(), where, name)
    _checks.expect(is_number(gamma), where, "a finite gamma", repr(gamma))
    return torch.where(torch.minimum(first, second) >= float(gamma), s, torch.full_like(s, REJECTED))


class ThresholdRow(NamedTuple):
    """What one gamma does to a set of pairs with scores (P,): shares rejected and FRR at each FAR."""

    gamma: float
    rejected_genuine: float  # share of genuine pairs whose less recognizable image lies below gamma
    rejected_impostor: float  # share of impostor pairs likewise
    frr: tuple[float, ...]  # false reject rate at each FAR asked for, rejected genuine pairs counted as errors


def threshold_table(
    scores: Any,  # (P,) cosines
    same: Any,  # (P,) bool
    e1: Any,  # (P,)
    e2: Any,  # (P,)
    gammas: Sequence[float] = _GRID,
    fars: Sequence[float] = (1e-2, 1e-3),
) -> list[ThresholdRow]:
    """The table gamma is selected from: what each gamma rejects, and FRR at each FAR after `pair_decision`. scores, same, e1, e2 (P,).

    The match threshold is set anew for every gamma, on all impostor pairs, rejected ones included (they score -1): accept
    scores above the (k+1)-th highest impostor, k = floor(FAR n_impostors) (math.md 6). A rejected genuine pair counts as
    a false reject, so gamma pays for what it rejects; where all pairs are rejected FRR is 1.

    Raises ValueError for shapes that differ, for no genuine or no impostor pair, and for a FAR outside [0, 1].
    Source: Harnessing Unrecognizable Faces, choice of gamma.
    """
    where = "threshold_table"
    s = _checks.as_tensor(scores, where, "scores").double()
    mask = _checks.as_tensor(same, where, "same")
    _checks.check_vector(mask, s.numel(), where, "same")
    _checks.expect(mask.dtype == torch.bool, where, "same as booleans", str(mask.dtype))
    _checks.expect(
        bool(mask.any()) and not bool(mask.all()),
        where,
        "genuine and impostor pairs",
        f"{int(mask.sum())} genuine of {mask.numel()}",
    )
    _checks.expect(all(is_number(far, 0, 1) for far in _checks.listed(fars, where, "fars")), where, "fars in [0, 1]", repr(fars))
    gammas = _checks.listed(gammas, where, "gammas")
    first, second = _checks.as_tensor(e1, where, "e1"), _checks.as_tensor(e2, where, "e2")
    for name, value in (("e1", first), ("e2", second)):
        _checks.check_vector(value, s.numel(), where, name)
    quality = torch.minimum(first, second)
    rows = []
    for gamma in gammas:
        decided = pair_decision(s, e1, e2, gamma)
        genuine, impostor = decided[mask], decided[~mask].sort(descending=True).values
        below = quality < gamma
        shares = torch.arange(1, impostor.numel() + 1, dtype=torch.float64) / impostor.numel()
        frr = []
        for far in fars:
            # floor by comparison of k / n: 0.29 * 100 is 28.999999999999996 in floating point.
            k = int((shares <= far).sum())
            # k = n: every impostor may pass, and nothing is refused but what recognizability rejects.
            threshold = float(impostor[k]) if k < impostor.numel() else REJECTED
            frr.append(float((genuine <= max(threshold, REJECTED)).double().mean()))
        rejected = [float(below[which].double().mean()) for which in (mask, ~mask)]
        rows.append(ThresholdRow(float(gamma), rejected[0], rejected[1], tuple(frr)))
    return rows
