"""The memory write of math.md section 2: a batch of unit rows enters a ring of S slots, at most one slot per class."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _library

_LAST = torch.iinfo(torch.int64).max
# Age and slot share one int64 sort key (step * S + slot), so each half gets 31 bits.
MAX_STEP = 2**31 - 1


def reference_memory_write(
    rows: Tensor,  # (S, D) any floating dtype, written in place
    row_strength: Tensor,  # (S,) floating, written in place
    stamp: Tensor,  # (S,) int64, written in place; -1 = never written
    owner: Tensor,  # (S,) int64 class id, written in place; -1 = none
    slot: Tensor,  # (C,) int32 slot of the class, written in place; -1 = none
    cursor: Tensor,  # () int64 number of slots in use, written in place
    embeddings: Tensor,  # (N, D) unit rows
    labels: Tensor,  # (N,) int64; rows outside [0, C) are ignored
    strengths: Tensor,  # (N,)
    step: int,
) -> Tensor:
    """Stores the batch and returns how many entries the full ring lost, () int64.

    Of several rows of one class the last is stored. A class that has a slot overwrites it in place. The other classes,
    in batch order, take the free slots in slot order, then the slots of the oldest entries (smallest stamp, ties:
    lowest slot) whose class is not in this batch; the class that owned such a slot loses it. Of a batch with more
    classes than slots the last S are stored and the others count as lost. O(S + N log N), the same bits on every run.
    """
    size, classes = rows.shape[0], slot.shape[0]
    winners = _last_row_of_each_class(labels, classes)  # (K,) ascending row numbers
    dropped = winners[: max(0, winners.numel() - size)]
    winners = winners[dropped.numel() :]
    lost = (
        slot[labels[dropped]] < 0
    ).sum()  # a dropped class that has a slot is counted below, when the slot changes hands
    ids = labels[winners]
    at = slot[ids].long()  # (K,)
    new = at < 0
    free = _oldest_slots(stamp, at[~new], cursor, int(new.sum()))
    previous = owner[free]
    previous = previous[previous >= 0]
    slot[previous] = -1
    at[new] = free
    rows[at] = embeddings[winners].to(rows.dtype)
    row_strength[at] = strengths[winners].to(row_strength.dtype)
    stamp[at] = step
    owner[at] = ids
    slot[ids] = at.to(slot.dtype)
    cursor.add_(free.numel()).clamp_(max=size)
    return lost + previous.numel()


def _last_row_of_each_class(labels: Tensor, classes: int) -> Tensor:
    """Row numbers (K,), ascending, of the last row of every class in [0, classes)."""
    kept = ((labels >= 0) & (labels < classes)).nonzero().squeeze(1)
    by_class, order = torch.sort(labels[kept], stable=True)
    last = torch.ones_like(by_class, dtype=torch.bool)
    last[:-1] = by_class[1:] != by_class[:-1]
    return kept[order[last]].sort().values


def _oldest_slots(stamp: Tensor, refreshed: Tensor, cursor: Tensor, count: int) -> Tensor:
    """Slots to fill, (count,) int64: free ones (stamp -1) first, then by stamp, ties by slot; never a refreshed one."""
    size = stamp.numel()
    used = int(cursor)
    if used + count <= size:  # slots fill up in order, so the free ones are the last: no search
        return torch.arange(used, used + count, device=stamp.device)
    key = stamp * size + torch.arange(size, device=stamp.device)  # no two are equal: the order is total
    key[refreshed] = _LAST
    return torch.topk(key, count, largest=False, sorted=True).indices


def memory_write(
    rows: Tensor,
    row_strength: Tensor,
    stamp: Tensor,
    owner: Tensor,
    slot: Tensor,
    cursor: Tensor,
    embeddings: Tensor,
    labels: Tensor,
    strengths: Tensor,
    step: int,
) -> Tensor:
    """Writes a batch into the ring in place; arguments, order and result as `reference_memory_write` states them.

    Raises ValueError for shapes that do not fit together, for labels or integer state of another dtype than int64
    (slot: int32), and for a step outside [0, 2^31).
    """
    _check_ring(rows, row_strength, stamp, owner, slot, cursor)
    _check_batch(rows, embeddings, labels, strengths, step)
    return torch.ops.recog_fast.memory_write(  # type: ignore[no-any-return]
        rows, row_strength, stamp, owner, slot, cursor, embeddings, labels, strengths, step
    )


def _check_ring(rows: Tensor, row_strength: Tensor, stamp: Tensor, owner: Tensor, slot: Tensor, cursor: Tensor) -> None:
    """Shapes and dtypes of the state."""
    if rows.dim() != 2 or not rows.is_floating_point():
        raise ValueError(f"memory_write: expected rows of shape (S, D) and floating dtype, got {_describe(rows)}")
    size = rows.shape[0]
    if tuple(row_strength.shape) != (size,) or not row_strength.is_floating_point():
        raise ValueError(
            f"memory_write: expected floating row_strength of shape (S,) = ({size},), got {_describe(row_strength)}"
        )
    for name, value in (("stamp", stamp), ("owner", owner)):
        if tuple(value.shape) != (size,) or value.dtype != torch.int64:
            raise ValueError(f"memory_write: expected int64 {name} of shape (S,) = ({size},), got {_describe(value)}")
    if slot.dim() != 1 or slot.dtype != torch.int32:
        raise ValueError(f"memory_write: expected int32 slot of shape (C,), got {_describe(slot)}")
    if cursor.dim() != 0 or cursor.dtype != torch.int64:
        raise ValueError(f"memory_write: expected int64 cursor of shape (), got {_describe(cursor)}")


def _check_batch(rows: Tensor, embeddings: Tensor, labels: Tensor, strengths: Tensor, step: int) -> None:
    """Shapes and dtypes of what is written."""
    dim = rows.shape[1]
    if embeddings.dim() != 2 or embeddings.shape[1] != dim or not embeddings.is_floating_point():
        raise ValueError(
            f"memory_write: expected floating embeddings of shape (N, D) = (N, {dim}), got {_describe(embeddings)}"
        )
    count = embeddings.shape[0]
    if tuple(labels.shape) != (count,) or labels.dtype != torch.int64:
        raise ValueError(f"memory_write: expected int64 labels of shape (N,) = ({count},), got {_describe(labels)}")
    if tuple(strengths.shape) != (count,) or not strengths.is_floating_point():
        raise ValueError(
            f"memory_write: expected floating strengths of shape (N,) = ({count},), got {_describe(strengths)}"
        )
    if not 0 <= step <= MAX_STEP:
        raise ValueError(f"memory_write: expected step in [0, {MAX_STEP}], got {step}")


def _describe(value: Tensor) -> str:
    return f"{value.dtype} {tuple(value.shape)}"


def _fake(rows: Tensor, row_strength: Tensor, stamp: Tensor, *_: Any) -> Tensor:
    return stamp.new_empty(())


_library.register("memory_write", reference=reference_memory_write, fake=_fake)
