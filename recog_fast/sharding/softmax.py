"""Margin softmax over classes spread over ranks, as one autograd node (math.md 1, 3; the order of collectives: docs/scale.md).

A rank gathers all rows, sweeps its own classes, and what must be known of all classes is reduced: numbers per row on every
rank, the two vectors a row's dx is made of on the row's rank. Every rank then knows all that its class sweep needs.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..ops import _library
from ..ops._rows import RowRecords, target_prototypes, wants_half, without
from ..ops._unknown import Unknown
from ..ops.margin_softmax import (
    Batch,
    LossOptions,
    _class_gradient,
    _dropped,
    _dropped_mass,
    _hides_unknown,
    _lists,
    _margin_gradients,
    _row_losses,
    _row_shares,
    _run_margin,
    _terms,
    _with_exact_nearest,
    weight_wanted,
)
from ..ops.unknown_rejection import double_slope, excess_double
from ..rules import NegativeRule, RowStats, pack_rules
from .group import Admission, ShardGroup

_DOUBLE_EXPONENT = 600.0  # e^-600 is normal in float64: sums with one fixed offset lose nothing above it
_LOW = 0xFFFFFFFF


@dataclass(frozen=True)
class Shard:
    """A rank's classes and rows: the group, what the ranks agreed on, and the factor of d_embeddings."""

    group: ShardGroup
    admission: Admission
    ddp_average: bool

    @property
    def own(self) -> slice:
        """This rank's rows among all ranks'."""
        return self.group.own(self.admission.sizes)

    @property
    def factor(self) -> float:
        """DDP divides the backbone's gradient by R."""
        return float(self.group.size) if self.ddp_average else 1.0

    def local(self, ids: Tensor) -> Tensor:
        """Global class ids -> rows of this shard; negative ones stay, -2 for classes of other ranks."""
        here = (ids >= self.group.start) & (ids < self.group.stop)
        return torch.where(here, ids - self.group.start, torch.where(ids < 0, ids, torch.full_like(ids, -2)))

    def scatter(self, rows: Tensor) -> Tensor:
        """Sum over ranks of rows (N, ...), of which each rank gets its own (n, ...)."""
        return self.group.scatter_sum(rows, self.admission.sizes)

    def gather(self, columns: list[Tensor]) -> list[Tensor]:
        """All ranks' rows (N, ...) of each of the tensors (n, ...)."""
        return self.group.gather(columns, self.admission.sizes)


def shard_prototypes(unit: Tensor, weight: Tensor, local: Tensor, injection: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Cosine (N,), sub-center (N,) and prototype (N, D) of each row's class `local`; zeros where it is not of this shard."""
    n = local.numel()
    if weight.shape[0] == 0:
        return unit.new_zeros(n), torch.zeros_like(local), torch.zeros_like(unit)
    here = local >= 0
    cosine, sub, rows = target_prototypes(unit, weight, local, injection)
    zero = torch.zeros((), dtype=unit.dtype, device=unit.device)
    return torch.where(here, cosine, zero), torch.where(here, sub, torch.zeros_like(sub)), torch.where(here.unsqueeze(1), rows, zero)


def sharded_margin_softmax(
    embeddings: Tensor, weight: Tensor, rows: Tensor, labels: Tensor, options: LossOptions, shard: Shard
) -> tuple[Tensor, RowStats]:
    """`margin_softmax` of all ranks' rows (N, D), labels (N,) and sample weights over all ranks' classes.

    embeddings (n, D) are this rank's rows, weight this rank's classes. The loss is the global one on every rank (reduction
    "none": of own rows), RowStats are of own rows with global class ids; d_embeddings is times R where DDP will average it,
    dW is the gradient of the global loss. `MarginHead` has checked arguments; raises ValueError for a margin that gives another shape
    and, in backward, RuntimeError where the memory was written since.
    """
    dtype = torch.bfloat16 if wants_half(embeddings, options.compute_dtype) else torch.float32
    options = dataclasses.replace(options, record=torch.is_grad_enabled(), compute_dtype=dtype)
    loss, *stats = _ShardedMarginSoftmax.apply(embeddings, weight, rows, labels, options, shard, *options.parameters())
    return loss, RowStats(*stats)


class _ShardedMarginSoftmax(torch.autograd.Function):
    """(own embeddings, own weight) -> (loss, *RowStats)."""

    @staticmethod
    def forward(
        ctx: Any, embeddings: Tensor, weight: Tensor, rows: Tensor, labels: Tensor, options: LossOptions, shard: Shard, *parameters: Any
    ) -> tuple[Tensor, ...]:
        with torch.autocast(embeddings.device.type, enabled=False):
            exact, lengths = reference.unit_rows(rows.double())
            unit, norms = exact.to(weight.dtype), lengths.to(weight.dtype)
            batch, stats, unknown = _sweep(unit, norms, exact, weight, labels, options, shard)
            losses = _row_losses(batch, unknown, options)
            if options.spoiled is not None:
                losses = losses.masked_fill(options.spoiled, float("nan"))
            shares = _row_shares(batch, unknown, options)
            loss = losses[shard.own] if options.reduction == "none" else (losses * shares).sum()
        ctx.save_for_backward(weight)
        ctx.batch, ctx.unknown, ctx.shares, ctx.options, ctx.shard = batch, unknown, shares, options, shard
        ctx.parameters, ctx.dtype, ctx.backend = parameters, embeddings.dtype, _library.backend()
        ctx.versions = options.injection.versions()
        own = RowStats(*(field[shard.own].clone() for field in stats))
        ctx.mark_non_differentiable(*own)
        return loss.to(weight.dtype), *own

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        with torch.autocast(d_loss.device.type, enabled=False), _library.use_backend(ctx.backend):
            d_embeddings, record, d_parameters = _backward_rows(ctx, d_loss)
            d_weight = _shard_gradient(weight, record, ctx) if weight_wanted(ctx, 1, ctx.options.on_rows) else None
        return d_embeddings, d_weight, None, None, None, None, *d_parameters


def _shard_gradient(weight: Tensor, record: RowRecords, ctx: Any) -> Tensor | None:
    """dW of this shard, or None where a fused optimizer takes the rows."""
    if weight.shape[0] == 0 and ctx.options.on_rows is None:
        return torch.zeros_like(weight)
    return _class_gradient(weight, record, ctx.options, ctx.versions)


# -- forward ---------------------------------------------------------------------------------------------------------------


@dataclass
class _Sums:
    """What a sweep over all classes says of all rows; pull: this shard's part of it."""

    lse: Tensor  # (N,) float64
    nearest: Tensor  # (N,)
    index: Tensor  # (N,) global
    pull: Tensor  # (N, D) or (0, D)
    listed: Tensor | None  # (N,) share of the sum that was listed


def _sweep(
    unit: Tensor, norms: Tensor, exact: Tensor, weight: Tensor, labels: Tensor, options: LossOptions, shard: Shard
) -> tuple[Batch, RowStats, Unknown | None]:
    """Target cosines, margin and forward sweep of all rows; `pull` and `target_prototypes` of the batch are of own rows."""
    margin, labelled, half = options.margin, labels >= 0, options.compute_dtype == torch.bfloat16
    local = shard.local(labels)
    cosine, sub, prototypes = shard_prototypes(unit, weight, local, options.injection)
    cosine, sub = _sum_targets(cosine, sub, weight, shard)
    if margin is not None and hasattr(margin, "update") and getattr(margin, "training", True):
        margin.update(cosine, norms, labelled)
    rule, thresholds = margin.rule(cosine) if margin is not None and hasattr(margin, "rule") else (None, None)
    rules = pack_rules(labels, rule, thresholds, float(getattr(margin, "clamp", 1.0)), unit.dtype)
    leaf, norm_leaf, target, penalty = _run_margin(options, cosine, norms)
    apart = options.members is not None and not bool(labelled.all())
    wanted = apart and (options.unknown_stats or options.unknown_weight > 0)
    keep = _keep(options, wanted, half, labelled)
    count = weight.shape[0] if options.members is None else options.members.numel()
    kept = None if keep is None or weight.shape[0] == 0 else keep.lease(unit, weight, half, count)
    seen = torch.where(labelled, local, -2) if apart and not wanted else local
    sums = _class_sums(unit, weight, seen, target, rule, rules, half, kept, options, shard)
    lse, nearest = sums.lse, sums.nearest
    if half:
        nearest = _exact_nearest(unit, weight, sums, options, shard)
        lse = torch.where(labelled, lse, _with_exact_nearest(lse, sums.nearest, nearest, options.scale))
    q = torch.where(labelled, torch.sigmoid(lse - options.scale * target.detach().double()), torch.zeros_like(lse))
    targets = torch.where(local >= 0, local * _subcenters(weight) + sub, local)
    dropped = _dropped(q, labelled, options)
    probability = torch.exp(options.scale * nearest.double() - lse)
    zero = torch.zeros_like(lse)
    stats = RowStats(
        lse.float(),
        cosine.float(),
        nearest.float(),
        sums.index,
        torch.where(labelled, 1 - q, zero).float(),
        torch.where(labelled, sub, torch.zeros_like(sub)),
        torch.where(labels == -1, probability, zero).float(),
        _dropped_mass(q, dropped, sums.listed).float(),
    )
    batch = Batch(unit, norms, labels, targets, prototypes, leaf, norm_leaf, target, penalty, rules, lse, sums.pull, q, half, kept, dropped)
    unknown = _reject_unknown(batch, exact, sums.index, weight, options, shard)
    return batch, stats, unknown


def _subcenters(weight: Tensor) -> int:
    return weight.shape[1] if weight.dim() == 3 else 1


def _keep(options: LossOptions, wanted: bool, half: bool, labelled: Tensor) -> Any:
    """The pool of kept exponentials, where this forward may use it (`ops.margin_softmax._sweep` says when)."""
    keep = options.keep if options.record and not wanted else None
    if keep is not None and keep.dtype == torch.int32 and options.drop_elements == 0:
        return None
    hidden = keep is not None and _hides_unknown(keep, half) and options.unknown_weight > 0 and not bool(labelled.all())
    return None if hidden else keep


def _sum_targets(cosine: Tensor, sub: Tensor, weight: Tensor, shard: Shard) -> tuple[Tensor, Tensor]:
    """Target cosines (N,) and winning sub-centers (N,) of all rows: each is of one rank, the others add 0."""
    if weight.dim() == 2:
        return shard.group.sum_(cosine), sub
    both = shard.group.sum_(torch.stack([cosine, sub.to(cosine.dtype)]))
    return both[0], both[1].round().to(sub.dtype)


def _class_sums(
    unit: Tensor, weight: Tensor, labels: Tensor, target: Tensor, rule: NegativeRule | None, rules: Tensor | None, half: bool,
    kept: Any, options: LossOptions, shard: Shard,
) -> _Sums:  # fmt: skip
    """The sweep over this shard's classes, and its sums over all ranks."""
    n, classes = unit.shape[0], weight.shape[0]
    listed: Tensor | None = None
    if classes == 0 or n == 0:
        lse = torch.full((n,), -torch.inf, dtype=torch.float64, device=unit.device)
        nearest, index = torch.full_like(unit[:, 0], -2.0), torch.full((n,), -1, dtype=torch.int64, device=unit.device)
        pull = torch.zeros_like(unit)
    else:
        floor, listed = _lists(unit, weight, labels, target, rules, half, kept, options)
        lse, nearest, index, pull = torch.ops.recog_fast.negative_logsumexp(
            unit, weight, labels, options.scale, rules, *options.injection.arguments(), False, True, half, options.record,
            None if kept is None else kept.buffer, options.members, floor, listed,
        )  # fmt: skip
        index = torch.where(index >= 0, index + shard.group.start, index)
        nearest = nearest.to(unit.dtype)
    whole, share, listed = _add_exponentials(lse, listed, rule, options, shard)
    nearest, index = _add_nearest(nearest, index, shard)
    pull = share.to(pull.dtype).unsqueeze(1) * pull if pull.shape[0] else pull
    return _Sums(whole, nearest, index, pull, listed)


def _add_exponentials(
    lse: Tensor, listed: Tensor | None, rule: NegativeRule | None, options: LossOptions, shard: Shard
) -> tuple[Tensor, Tensor, Tensor | None]:
    """lse (N,) over all ranks, this shard's share of each row's sum (N,), and the share that was listed anywhere (N,)."""
    largest = _largest_slope(rule)
    offset: Tensor | float = options.scale * largest  # on every rank the same, so the sums add
    if 2 * options.scale * largest > _DOUBLE_EXPONENT:
        highest = shard.group.max_(lse.clone())
        offset = torch.where(torch.isinf(highest), torch.zeros_like(highest), highest)
    part = torch.exp(lse - offset)
    lists = options.keep is not None and options.keep.dtype == torch.int32 and options.drop_elements > 0 and options.record
    if lists:
        both = shard.group.sum_(torch.stack([part, part if listed is None else part * listed]))
        total, listed = both[0], both[1] / both[0].clamp_min(torch.finfo(torch.float64).tiny)
    else:
        total, listed = shard.group.sum_(part.clone()), None
    share = torch.where(total > 0, part / total, torch.zeros_like(total))
    return torch.log(total) + offset, share, listed


def _largest_slope(rule: NegativeRule | None) -> float:
    """A bound of |f(c)| over [-1, 1] for every row: the plain rule's is 1 (unlabelled rows have it)."""
    if rule is None:
        return 1.0
    return max(1.0, *(sum(abs(float(a)) for a in set_[:3]) for set_ in (rule.above, rule.below)))


def _add_nearest(nearest: Tensor, index: Tensor, shard: Shard) -> tuple[Tensor, Tensor]:
    """Largest cosine of all ranks and its class, ties to the lowest: one int64 key (float64: cosine, then class)."""
    if nearest.dtype == torch.float64:
        best = shard.group.max_(nearest.clone())
        candidate = torch.where((nearest == best) & (index >= 0), index, torch.full_like(index, torch.iinfo(torch.int64).max))
        lowest = shard.group.min_(candidate)
        return best, torch.where(lowest == torch.iinfo(torch.int64).max, torch.full_like(lowest, -1), lowest)
    bits = nearest.contiguous().view(torch.int32).long()
    ordered = torch.where(bits >= 0, bits, -(bits & 0x7FFFFFFF))
    low = torch.where(index >= 0, _LOW - index, torch.zeros_like(index))  # ~class in 32 bits
    key = shard.group.max_((ordered << 32) | low)
    ordered, low = key >> 32, key & _LOW
    bits = torch.where(ordered >= 0, ordered, -ordered | -0x80000000)
    return bits.to(torch.int32).view(torch.float32), torch.where(low == 0, torch.full_like(low, -1), _LOW - low)


def _exact_nearest(unit: Tensor, weight: Tensor, sums: _Sums, options: LossOptions, shard: Shard) -> Tensor:
    """The nearest cosines (N,) in float32, each computed by the owner of its class."""
    cosine, _, _ = shard_prototypes(unit, weight, shard.local(sums.index), options.injection)
    return torch.where(sums.index >= 0, shard.group.sum_(cosine), sums.nearest)


def _scattered(batch: Batch, top: Tensor | None, at: Tensor, options: LossOptions, shard: Shard) -> None:
    """Replaces pull and target prototypes of the batch by the sums of own rows; `top`: nearest prototypes of unlabelled rows."""
    prototypes = batch.target_prototypes if top is None else batch.target_prototypes.index_copy(0, at, top)
    if not (options.record and shard.admission.d_embeddings):
        batch.pull, batch.target_prototypes = batch.unit[:0], batch.unit[:0]
        return
    both = shard.scatter(torch.cat([batch.pull, prototypes], dim=1))
    batch.pull, batch.target_prototypes = both.split(batch.unit.shape[1], dim=1)


def _reject_unknown(batch: Batch, exact: Tensor, nearest: Tensor, weight: Tensor, options: LossOptions, shard: Shard) -> Unknown | None:
    """`ops._unknown._reject_double` over all ranks' classes, for all unlabelled rows; d_unit is of own rows. Scatters the batch."""
    at = batch.labels[:0] if options.unknown_weight == 0 else (batch.labels == -1).nonzero().squeeze(1)  # waits for a device
    if at.numel() == 0:
        _scattered(batch, None, at, options, shard)
        return None
    classes, local = shard.group.num_classes, shard.local(nearest[at])
    unit, lse = batch.unit[at], batch.lse[at].to(batch.unit.dtype).double()
    cosine, sub, top_prototype = shard_prototypes(exact[at], weight, local, options.injection)
    estimate = torch.exp(options.scale * shard.group.sum_(cosine) - lse)
    first_mean = (estimate * torch.expm1(estimate)).to(unit.dtype)
    if weight.shape[0] == 0:
        sums, push = torch.zeros(3, at.numel(), dtype=torch.float64, device=unit.device), torch.zeros_like(unit)
    else:
        *three, push = torch.ops.recog_fast.unknown_rejection(
            unit, weight, local, lse, first_mean, options.scale, *options.injection.arguments(), False, True, batch.half,
            (exact[at] - unit.double()).to(unit.dtype),
        )  # fmt: skip
        sums = torch.stack(three)
    mass, remainder, mean = shard.group.sum_(sums)
    whole = mass + estimate
    remainder, mean = remainder - (whole - 1) * mean, mean / whole**2
    mass, estimate = mass / whole, estimate / whole
    p = torch.where(mass < 0.5, 1 - mass, estimate)
    h = torch.expm1(p)
    top = p * (torch.where(mass < 0.5, mass, 1 - p) * h - mean)
    remainder, mean = remainder + h - p, mean + p * h
    slope = double_slope(remainder, classes)
    _scattered(batch, top_prototype.to(unit.dtype), at, options, shard)
    d_unit = unit[:0]
    if options.record and shard.admission.d_embeddings:
        numbers = torch.stack([p, top, mass, mean - first_mean.double(), options.scale * slope], dim=1)
        d_unit = _unknown_gradient(batch, at, push, numbers, shard)
    targets = torch.where(local >= 0, local * _subcenters(weight) + sub, local)
    return Unknown(at, targets, slope * top, excess_double(remainder, classes), d_unit, slope, mean, reference.UNKNOWN_DOUBLE)


def _unknown_gradient(batch: Batch, at: Tensor, push: Tensor, numbers: Tensor, shard: Shard) -> Tensor:
    """d excess / d x^ (u, D) of own unlabelled rows: the push of all ranks, P of the nearest class, what is left of the pull."""
    counts = tuple(int((part == -1).sum()) for part in batch.labels.split(list(shard.admission.sizes)))
    mine = shard.group.own(counts)
    own = at[mine] - shard.own.start
    pushed = shard.group.scatter_sum(push, counts).double()
    p, top, mass, change, factor = numbers[mine].unsqueeze(2).unbind(1)
    nearest = batch.target_prototypes[own].double()
    rest = batch.pull[own].double() - p * nearest
    rest *= (mass / rest.norm(dim=1, keepdim=True).clamp_min(1e-300)).clamp(0.0, 1.0)
    return (factor * (top * nearest + pushed - change * rest)).to(batch.unit.dtype)


# -- backward --------------------------------------------------------------------------------------------------------------


def _backward_rows(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, RowRecords, list[Tensor | None]]:
    """dx of own rows without communication, the row records of all rows, and the gradients of the margin's own parameters.

    With reduction "none" the upstream gradients are gathered first: every shard's dW needs those of all rows.
    """
    batch, unknown, options, shard = ctx.batch, ctx.unknown, ctx.options, ctx.shard
    dtype = batch.unit.dtype
    upstream = shard.gather([d_loss])[0] if options.reduction == "none" else d_loss
    d_rows = upstream.double() * ctx.shares
    weighted = d_rows if options.sample_weight is None else d_rows * options.sample_weight.double()
    d_margin = torch.where(batch.labelled, weighted, torch.zeros_like(d_rows))
    d_logit = options.scale * d_margin * batch.q
    d_cosine, d_norms, *d_parameters = _margin_gradients(batch, ctx.parameters, -d_logit, d_margin)
    negative = d_logit.to(dtype)
    target = torch.zeros_like(negative) if d_cosine is None else d_cosine.to(dtype)
    terms = _terms(batch, unknown, negative, target, d_rows, options)
    targets = batch.targets if unknown is None else batch.targets.index_copy(0, unknown.at, unknown.nearest)
    record = RowRecords(
        batch.unit, targets, terms, batch.rules, options.scale, options.injection, options.key, batch.half, batch.kept, options.members
    )
    d_embeddings = _own_gradient(ctx, d_rows, negative, target, d_norms) if ctx.needs_input_grad[0] else None
    return d_embeddings, record if batch.dropped is None else without(record, batch.dropped), d_parameters


def _own_gradient(ctx: Any, d_rows: Tensor, negative: Tensor, target: Tensor, d_norms: Tensor | None) -> Tensor:
    """dx (n, D) of this rank's rows, times R where DDP will average."""
    batch, unknown, options, shard = ctx.batch, ctx.unknown, ctx.options, ctx.shard
    own, dtype = shard.own, batch.unit.dtype
    d_unit = negative[own].unsqueeze(1) * batch.pull + target[own].unsqueeze(1) * batch.target_prototypes
    if unknown is not None:
        at = unknown.at[(unknown.at >= own.start) & (unknown.at < own.stop)]
        d_unit[at - own.start] = (options.unknown_weight * d_rows[at]).to(dtype).unsqueeze(1) * unknown.d_unit
    d_embeddings = reference.through_normalisation(d_unit, batch.unit[own], batch.norms[own])
    if d_norms is not None:
        d_embeddings = d_embeddings + d_norms[own].to(dtype).unsqueeze(1) * batch.unit[own]
    scaled: Tensor = (shard.factor * d_embeddings).to(ctx.dtype)
    return scaled
