"""What a head is asked beside its loss, with all classes here or with one shard of them: prototypes, topk, logits, cosines."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import reference
from ..head_weight import HeadWeight
from ..ops import _checks, _planes
from ..ops._classes import class_cosines, nearest_classes
from ..ops._compile import outside_graphs
from ..ops.attached_cosine import CosineOptions, attached_cosine
from .group import ShardGroup
from .rows import share_writes
from .softmax import Shard
from .use import sharded_cosine, sharded_logits, sharded_topk

if TYPE_CHECKING:
    from ..memory import PrototypeMemory
    from ..ops._flags import HostCount
    from ..ops._kept import KeptExponentials
    from ..ops._rows import Injection, Key, RowRecords
    from ..ops.margin_softmax import Margin


class ClassQueries(HeadWeight):
    """The part of `MarginHead` that its training does not need, and how it comes to terms with other ranks."""

    steps: Tensor
    sample_seed: Tensor
    num_classes: int
    embedding_dim: int
    subcenters: int
    first_class: int
    scale: float
    margin: Margin
    memory: PrototypeMemory | None
    shards: ShardGroup | None
    ddp_average: bool
    sample_rate: float
    unknown_weight: float
    compute_dtype: torch.dtype | None
    drop_mass: float
    drop_elements: float
    keep: KeptExponentials | None
    _fused: object | None
    _count: HostCount
    _cache: tuple[Key, Tensor] | None

    def _key(self, step: int) -> Key:
        raise NotImplementedError

    def _injection(self, step: int) -> Injection:
        raise NotImplementedError

    def _keep_rows(self, rows: RowRecords) -> None:
        raise NotImplementedError

    # -- ranks -----------------------------------------------------------------------------------------------------------

    def _join(self) -> None:
        """Rank 0's seed for the sampled classes, this shard of the memory."""
        assert self.shards is not None
        self.sample_seed.fill_(self.shards.exchange(int(self.sample_seed))[0])
        if self.memory is not None:
            self.memory.shard(self.shards.start, self.shards.stop)
            self.memory.share = share_writes(self.shards)

    def _admit(
        self, where: str, check: Callable[[], object], embeddings: Tensor, arguments: Mapping[str, object], statistics: bool = False
    ) -> Shard | None:
        """Runs `check`, whose errors leave all state untouched; on a sharded head of all ranks: what they agreed on."""
        if self.shards is None:
            check()
            return None
        facts = {
            **arguments, "mode": "training" if self.training else "evaluation", "gradients": torch.is_grad_enabled(), "clock": self._count.of(self.steps),
            "scale": self.scale, "unknown_weight": self.unknown_weight, "sample_rate": self.sample_rate,
            "dtypes": (getattr(embeddings, "dtype", None), self.weight.dtype), "fused optimizer": self._fused is not None,
            "autocast": torch.is_autocast_enabled(self.weight.device.type),
        }  # fmt: skip
        is_rows = isinstance(embeddings, Tensor) and embeddings.dim() == 2
        wanted = is_rows and embeddings.requires_grad
        admission = self.shards.agree(where, check, facts, embeddings.shape[0] if is_rows else 0, statistics=statistics, d_embeddings=wanted)
        return Shard(self.shards, admission, self.ddp_average)

    # -- use -------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def prototypes(self) -> Tensor:
        """Effective unit prototypes (C, D) or (C, K, D) at the head's clock; cached until W, memory or clock change: read only."""
        self._settle_planes()
        now = self._count.of(self.steps)
        key = self._key(now)
        if self.weight.shape[0] == 0:
            return self.weight.detach()
        if self._cache is None or self._cache[0] != key:
            with torch.inference_mode(False), torch.no_grad():  # a cache made while evaluating serves training too
                made = torch.ops.recog_fast.effective_prototypes(self.weight, *self._injection(now).arguments(), True, self.weight_low)
            self._cache = (key, made)
        return self._cache[1]

    def logits(self, embeddings: Tensor) -> Tensor:
        """s * cosine (N, C), no margin (max over sub-centers): an N x C tensor, differentiable in embeddings only."""
        shard = self._admit("MarginHead.logits", lambda: self._check_embeddings(embeddings, "MarginHead.logits"), embeddings, {})
        if shard is not None:
            unit, _ = reference.unit_rows(embeddings.to(self.weight.dtype))
            return self.scale * sharded_logits(unit, self.prototypes(), self.subcenters, shard)
        return self.scale * torch.cat([c for _, c in class_cosines(embeddings, self._prototypes_of, self.num_classes, self._shaped.dtype)], dim=1)

    @torch.no_grad()
    def _prototypes_of(self, start: int, stop: int) -> Tensor:
        """Prototypes of classes start .. stop - 1; those of a split head are never all there: they would be larger than W."""
        if self.weight_low is None:
            return self.prototypes()[start:stop]
        rows = _planes.join(self.weight[start:stop], self.weight_low[start:stop])
        memory = self._injection(self._count.of(self.steps))
        slot = None if memory.slot is None else memory.slot[start:stop]
        return torch.ops.recog_fast.effective_prototypes(rows, memory.rows, memory.strength, slot, True)  # type: ignore[no-any-return]

    @torch.no_grad()
    def topk(self, embeddings: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k nearest classes of each row: cosine (N, k) descending, class id (N, k) int64; ties: the lower id.

        Raises ValueError for k outside [1, C].
        """
        where = "MarginHead.topk"

        def check() -> None:
            self._check_embeddings(embeddings, where)
            _checks.expect(1 <= k <= self.num_classes, where, f"k in [1, C = {self.num_classes}]", k)

        shard = self._admit(where, check, embeddings, {"k": k})
        if shard is None:
            return nearest_classes(embeddings, self._prototypes_of, self.num_classes, self._shaped.dtype, k)
        best, ids = nearest_classes(shard.gather([embeddings])[0], self._prototypes_of, self.weight.shape[0], self.weight.dtype, k)
        return sharded_topk(best, ids + self.first_class, k, shard)

    @outside_graphs
    def cosine(self, embeddings: Tensor, class_ids: Tensor) -> Tensor:
        """<x_i/|x_i|, P_{class_ids_i}> (N,), differentiable in embeddings and weight (max over sub-centers).

        Raises ValueError naming the argument.
        """
        where = "MarginHead.cosine"

        def check() -> None:
            self._check_embeddings(embeddings, where)
            _checks.check_labels(class_ids, embeddings.shape[0], self.num_classes, where, low=0, name="class_ids")

        shard = self._admit(where, check, embeddings, {})
        now = self._count.of(self.steps)
        on_rows = self._keep_rows if self.training and self._fused is not None else None
        options = CosineOptions(self.scale, self._injection(now), self._key(now), on_rows, self.weight_low)
        if shard is None:
            return attached_cosine(embeddings, self.weight, class_ids.long(), options)
        return sharded_cosine(embeddings, self.weight, class_ids.long(), options, shard)
