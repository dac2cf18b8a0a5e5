"""Cosines to one class per row that stay attached to both sides: nearest or target cosines in a loss of one's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ._planes import held, refuse_gradient
from ._rows import Injection, Key, RowRecords, target_prototypes
from .margin_softmax import weight_wanted

_NO_NEGATIVES = 1e30  # an lse under which every negative's share is 0


@dataclass(frozen=True)
class CosineOptions:
    """Everything of a call that is no differentiable tensor."""

    scale: float
    injection: Injection
    key: Key
    on_rows: Callable[[RowRecords], None] | None  # takes the rows instead of a weight gradient
    residual: Tensor | None = None  # lower plane of a bfloat16 weight


def attached_cosine(embeddings: Tensor, weight: Tensor, ids: Tensor, options: CosineOptions) -> Tensor:
    """<x_i/|x_i|, P_{ids_i}> (N,) of checked inputs; max over sub-centers."""
    cosine: Tensor = _AttachedCosine.apply(embeddings, weight, ids, options)
    return cosine


class _AttachedCosine(torch.autograd.Function):
    """Cosine to one class per row; its weight gradient is (row, class, coefficient): a row record without negatives."""

    @staticmethod
    def forward(ctx: Any, embeddings: Tensor, weight: Tensor, ids: Tensor, options: CosineOptions) -> Tensor:
        classes = held(weight, options.residual)
        unit, norms = reference.unit_rows(embeddings.to(classes.dtype))
        cosine, sub, rows = target_prototypes(unit, classes, ids, options.injection)
        ctx.save_for_backward(weight, ids, sub, unit, norms, rows)
        ctx.options, ctx.dtype, ctx.versions = options, embeddings.dtype, options.injection.versions()
        return cosine

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_cosine: Tensor) -> tuple[Tensor | None, ...]:
        weight, ids, sub, unit, norms, rows = ctx.saved_tensors
        d_embeddings = reference.through_normalisation(d_cosine.unsqueeze(1) * rows, unit, norms)
        d_weight, options = None, ctx.options
        wanted = weight_wanted(ctx, 1, options.on_rows)
        if wanted and options.on_rows is not None:
            terms = unit.new_zeros(reference.TERM_ROWS, ids.numel())
            terms[0], terms[2] = _NO_NEGATIVES, d_cosine
            targets = ids * (weight.shape[1] if weight.dim() == 3 else 1) + sub
            options.on_rows(RowRecords(unit, targets, terms, None, options.scale, options.injection, options.key))
        elif wanted:
            refuse_gradient(options.residual)
            options.injection.check_versions(ctx.versions)
            d_weight = _scatter_rows(weight, ids, sub, d_cosine.unsqueeze(1) * unit, options.injection)
        return d_embeddings.to(ctx.dtype), d_weight, None, None


def _scatter_rows(weight: Tensor, ids: Tensor, sub: Tensor, d_rows: Tensor, injection: Injection) -> Tensor:
    """dW (shaped as weight) of prototype gradients d_rows (N, D) at (ids, sub)."""
    chosen = weight[ids] if weight.dim() == 2 else weight[ids, sub]
    d_chosen = reference.prototype_chain(d_rows, chosen, *injection.of(ids).arguments())
    flat = ids if weight.dim() == 2 else ids * weight.shape[1] + sub
    gradient = torch.zeros(weight.numel() // weight.shape[-1], weight.shape[-1], dtype=weight.dtype, device=weight.device)
    return gradient.index_add_(0, flat, d_chosen).reshape(weight.shape)
