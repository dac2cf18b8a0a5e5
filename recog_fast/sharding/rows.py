"""What a sharded head needs beside its loss: its rows of W, the batch of all ranks, writes into its memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops._flags import BAD_LABEL, RowFlags, defers
from .group import ShardGroup
from .softmax import Shard

_SPOILED = BAD_LABEL - 1  # label under which a non-finite row travels
_PIECE = 1 << 22  # elements drawn at a time; a multiple of 16: torch.normal_ makes them in sixteens


class GlobalBatch(NamedTuple):
    """The rows of all ranks, in rank order: embeddings (N, D), labels and sample weights (N,)."""

    embeddings: Tensor  # (N, D) raw
    labels: Tensor  # (N,) int64, global
    sample_weight: Tensor | None  # (N,)
    spoiled: Tensor | None = None  # (N,) bool: rows found non-finite without waiting for the device, here all 0


def gather_batch(embeddings: Tensor, labels: Tensor, sample_weight: Tensor | None, shard: Shard, flags: RowFlags | None = None) -> GlobalBatch:
    """One all-gather of x (x^ and |x| follow from it, in double, on every rank alike), label and sample weight: embeddings (n, D),
    labels (n,) and sample_weight (n,) or None of this rank -> the rows of all ranks, in every tensor's own dtype.

    flags: where rows were not looked at before (CUDA), they note this rank's bad rows. Those whose label is out of range travel
    as label -2, those with a non-finite value as zeros with label -3; on every rank both then have label -2, and the latter,
    where it does not wait either, are `spoiled` too.
    """
    ids = labels.to(torch.int64)
    if flags is not None:
        ids, spoiled = flags.screen(embeddings.detach(), ids, shard.group.num_classes)
        ids = torch.where(spoiled, _SPOILED, ids)
        embeddings = embeddings.detach().masked_fill(spoiled.unsqueeze(1), 0.0)
    rows, ids, *weights = shard.gather([embeddings, ids, *([] if sample_weight is None else [sample_weight])])
    # A rank that looked at once has none, and learns here of those of the others.
    of_all = ids == _SPOILED if defers(ids) else None
    return GlobalBatch(rows, ids if of_all is None else ids.clamp_min(BAD_LABEL), weights[0] if weights else None, of_all)


def initial_rows(shape: tuple[int, ...], start: int, stop: int) -> Tensor:
    """Rows start .. stop - 1 of `torch.empty(shape).normal_(0, 0.01)`: the same W whatever the number of ranks.

    shape (C, D) or (C, K, D) -> (stop - start, ...) float32 on the CPU. Draws all of it from torch's global generator, a piece at a
    time (about 3 ns per element of the whole W), and keeps these.
    """
    width = 1
    for size in shape[1:]:
        width *= size
    whole, kept = shape[0] * width, torch.empty((stop - start) * width, dtype=torch.float32)
    if stop - start == shape[0]:
        return kept.normal_(0.0, 0.01).reshape(shape)
    first, at = start * width, 0
    while at < whole:
        count = whole - at if whole - at < 2 * _PIECE else _PIECE  # the last piece is never shorter than sixteen
        piece = torch.empty(count, dtype=torch.float32).normal_(0.0, 0.01)
        low, high = max(at, first), min(at + count, first + kept.numel())
        if low < high:
            kept[low - first : high - first] = piece[low - at : high - at]
        at += count
    return kept.reshape(stop - start, *shape[1:])


def share_writes(group: ShardGroup) -> Callable[[Callable[[], object], Tensor, Tensor, object], tuple[Tensor, Tensor]]:
    """What `PrototypeMemory.write` on a sharded head calls: own rows -> the rows and labels of all ranks, or an error on all."""

    def share(check: Callable[[], object], embeddings: Tensor, labels: Tensor, step: object) -> tuple[Tensor, Tensor]:
        facts: dict[str, object] = {"step": step, "dtype": getattr(embeddings, "dtype", None)}
        rows = embeddings.shape[0] if isinstance(embeddings, Tensor) and embeddings.dim() else 0
        admission = group.agree("PrototypeMemory.write", check, facts, rows)
        keys, ids = group.gather([embeddings, labels.long()], admission.sizes)
        return keys, ids

    return share
