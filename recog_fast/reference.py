"""Every operation in plain PyTorch, materialised, to be read next to math.md: the fallback and the truth.

Symbols of math.md: x^ (N, D) unit embeddings, W (C, D) or (C, K, D) raw class centres, P unit prototypes, c = cosine,
s = scale, y = labels (-1 = unlabelled). The functions named like an operation of `recog_fast.ops` are its twins: same
arguments, same order. They work in the dtype they are given (float32, float64) on any device and store N x C tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor

ZERO_NORM = 1e-12
CANCELLED = 1e-4
MARGIN, UNKNOWN_DOUBLE, UNKNOWN_SINGLE = 0, 1, 2
# Rows of `terms` (5, N): lse, weight of the negatives, gradient of the target cosine, E of UIR, kind.
TERM_ROWS = 5


def unit_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (..., D) -> (x/|x|, |x| (...,)); a row with |x| <= 1e-12 becomes 0, NaN stays NaN. Safe for any finite magnitude."""
    largest = x.abs().amax(dim=-1, keepdim=True)
    scaled = x / torch.where(largest > 0, largest, torch.ones_like(largest))
    norm = scaled.norm(dim=-1, keepdim=True) * largest
    unit = torch.where(norm <= ZERO_NORM, torch.zeros_like(x), scaled / scaled.norm(dim=-1, keepdim=True).clamp_min(ZERO_NORM))
    return unit, norm.squeeze(-1)


def through_normalisation(d_unit: Tensor, unit: Tensor, norm: Tensor) -> Tensor:
    """dx = (dx^ - <dx^, x^> x^)/|x|; 0 for a zero row."""
    tangent = d_unit - (d_unit * unit).sum(-1, keepdim=True) * unit
    inverse = torch.where(norm <= ZERO_NORM, torch.zeros_like(norm), 1 / norm.clamp_min(ZERO_NORM))
    return tangent * inverse.unsqueeze(-1)


def _injection(
    unit: Tensor, memory_rows: Tensor | None, strength: Tensor | None, slot: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """(lam (C,), lam M (C, 1, D)) of every class, or None without memory."""
    if memory_rows is None or strength is None:
        return None
    if slot is None:
        slot = torch.arange(unit.shape[0], device=unit.device)
    at = slot.long()
    lam = torch.where(at >= 0, strength.to(unit.dtype)[at.clamp_min(0)], torch.zeros((), dtype=unit.dtype, device=unit.device))
    rows = memory_rows[at.clamp_min(0)].to(unit.dtype).reshape(unit.shape[0], *([1] * (unit.dim() - 2)), unit.shape[-1])
    shape = (-1, *([1] * (unit.dim() - 1)))
    return lam, torch.where(lam.reshape(shape) != 0, lam.reshape(shape) * rows, torch.zeros_like(rows))


def effective_prototypes(
    weight: Tensor,  # (C, D) or (C, K, D)
    memory_rows: Tensor | None = None,  # (S, D)
    strength: Tensor | None = None,  # (S,)
    slot: Tensor | None = None,  # (C,)
    renormalize: bool = True,
) -> Tensor:
    """P_j = normalize(normalize(W_j) + lam_j M_j) (math.md 2); |U| < 1e-4 falls back to W^."""
    unit, _ = unit_rows(weight)
    injection = _injection(unit, memory_rows, strength, slot)
    if injection is None:
        return unit
    lam, push = injection
    mixed = unit + push
    if not renormalize:
        return mixed
    norm = mixed.norm(dim=-1, keepdim=True)
    used = (lam.reshape(-1, *([1] * (unit.dim() - 1))) != 0) & (norm >= CANCELLED)
    return torch.where(used, mixed / norm.clamp_min(CANCELLED), unit)


def prototype_chain(
    d_prototypes: Tensor,
    weight: Tensor,
    memory_rows: Tensor | None = None,
    strength: Tensor | None = None,
    slot: Tensor | None = None,
    renormalize: bool = True,
) -> Tensor:
    """dP -> dW through both normalisations of `effective_prototypes`; shapes as weight."""
    unit, norm = unit_rows(weight)
    d_unit = d_prototypes
    injection = _injection(unit, memory_rows, strength, slot)
    if injection is not None and renormalize:
        lam, push = injection
        mixed_unit, mixed_norm = unit_rows(unit + push)
        used = (lam.reshape(-1, *([1] * (unit.dim() - 2))) != 0) & (mixed_norm >= CANCELLED)
        d_unit = torch.where(used.unsqueeze(-1), through_normalisation(d_prototypes, mixed_unit, mixed_norm), d_prototypes)
    return through_normalisation(d_unit, unit, norm)


def _prototypes(
    weight: Tensor, memory_rows: Tensor | None, strength: Tensor | None, slot: Tensor | None, unit: bool, renormalize: bool
) -> Tensor:
    """(C, K, D)"""
    rows = weight if unit else effective_prototypes(weight, memory_rows, strength, slot, renormalize)
    return rows.reshape(weight.shape[0], -1, weight.shape[-1])


def _apply_rules(cosine: Tensor, rules: Tensor | None) -> tuple[Tensor, Tensor]:
    """f(c), g(c) of math.md 1.2 for cosine (N, C); g = 0 where the clamp holds."""
    if rules is None:
        return cosine, torch.ones_like(cosine)
    r = rules.to(cosine.dtype).unsqueeze(-1)
    c = torch.minimum(torch.maximum(cosine, -r[0]), r[0])
    a2, a1, a0, b1, b0 = (torch.where(c > r[1], r[2 + k], r[7 + k]) for k in range(5))
    return (a2 * c + a1) * c + a0, torch.where(c == cosine, b1 * c + b0, torch.zeros_like(c))


def _class_cosines(unit_embeddings: Tensor, prototypes: Tensor) -> tuple[Tensor, Tensor]:
    """c_ij = max_k <x^_i, P_jk> (N, C) and the winning k (ties: the lowest)."""
    c, k, d = prototypes.shape
    cosine = (unit_embeddings @ prototypes.reshape(c * k, d).t()).unflatten(1, (c, k))
    best = cosine.max(dim=2)
    first = (cosine == best.values.unsqueeze(2)).to(torch.int8).argmax(dim=2)
    return best.values, first


def _negatives(labels: Tensor, classes: int, members: Tensor | None = None, all_of: Tensor | None = None) -> Tensor:
    """(N, C) mask of the classes that are a row's negatives: all, or `members` alone but for the rows in `all_of` (N,)."""
    others = torch.arange(classes, device=labels.device) != labels.unsqueeze(1)
    if members is None or all_of is None:
        return others
    seen = torch.zeros(classes, dtype=torch.bool, device=labels.device).index_fill_(0, members, True)
    return others & (seen | all_of.unsqueeze(1))


def sample_classes(
    labels: Tensor,  # (N,)
    priorities: Tensor,  # (C,) random, distinct
    count: int,
) -> Tensor:
    """Partial FC (math.md 1.3): the batch's classes first, then those of lowest priority until there are `count`; ascending.

    More than `count` positives: all of them.
    """
    positive = labels[labels >= 0].unique()
    first = torch.ones_like(priorities, dtype=torch.int8).index_fill_(0, positive, 0)
    by_priority = torch.argsort(priorities, stable=True)
    order = by_priority[torch.argsort(first[by_priority], stable=True)]
    return order[: max(count, positive.numel())].sort().values


def negative_logsumexp(
    unit_embeddings: Tensor,  # (N, D)
    weight: Tensor,  # (C, D) or (C, K, D)
    labels: Tensor,  # (N,)
    scale: float,
    rules: Tensor | None = None,  # (12, N)
    memory_rows: Tensor | None = None,
    strength: Tensor | None = None,
    slot: Tensor | None = None,
    unit: bool = False,
    renormalize: bool = True,
    members: Tensor | None = None,  # (M,) ascending
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """L_i = log sum_{j != y_i} exp(s f(c_ij)); nearest negative cosine and class; pull = sum_j softmax_j g(c_ij) P_j.

    With `members` the sums are over these classes alone, but for rows labelled -1: they see all classes.
    """
    classes = weight.shape[0]
    prototypes = _prototypes(weight, memory_rows, strength, slot, unit, renormalize)
    cosine, sub = _class_cosines(unit_embeddings, prototypes)
    negative = _negatives(labels, classes, members, labels == -1)
    f, g = _apply_rules(cosine, rules)
    z = (scale * f.double()).masked_fill(~negative, float("-inf"))
    lse = torch.logsumexp(z, dim=1)
    raw = cosine.masked_fill(~negative, float("-inf"))
    nearest = raw.amax(dim=1)
    index = (raw == nearest.unsqueeze(1)).to(torch.int8).argmax(dim=1)
    index = torch.where(negative.any(dim=1), index, torch.full_like(index, -1))
    nearest = torch.where(negative.any(dim=1), nearest, torch.full_like(nearest, -2.0))
    share = torch.where(negative, torch.exp(z - lse.unsqueeze(1)), torch.zeros_like(z)).to(cosine.dtype) * g
    pull = _spread(share, sub, prototypes.shape[1]) @ prototypes.reshape(-1, weight.shape[-1])
    return lse, nearest, index, pull


def _spread(values: Tensor, sub: Tensor, subcenters: int) -> Tensor:
    """(N, C) -> (N, C K): each value at its class's winning sub-center."""
    if subcenters == 1:
        return values
    spread = values.new_zeros(*values.shape, subcenters)
    return spread.scatter_(2, sub.unsqueeze(2), values.unsqueeze(2)).flatten(1)


def unknown_rejection(
    unit_embeddings: Tensor,  # (N, D)
    weight: Tensor,
    nearest: Tensor,  # (N,) class left out of the sums: the one whose p may be close to 1
    lse: Tensor,  # (N,) over all classes
    first_mean: Tensor,  # (N,)
    scale: float,
    memory_rows: Tensor | None = None,
    strength: Tensor | None = None,
    slot: Tensor | None = None,
    unit: bool = False,
    renormalize: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Over all classes but the nearest: sum p, sum(expm1(p) - p), sum p expm1(p), sum p (expm1(p) - first_mean) P (math.md 3).

    p = exp(s c - lse). Leaving the nearest out keeps what cancels when its p is close to 1: E - expm1(p) and 1 - p.
    """
    prototypes = _prototypes(weight, memory_rows, strength, slot, unit, renormalize)
    cosine, sub = _class_cosines(unit_embeddings, prototypes)
    p = torch.exp(scale * cosine.double() - lse.double().unsqueeze(1)).clamp_max(1.0)
    p = torch.where(_negatives(nearest, p.shape[1]), p, torch.zeros_like(p))
    series = p * p * (0.5 + p * (1 / 6 + p * (1 / 24 + p * (1 / 120 + p * (1 / 720 + p * (1 / 5040 + p / 40320))))))
    remainder = torch.where(p < 0.1, series, torch.expm1(p) - p)
    share = p * (torch.expm1(p) - first_mean.double().unsqueeze(1))
    spread = _spread(share.to(unit_embeddings.dtype), sub, prototypes.shape[1])
    return p.sum(1), remainder.sum(1), (p * torch.expm1(p)).sum(1), spread @ prototypes.reshape(-1, weight.shape[-1])


def class_gradient(
    unit_embeddings: Tensor,  # (N, D)
    targets: Tensor,  # (N,) class * K + sub-center, negative: none
    terms: Tensor,  # (5, N)
    weight: Tensor,
    scale: float,
    rules: Tensor | None = None,
    memory_rows: Tensor | None = None,
    strength: Tensor | None = None,
    slot: Tensor | None = None,
    unit: bool = False,
    renormalize: bool = True,
    members: Tensor | None = None,  # (M,) ascending
) -> Tensor:
    """dP_j = sum_i (dloss/dc_ij) x^_i, carried to dW unless `unit`; shaped as weight.

    With `members` the negatives of margin rows are these classes alone; targets may be any class.
    """
    prototypes = _prototypes(weight, memory_rows, strength, slot, unit, renormalize)
    classes, subcenters, _ = prototypes.shape
    cosine, sub = _class_cosines(unit_embeddings, prototypes)
    lse, negative_weight, target_weight, mean, kind = terms.to(cosine.dtype).unsqueeze(2)
    f, g = _apply_rules(cosine, rules)
    p = torch.exp(torch.clamp(scale * f - lse, max=80.0))
    capped = p.clamp_max(1.0)
    h = torch.where(kind == UNKNOWN_DOUBLE, capped * (torch.expm1(capped) - mean), p * g)
    h = torch.where(kind == UNKNOWN_SINGLE, p * classes - 1, h)
    owner = torch.where(targets >= 0, targets // subcenters, torch.full_like(targets, -1))
    negative = _negatives(owner, classes, members, kind.squeeze(1) != MARGIN)
    d_cosine = torch.where(negative, negative_weight * h, torch.zeros_like(h))
    d_cosine = _spread(d_cosine, sub, subcenters)
    here = (targets >= 0) & (targets < classes * subcenters)
    d_cosine[here, targets[here]] = target_weight.squeeze(1)[here]
    d_prototypes = (d_cosine.t() @ unit_embeddings).reshape(weight.shape)
    return d_prototypes if unit else prototype_chain(d_prototypes, weight, memory_rows, strength, slot, renormalize)


def class_step(
    unit_embeddings: Tensor,
    targets: Tensor,
    terms: Tensor,
    weight: Tensor,  # updated in place
    velocity: Tensor | None,  # updated in place; None with momentum 0
    scale: float,
    rules: Tensor | None,
    memory_rows: Tensor | None,
    strength: Tensor | None,
    slot: Tensor | None,
    renormalize: bool,
    lr: float,
    momentum: float,
    weight_decay: float,
    nesterov: bool,
    members: Tensor | None = None,  # (M,) ascending
    sparse: bool = False,
) -> None:
    """`class_gradient` and `sgd_update` in place, for all rows of a step; `sparse`: of the classes some row sees alone."""
    gradient = class_gradient(
        unit_embeddings, targets, terms, weight, scale, rules, memory_rows, strength, slot, False, renormalize, members
    )
    ids = touched_classes(targets, terms, weight, members) if sparse else None
    if ids is None:
        return sgd_update(weight, velocity, gradient, lr, momentum, weight_decay, nesterov)
    rows, speed = weight[ids], None if velocity is None else velocity[ids]
    sgd_update(rows, speed, gradient[ids], lr, momentum, weight_decay, nesterov)
    weight[ids] = rows
    if velocity is not None and speed is not None:
        velocity[ids] = speed
    return None


def touched_classes(targets: Tensor, terms: Tensor, weight: Tensor, members: Tensor | None) -> Tensor | None:
    """The classes (T,) a gradient reaches, ascending: `members` and targets; None = all (unknown rows see every class)."""
    if members is None or bool((terms[4] != MARGIN).any()):
        return None
    ids: Tensor = torch.cat([members, targets[targets >= 0] // (weight.shape[1] if weight.dim() == 3 else 1)]).unique()
    return ids


def sgd_update(
    weight: Tensor,  # (C, D), updated in place
    velocity: Tensor | None,  # (C, D), updated in place; None: momentum 0
    gradient: Tensor,  # (C, D)
    lr: float,
    momentum: float,
    weight_decay: float,
    nesterov: bool = False,
) -> None:
    """v <- mu v + g, g = dW + wd W;  W <- W - lr v (Nesterov: W <- W - lr (g + mu v)): torch.optim.SGD without dampening."""
    g = gradient.add(weight, alpha=weight_decay)
    if velocity is None:
        weight.sub_(g, alpha=lr)
        return
    velocity.mul_(momentum).add_(g)
    weight.sub_(g.add_(velocity, alpha=momentum) if nesterov else velocity, alpha=lr)


def center_sparsity(weight: Tensor) -> Tensor:
    """mean_{j<k}(1 - <W^_j, W^_k>) = 1 - (|sum W^|^2 - C)/(C (C - 1)), in float64 (math.md 3); 0-dim.

    weight (C, D) raw class centres, C >= 2, any float dtype (of a split head: `full_weight()`). Raises TypeError for what is no dense
    tensor, ValueError for another shape.
    """
    if not isinstance(weight, Tensor) or weight.layout != torch.strided:
        raise TypeError(f"center_sparsity: expected weight to be a dense torch.Tensor, got {getattr(weight, 'layout', type(weight).__name__)}")
    if weight.dim() != 2 or weight.shape[0] < 2:
        raise ValueError(f"center_sparsity: expected weight of shape (C, D) with C >= 2, got shape {tuple(weight.shape)}")
    unit, _ = unit_rows(weight.double())
    count = unit.shape[0]
    return 1 - (unit.sum(0).square().sum() - count) / (count * (count - 1))
