"""What a prototype memory hands to the sweeps, to checkpoints, and to itself."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Injection(NamedTuple):
    """What the class sweeps take: rows (S, D), strength (S,) and slot (C,) int32; no C x D tensor."""

    rows: Tensor  # (S, D) the ring itself
    strength: Tensor  # (S,) lam of each slot at the step asked for; 0 = stale, never written or not started
    slot: Tensor  # (C,) int32 the class -> slot map itself; -1 = none


class Entries(NamedTuple):
    """The E stored entries by global class id, ascending: ids (E,), rows (E, D), strength (E,), stamp (E,); what a checkpoint of any world size holds."""

    ids: Tensor  # (E,) int64
    rows: Tensor  # (E, D)
    strength: Tensor  # (E,) as stored, staleness not applied
    stamp: Tensor  # (E,) int64 step of the write


class Write(NamedTuple):
    """One queued batch."""

    rows: Tensor  # (N, D) unit
    norms: Tensor  # (N,)
    labels: Tensor  # (N,) int64, global
    step: int
