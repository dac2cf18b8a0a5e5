"""A sharded head outside its loss: attached cosines, nearest classes, logits; the queries are this rank's rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..ops._rows import RowRecords
from ..ops.attached_cosine import _NO_NEGATIVES, CosineOptions, _scatter_rows
from ..ops.margin_softmax import weight_wanted
from .group import class_range
from .softmax import Shard, shard_prototypes


def sharded_cosine(embeddings: Tensor, weight: Tensor, ids: Tensor, options: CosineOptions, shard: Shard) -> Tensor:
    """<x_i/|x_i|, P_{ids_i}> (n,) of this rank's rows and global class ids."""
    rows, classes = shard.gather([embeddings, ids])
    cosine: Tensor = _ShardedCosine.apply(embeddings, weight, rows, classes, options, shard)
    return cosine


class _ShardedCosine(torch.autograd.Function):
    """As `attached_cosine`: the owner of a class answers; a row's rank gets its prototype for dx, the owner the row for dW."""

    @staticmethod
    def forward(ctx: Any, embeddings: Tensor, weight: Tensor, rows: Tensor, ids: Tensor, options: CosineOptions, shard: Shard) -> Tensor:
        unit, norms = reference.unit_rows(rows.to(weight.dtype))
        local = shard.local(ids)
        cosine, sub, prototypes = shard_prototypes(unit, weight, local, options.injection)
        answer = shard.scatter(torch.cat([prototypes, cosine.unsqueeze(1)], dim=1))
        ctx.save_for_backward(weight, local, sub, unit, norms, answer)
        ctx.options, ctx.shard, ctx.dtype, ctx.versions = options, shard, embeddings.dtype, options.injection.versions()
        return answer[:, -1].clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_cosine: Tensor) -> tuple[Tensor | None, ...]:
        weight, local, sub, unit, norms, answer = ctx.saved_tensors
        options, shard = ctx.options, ctx.shard
        own = shard.own
        d_embeddings = reference.through_normalisation(d_cosine.unsqueeze(1) * answer[:, :-1], unit[own], norms[own])
        upstream = shard.gather([d_cosine])[0]
        d_weight, wanted = None, weight_wanted(ctx, 1, options.on_rows)
        here = (local >= 0).nonzero().squeeze(1)
        if wanted and options.on_rows is not None:
            terms = unit.new_zeros(reference.TERM_ROWS, here.numel())
            terms[0], terms[2] = _NO_NEGATIVES, upstream[here]
            targets = local[here] * (weight.shape[1] if weight.dim() == 3 else 1) + sub[here]
            options.on_rows(RowRecords(unit[here], targets, terms, None, options.scale, options.injection, options.key))
        elif wanted:
            options.injection.check_versions(ctx.versions)
            d_weight = torch.zeros_like(weight)
            if here.numel():
                d_weight = _scatter_rows(weight, local[here], sub[here], upstream[here].unsqueeze(1) * unit[here], options.injection)
        return (shard.factor * d_embeddings).to(ctx.dtype), d_weight, None, None, None, None


def sharded_topk(best: Tensor, ids: Tensor, k: int, shard: Shard) -> tuple[Tensor, Tensor]:
    """The k best of all shards for own rows, from each shard's own best (N, <= k) and their global ids."""
    sizes, ranges = shard.admission.sizes, _ranges(shard)
    counts = tuple(min(k, stop - start) for start, stop in ranges)
    # by rank, so by class: the stable sort keeps the lower id first among equals
    cosine, index = (shard.group.swap_columns(part, sizes, counts) for part in (best, ids))
    order = torch.sort(cosine, dim=1, descending=True, stable=True).indices[:, :k]
    return cosine.gather(1, order), index.gather(1, order)


def _ranges(shard: Shard) -> list[tuple[int, int]]:
    return [class_range(shard.group.num_classes, shard.group.size, rank) for rank in range(shard.group.size)]


class _ShardedLogits(torch.autograd.Function):
    """Cosines (n, C) of own rows from x^ of own rows: every shard answers for its classes."""

    @staticmethod
    def forward(ctx: Any, unit: Tensor, prototypes: Tensor, subcenters: int, shard: Shard) -> Tensor:
        (rows,) = shard.gather([unit])
        classes, dimension = prototypes.shape[0], unit.shape[1]
        every = (rows @ prototypes.reshape(-1, dimension).t()).reshape(rows.shape[0], classes, subcenters)
        cosine, best = every.max(dim=2)
        ctx.columns = tuple(stop - start for start, stop in _ranges(shard))
        ctx.shard = shard
        ctx.save_for_backward(prototypes, best)
        return shard.group.swap_columns(cosine, shard.admission.sizes, ctx.columns)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_cosine: Tensor) -> tuple[Tensor | None, ...]:
        prototypes, best = ctx.saved_tensors
        shard = ctx.shard
        here = shard.group.swap_rows(d_cosine, shard.admission.sizes, ctx.columns)
        classes, dimension = prototypes.shape[0], prototypes.shape[-1]
        flat = prototypes.reshape(-1, dimension)
        subcenters = flat.shape[0] // classes if classes else 1
        spread = here.new_zeros(here.shape[0], classes, subcenters).scatter_(2, best.unsqueeze(2), here.unsqueeze(2))
        return shard.scatter(spread.flatten(1) @ flat), None, None, None


def sharded_logits(unit: Tensor, prototypes: Tensor, subcenters: int, shard: Shard) -> Tensor:
    """Cosines (n, C) of x^ (n, D), this rank's rows, to all classes; differentiable in x^."""
    cosine: Tensor = _ShardedLogits.apply(unit, prototypes, subcenters, shard)
    return cosine
