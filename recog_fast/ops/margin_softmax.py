"""Margin softmax over C classes as ONE autograd node: loss, statistics, dx and dW or row records (math.md 1, 3)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .. import reference
from ..rules import RowStats, exponent_span, pack_rules
from . import _library, _planes
from ._buffers import GradientBuffers
from ._flags import RowFlags
from ._kept import KeptExponentials, Lease
from ._lists import list_floor
from ._rows import Injection, Key, RowRecords, least_mass, target_prototypes, wants_half, without
from ._unknown import Unknown, reject_unknown
from .class_gradient import recycled_class_gradient

SAFE_SPAN = 144.0  # nats between a row's largest and smallest logit for which no sum of exponentials can vanish in float32


class Margin(Protocol):
    """A margin: target cosine (N,) and norms (N,) -> target logit / s (N,)."""

    def __call__(self, cosine: Tensor, norms: Tensor, /) -> Tensor: ...


@dataclass(frozen=True)
class LossOptions:
    """Everything of a call that is no differentiable tensor."""

    margin: Margin | None
    scale: float
    injection: Injection = field(default_factory=Injection)
    unknown_weight: float = 0.0
    softmax: str = "double"
    sample_weight: Tensor | None = None
    reduction: str = "mean"
    normalizer: float | Tensor | None = None
    on_rows: Callable[[RowRecords], None] | None = None
    key: Key = ()
    record: bool = True  # a backward pass may follow
    compute_dtype: torch.dtype | None = None
    keep: KeptExponentials | None = None
    drop_mass: float = 0.0
    drop_elements: float = 0.0  # with a `keep` of element lists: the share of its row's mass below which an element is left out
    members: Tensor | None = None  # (M,) ascending: sampled classes, the negatives of labelled rows; None: all
    unknown_stats: bool = True  # statistics of unlabelled rows are wanted even where they do not count
    buffers: GradientBuffers | None = None  # memory for dW
    flags: RowFlags | None = None  # bad rows are noted there instead of being refused beforehand
    residual: Tensor | None = None  # int16 lower plane of a bfloat16 weight: HeadSGD alone moves it
    spoiled: Tensor | None = None  # (N,) bool: rows found non-finite that way

    def parameters(self) -> tuple[nn.Parameter, ...]:
        """Learnable parameters of the margin: they get their gradient too."""
        return tuple(p for p in self.margin.parameters() if p.requires_grad) if isinstance(self.margin, nn.Module) else ()


@dataclass
class Batch:
    """What forward leaves for backward."""

    unit: Tensor  # (N, D)
    norms: Tensor  # (N,)
    labels: Tensor  # (N,)
    targets: Tensor  # (N,) rows of W
    target_prototypes: Tensor  # (N, D)
    cosine: Tensor  # (N,) leaf of the margin's little graph
    norm_leaf: Tensor  # (N,) likewise
    target: Tensor  # (N,) margin output
    penalty: Tensor | None
    rules: Tensor | None
    lse: Tensor  # (N,) float64
    pull: Tensor  # (N, D)
    q: Tensor  # (N,) sigmoid(lse - s t), 0 for unlabelled rows
    half: bool  # 16-bit sweeps
    kept: Lease | None
    dropped: Tensor | None  # (N,) rows that the class sweep leaves out

    @property
    def labelled(self) -> Tensor:
        return self.labels >= 0


def _run_margin(options: LossOptions, cosine: Tensor, norms: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The margin's little graph over N numbers: leaves (cosine, norms) and outputs (target, penalty)."""
    with torch.set_grad_enabled(options.record):
        c, n = cosine.detach(), norms.detach()
        if options.record:
            c, n = c.requires_grad_(), n.requires_grad_()
        if options.margin is None:
            return c, n, c * 1.0, None
        target = options.margin(c, n)
        if not isinstance(target, Tensor) or target.shape != c.shape:
            got = tuple(target.shape) if isinstance(target, Tensor) else type(target).__name__
            raise ValueError(f"margin_softmax_loss: expected margin to return a tensor of shape (N,) = ({c.numel()},), got {got}")
        penalty = options.margin.penalty(n) if hasattr(options.margin, "penalty") else None
    return c, n, target, penalty


def _dropped(q: Tensor, labelled: Tensor, options: LossOptions) -> Tensor | None:
    """Rows left out of the class sweep by `drop_mass`: their mass is w_i q_i, the whole that of all labelled rows."""
    if options.drop_mass == 0 or not options.record:
        return None
    mass = q if options.sample_weight is None else q * options.sample_weight.double().abs()
    return least_mass(torch.where(labelled, mass, torch.zeros_like(mass)), options.drop_mass) & labelled


def _hides_unknown(keep: KeptExponentials, half: bool) -> bool:
    """Whether what is kept of unlabelled rows would not do: they need every class, and in 16 bits not in the step of their nearest one."""
    return keep.dtype == torch.int32 or (half and keep.dtype == torch.bfloat16)


def _lists(
    unit: Tensor, weight: Tensor, labels: Tensor, target: Tensor, rules: Tensor | None, half: bool, kept: Lease | None, options: LossOptions
) -> tuple[Tensor | None, Tensor | None]:
    """(floor (N,), where the sweep writes the share (N,) of each row's sum that it listed), or None where there are no lists."""
    if kept is None or kept.buffer is None or kept.buffer.dtype != torch.int32:
        return None, None
    floor = list_floor(
        unit, weight, labels, target.detach(), options.scale, rules, options.injection, half, options.members, options.drop_elements
    )
    return floor, torch.ones_like(floor, dtype=torch.float64)


def _dropped_mass(q: Tensor, dropped: Tensor | None, listed: Tensor | None) -> Tensor:
    """(N,) of q_i, what the class sweep leaves out: all of a dropped row, the elements not listed."""
    if listed is not None:
        return q * (1 - listed).clamp_min(0)
    return torch.zeros_like(q) if dropped is None else torch.where(dropped, q, torch.zeros_like(q))


def _with_exact_nearest(lse: Tensor, swept: Tensor, exact: Tensor, scale: float) -> Tensor:
    """lse (N,) of 16-bit logits with the nearest class's replaced by the float32 one: what p_0 close to 1 leaves is
    then as good as in float32 (math.md 3), and p_0 <= 1."""
    before, after = (torch.exp(scale * cosine.double() - lse) for cosine in (swept, exact))
    return lse + torch.log((1 - before).clamp_min(0) + after)


def _sweep(unit: Tensor, norms: Tensor, weight: _planes.Weight, labels: Tensor, options: LossOptions, half: bool) -> tuple[Batch, RowStats]:
    """Target cosines, margin, forward sweep; rows' statistics."""
    margin = options.margin
    cosine, sub, rows = target_prototypes(unit, weight, labels, options.injection)
    labelled = labels >= 0
    cosine = torch.where(labelled, cosine, torch.zeros_like(cosine))
    if margin is not None and hasattr(margin, "update") and getattr(margin, "training", True):
        margin.update(cosine, norms, labelled)
    rule, thresholds = margin.rule(cosine) if margin is not None and hasattr(margin, "rule") else (None, None)
    clamp = float(getattr(margin, "clamp", 1.0))
    rules = pack_rules(labels, rule, thresholds, clamp, unit.dtype)
    leaf, norm_leaf, target, penalty = _run_margin(options, cosine, norms)
    # Under sampling, rows labelled -1 cost a sweep over all classes: label -2 (see the members) where nobody wants it.
    apart = options.members is not None and not bool(labelled.all())
    wanted = apart and (options.unknown_stats or options.unknown_weight > 0)
    # One forward sweep for one class sweep; in 16 bits a saturated unlabelled row's nearest class would hide its tile mates.
    keep = options.keep if options.record and not wanted else None
    if keep is not None and keep.dtype == torch.int32 and options.drop_elements == 0:  # head.drop_elements = 0 turns lists off
        keep = None
    if keep is not None and _hides_unknown(keep, half) and options.unknown_weight > 0 and not bool(labelled.all()):
        keep = None
    count = weight.shape[0] if options.members is None else options.members.numel()
    kept = None if keep is None else keep.lease(unit, _planes.plane(weight), half, count)
    floor, listed = _lists(unit, _planes.plane(weight), labels, target, rules, half, kept, options)
    lse, nearest, index, pull = torch.ops.recog_fast.negative_logsumexp(
        unit, _planes.plane(weight), torch.where(labelled, labels, -2) if apart and not wanted else labels, options.scale, rules,
        *options.injection.arguments(), False, True, half, options.record, None if kept is None else kept.buffer, options.members,
        floor, listed, options.scale * exponent_span(rule, clamp) <= SAFE_SPAN,
        _planes.residual(weight),
    )  # fmt: skip
    if half:
        swept = nearest
        nearest = torch.where(index >= 0, target_prototypes(unit, weight, index, options.injection)[0], swept)
        lse = torch.where(labelled, lse, _with_exact_nearest(lse, swept, nearest, options.scale))
    q = torch.where(labelled, torch.sigmoid(lse - options.scale * target.detach().double()), torch.zeros_like(lse))
    subcenters = weight.shape[1] if weight.dim() == 3 else 1
    targets = torch.where(labelled, labels * subcenters + sub, labels)
    probability = torch.exp(options.scale * nearest.double() - lse)
    zero = torch.zeros_like(lse)
    dropped = _dropped(q, labelled, options)
    stats = RowStats(
        lse.float(),
        cosine.float(),
        nearest.float(),
        index,
        torch.where(labelled, 1 - q, zero).float(),
        torch.where(labelled, sub, torch.zeros_like(sub)),
        torch.where(labels == -1, probability, zero).float(),
        _dropped_mass(q, dropped, listed).float(),
    )
    batch = Batch(
        unit, norms, labels, targets, rows, leaf, norm_leaf, target, penalty, rules, lse, pull, q, half, kept, dropped
    )
    return batch, stats


def _row_losses(batch: Batch, unknown: Unknown | None, options: LossOptions) -> Tensor:
    """(N,) float64: weighted margin loss of labelled rows, weighted excess of unlabelled ones."""
    loss = torch.logaddexp(torch.zeros_like(batch.lse), batch.lse - options.scale * batch.target.detach().double())
    if batch.penalty is not None:
        loss = loss + batch.penalty.detach().double()
    if options.sample_weight is not None:
        loss = loss * options.sample_weight.double()
    loss = torch.where(batch.labelled, loss, torch.zeros_like(loss))
    if unknown is not None:
        loss[unknown.at] = options.unknown_weight * unknown.excess
    return loss


def _row_shares(batch: Batch, unknown: Unknown | None, options: LossOptions) -> Tensor:
    """(N,) float64: d(reduced loss)/d(row loss): 1/#labelled (or 1/normalizer), 1/#unlabelled, or 1."""
    if options.reduction != "mean":
        return torch.ones_like(batch.lse)
    labelled = batch.labelled
    if isinstance(options.normalizer, Tensor):
        count = options.normalizer.to(labelled.device).double().reshape(())
    else:
        count = labelled.sum().clamp_min(1).double()
        count = count if options.normalizer is None else torch.full_like(count, float(options.normalizer))
    unlabelled = (batch.labels == -1).sum().clamp_min(1).double()
    return torch.where(labelled, 1 / count, 1 / unlabelled)


def _terms(batch: Batch, unknown: Unknown | None, negative: Tensor, target: Tensor, d_rows: Tensor, options: LossOptions) -> Tensor:
    """(5, N) lse, weight of the negatives, gradient of the target cosine, E, kind."""
    terms = torch.zeros(reference.TERM_ROWS, batch.lse.numel(), dtype=batch.unit.dtype, device=batch.unit.device)
    terms[0] = torch.where(torch.isinf(batch.lse), torch.zeros_like(batch.lse), batch.lse)
    terms[1], terms[2] = negative, target
    if unknown is not None:
        at = unknown.at
        upstream = options.scale * options.unknown_weight * d_rows[at]
        terms[1, at] = (upstream * unknown.slope).to(terms.dtype)
        terms[2, at] = (upstream * unknown.top).to(terms.dtype)
        terms[3, at] = unknown.mean.to(terms.dtype)
        terms[4, at] = float(unknown.kind)
    return terms


def _margin_gradients(batch: Batch, parameters: tuple[nn.Parameter, ...], d_target: Tensor, d_penalty: Tensor) -> list[Tensor | None]:
    """Back through the margin's little graph: d cosine, d norms, d parameters."""
    outputs, upstream = [batch.target], [d_target.to(batch.target.dtype)]
    if batch.penalty is not None:
        outputs.append(batch.penalty)
        upstream.append(d_penalty.to(batch.penalty.dtype))
    kept = [(o, g) for o, g in zip(outputs, upstream, strict=True) if o.requires_grad]
    leaves = [batch.cosine, batch.norm_leaf, *parameters]
    if not kept:
        return [None] * len(leaves)
    grads = torch.autograd.grad([o for o, _ in kept], leaves, [g for _, g in kept], retain_graph=True, allow_unused=True)
    return list(grads)


class _MarginSoftmax(torch.autograd.Function):
    """(embeddings, weight) -> (loss, *RowStats)."""

    @staticmethod
    def forward(ctx: Any, embeddings: Tensor, weight: Tensor, labels: Tensor, options: LossOptions, *parameters: Tensor) -> tuple[Tensor, ...]:
        classes = _planes.held(weight, options.residual)
        with torch.autocast(embeddings.device.type, enabled=False):
            # in double: an error of |x| is one of all the row's logits at once, and shows in the UIR excess
            rows_in = embeddings if options.spoiled is None else embeddings.masked_fill(options.spoiled.unsqueeze(1), 0.0)
            exact, lengths = reference.unit_rows(rows_in.double())
            unit, norms = exact.to(classes.dtype), lengths.to(classes.dtype)
            # the single softmax multiplies the error of lse by C: float32 whatever is asked for
            half = options.compute_dtype == torch.bfloat16 and options.softmax == "double"
            batch, stats = _sweep(unit, norms, classes, labels, options, half)
            unknown = reject_unknown(batch, exact, stats.nearest_index, classes, options)
            rows = _row_losses(batch, unknown, options)
            shares = _row_shares(batch, unknown, options)
            if options.spoiled is not None:
                rows = rows.masked_fill(options.spoiled, float("nan"))
            loss = rows if options.reduction == "none" else (rows * shares).sum()
        ctx.save_for_backward(weight)
        ctx.batch, ctx.unknown, ctx.shares, ctx.options = batch, unknown, shares, options
        ctx.parameters, ctx.dtype, ctx.backend = parameters, embeddings.dtype, _library.backend()
        ctx.versions = options.injection.versions()
        ctx.mark_non_differentiable(*stats)
        return loss.to(classes.dtype), *stats

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        with torch.autocast(d_loss.device.type, enabled=False), _library.use_backend(ctx.backend):
            d_embeddings, record, d_parameters = _backward_rows(ctx, d_loss)
            d_weight = _class_gradient(weight, record, ctx.options, ctx.versions) if weight_wanted(ctx, 1, ctx.options.on_rows) else None
        return d_embeddings.to(ctx.dtype), d_weight, None, None, *d_parameters


def _backward_rows(ctx: Any, d_loss: Tensor) -> tuple[Tensor, RowRecords, list[Tensor | None]]:
    """dx, the row records of the class sweep, and the gradients of the margin's own parameters."""
    batch, unknown, options = ctx.batch, ctx.unknown, ctx.options
    dtype = batch.unit.dtype
    d_rows = d_loss.double() * ctx.shares
    weighted = d_rows if options.sample_weight is None else d_rows * options.sample_weight.double()
    d_margin = torch.where(batch.labelled, weighted, torch.zeros_like(d_rows))
    d_logit = options.scale * d_margin * batch.q
    d_cosine, d_norms, *d_parameters = _margin_gradients(batch, ctx.parameters, -d_logit, d_margin)
    negative = d_logit.to(dtype)
    target = torch.zeros_like(negative) if d_cosine is None else d_cosine.to(dtype)
    d_unit = negative.unsqueeze(1) * batch.pull + target.unsqueeze(1) * batch.target_prototypes
    if unknown is not None:
        d_unit[unknown.at] = (options.unknown_weight * d_rows[unknown.at]).to(dtype).unsqueeze(1) * unknown.d_unit
    d_embeddings = reference.through_normalisation(d_unit, batch.unit, batch.norms)
    if d_norms is not None:
        d_embeddings = d_embeddings + d_norms.to(dtype).unsqueeze(1) * batch.unit
    terms = _terms(batch, unknown, negative, target, d_rows, options)
    targets = batch.targets if unknown is None else batch.targets.index_copy(0, unknown.at, unknown.nearest)
    record = RowRecords(
        batch.unit, targets, terms, batch.rules, options.scale, options.injection, options.key, batch.half, batch.kept, options.members
    )
    return d_embeddings, record if batch.dropped is None else without(record, batch.dropped), d_parameters


def weight_wanted(ctx: Any, position: int, on_rows: Callable[[RowRecords], None] | None = None) -> bool:
    """Whether this backward pass is to reach the weight, input number `position` of the node: torch.autograd.grad(loss,
    embeddings) is not, and must leave no rows for the fused optimizer. RuntimeError for torch.autograd.grad(loss, weight)
    where rows are all there is: they would stay for the next step."""
    if not ctx.needs_input_grad[position]:
        return False
    node = ctx.next_functions[position][0]
    try:
        return node is None or bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:  # the weight itself was asked for: autograd.grad(loss, weight)
        if on_rows is None:
            return True
    raise RuntimeError(
        "MarginHead: expected backward() with HeadSGD, got torch.autograd.grad(..., head.weight): no gradient tensor is made "
        "then; use margin_softmax_loss on a copy of the weight, or another optimizer"
    )


def _class_gradient(weight: Tensor, record: RowRecords, options: LossOptions, versions: tuple[int, ...]) -> Tensor | None:
    """dW, or None where a fused optimizer takes the rows instead (its step compares the memory's epoch)."""
    if options.on_rows is not None:
        options.on_rows(record)
        return None
    _planes.refuse_gradient(options.residual)
    options.injection.check_versions(versions)
    arguments = (
        record.unit_embeddings, record.targets, record.terms, weight, record.scale, record.rules,
        *record.injection.arguments(), False, True, record.half, None if record.kept is None else record.kept.buffer,
        record.members,
    )  # fmt: skip
    if options.buffers is not None:
        return recycled_class_gradient(options.buffers, weight, arguments)
    return torch.ops.recog_fast.class_gradient(*arguments)  # type: ignore[no-any-return]


def margin_softmax(embeddings: Tensor, weight: Tensor, labels: Tensor, options: LossOptions) -> tuple[Tensor, RowStats]:
    """Loss and statistics of checked inputs; what `margin_softmax_loss`, `unknown_rejection_loss` and `MarginHead` share."""
    dtype = torch.bfloat16 if wants_half(embeddings, options.compute_dtype) else torch.float32
    # copies: backward reads both, and who reuses a buffer of labels or weights must not change its gradient
    sample_weight = None if options.sample_weight is None else options.sample_weight.detach().clone()
    options = dataclasses.replace(options, record=torch.is_grad_enabled(), compute_dtype=dtype, sample_weight=sample_weight)
    labels = labels.to(torch.int64, copy=True)
    if options.flags is not None:
        labels, spoiled = options.flags.screen(embeddings.detach(), labels, weight.shape[0])
        options = dataclasses.replace(options, spoiled=spoiled)
    loss, *stats = _MarginSoftmax.apply(embeddings, weight, labels, options, *options.parameters())
    return loss, RowStats(*stats)
