"""The prototype memory of VPL and QAFace: one stored unit row per class in a ring of S slots (math.md section 2)."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, SupportsIndex

import torch
from torch import Tensor, nn

from ..ops._deferred import DeferredReport
from ..ops._flags import defers
from ..ops.memory_write import memory_write
from .checks import bad_rows, check_batch, check_entries, check_ids, check_sizes, check_step, complaint, normalised
from .entries import Entries, Injection, Write
from .policies import MemoryPolicy, NormStatistics

_ZERO_NORM = 1e-12


class PrototypeMemory(nn.Module):
    """Memory of the last sample of every class, injected as P_j = normalize(W^_j + lam_j M_j); no gradient enters it.

    `write` queues a batch of raw embeddings; queued batches take effect in the order written. A memory no head holds
    applies its queue at the next read; a head that holds it (`held` = True) calls `flush` after the optimizer step.
    `policy` (`VPL`, `QAFace` or any `MemoryPolicy`) says which strength a sample gets and when it is injected.
    `capacity` = S bounds the rows kept; min(C, delta * global batch) is all that can ever be valid. A full ring evicts
    its oldest entry (the earliest step, ties: lowest slot), counts it and warns once. `epoch` moves whenever anything a
    read returns may have changed. Rows are stored as `dtype`, strengths as float32 (float64 with dtype=torch.float64),
    norm statistics as float64; `.half()`, `.to(dtype)` and the like move nothing but the device. State (all of it in
    state_dict): the ring, strengths, stamps, owners, class -> slot map, clock (the latest step written), norm
    statistics, counters. Queued writes are not in state_dict: look at `pending`. An unheld memory applies them before
    it is saved; loading discards them.

    Args: num_classes C; embedding_dim D; capacity: 1 or more rows, at most C are used (None: C); dtype: floating.
    Raises ValueError for sizes below 1, TypeError for a dtype that is not floating and for what is no policy.
    Source: VPL (variational prototypes), QAFace; docs/math.md section 2.
    """

    ring: Tensor
    ring_strength: Tensor
    stamp: Tensor
    owner: Tensor
    slot: Tensor
    cursor: Tensor
    clock: Tensor
    norm_mean: Tensor
    norm_std: Tensor
    norm_batches: Tensor
    rejected: Tensor
    evicted: Tensor
    _report: Tensor

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        policy: MemoryPolicy,
        *,
        capacity: int | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__()
        check_sizes(num_classes, embedding_dim, capacity, dtype)
        if isinstance(policy, type) or not isinstance(policy, MemoryPolicy):
            raise TypeError(f"PrototypeMemory: expected a policy such as VPL() or QAFace(), got {policy!r}")
        self.num_classes = num_classes
        self.embedding_dim = embedding_dim
        self.policy = policy
        self.capacity = num_classes if capacity is None else min(capacity, num_classes)
        self.first_class = 0
        self.held = False
        # of a sharded head: (check, own rows, labels, step) -> the rows and labels of all ranks
        self.share: Callable[[Callable[[], object], Tensor, Tensor, object], tuple[Tensor, Tensor]] | None = None
        self.epoch = 0
        self._queue: list[Write] = []
        self._warned = False
        self._reads_norms = bool(getattr(policy, "reads_norms", False))
        self._deferred = DeferredReport()
        self._allocate(num_classes, self.capacity, dtype, torch.device("cpu"))
        for name in ("norm_mean", "norm_std"):
            self.register_buffer(name, torch.zeros((), dtype=torch.float64))
        for name in ("norm_batches", "rejected", "evicted"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64))
        self.register_buffer("clock", torch.tensor(-1))
        # Count, first row and value of what a CUDA write could not raise about at once, then the evictions.
        self.register_buffer("_report", torch.zeros(4, dtype=torch.int64), persistent=False)

    def _allocate(self, classes: int, size: int, dtype: torch.dtype, device: torch.device) -> None:
        """An empty ring of `size` slots and the map of `classes` classes."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.register_buffer("ring", torch.zeros(size, self.embedding_dim, dtype=dtype, device=device))
        self.register_buffer("ring_strength", torch.zeros(size, dtype=wide, device=device))
        self.register_buffer("stamp", torch.full((size,), -1, dtype=torch.int64, device=device))
        self.register_buffer("owner", torch.full((size,), -1, dtype=torch.int64, device=device))
        self.register_buffer("slot", torch.full((classes,), -1, dtype=torch.int32, device=device))
        self.register_buffer("cursor", torch.zeros((), dtype=torch.int64, device=device))

    @torch.no_grad()
    def write(self, embeddings: Tensor, labels: Tensor, step: SupportsIndex) -> None:
        """Queues a batch: embeddings (N, D) raw (their norm is the quality), labels (N,) int, -1 = ignored; step >= 0.

        Of several rows of a class the last one stored wins. Of a sharded head's memory: own rows, every rank calls. Rows are copied: later
        changes of `embeddings` do no harm.
        Raises TypeError for wrong types and dtypes; ValueError for shapes, devices, a step outside [0, 2^31), labels
        outside [-1, C) and non-finite rows, naming the first; a refused batch leaves all state untouched. On CUDA the
        last two do not wait for the device: such rows are ignored and the error comes from a later `write`, `flush` or
        `stats` (of a sharded head's memory: a later `write`, on every rank).
        """

        def check(report: bool = True) -> tuple[int, Tensor, Tensor, Tensor]:
            if report:
                self._raise_deferred(wait=False, agreed=True)
            now = check_step("PrototypeMemory.write", step)
            check_batch(embeddings, labels, self.embedding_dim, self.ring.device)
            raw = embeddings.detach().to(torch.promote_types(self.ring_strength.dtype, embeddings.dtype))
            norms = torch.linalg.vector_norm(raw, dim=1)  # (N,)
            return now, raw, norms, self._check_values(norms, labels.long(), report)

        if self.share is not None:
            embeddings, labels = self.share(check, embeddings, labels, step)
        now, raw, norms, labels = check(report=self.share is None)  # each rank says what its own rows had
        self._warn_normalised(norms, labels)
        unit = torch.where(norms > _ZERO_NORM, 1.0 / norms, 0.0).unsqueeze(1) * raw
        self._queue.append(Write(unit.to(self.ring.dtype), norms, labels.clone(), now))

    def _warn_normalised(self, norms: Tensor, labels: Tensor) -> None:
        """Says once where a policy that reads norms gets embeddings that have none left."""
        if self._reads_norms and not defers(norms) and normalised(norms, labels):
            self._reads_norms = False
            warnings.warn(
                f"PrototypeMemory: {type(self.policy).__name__} weighs samples by the norm of raw embeddings, and all of these "
                "have norm 1: write them before they are normalised",
                stacklevel=4,
            )

    def flush(self) -> None:
        """Applies the queued writes in order; a head that holds the memory calls it after the optimizer step."""
        if not self._queue:
            return
        queue, self._queue = self._queue, []
        for batch in queue:
            self._apply_write(batch)
        self.epoch += 1
        if self.ring.shape[0] < self.slot.numel():  # a smaller ring may have evicted
            self._report[3].copy_(self.evicted)
            self._deferred.post(self._report)
            self._raise_deferred(wait=False)

    @property
    def pending(self) -> int:
        """Number of queued writes."""
        return len(self._queue)

    def _apply_write(self, batch: Write) -> None:
        """Statistics, then strengths, then the ring: update before use."""
        statistics = NormStatistics(self.norm_mean, self.norm_std, self.norm_batches)
        labelled = batch.labels >= 0
        updated = self.policy.update(batch.norms, labelled, statistics)
        strengths, rejected = self.policy.strengths(batch.norms, updated)
        rejected = rejected & labelled
        for old, new in zip(statistics, updated, strict=True):
            old.copy_(new)
        self.rejected += rejected.sum()
        local = self._local(batch.labels)
        if self.policy.skips_rejected:
            local = torch.where(rejected, -1, local)
        state = (self.ring, self.ring_strength, self.stamp, self.owner, self.slot, self.cursor)
        self.evicted += memory_write(*state, batch.rows, local, strengths, batch.step)
        self.clock.clamp_(min=batch.step)

    @torch.no_grad()
    def injection(self, step: SupportsIndex) -> Injection:
        """(rows (S, D), strength (S,), slot (C,) int32) at `step` for the kernels; rows and slot are live state."""
        step = check_step("PrototypeMemory.injection", step)
        self._settle()
        if self.policy.started(step):
            strength = torch.where(self._fresh(step), self.ring_strength, 0.0)
        else:
            strength = torch.zeros_like(self.ring_strength)
        return Injection(self.ring, strength, self.slot)

    @torch.no_grad()
    def gather(self, ids: Tensor, step: SupportsIndex) -> tuple[Tensor, Tensor]:
        """Rows (M, D) and strengths (M,) at `step` of the classes ids (M,) int; never written: row 0, strength 0.

        Raises ValueError for ids that are not one-dimensional or (on CPU) outside [0, C), TypeError for another dtype
        than int.
        """
        check_ids(ids, self.num_classes)
        rows, strength, _ = self.injection(step)
        at = self._slots(ids.long().to(rows.device))
        return _rows_at(rows, at), _rows_at(strength, at)

    def strength(self, step: SupportsIndex) -> Tensor:
        """lam (C,) at `step`: 0 where stale, never written or not started."""
        strength = self.injection(step).strength
        return _rows_at(strength, self._slots(torch.arange(self.num_classes, device=strength.device)))

    def rows(self) -> Tensor:
        """The stored rows by class, (C, D), zero where never written: for tests, it allocates C x D."""
        self._settle()
        return _rows_at(self.ring, self._slots(torch.arange(self.num_classes, device=self.ring.device)))

    def stats(self, step: SupportsIndex | None = None) -> dict[str, int]:
        """live and stale entries at `step` (None: the latest written), rejected samples and evicted entries so far.

        live: entries not older than delta, whether or not injection has started; stale: older ones still in the ring.
        """
        at = None if step is None else check_step("PrototypeMemory.stats", step)
        self._settle()
        self._raise_deferred(wait=True)
        now = int(self.clock) if at is None else at
        used = self.stamp >= 0
        live = int(self._fresh(now).sum())
        return {
            "live": live,
            "rejected": int(self.rejected),
            "stale": int(used.sum()) - live,
            "evicted": int(self.evicted),
        }

    @property
    def mean(self) -> Tensor:
        """mu of the norms, () float64 (QAFace; 0 before the first labelled row)."""
        self._settle()
        return self.norm_mean.clone()

    @property
    def std(self) -> Tensor:
        """sigma of the norms, () float64 (QAFace; 0 before the first labelled row)."""
        self._settle()
        return self.norm_std.clone()

    @torch.no_grad()
    def shard(self, start: int, stop: int) -> None:
        """Keeps the classes start .. stop - 1: slot becomes (stop - start,), the ring min(capacity, stop - start) rows.

        Labels and ids stay global; rows of other classes count in the statistics and are not stored. The call moves
        entries already written. Raises ValueError for a range outside the classes held and RuntimeError with queued
        writes.
        """
        last = self.first_class + self.slot.numel()
        if not self.first_class <= start <= stop <= last:
            raise ValueError(
                f"PrototypeMemory.shard: expected a range in [{self.first_class}, {last}], got [{start}, {stop}]"
            )
        if self._queue:
            raise RuntimeError(f"PrototypeMemory.shard: expected no queued writes, got {len(self._queue)}")
        entries = self.entries()
        self._allocate(stop - start, min(self.capacity, stop - start), self.ring.dtype, self.ring.device)
        self.first_class = start
        self.load_entries(entries)

    @torch.no_grad()
    def entries(self) -> Entries:
        """The stored entries by class id (queued writes of an unheld memory included)."""
        self._settle()
        local = (self.slot >= 0).nonzero().squeeze(1)
        at = self.slot[local].long()
        return Entries(local + self.first_class, self.ring[at], self.ring_strength[at], self.stamp[at])

    @torch.no_grad()
    def load_entries(self, entries: Entries) -> None:
        """Replaces the stored entries by those of `entries` whose class is kept here; of more than S the newest stay.

        Raises ValueError for ids not strictly ascending in [0, C) and for fields that are not (E,) or (E, D).
        """
        check_entries(entries.ids, entries.rows, entries.strength, entries.stamp, self.num_classes, self.embedding_dim)
        self._queue.clear()
        for buffer, value in (
            (self.ring, 0),
            (self.ring_strength, 0),
            (self.stamp, -1),
            (self.owner, -1),
            (self.slot, -1),
        ):
            buffer.fill_(value)
        local = self._local(entries.ids.to(self.slot.device))
        order = torch.argsort(entries.stamp.to(local.device), stable=True)  # oldest first: free slots are filled by age
        order = order[local[order] >= 0]
        order = order[max(0, order.numel() - self.ring.shape[0]) :]
        count = order.numel()
        self.ring[:count] = entries.rows.to(self.ring.device)[order].to(self.ring.dtype)
        self.ring_strength[:count] = entries.strength.to(local.device)[order].to(self.ring_strength.dtype)
        self.stamp[:count] = entries.stamp.to(local.device)[order]
        self.owner[:count] = local[order]
        self.slot[local[order]] = torch.arange(count, dtype=torch.int32, device=local.device)
        self.cursor.fill_(count)
        self.clock.copy_(torch.cat([self.clock.reshape(1), self.stamp]).max())
        self.epoch += 1

    def _settle(self) -> None:
        """Before a read: an unheld memory applies its queue, a held one waits for its head."""
        if not self.held:
            self.flush()

    def _fresh(self, step: int) -> Tensor:
        """Which slots (S,) hold an entry that is not stale at `step`; with delta = 0 none."""
        if self.policy.delta == 0:
            return torch.zeros_like(self.stamp, dtype=torch.bool)
        return (self.stamp >= 0) & (step - self.stamp <= self.policy.delta)

    def _local(self, ids: Tensor) -> Tensor:
        """Global class ids -> rows of `slot`; -1 where the class is not held here."""
        local = ids - self.first_class
        return torch.where((ids >= 0) & (local >= 0) & (local < self.slot.numel()), local, -1)

    def _slots(self, ids: Tensor) -> Tensor:
        """Slot (M,) int64 of global class ids (M,); -1 = none."""
        local = self._local(ids)
        if self.slot.numel() == 0:  # an empty shard: nothing to look at
            return local
        return torch.where(local >= 0, self.slot[local.clamp(min=0)].long(), -1)

    def _check_values(self, norms: Tensor, labels: Tensor, report: bool) -> Tensor:
        """Labels with the bad rows refused: on CPU by an error, on CUDA set to -1 and, with `report`, reported."""
        bad = bad_rows(norms, labels, self.num_classes)
        if defers(labels):
            return self._defer(bad, labels) if report else torch.where(bad, -1, labels)
        if bool(bad.any()):
            row = int(bad.nonzero()[0])
            raise ValueError(complaint(row, int(labels[row]), self.num_classes))
        return labels

    def _defer(self, bad: Tensor, labels: Tensor) -> Tensor:
        """Ignores the bad rows (N,) and posts their count, the first row and its label; no synchronisation."""
        if labels.numel() == 0:
            return labels
        row = bad.to(torch.int8).argmax()  # the first of the largest
        label = labels.gather(0, row.unsqueeze(0)).squeeze(0)  # labels[row] would wait for the device
        report = torch.stack([bad.sum(), row, label])
        self._report[:3] = torch.where((self._report[0] == 0) & bad.any(), report, self._report[:3])
        self._deferred.post(self._report)
        return torch.where(bad, -1, labels)

    def _raise_deferred(self, *, wait: bool, agreed: bool = False) -> None:
        """Acts on the last report: one warning about evictions, an error about bad rows; of a sharded head's memory only where the
        ranks agree on errors."""
        report = self._deferred.poll(wait=wait)
        if report is None:
            return
        count, row, label, evicted = report
        if evicted > 0 and not self._warned:
            self._warned = True
            warnings.warn(
                f"PrototypeMemory: the ring of {self.ring.shape[0]} rows is full and evicts its oldest entries; "
                "a capacity of delta * global batch holds all that can be valid",
                stacklevel=3,
            )
        if count > 0 and not agreed and self.share is not None:
            self._deferred.post(self._report)  # for the next call in which all ranks raise
        elif count > 0:
            self._report[:3] = 0
            raise ValueError(f"{complaint(row, label, self.num_classes)}; {count} such rows were ignored")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PrototypeMemory:
        """Moves between devices keep every dtype: `.half()` on a model must not cost the memory its precision."""

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(keep_dtype, recurse)  # type: ignore[no-untyped-call]
        device = self.ring.device
        self._queue = [Write(w.rows.to(device), w.norms.to(device), w.labels.to(device), w.step) for w in self._queue]
        self.epoch += 1
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self._settle()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._queue.clear()
        super()._load_from_state_dict(*args, **kwargs)
        self.epoch += 1

    def extra_repr(self) -> str:
        """Sizes and policy, for print."""
        sizes = f"{self.num_classes}, {self.embedding_dim}, capacity={self.capacity}"
        return f"{sizes}, dtype={self.ring.dtype}, policy={self.policy}"


def _rows_at(values: Tensor, at: Tensor) -> Tensor:
    """values[at], zeros where at (M,) is -1."""
    if values.shape[0] == 0:
        return values.new_zeros((at.numel(), *values.shape[1:]))
    mask = (at >= 0).reshape(-1, *[1] * (values.dim() - 1))
    return torch.where(mask, values[at.clamp(min=0)], 0.0)
