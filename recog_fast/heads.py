"""MarginHead: class centres, margin, memory and their bookkeeping."""

from __future__ import annotations

import operator
from typing import Any, Literal, overload

import torch
from torch import Tensor

from ._arguments import is_choice, is_number, is_whole
from .head_weight import WeightFormat
from .losses import Reduction, check_options, check_rows
from .margins import ArcFace
from .memory import PrototypeMemory
from .ops import _checks
from .ops._compile import outside_graphs
from .ops._flags import HostCount, RowFlags
from .ops._kept import BUDGET, kept_exponentials
from .ops._rows import Injection, Key, RowRecords
from .ops.margin_softmax import LossOptions, Margin, margin_softmax
from .rules import RowStats
from .sampling import sample_classes
from .sharding import ClassQueries, GlobalBatch, gather_batch, initial_rows, join_group, sharded_margin_softmax


class MarginHead(ClassQueries):
    """The classification head of margin softmax over very many classes; holds W (C, D) float32 and nothing else of size C x D.

    loss_i = softplus(L_i - s phi(c_{i,y_i})), L_i the logsumexp of s f(c_ij) over the other classes (math.md 1).

    Args:
        num_classes, embedding_dim: C, D. margin: see `recog_fast.margins`; a margin with state is a submodule and is
            updated once per training forward. scale: s. subcenters: K; W is then (C, K, D) and c = max over k.
        memory: a `PrototypeMemory` whose rows are injected into the prototypes; part of state_dict. Something must fill it:
            pass `keys=` to every training forward (the momentum encoder's embeddings, or `embeddings.detach()`), or call
            `memory.write(embeddings, labels, step)` after backward. The head owns its clock: writes take effect after the optimizer
            step (without HeadSGD: at the next training forward).
        sample_rate: share of the classes that serve as negatives of a training step (Partial FC): the batch's own classes,
            and others drawn by (sample_seed, step) until there are int(sample_rate * C); `last_sampled` has their ids. The
            first forward of a HeadSGD step (without HeadSGD: every training forward) draws them for all its micro-batches: a later row of
            another class meets the same negatives, and its own class through the target cosine alone. Rows labelled -1 and all use outside training
            see every class. weight.grad is dense, 0 in the other rows. sample_seed: None takes torch.initial_seed().
        unknown_weight: weight of the UIR excess of rows labelled -1 (UIR: 0.1). compute_dtype: as `margin_softmax_loss`.
        keep_exponentials: keep e^{s f(c) - offset} of the forward sweep for the class sweep, which then saves its first product:
            True (or torch.bfloat16) in 16 bits, 2NC bytes, with float32 arithmetic the mode fp32-Ebf16, not exact, so off by
            default (dW of every class that is nobody's target within 4e-3; measured errors: math.md 1.4); torch.float32: 4NC
            bytes, nothing lost. Classes beyond `keep_budget` bytes are computed again. With several forwards per HeadSGD
            step all are computed again. Only the CPU kernels keep.
        drop_mass: leave the rows of least gradient mass w_i q_i, together at most this share of the batch's, out of dW (dx is
            exact). Not exact, off by default (measured errors: math.md 1.4); `RowStats.dropped_mass` holds q_i of each row left
            out. With reduction "none" the upstream gradient of a row does not count in its mass.
        drop_elements: leave single elements p_ij < drop_elements out of dx and dW: only the others are listed, and the backward pass
            walks the lists (2NCD products instead of 8NCD; up to 4NC bytes of lists, within `keep_budget`). Loss and
            statistics are exact, `RowStats.dropped_mass` holds the mass left out of each row. 2**-16 errs about as bfloat16 does.
            Not exact, off by default (measured errors: math.md 1.4). Only the CPU kernels list; a tile of classes with more
            than half of its elements to list, and a batch whose unlabelled rows count, are swept in full; with several forwards per
            HeadSGD step dW is (dx and dropped_mass are of the lists all the same). Setting it to 0 later turns it off. One of
            drop_elements, drop_mass and keep_exponentials.
        group: a torch.distributed process group whose R ranks share the classes, torch.chunk's ranges of them; `weight` and the memory
            then hold this rank's (`first_class` and on). Rows, keys and queries are this rank's own (any number, 0 too), labels and
            class ids global, means, statistics and the loss those of all ranks' rows; every rank makes every call, and an error of one
            is raised on all. Several ranks without a group: ValueError. `prototypes` and `last_sampled` are this shard's.
        ddp_average: multiply the gradient of the embeddings by R, since DistributedDataParallel averages the backbone's over the ranks;
            False: the gradient of the global loss. weight.grad never is.
        weight_format: "split" holds W as `weight` bfloat16, its nearest, and `weight_low` int16, the rest: float32 bit for bit
            (`full_weight()`, `copy_weight(values)`), from which every sweep reads. It needs HeadSGD, whose momentum_dtype=torch.bfloat16
            leaves 6 bytes to an element of W; no keep_exponentials or drop_elements. float32 states load into it and back. Not with a group of several ranks.
    W is drawn from N(0, 0.01). Without `HeadSGD`, backward fills weight.grad; with it, backward leaves row records here
    and weight.grad stays None: clip the backbone's gradients only.

    Raises ValueError naming the argument.
    """

    steps: Tensor
    sample_seed: Tensor

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        *,
        margin: Margin = ArcFace(0.5),  # noqa: B008 - frozen dataclass
        scale: float = 64.0,
        subcenters: int = 1,
        memory: PrototypeMemory | None = None,
        sample_rate: float = 1.0,
        sample_seed: int | None = None,
        unknown_weight: float = 0.0,
        compute_dtype: torch.dtype | None = None,
        keep_exponentials: bool | torch.dtype = False,
        keep_budget: int = BUDGET,
        drop_mass: float = 0.0,
        drop_elements: float = 0.0,
        group: Any = None,
        ddp_average: bool = True,
        weight_format: WeightFormat = "float32",
    ) -> None:
        shards = join_group(group)

        def check() -> None:
            _check_arguments(num_classes, embedding_dim, subcenters, margin, scale, unknown_weight, compute_dtype, sample_rate, sample_seed)
            _check_memory(memory, num_classes, embedding_dim, subcenters)
            _check_format(weight_format, kept_exponentials(keep_exponentials, keep_budget, drop_mass, drop_elements) is not None, shards is not None)

        if shards is None:
            check()
        else:
            shards.agree("MarginHead", check, {
                "num_classes": num_classes, "embedding_dim": embedding_dim, "subcenters": subcenters, "scale": scale, "margin": margin,
                "memory": memory and (memory.policy, memory.capacity, memory.ring.dtype), "sample_rate": sample_rate, "sample_seed": sample_seed,
                "unknown_weight": unknown_weight, "compute_dtype": compute_dtype, "ddp_average": ddp_average, "keep_exponentials": keep_exponentials,
                "drop_mass": drop_mass, "drop_elements": drop_elements, "weight_format": weight_format,
            })  # fmt: skip
        shape = (num_classes, embedding_dim) if subcenters == 1 else (num_classes, subcenters, embedding_dim)
        first, last = (0, shape[0]) if shards is None else shards.spread(shape[0])
        super().__init__((last - first, *shape[1:]), weight_format, initial_rows(shape, first, last) if weight_format == "float32" else None)
        self.shards, self.ddp_average, self.first_class = shards, ddp_average, first
        self.num_classes, self.embedding_dim, self.subcenters = map(operator.index, (num_classes, embedding_dim, subcenters))
        self.margin, self.scale, self.unknown_weight, self.compute_dtype = margin, float(scale), unknown_weight, compute_dtype
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.sample_rate, seed = float(sample_rate), torch.initial_seed() if sample_seed is None else operator.index(sample_seed)
        self.register_buffer("sample_seed", torch.tensor(seed % 2**63))
        self.memory = memory
        if memory is not None:
            memory.held = True
        self._fused, self._epoch, self._cache = None, 0, None
        self._pending: list[RowRecords] = []
        self._class_set: tuple[int, Tensor] | None = None  # step and ids of the classes sampled for it
        self._redraw = False  # zero_grad came after the set was drawn
        self.last_sampled: Tensor | None = None  # (M,) int64 sorted ids of the last training forward's classes; None: all
        self._flags, self._count = RowFlags("MarginHead"), HostCount()
        self.keep = kept_exponentials(keep_exponentials, keep_budget, drop_mass, drop_elements)
        self.drop_mass, self.drop_elements = float(drop_mass), float(drop_elements)
        if self.shards is not None:
            self._join()

    # -- training --------------------------------------------------------------------------------------------------------

    @overload
    def forward(
        self, embeddings: Tensor, labels: Tensor, *, sample_weight: Tensor | None = ..., reduction: Reduction = ...,
        normalizer: float | Tensor | None = ..., check_labels: bool = ..., keys: Tensor | None = ...,
        step: int | None = ..., return_stats: Literal[False] = ...,
    ) -> Tensor: ...  # fmt: skip
    @overload
    def forward(
        self, embeddings: Tensor, labels: Tensor, *, sample_weight: Tensor | None = ..., reduction: Reduction = ...,
        normalizer: float | Tensor | None = ..., check_labels: bool = ..., keys: Tensor | None = ...,
        step: int | None = ..., return_stats: Literal[True],
    ) -> tuple[Tensor, RowStats]: ...  # fmt: skip
    @outside_graphs
    def forward(
        self,
        embeddings: Tensor,  # (N, D)
        labels: Tensor,  # (N,)
        *,
        sample_weight: Tensor | None = None,  # (N,)
        reduction: Reduction = "mean",
        normalizer: float | Tensor | None = None,
        check_labels: bool = False,
        keys: Tensor | None = None,  # (N, D)
        step: int | None = None,
        return_stats: bool = False,
    ) -> Tensor | tuple[Tensor, RowStats]:
        """The loss of `margin_softmax_loss` on this head's weight and memory; arguments and errors as there.

        keys: raw embeddings of the momentum encoder, queued into the memory with the labels (training mode).
        step: the clock the memory is read at; None: the head's own count of optimizer steps (training forwards
        without HeadSGD); with HeadSGD and a memory only that count. Raises RuntimeError inside activation checkpointing: its second
        forward would move all state twice.
        """

        flags: RowFlags | None = None

        def check() -> None:
            nonlocal flags
            flags = self._check(embeddings, labels, keys, check_labels)
            check_options("MarginHead", embeddings, self.scale, reduction, self.unknown_weight, sample_weight, normalizer, self.compute_dtype)
            self._clock(step)

        arguments = {"reduction": reduction, "normalizer": normalizer, "sample_weight": sample_weight, "keys": keys, "step": step}
        shard = self._admit("MarginHead", check, embeddings, arguments, return_stats)
        recording = self.training and torch.is_grad_enabled()
        if self.training and self._fused is None and self.memory is not None:
            self.memory.flush()
        now = self._clock(step)
        rows = GlobalBatch(embeddings, labels, sample_weight) if shard is None else gather_batch(embeddings, labels, sample_weight, shard, flags)
        options = LossOptions(
            margin=self.margin, scale=self.scale, injection=self._injection(now), unknown_weight=self.unknown_weight,
            sample_weight=rows.sample_weight, reduction=reduction, normalizer=normalizer,
            on_rows=self._keep_rows if recording and self._fused is not None else None,
            key=self._key(now), members=self._sample(rows.labels, now, recording),
            unknown_stats=return_stats if shard is None else shard.admission.statistics,
            buffers=self._gradients, compute_dtype=self.compute_dtype,
            keep=self.keep if recording else None, drop_mass=self.drop_mass if recording else 0.0, drop_elements=self.drop_elements,
            flags=flags, spoiled=rows.spoiled, residual=self.weight_low,
        )  # fmt: skip
        if shard is None:
            loss, stats = margin_softmax(embeddings, self.weight, labels, options)
        else:
            loss, stats = sharded_margin_softmax(embeddings, self.weight, rows.embeddings, rows.labels, options, shard)
        if self.training:
            self._after_forward(labels, keys, now)
        return (loss, stats) if return_stats else loss

    def _clock(self, step: int | None) -> int:
        """The step the memory is read at."""
        now = self._count.of(self.steps)
        if step is None or step == now:
            return now
        _checks.expect(step >= 0, "MarginHead", "step >= 0 or None", step)
        clocked = "a memory" if self.memory is not None else "sampled classes" if self.sample_rate < 1 else ""
        fixed = self._fused is not None and clocked
        _checks.expect(not fixed, "MarginHead", f"step None or the head's own count {now} with HeadSGD and {clocked}", step)
        return step

    def _sample(self, labels: Tensor, step: int, recording: bool) -> Tensor | None:
        """Ids (M,) of the classes that are this forward's negatives; None: all."""
        if self.sample_rate == 1 or not self.training:
            return None
        drawn, dropped = self._class_set, self._redraw and not self._pending
        if recording and not dropped and drawn is not None and drawn[0] == step:
            ids = drawn[1]
        else:
            ids = self._draw(labels, step)
            if recording:
                self._class_set, self._redraw = (step, ids), False
        self.last_sampled = ids if self.first_class == 0 else ids + self.first_class
        return ids

    def _draw(self, labels: Tensor, step: int) -> Tensor:
        """This shard's sampled classes, as rows of `weight`; labels (N,) of all ranks."""
        classes, shard = self.weight.shape[0], 0 if self.shards is None else self.shards.rank
        if classes == 0:
            return labels[:0].long()
        here = torch.where((labels >= self.first_class) & (labels < self.first_class + classes), labels - self.first_class, -1)
        return sample_classes(here, classes, max(1, int(self.sample_rate * classes)), int(self.sample_seed), step, shard)

    def _check(self, embeddings: Tensor, labels: Tensor, keys: Tensor | None, now: bool) -> RowFlags | None:
        """Raises about what can be seen without waiting for a device (`now`: about all of it); else the flags that take it."""
        where = "MarginHead"
        if torch._C._current_graph_task_id() != -1:
            raise RuntimeError(
                "MarginHead: expected one forward per batch, got a second one from inside backward (activation "
                "checkpointing); keep the head outside the checkpointed region"
            )
        self._check_embeddings(embeddings, where)
        flags = check_rows(where, embeddings, labels, self.num_classes, self._shaped.dtype, None if now else self._flags)
        if keys is not None:
            _checks.expect(self.memory is not None, where, "a head with a memory when keys are given", "memory=None")
            _checks.check_embeddings(keys, where, "keys")
            _checks.expect(keys.shape == embeddings.shape, where, f"keys of shape {tuple(embeddings.shape)}", tuple(keys.shape))
            if flags is None:  # else the memory leaves such rows out and says so
                _checks.check_finite_rows(keys, where, "keys")
        return flags

    def check_rows(self, *, replays: bool = True) -> None:
        """ValueError where an earlier CUDA batch had labels out of range or non-finite rows; waits for the device.

        The next forward and `HeadSGD.step` raise it too, but for batches of a replayed CUDA graph (`replays`), which only this sees.
        Of a sharded head: this rank's rows; there the next forward raises, on every rank, and `HeadSGD.step` does not.
        """
        self._flags.raise_noted(fresh=replays)

    def _after_forward(self, labels: Tensor, keys: Tensor | None, now: int) -> None:
        if keys is not None and self.memory is not None:
            self.memory.write(keys, labels, now)
        if self._fused is None:
            self._count.advance(self.steps)

    # -- state -----------------------------------------------------------------------------------------------------------

    def _injection(self, step: int) -> Injection:
        return Injection() if self.memory is None else Injection(*self.memory.injection(step))

    def _key(self, step: int) -> Key:
        """What a row record depends on: scale, W's storage and version, memory, clock, `invalidate` calls."""
        clock = (self.memory.epoch, step) if self.memory is not None else ()
        low = () if self.weight_low is None else (self.weight_low.data_ptr(), self.weight_low._version)
        return (self.scale, self.sample_rate, self.weight.data_ptr(), self.weight._version, self._epoch, *low, *clock)

    def invalidate(self) -> None:
        """Call after edits autograd cannot see (`weight.data[...] = `, replays of a CUDA graph): cached prototypes and pending
        rows become stale."""
        self._epoch += 1
        self._count.forget()

    @property
    def pending_rows(self) -> int:
        """Rows left by backward passes that no `HeadSGD.step` has taken yet."""
        return sum(r.targets.numel() for r in self._pending)

    def _keep_rows(self, rows: RowRecords) -> None:
        """What backward calls; the list itself is replaced by every step and zero_grad."""
        self._pending.append(rows)

    def take_rows(self) -> list[RowRecords]:
        """The pending rows, for the fused optimizer; raises RuntimeError where W, memory, clock or sampled classes changed since."""
        rows, self._pending = self._pending, []
        now = self._key(self._count.of(self.steps))
        sampled = None if self._class_set is None else self._class_set[1]
        stale = sum(r.key != now or (r.members is not None and r.members is not sampled) for r in rows)
        if stale:
            raise RuntimeError(
                f"HeadSGD: expected all pending rows to come from the present prototypes, got {stale} of {len(rows)} "
                "micro-batches from before a change of weight, memory, clock or sampled classes (load_state_dict, invalidate, "
                "another optimizer or an earlier step, a memory flush); they were discarded: run their forward and backward again"
            )
        return rows

    def discard_rows(self) -> None:
        """Forgets pending rows (`HeadSGD.zero_grad`); a batch that follows instead draws its own classes."""
        self._pending, self._redraw = [], True

    def end_step(self) -> None:
        """After the fused optimizer's step: queued memory writes take effect and the clock moves."""
        if self.memory is not None:
            self.memory.flush()
        self._count.advance(self.steps)
        self._class_set = None

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles start without an optimizer, pending rows, sampled classes, cache or gradient memory."""
        fresh: dict[str, Any] = {"_fused": None, "_pending": [], "_cache": None, "_class_set": None, "_count": HostCount()}
        return {**self.__dict__, **fresh}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state_dict.setdefault(prefix + "sample_seed", self.sample_seed)  # heads saved before there was sampling
        self._class_set = None
        super()._load_from_state_dict(state_dict, prefix, *args)

    def attach(self, optimizer: object) -> None:
        """Makes backward leave row records for `optimizer` (HeadSGD calls it); RuntimeError while rows wait for another."""
        if self._pending and self._fused is not optimizer:
            raise RuntimeError(f"MarginHead: expected no pending rows when an optimizer is attached, got {self.pending_rows}")
        self._fused = optimizer
        self.release_gradient_memory()

    @property
    def fused_optimizer(self) -> object | None:
        """The HeadSGD that takes this head's rows, or None."""
        return self._fused

    def extra_repr(self) -> str:
        """Sizes, for print."""
        more = f", sample_rate={self.sample_rate}" * (self.sample_rate < 1) + ", weight_format='split'" * (self.weight_low is not None)
        return f"{self.num_classes}, {self.embedding_dim}, margin={self.margin}, scale={self.scale}, subcenters={self.subcenters}{more}"


def _check_arguments(
    num_classes: Any, embedding_dim: Any, subcenters: Any, margin: Any, scale: Any, unknown_weight: Any, compute_dtype: Any,
    sample_rate: Any, sample_seed: Any,
) -> None:  # fmt: skip
    """ValueError for what `MarginHead` refuses of its arguments."""
    where = "MarginHead"
    for name, value in (("num_classes", num_classes), ("embedding_dim", embedding_dim), ("subcenters", subcenters)):
        _checks.expect(is_whole(value, 1), where, f"{name} >= 1", repr(value))
    _checks.check_margin(margin, where)
    check_options(where, torch.empty(0, 1), scale, "mean", unknown_weight, None, None, compute_dtype)
    _checks.expect(is_number(sample_rate, 0, 1, above=True), where, "sample_rate in (0, 1]", repr(sample_rate))
    _checks.expect(sample_seed is None or is_whole(sample_seed), where, "sample_seed an integer or None", repr(sample_seed))


def _check_memory(memory: PrototypeMemory | None, num_classes: int, embedding_dim: int, subcenters: int) -> None:
    """A memory holds all classes of the head, and the head has no sub-centers."""
    if memory is None:
        return
    if not isinstance(memory, PrototypeMemory):
        raise TypeError(f"MarginHead: expected memory as a PrototypeMemory or None, got {type(memory).__name__}")
    held = (memory.num_classes, memory.embedding_dim)
    _checks.expect(
        held == (num_classes, embedding_dim) and subcenters == 1,
        "MarginHead",
        f"memory of (num_classes, embedding_dim) = {(num_classes, embedding_dim)} without sub-centers",
        f"{held} with subcenters = {subcenters}",
    )


def _check_format(weight_format: str, keeps: bool, several_ranks: bool) -> None:
    """A split W takes neither kept exponentials nor a group."""
    _checks.expect(is_choice(weight_format, ("float32", "split")), "MarginHead", "weight_format 'float32' or 'split'", repr(weight_format))
    for refused, what in ((keeps, "keep_exponentials or drop_elements"), (several_ranks, "a group of several ranks")):
        _checks.expect(not refused or weight_format == "float32", "MarginHead", f"weight_format 'float32' with {what}", repr(weight_format))
