"""The forward sweep: logsumexp over the negatives, nearest negative, pull (math.md 1)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from .. import reference
from .._arguments import is_number
from ..rules import NegativeRule, pack_rules
from . import _checks, _chunked, _cpu, _library, _planes

Sweep = tuple[Tensor, Tensor, Tensor, Tensor]


def _target_rows(labels: Tensor, weight: Tensor) -> Tensor:
    """Labels -> rows of W (class * K)."""
    return torch.where(labels >= 0, labels * (weight.shape[1] if weight.dim() == 3 else 1), labels)


def _cpu_kernel(
    unit_embeddings: Tensor,
    weight: Tensor,
    labels: Tensor,
    scale: float,
    rules: Tensor | None,
    memory_rows: Tensor | None,
    strength: Tensor | None,
    slot: Tensor | None,
    unit: bool,
    renormalize: bool,
    half: bool = False,
    want_pull: bool = True,
    kept: Tensor | None = None,
    members: Tensor | None = None,
    floor: Tensor | None = None,
    listed: Tensor | None = None,
    bounded: bool = False,  # of the GPU's sweep: no sum can leave float32's range
    residual: Tensor | None = None,
) -> Sweep:
    module = _library.compiled(unit_embeddings, weight)
    if module is None:
        return _reference(
            unit_embeddings, weight, labels, scale, rules, memory_rows, strength, slot, unit, renormalize, half, want_pull, kept, members,
            floor, listed, False, residual,
        )  # fmt: skip
    if residual is not None:
        _planes.check_planes(weight, residual, "negative_logsumexp")
        _checks.expect(kept is None and not unit, "negative_logsumexp", "no kept and unit=False with residual", (kept is None, unit))
    if members is not None and bool((labels == -1).any()):
        _checks.expect(kept is None, "recog_fast", "no kept with members and rows labelled -1 (two sweeps)", "kept")
        return _mixed(unit_embeddings, weight, labels, scale, rules, memory_rows, strength, slot, unit, renormalize, half, want_pull, members, residual)
    members = None if members is None else _cpu.check_members(members, weight.shape[0])
    _checks.expect(kept is None or want_pull, "recog_fast", "want_pull=True with kept (they are written in one pass)", want_pull)
    if residual is not None:
        return _chunked.forward(
            cast("Callable[..., Sweep]", _cpu_kernel), unit_embeddings, weight, residual, labels, scale, rules, (memory_rows, strength, slot),
            renormalize, half, want_pull, members,
        )  # fmt: skip
    floor = _check_lists(kept, floor, listed, unit_embeddings.shape[0])
    operands = _cpu.Operands(module, weight, memory_rows, strength, slot, unit=unit, renormalize=renormalize, members=members)
    rows = operands.rows(unit_embeddings, _target_rows(labels, weight), rules, scale, half)
    n, dimension = unit_embeddings.shape
    lse = torch.empty(n, dtype=torch.float64)
    # float32 by name: the kernels write it whatever torch's default dtype is
    cosine, pull = torch.empty(n, dtype=torch.float32), torch.empty(n if want_pull else 0, dimension, dtype=torch.float32)
    index = torch.empty(n, dtype=torch.int64)
    module.row_sweep(
        operands.classes, rows, lse=lse.data_ptr(), nearest_cosine=cosine.data_ptr(), nearest_index=index.data_ptr(),
        pull=_cpu.address(pull if want_pull else None), kept=_cpu.kept(module, kept, floor), threads=_cpu.threads(),
        listed=_cpu.address(listed),
    )  # fmt: skip
    if members is not None:
        index = torch.where(index >= 0, members[index.clamp_min(0)], index)
    return lse, cosine, index, pull


def _check_lists(kept: Tensor | None, floor: Tensor | None, listed: Tensor | None, rows: int) -> Tensor | None:
    """`floor` (N,) as the kernels read it; it comes with an int32 `kept` and only there."""
    lists = kept is not None and kept.dtype == torch.int32
    _checks.expect(lists == (floor is not None), "recog_fast", "floor (N,) with an int32 kept, and only with one", None if kept is None else kept.dtype)
    for name, given, dtype in (("floor", floor, None), ("listed", listed, torch.float64)):
        fits = given is None or (tuple(given.shape) == (rows,) and given.is_contiguous() and dtype in (None, given.dtype))
        _checks.expect(fits, "recog_fast", f"{name} (N,) = ({rows},), contiguous{', float64' if dtype else ''}", given)
    return None if floor is None else _cpu.float_rows(floor)


def _mixed(unit: Tensor, weight: Tensor, labels: Tensor, scale: float, rules: Tensor | None, *rest: Any) -> Sweep:
    """Rows labelled -1 see all classes, the others the members (the last but one of `rest`): one sweep for each kind, nothing kept."""
    parts, sweep = [], cast("Callable[..., Sweep]", _cpu_kernel)
    alone = labels == -1
    *operands, given, residual = rest
    for rows, members in ((alone, None), (~alone, given)):
        its = None if rules is None else rules[:, rows]
        parts.append(sweep(unit[rows], weight, labels[rows], scale, its, *operands, None, members, residual=residual))
    order = torch.cat([alone.nonzero(), (~alone).nonzero()]).squeeze(1).argsort()
    lse, cosine, index, pull = (torch.cat(pair) for pair in zip(*parts, strict=True))
    return lse[order], cosine[order], index[order], pull[order] if pull.shape[0] else pull


def _reference(
    unit_embeddings: Tensor, weight: Tensor, labels: Tensor, scale: float, rules: Tensor | None, memory_rows: Tensor | None,
    strength: Tensor | None, slot: Tensor | None, unit: bool, renormalize: bool, half: bool = False, want_pull: bool = True,
    kept: Tensor | None = None, members: Tensor | None = None, floor: Tensor | None = None, listed: Tensor | None = None,
    bounded: bool = False, residual: Tensor | None = None,
) -> Sweep:  # fmt: skip
    """Materialised, in the operands' own precision: `half`, `kept` and `floor` are the kernels' means, not part of the result."""
    lse, cosine, index, pull = reference.negative_logsumexp(
        unit_embeddings, _planes.whole(weight, residual, unit_embeddings), labels, scale, rules, memory_rows, strength, slot, unit, renormalize, members
    )
    if listed is not None:
        listed.fill_(1.0)
    return lse, cosine, index, pull if want_pull else pull[:0].clone()


def _fake(
    unit_embeddings: Tensor, weight: Tensor, labels: Tensor, scale: float, rules: Tensor | None, memory_rows: Tensor | None,
    strength: Tensor | None, slot: Tensor | None, unit: bool, renormalize: bool, half: bool = False, want_pull: bool = True,
    kept: Tensor | None = None, members: Tensor | None = None, floor: Tensor | None = None, listed: Tensor | None = None,
    bounded: bool = False, residual: Tensor | None = None,
) -> Sweep:  # fmt: skip
    n = unit_embeddings.shape[0]
    return (
        unit_embeddings.new_empty(n, dtype=torch.float64),
        unit_embeddings.new_empty(n),
        labels.new_empty(n, dtype=torch.int64),
        unit_embeddings.new_empty(n if want_pull else 0, unit_embeddings.shape[1]),
    )


_DEFAULTS = (False, True, None, None, None, None, False, None)  # half, want_pull, kept, members, floor, listed, bounded, residual


class _NegativeLogsumexp(torch.autograd.Function):
    """Differentiable in lse alone: d_x^ = s d_lse pull, dP from the class sweep."""

    @staticmethod
    def forward(ctx: Any, unit_embeddings: Tensor, weight: Tensor, labels: Tensor, scale: float, *rest: Any) -> Sweep:
        with _library.below_autograd():
            lse, cosine, index, pull = torch.ops.recog_fast.negative_logsumexp(unit_embeddings, weight, labels, scale, *rest)
        options = (*rest[4:], *_DEFAULTS[len(rest) - 6 :])
        ctx.scale, ctx.backend = scale, _library.backend()
        ctx.unit, ctx.renormalize, ctx.half, ctx.want_pull, _, members, _, _, _, residual = options
        ctx.split = residual is not None
        ctx.save_for_backward(unit_embeddings, weight, labels, lse, pull, *rest[:4], members)
        ctx.mark_non_differentiable(cosine, index, pull)
        return lse, cosine, index, pull

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_lse: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        unit_embeddings, weight, labels, lse, pull, rules, memory_rows, strength, slot, members = ctx.saved_tensors
        slope = (ctx.scale * d_lse).to(unit_embeddings.dtype)
        if ctx.needs_input_grad[0] and not ctx.want_pull:
            raise RuntimeError("negative_logsumexp: expected want_pull=True for a gradient of unit_embeddings, got False")
        d_unit = slope.unsqueeze(1) * pull if ctx.needs_input_grad[0] else None
        d_weight = None
        if ctx.needs_input_grad[1]:
            if ctx.split:
                raise RuntimeError("negative_logsumexp: expected no gradient of a weight in planes (HeadSGD moves it), got one asked for")
            terms = torch.zeros(reference.TERM_ROWS, labels.numel(), dtype=unit_embeddings.dtype, device=labels.device)
            terms[0] = torch.where(torch.isinf(lse), torch.zeros_like(lse), lse)
            terms[1] = torch.where(torch.isinf(lse), torch.zeros_like(slope), slope)
            every = torch.ones_like(labels, dtype=torch.bool)
            kinds = [(every, None)] if members is None else [(labels != -1, members), (labels == -1, None)]
            with _library.use_backend(ctx.backend):
                d_weight = sum(
                    torch.ops.recog_fast.class_gradient(
                        unit_embeddings[rows], _target_rows(labels, weight)[rows], terms[:, rows], weight, ctx.scale,
                        None if rules is None else rules[:, rows], memory_rows, strength, slot, ctx.unit, ctx.renormalize, ctx.half, None, ids,
                    )
                    for rows, ids in kinds
                )  # fmt: skip
        return d_unit, d_weight, *([None] * (len(ctx.needs_input_grad) - 2))


def _autograd(*arguments: Any) -> Sweep:
    return _NegativeLogsumexp.apply(*arguments)  # type: ignore[no-any-return]


_library.register(
    "negative_logsumexp", reference=_reference, fake=_fake, cpu=_cpu_kernel, autograd=_autograd
)


def negative_logsumexp(
    unit_embeddings: Tensor,  # (N, D)
    prototypes: Tensor,  # (C, D) or (C, K, D) unit rows
    labels: Tensor,  # (N,)
    scale: float,
    *,
    rule: NegativeRule | None = None,
    thresholds: Tensor | None = None,  # (N,)
    clamp: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """L_i = log sum_{j != y_i} exp(s f(c_ij)), c_ij = <x^_i, P_j>, without an N x C tensor; and the nearest negative.

    unit_embeddings (N, D) and prototypes (C, D) (or (C, K, D): c = max over k) unit rows, float32 or float64;
    labels (N,) int, -1 = unlabelled (every class is a negative, no rule, no clamp); scale > 0. A rule bends the
    negatives by math.md 1.2 and needs thresholds (N,); clamp < 1 bounds all cosines of labelled rows (AdaFace).
    Returns lse (N,), nearest_cosine (N,) raw, nearest_index (N,) int64; one class: -inf, -2, -1. Ties: lowest index.
    Differentiable once, in lse with respect to unit_embeddings and prototypes.

    Raises ValueError naming the argument (labels: the first bad row), TypeError for what is no tensor.
    """
    where = "negative_logsumexp"
    _checks.check_embeddings(unit_embeddings, where, "unit_embeddings")
    _checks.check_weight(prototypes, unit_embeddings.shape[1], where, "prototypes")
    _checks.check_labels(labels, unit_embeddings.shape[0], prototypes.shape[0], where)
    _checks.check_scale(scale, where)
    _checks.check_vector(thresholds, unit_embeddings.shape[0], where, "thresholds")
    _checks.expect(is_number(clamp, 0, 1, above=True), where, "clamp in (0, 1]", repr(clamp))
    rows = unit_embeddings.to(prototypes.dtype)
    rules = pack_rules(labels, rule, thresholds, clamp, rows.dtype)
    lse, cosine, index, _ = torch.ops.recog_fast.negative_logsumexp(
        rows, prototypes, labels, float(scale), rules, None, None, None, True, True
    )
    return lse.to(prototypes.dtype), cosine, index
