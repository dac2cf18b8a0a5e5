"""Cosines of rows to classes, a chunk of classes at a time: what `MarginHead.topk` and `logits` are made of."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .. import reference

_CHUNK = 16384  # classes whose cosines are held at a time


def class_cosines(embeddings: Tensor, prototypes: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(first class, cosines (N, chunk)) of raw rows (N, D) to unit prototypes (C, D) or (C, K, D), max over K."""
    unit, _ = reference.unit_rows(embeddings.to(prototypes.dtype))
    subcenters = prototypes.shape[1] if prototypes.dim() == 3 else 1
    for start in range(0, prototypes.shape[0], _CHUNK):
        rows = prototypes[start : start + _CHUNK]
        cosine = unit @ rows.reshape(-1, prototypes.shape[-1]).t()
        yield start, cosine.reshape(unit.shape[0], rows.shape[0], subcenters).amax(dim=2)


def nearest_classes(embeddings: Tensor, prototypes: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The min(k, C) nearest classes of each row: cosine descending, class int64; ties: the lower class."""
    n = embeddings.shape[0]
    best = torch.empty(n, 0, dtype=prototypes.dtype, device=prototypes.device)
    ids = torch.empty(n, 0, dtype=torch.int64, device=prototypes.device)
    for start, cosine in class_cosines(embeddings, prototypes):
        here = torch.arange(start, start + cosine.shape[1], device=ids.device).expand(n, -1)
        best, ids = torch.cat([best, cosine], dim=1), torch.cat([ids, here], dim=1)
        order = torch.sort(best, dim=1, descending=True, stable=True).indices[:, :k]
        best, ids = best.gather(1, order), ids.gather(1, order)
    return best, ids
