"""Cosines of rows to classes, a chunk of classes at a time: what `MarginHead.topk` and `logits` are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .. import reference

_CHUNK = 16384  # classes whose cosines are held at a time


Prototypes = Callable[[int, int], Tensor]  # (first class, last + 1) -> their unit rows (c, D) or (c, K, D)


def class_cosines(embeddings: Tensor, prototypes: Prototypes, classes: int, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """(first class, cosines (N, chunk)) of raw rows (N, D) to prototypes of that dtype, max over K."""
    unit, _ = reference.unit_rows(embeddings.to(dtype))
    for start in range(0, classes, _CHUNK):
        rows = prototypes(start, min(start + _CHUNK, classes))
        subcenters = rows.shape[1] if rows.dim() == 3 else 1
        cosine = unit @ rows.reshape(-1, rows.shape[-1]).t()
        yield start, cosine.reshape(unit.shape[0], rows.shape[0], subcenters).amax(dim=2)


def nearest_classes(embeddings: Tensor, prototypes: Prototypes, classes: int, dtype: torch.dtype, k: int) -> tuple[Tensor, Tensor]:
    """The min(k, C) nearest classes of each row: cosine descending, class int64; ties: the lower class."""
    n = embeddings.shape[0]
    best = torch.empty(n, 0, dtype=dtype, device=embeddings.device)
    ids = torch.empty(n, 0, dtype=torch.int64, device=embeddings.device)
    for start, cosine in class_cosines(embeddings, prototypes, classes, dtype):
        here = torch.arange(start, start + cosine.shape[1], device=ids.device).expand(n, -1)
        best, ids = torch.cat([best, cosine], dim=1), torch.cat([ids, here], dim=1)
        order = torch.sort(best, dim=1, descending=True, stable=True).indices[:, :k]
        best, ids = best.gather(1, order), ids.gather(1, order)
    return best, ids
