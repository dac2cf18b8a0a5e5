"""Millions of pairs in bounded memory: all-pairs score histograms, tile by tile, and the rates read off them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from recog_fast._arguments import is_whole
from recog_fast.evaluation._arrays import FloatArray, IntArray, floats, integers, to_numpy

Counts = NDArray[np.int64]

BINS = 2**16  # 3e-5 of cosine a bin; 1 MB a histogram pair, whatever the number of pairs
_MOST_BINS = 2**27  # two counters of 1 GB


@dataclass
class ScoreHistograms:
    """Genuine and impostor pair scores in [-1, 1], counted in `bins` equal bins.

    genuine, impostor  (bins,) int64 counts; bin b holds the scores in [edge b, edge b + 1), the last one also 1.
    Exactness: counts are exact, and so are FAR and TAR at every edge. A threshold can only lie on an edge, so a rate
    asked for between two edges is off by at most the share of pairs in that one bin (`tar_at_far` bounds it).
    Raises ValueError for bins outside [2, 2^27].
    """

    bins: int = BINS
    genuine: Counts = field(init=False)
    impostor: Counts = field(init=False)

    def __post_init__(self) -> None:
        if not is_whole(self.bins, 2, _MOST_BINS):
            raise ValueError(f"ScoreHistograms: expected bins >= 2 and at most {_MOST_BINS}, an integer, got {self.bins!r}")
        self.genuine = np.zeros(self.bins, dtype=np.int64)
        self.impostor = np.zeros(self.bins, dtype=np.int64)

    @property
    def edges(self) -> FloatArray:
        """(bins + 1,) from -1 to 1."""
        return np.linspace(-1.0, 1.0, self.bins + 1)

    def add(self, scores: ArrayLike | torch.Tensor, same: ArrayLike | torch.Tensor) -> None:
        """Counts pairs: scores (P,) cosines (beyond [-1, 1] they count at the end), same (P,) bool.

        Raises ValueError for NaN scores or shapes that do not match.
        """
        values, mask = to_numpy(scores).ravel(), to_numpy(same).ravel().astype(np.bool_)
        if values.shape != mask.shape:
            raise ValueError(f"ScoreHistograms.add: expected same of shape {values.shape}, got {mask.shape}")
        if np.isnan(values).any():
            raise ValueError(
                f"ScoreHistograms.add: expected scores without NaN, got one at {np.isnan(values).argmax()}"
            )
        place = np.clip((values + 1) * (self.bins / 2), 0, self.bins - 1).astype(np.int64)
        self.genuine += np.bincount(place[mask], minlength=self.bins)
        self.impostor += np.bincount(place[~mask], minlength=self.bins)

    def roc(self) -> tuple[FloatArray, FloatArray]:
        """(far, tar) of "accept when score >= edge", (bins + 1,) each, edges rising: from (1, 1) to (0, 0).

        Raises ValueError without a genuine or an impostor pair.
        """
        totals = int(self.genuine.sum()), int(self.impostor.sum())
        if 0 in totals:
            raise ValueError(
                f"ScoreHistograms.roc: expected genuine and impostor pairs, got {totals[0]} and {totals[1]}"
            )

        def share_above(counts: Counts, total: int) -> FloatArray:
            return np.append(counts[::-1].cumsum()[::-1], 0) / total

        return share_above(self.impostor, totals[1]), share_above(self.genuine, totals[0])

    def tar_at_far(self, fars: Sequence[float]) -> tuple[FloatArray, FloatArray]:
        """(tar, slack), (len(fars),) each: TAR at the lowest edge whose FAR is at most the target (conservative).

        The exact conservative TAR of the pairs lies in [tar, tar + slack]: its threshold is inside the bin below.
        """
        targets = np.asarray(fars, dtype=np.float64)
        if targets.ndim != 1 or ((targets < 0) | (targets > 1)).any():
            raise ValueError(f"ScoreHistograms.tar_at_far: expected fars (n,) in [0, 1], got {fars}")
        far, tar = self.roc()
        at = np.array([int(np.argmax(far <= target)) for target in targets], dtype=np.int64)
        below = np.maximum(at - 1, 0)
        return tar[at], tar[below] - tar[at]

    def equal_error_rate(self) -> float:
        """EER at the crossing of FAR and FRR, the two neighbouring edges joined by a straight line."""
        far, tar = self.roc()
        gap = far + tar - 1.0  # FAR - FRR: falls from 1 to -1 along rising edges
        after = int(np.argmax(gap <= 0))
        before = after - 1
        share = gap[before] / (gap[before] - gap[after])
        return float(far[before] + share * (far[after] - far[before]))


def all_pairs(
    embeddings: ArrayLike | torch.Tensor,  # (M, D); rows are normalised here
    ids: ArrayLike | torch.Tensor,  # (M,) int: whose image it is
    others: ArrayLike | torch.Tensor | None = None,  # (K, D): pairs of a row of each instead of pairs within one set
    other_ids: ArrayLike | torch.Tensor | None = None,  # (K,) int
    *,
    skip_equal_index: bool = False,
    quality: ArrayLike | torch.Tensor | None = None,  # (M,): pairs with min(q_i, q_j) < gamma score -1
    other_quality: ArrayLike | torch.Tensor | None = None,  # (K,)
    gamma: float | None = None,
    bins: int = BINS,
    tile: int = 1024,
) -> ScoreHistograms:
    """Histograms of the cosines of ALL pairs i < j of one set, or of every (row, other row); O(tile^2) memory.

    embeddings (M, D), ids (M,); others (K, D), other_ids (K,); a quality of each row.

    skip_equal_index: leave (i, i) out where `others` are the same images in another condition (clean against 8x8).
    quality, gamma: the pair decision of ERS (math.md 5): an unrecognizable pair is a non-match, score -1.
    Products are float32 (cosines good to about 1e-7; a bin is 3e-5 wide): a score within that of an edge may fall on
    either side of it.
    Raises ValueError for shapes that do not match, non-finite rows, or gamma without quality.
    """
    where = "all_pairs"
    if (quality is None) != (gamma is None) or (others is None) != (other_ids is None):
        raise ValueError(f"{where}: expected quality with gamma and others with other_ids, got one of them alone")
    if others is not None and (quality is None) != (other_quality is None):
        raise ValueError(f"{where}: expected other_quality with quality and others, got one of them alone")
    rows = _unit(where, "embeddings", embeddings)
    who = integers(where, "ids", ids, len(rows))
    within = others is None
    columns = rows if others is None else _unit(where, "others", others)
    whom = who if other_ids is None else integers(where, "other_ids", other_ids, len(columns))
    worth = None if quality is None else floats(where, "quality", quality, 1)
    worths = worth if other_quality is None else floats(where, "other_quality", other_quality, 1)
    if rows.shape[1] != columns.shape[1]:
        raise ValueError(f"{where}: expected others of width {rows.shape[1]}, got {columns.shape[1]}")
    if worth is not None and worths is not None and (len(worth), len(worths)) != (len(rows), len(columns)):
        raise ValueError(f"{where}: expected a quality per row, got {len(worth)} and {len(worths)}")
    if not is_whole(tile, 1):
        raise ValueError(f"{where}: expected tile >= 1, got {tile!r}")
    found = ScoreHistograms(bins)
    for i in range(0, len(rows), tile):
        for j in range(i if within else 0, len(columns), tile):
            a, b = slice(i, i + tile), slice(j, j + tile)
            scores = rows[a] @ columns[b].T
            if worth is not None and worths is not None and gamma is not None:
                scores[np.minimum(worth[a, None], worths[None, b]) < gamma] = -1.0
            kept = _kept(i, j, scores.shape, within, skip_equal_index)
            same = who[a, None] == whom[None, b]
            found.add(scores if kept is None else scores[kept], same if kept is None else same[kept])
    return found


def _unit(where: str, name: str, value: ArrayLike | torch.Tensor) -> NDArray[np.float32]:
    rows = floats(where, name, value, 2)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    unit: NDArray[np.float32] = np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 1e-12).astype(np.float32)
    return unit


def _kept(i: int, j: int, shape: tuple[int, ...], within: bool, skip_equal: bool) -> NDArray[np.bool_] | None:
    """Which elements of the tile at (i, j) are pairs; None: all."""
    if not (within or skip_equal):
        return None
    row: IntArray = i + np.arange(shape[0])[:, None]
    column: IntArray = j + np.arange(shape[1])[None, :]
    kept: NDArray[np.bool_] = row < column if within else row != column
    return None if kept.all() else kept
