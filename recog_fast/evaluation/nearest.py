"""Nearest gallery vectors of each probe: exact, block by block, or through faiss."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from recog_fast._arguments import is_choice
from recog_fast.evaluation._arrays import array_of, unit_rows

Engine = Literal["exact", "faiss"]
Found = tuple[NDArray[np.float32], NDArray[np.int64]]
_BLOCK_BYTES = 1 << 26  # of similarities held at a time
_COPIED_ROWS = 1 << 14  # of a gallery array (a memory map, say) taken at a time


class GallerySearch:
    """The k gallery rows of largest cosine for each of Q probes, while the gallery comes by in blocks.

    search = GallerySearch(probes, k=5)          # (Q, D)
    for block in gallery: search.add(block)      # (G_b, D) each
    cosine, rows = search.result()               # (Q, min(k, G)) each

    "exact": float32 products; held are the probes, k matches of each and one block, whatever G is. "faiss": faiss's flat
    inner-product index, the same but for ties and rounding; it holds the gallery (needs faiss-cpu).
    Raises ValueError for probes that are not (Q, D), zero or not finite, k < 1, an unknown engine.
    """

    def __init__(self, probes: ArrayLike | Tensor, k: int = 1, *, engine: Engine = "exact") -> None:
        if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
            raise ValueError(f"search: expected k >= 1, got {k!r}")
        if not is_choice(engine, ("exact", "faiss")):
            raise ValueError(f"search: expected engine exact or faiss, got {engine!r}")
        self._probes = _unit("probes", probes, None, 0)
        self.k, self.rows = int(k), 0
        self._best = np.empty((len(self._probes), 0), np.float32)
        self._ids = np.empty((len(self._probes), 0), np.int64)
        self._index: Any = None
        if engine == "faiss":
            import faiss

            self._index = faiss.IndexFlatIP(self._probes.shape[1])

    def add(self, block: ArrayLike | Tensor) -> None:
        """Take the next rows (G_b, D) of the gallery. Raises ValueError for another D, rows that are zero or not finite."""
        unit = _unit("gallery", block, self._probes.shape[1], self.rows)
        if self._index is not None:
            self._index.add(unit)
        else:
            step = max(self.k, _BLOCK_BYTES // (4 * max(1, len(self._probes))))
            for start in range(0, len(unit), step):
                self._merge(unit[start : start + step], self.rows + start)
        self.rows += len(unit)

    def _merge(self, unit: NDArray[np.float32], first: int) -> None:
        cosine = self._probes @ unit.T
        if len(unit) > self.k:
            # Only what can be among the k best is sorted; what ties with the k-th stays in, for the lower row.
            bound = np.partition(cosine, len(unit) - self.k, axis=1)[:, len(unit) - self.k]
            keep = np.flatnonzero((cosine >= bound[:, None]).any(axis=0))
            cosine, places = cosine[:, keep], keep + first
        else:
            places = np.arange(first, first + len(unit))
        best = np.concatenate([self._best, cosine], axis=1)
        ids = np.concatenate([self._ids, np.broadcast_to(places, cosine.shape)], axis=1)
        order = np.argsort(-best, axis=1, kind="stable")[:, : self.k]
        self._best, self._ids = np.take_along_axis(best, order, 1), np.take_along_axis(ids, order, 1)

    def result(self) -> Found:
        """Cosines (Q, min(k, G)), falling, and row numbers; ties: the lower row. Raises ValueError for an empty gallery."""
        if self.rows == 0:
            raise ValueError("search: expected at least one gallery row, got none")
        if self._index is None:
            return self._best, self._ids
        cosine, ids = self._index.search(self._probes, min(self.k, self.rows))
        return np.asarray(cosine, np.float32), np.asarray(ids, np.int64)


def search(
    probes: ArrayLike | Tensor,  # (Q, D)
    gallery: ArrayLike | Tensor | Iterable[ArrayLike | Tensor],  # (G, D), or blocks (G_b, D) one after the other
    k: int = 1,
    *,
    engine: Engine = "exact",
) -> Found:
    """The k gallery rows of largest cosine for each probe: cosines (Q, k) falling and row numbers (Q, k); ties: the
    lower row. `GallerySearch` says how.

    gallery: an array, also a memory map, which is read in parts; or an iterator of blocks, for what is larger than memory.
    Raises ValueError for k outside [1, G], shapes that do not match, rows that are zero or not finite, an unknown engine.
    """
    found = GallerySearch(probes, k, engine=engine)
    if isinstance(gallery, np.ndarray | Tensor) or not isinstance(gallery, Iterable) or isinstance(gallery, list | tuple):
        whole = gallery if isinstance(gallery, np.ndarray | Tensor) and getattr(gallery, "layout", torch.strided) == torch.strided else array_of("search", "gallery", gallery)
        if whole.ndim != 2:
            raise ValueError(f"search: expected gallery of shape (G, D), got {tuple(whole.shape)}")
        blocks: Iterable[Any] = (whole[start : start + _COPIED_ROWS] for start in range(0, len(whole), _COPIED_ROWS))
    else:
        blocks = gallery
    for block in blocks:
        found.add(block)
    if found.rows < k:
        raise ValueError(f"search: expected k in [1, G = {found.rows}], got {k}")
    return found.result()


def _unit(name: str, rows: ArrayLike | Tensor, dimension: int | None, first: int) -> NDArray[np.float32]:
    """Rows of length 1 in float32; `first` is the number of the first in messages."""
    given = array_of("search", name, rows)
    if given.dtype.kind not in "fiub":
        raise TypeError(f"search: expected {name} of real numbers, got dtype {given.dtype}")
    wide = given.astype(np.float64)
    if wide.ndim != 2 or wide.shape[1] != (wide.shape[1] if dimension is None else dimension):
        raise ValueError(f"search: expected {name} of shape (rows, {'D' if dimension is None else f'D = {dimension}'}), got {wide.shape}")
    bad = ~(np.isfinite(wide).all(axis=1) & (np.abs(wide).max(axis=1, initial=0) > 0))
    if bad.any():
        raise ValueError(f"search: expected finite {name} that are not 0, got row {first + int(np.argmax(bad))}")
    return np.ascontiguousarray(unit_rows(wide), np.float32)
