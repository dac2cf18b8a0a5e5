"""Nearest gallery vectors of each probe: exact, in blocks, or through faiss."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from recog_fast.evaluation._arrays import to_numpy, unit_rows

_BLOCK_BYTES = 1 << 26  # of similarities held at a time


def search(
    probes: ArrayLike | Tensor,  # (Q, D)
    gallery: ArrayLike | Tensor,  # (G, D)
    k: int = 1,
    *,
    engine: Literal["exact", "faiss"] = "exact",
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The k gallery rows of largest cosine for each probe: cosines (Q, k) descending and row numbers (Q, k); ties: the
    lower row.

    "exact": float32 products in blocks of the gallery, Q x G is never held. "faiss": faiss's flat inner-product index, the
    same result but for ties and rounding (needs faiss-cpu). Raises ValueError for k outside [1, G], shapes that do not
    match, rows that are zero or not finite, an unknown engine.
    """
    where = "search"
    q, g = (np.atleast_2d(to_numpy(e).astype(np.float64)) for e in (probes, gallery))
    if q.ndim != 2 or g.ndim != 2 or q.shape[1] != g.shape[1]:
        raise ValueError(f"{where}: expected probes (Q, D) and gallery (G, D), got {q.shape} and {g.shape}")
    if not 1 <= k <= len(g):
        raise ValueError(f"{where}: expected k in [1, G = {len(g)}], got {k}")
    for name, rows in (("probes", q), ("gallery", g)):
        bad = ~(np.isfinite(rows).all(axis=1) & (np.abs(rows).max(axis=1, initial=0) > 0))
        if bad.any():
            raise ValueError(f"{where}: expected finite {name} that are not 0, got row {int(np.argmax(bad))}")
    unit_q, unit_g = (np.ascontiguousarray(unit_rows(rows), np.float32) for rows in (q, g))
    if engine == "faiss":
        return _faiss(unit_q, unit_g, k)
    if engine != "exact":
        raise ValueError(f"{where}: expected engine exact or faiss, got {engine!r}")
    best = np.empty((len(q), 0), np.float32)
    ids = np.empty((len(q), 0), np.int64)
    step = max(k, _BLOCK_BYTES // (4 * max(1, len(q))))
    for start in range(0, len(g), step):
        cosine = unit_q @ unit_g[start : start + step].T
        here = np.broadcast_to(np.arange(start, start + cosine.shape[1]), cosine.shape)
        best, ids = np.concatenate([best, cosine], axis=1), np.concatenate([ids, here], axis=1)
        if best.shape[1] > k:
            order = np.argsort(-best, axis=1, kind="stable")[:, :k]
            best, ids = np.take_along_axis(best, order, 1), np.take_along_axis(ids, order, 1)
    order = np.argsort(-best, axis=1, kind="stable")
    return np.take_along_axis(best, order, 1), np.take_along_axis(ids, order, 1)


def _faiss(
    probes: NDArray[np.float32], gallery: NDArray[np.float32], k: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    import faiss

    index = faiss.IndexFlatIP(gallery.shape[1])
    index.add(gallery)
    cosine, ids = index.search(probes, k)
    return np.asarray(cosine, np.float32), np.asarray(ids, np.int64)
