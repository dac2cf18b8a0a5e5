"""1:N search: rank rates, open-set TPIR at FPIR, mean average precision, CMC (math.md section 6)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike

from recog_fast._arguments import is_whole
from recog_fast.evaluation._arrays import BoolArray, FloatArray, IntArray, booleans, floats, integers


def identification(
    similarity: ArrayLike | torch.Tensor,  # (Q, G) higher = more alike
    mated: ArrayLike | torch.Tensor,  # (Q, G) bool: gallery entry g is of the person of query q
    ranks: Sequence[int] = (1, 5, 20),
    fpirs: Sequence[float] = (),
    tpir_rank: int = 20,
) -> tuple[FloatArray, FloatArray]:
    """Closed-set rank rates and open-set TPIR -> (rates (len(ranks),), tpir (len(fpirs),)), in the order asked.

    similarity (Q, G): higher = more alike; mated (Q, G) bool: entry g is of the person of query q.

    A query with a mate in the gallery is mated; its rank is 1 + the number of gallery scores above its best mate, and
    rank-k is the share of mated queries with rank <= k. Open set: the alarm threshold is the k-th highest of the
    non-mated queries' best scores, k = round(fpir * non-mated) (k = 0: above all of them); a mated query is found
    when its best mate's score is at or above the threshold and its rank <= `tpir_rank`.
    Raises ValueError for shapes that do not match, NaN similarity, no mated query, ranks < 1, an FPIR outside [0, 1],
    or fpirs without non-mated queries. Source: SurvFace (Cheng et al., 2018), NIST FRVT 1:N.
    """
    where = "identification"
    scores = floats(where, "similarity", similarity, 2)
    mates = booleans(where, "mated", mated, scores.shape)
    places = integers(where, "ranks", ranks)
    if not is_whole(tpir_rank, 1) or (places < 1).any():
        raise ValueError(f"{where}: expected ranks and tpir_rank >= 1, got {places.tolist()} and {tpir_rank!r}")
    alarm_rates = floats(where, "fpirs", fpirs, 1)
    if ((alarm_rates < 0) | (alarm_rates > 1)).any():
        raise ValueError(f"{where}: expected fpirs in [0, 1], got {alarm_rates.tolist()}")
    has_mate: BoolArray = np.asarray(mates.any(axis=1))
    if not has_mate.any():
        raise ValueError(f"{where}: expected at least one query with a mate, got none among {len(has_mate)}")
    best = np.where(mates, scores, -np.inf)[has_mate].max(axis=1)
    rank = 1 + (scores[has_mate] > best[:, None]).sum(axis=1)
    rates = np.array([(rank <= k).mean() for k in places], dtype=np.float64)
    if len(alarm_rates) == 0:
        return rates, np.empty(0)
    if has_mate.all():
        raise ValueError(f"{where}: expected queries without a mate for fpirs, got a mate for every query")
    alarms = np.sort(scores[~has_mate].max(axis=1))[::-1]
    tpir = [_tpir(best, rank <= tpir_rank, alarms, round(f * len(alarms))) for f in alarm_rates]
    return rates, np.array(tpir, dtype=np.float64)


def _tpir(best: FloatArray, within: BoolArray, alarms: FloatArray, k: int) -> float:
    """Share of mated queries found with k of the falling non-mated maxima `alarms` let through."""
    passed = best > alarms[0] if k == 0 else best >= alarms[k - 1]
    return float((passed & within).mean())


def fpir_threshold(best: ArrayLike | torch.Tensor, fpir: float) -> float:
    """The score from which a search counts as a match, so that at most a share `fpir` of people who are not in the gallery
    gets one: the smallest t with (best >= t) in at most floor(fpir Q) of the Q non-mated searches, ties included.

    best (Q,): each non-mated search's highest score. With fewer than 1 / fpir searches that is above all of them, and
    says little. Raises ValueError for no or non-finite scores and an fpir outside [0, 1]. Source: NIST FRVT 1:N's FPIR.
    """
    where = "fpir_threshold"
    scores = np.sort(floats(where, "best", best, 1))[::-1]
    if isinstance(fpir, bool) or not isinstance(fpir, int | float) or not 0 <= fpir <= 1:
        raise ValueError(f"{where}: expected fpir in [0, 1], got {fpir!r}")
    if len(scores) == 0:
        raise ValueError(f"{where}: expected at least one non-mated search in best, got none")
    let_through = int(fpir * len(scores) + 1e-9)
    return -np.inf if let_through >= len(scores) else float(np.nextafter(scores[let_through], np.inf))


def _ranked_lists(
    where: str,
    similarity: ArrayLike | torch.Tensor,
    query_ids: ArrayLike | torch.Tensor,
    gallery_ids: ArrayLike | torch.Tensor,
    junk: ArrayLike | torch.Tensor | None,
) -> list[IntArray]:
    """Positions (from 1) of each query's relevant entries in its list without junk; queries without one are left out."""
    scores = floats(where, "similarity", similarity, 2)
    queries = integers(where, "query_ids", query_ids, scores.shape[0])
    gallery = integers(where, "gallery_ids", gallery_ids, scores.shape[1])
    ignored = np.zeros(scores.shape, dtype=np.bool_) if junk is None else booleans(where, "junk", junk, scores.shape)
    lists = []
    for row, query, left_out in zip(scores, queries, ignored, strict=True):
        order = np.argsort(-row, kind="stable")
        positions: IntArray = np.flatnonzero((gallery == query)[order][~left_out[order]]) + 1
        if positions.size:
            lists.append(positions)
    if not lists:
        raise ValueError(
            f"{where}: expected at least one query with a relevant gallery entry, got none among {len(queries)}"
        )
    return lists


def mean_average_precision(
    similarity: ArrayLike | torch.Tensor,  # (Q, G) higher = more alike
    query_ids: ArrayLike | torch.Tensor,  # (Q,) int
    gallery_ids: ArrayLike | torch.Tensor,  # (G,) int
    junk: ArrayLike
    | torch.Tensor
    | None = None,  # (Q, G) bool: entries to leave out of that query's list (same camera, bad box)
) -> float:
    """Mean over queries of the average precision of their ranked gallery, in [0, 1] (the re-identification mAP).

    similarity (Q, G), query_ids (Q,), gallery_ids (G,), junk (Q, G) bool.
    AP = mean over the relevant entries of (relevant entries up to and including it / its position), junk entries
    removed from the list beforehand. Ties keep gallery order (stable). Queries without a relevant entry do not count.
    Raises ValueError for shapes that do not match, NaN similarity, or when no query has a relevant entry.
    Source: Zheng et al., Scalable Person Re-identification (Market-1501), 2015, without its trapezoid interpolation.
    """
    lists = _ranked_lists("mean_average_precision", similarity, query_ids, gallery_ids, junk)
    return float(np.mean([(np.arange(1, len(positions) + 1) / positions).mean() for positions in lists]))


def cumulative_match(
    similarity: ArrayLike | torch.Tensor,  # (Q, G)
    query_ids: ArrayLike | torch.Tensor,  # (Q,) int
    gallery_ids: ArrayLike | torch.Tensor,  # (G,) int
    junk: ArrayLike | torch.Tensor | None = None,  # (Q, G) bool, as in `mean_average_precision`
    ranks: Sequence[int] = (1, 5, 10),
) -> FloatArray:
    """CMC: share of queries with a relevant entry among the first k of their list, junk removed beforehand ->
    (len(ranks),).

    Arguments as `mean_average_precision`: similarity (Q, G). Ties keep gallery order (stable). Queries without a relevant entry do
    not count. Raises what `mean_average_precision` raises, and ValueError for ranks < 1. Source: Market-1501.
    """
    places = integers("cumulative_match", "ranks", ranks)
    if (places < 1).any():
        raise ValueError(f"cumulative_match: expected ranks >= 1, got {places.tolist()}")
    first = np.array(
        [lists[0] for lists in _ranked_lists("cumulative_match", similarity, query_ids, gallery_ids, junk)]
    )
    return np.array([(first <= k).mean() for k in places], dtype=np.float64)
