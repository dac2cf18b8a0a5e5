"""The operations on CUDA tensors: the chunk loop over Triton tiles, or the reference where `_dispatch.TABLE` says so."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import reference
from . import _checks, _dispatch, _library, _planes, _stochastic, chunks
from ._cuda_native import run_class_epilogue
from ._graphs import Inputs, run_loop
from ._operands import Classes, Plan
from ._rows import Injection
from .chunks import ClassSweep
from .class_gradient import _reference as _gradient_reference
from .class_step import _check_in_place, check_formats
from .class_step import _reference as _step_reference
from .effective_prototypes import _reference as _prototypes_reference
from .negative_logsumexp import _reference as _forward_reference
from .unknown_rejection import _reference as _unknown_reference

Sweep = tuple[Tensor, Tensor, Tensor, Tensor]
Memory = tuple[Tensor | None, Tensor | None, Tensor | None]
_REST = 1 << 16  # rows of W at a time whose classes no row saw


def _runs(operation: str, *operands: Tensor | None, kept: Tensor | None = None) -> bool:
    """Whether the table sends this call to the Triton kernels."""
    call = _dispatch.call_of_device(_library.backend(), operands, operation=operation, kept=kept is not None)
    return _dispatch.choose(call).runs == _dispatch.TRITON


def _dtype(half: bool) -> torch.dtype:
    return torch.bfloat16 if half else torch.float32


def _check_rows(unit_embeddings: Tensor, weight: Tensor, targets: Tensor, terms: Tensor | None = None) -> None:
    """The kernels read by pointer: what torch.ops.recog_fast.* is given must fit, whoever calls it."""
    n = unit_embeddings.shape[0]
    shape = tuple(unit_embeddings.shape)
    _checks.expect(unit_embeddings.dim() == 2 and shape[1] == weight.shape[-1], "recog_fast", f"unit_embeddings (N, D = {weight.shape[-1]})", shape)
    _checks.expect(tuple(targets.shape) == (n,), "recog_fast", f"targets or labels (N,) = ({n},)", tuple(targets.shape))
    if terms is not None:
        _checks.expect(tuple(terms.shape) == (reference.TERM_ROWS, n), "recog_fast", f"terms (5, N) = (5, {n})", tuple(terms.shape))


def _compact(weight: Tensor, memory: Memory, ids: Tensor) -> tuple[Tensor, Memory]:
    """(weight, memory) of the classes `ids` alone."""
    rows, strength, slot = memory
    if rows is None or strength is None:
        return weight[ids], memory
    at = ids.to(torch.int32) if slot is None else slot[ids]
    return weight[ids], Injection(rows, strength, at).arguments()


def _positions(ids: Tensor, classes: Tensor) -> Tensor:
    """Class ids -> their places in ascending `classes`; -2 where they are not in it."""
    at = torch.searchsorted(classes, ids).clamp_max(classes.numel() - 1)
    return torch.where(classes[at] == ids, at, torch.full_like(at, -2))


def forward(
    unit_embeddings: Tensor, weight: Tensor, labels: Tensor, scale: float, rules: Tensor | None, memory_rows: Tensor | None,
    strength: Tensor | None, slot: Tensor | None, unit: bool, renormalize: bool, half: bool = False, want_pull: bool = True,
    members: Tensor | None = None, bounded: bool = False, plan: Plan | None = None, residual: Tensor | None = None,
) -> Sweep:  # fmt: skip
    """`negative_logsumexp` by the chunk loop."""
    _check_rows(unit_embeddings, weight, labels)
    memory = memory_rows, strength, slot
    if members is None:
        classes = Classes(weight, *memory, unit, renormalize, _dtype(half), residual)
        return chunks.negative_logsumexp(unit_embeddings, classes, labels, scale, rules, want_pull, plan, bounded=bounded)
    some, its = _compact(weight, memory, members)
    classes = Classes(some, *its, unit, renormalize, _dtype(half), None if residual is None else residual[members])
    lse, cosine, index, pull = chunks.negative_logsumexp(
        unit_embeddings, classes, _positions(labels, members), scale, rules, want_pull, plan, bounded=bounded
    )
    index = torch.where(index >= 0, members[index.clamp_min(0)], index)
    alone = labels == -1  # these rows see all classes
    if bool(alone.any()):
        every = forward(
            unit_embeddings[alone], weight, labels[alone], scale, None if rules is None else rules[:, alone], *memory,
            unit, renormalize, half, want_pull, None, bounded, plan, residual,
        )  # fmt: skip
        for old, new in zip((lse, cosine, index, pull), every, strict=True):
            if old.shape[0]:
                old[alone] = new
    return lse, cosine, index, pull


def unknown(
    unit_embeddings: Tensor, weight: Tensor, nearest: Tensor, lse: Tensor, first_mean: Tensor, scale: float,
    memory_rows: Tensor | None, strength: Tensor | None, slot: Tensor | None, unit: bool, renormalize: bool, half: bool = False,
    low: Tensor | None = None, residual: Tensor | None = None, plan: Plan | None = None,
) -> Sweep:  # fmt: skip
    """`unknown_rejection` by the chunk loop; without `low`: what rounding x^ lost helps only where large classes come in double."""
    _check_rows(unit_embeddings, weight, nearest)
    classes = Classes(weight, memory_rows, strength, slot, unit, renormalize, _dtype(half), residual)
    return chunks.unknown_rejection(unit_embeddings, classes, nearest, lse, first_mean, scale, plan)


def _visited(
    members: Tensor | None, targets: Tensor, terms: Tensor, weight: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """(classes (T,) the sweep visits, which of them (T,) margin rows see) for margin rows' `members`; None = all."""
    if members is None:
        return None, None
    visited = reference.touched_classes(targets, terms, weight, members)
    if visited is None:
        everywhere = torch.zeros(weight.shape[0], dtype=torch.bool, device=weight.device)
        return None, everywhere.index_fill_(0, members, True)
    return visited, None if visited.numel() == members.numel() else torch.isin(visited, members)


def _within(targets: Tensor, visited: Tensor, weight: Tensor) -> Tensor:
    """Rows of W -> rows of the visited classes' compact copy; negative: none."""
    subcenters = weight.shape[1] if weight.dim() == 3 else 1
    at = _positions(targets // subcenters, visited)
    return torch.where((targets >= 0) & (at >= 0), at * subcenters + targets % subcenters, torch.full_like(at, -2))


def gradient(
    unit_embeddings: Tensor, targets: Tensor, terms: Tensor, weight: Tensor, scale: float, rules: Tensor | None,
    memory_rows: Tensor | None, strength: Tensor | None, slot: Tensor | None, unit: bool, renormalize: bool, half: bool = False,
    members: Tensor | None = None, plan: Plan | None = None,
) -> Tensor:  # fmt: skip
    """`class_gradient` by the chunk loop."""
    _check_rows(unit_embeddings, weight, targets, terms)
    visited, seen = _visited(members, targets, terms, weight)
    memory: Memory = (memory_rows, strength, slot)
    some, at = weight, targets
    if visited is not None:
        some, memory = _compact(weight, memory, visited)
        at = _within(targets, visited, weight)
    classes = Classes(some, *memory, unit, renormalize, _dtype(half))
    sweep = ClassSweep.of(unit_embeddings, classes, at, terms, scale, rules, seen, plan, weight.shape[0])
    result = torch.empty_like(classes.rows)

    def loop(own: Inputs) -> tuple[Tensor, ...]:
        there = classes.with_strengths(own["strengths"])
        for start, stop, d_rows in sweep.reading(own).chunks(there):
            out = result[start:stop].flatten(0, 1)
            if unit:
                out.copy_(d_rows)
            else:
                run_class_epilogue(
                    d_rows, there.rows[start:stop].flatten(0, 1), there.injection_of(start, stop), renormalize=renormalize, gradient=out
                )
        return ()

    inputs = {**sweep.inputs(), "strengths": classes.strengths}
    run_loop(("class_gradient", classes.key(), sweep.key(), result.data_ptr()), inputs, loop, sweep.rows.x)
    if visited is None:
        return result.reshape(weight.shape)
    whole = torch.zeros(weight.shape, dtype=result.dtype, device=weight.device)
    return whole.index_copy_(0, visited, result.reshape(visited.numel(), *weight.shape[1:]))


def step(
    unit_embeddings: Tensor, targets: Tensor, terms: Tensor, weight: Tensor, velocity: Tensor | None, scale: float,
    rules: Tensor | None, memory_rows: Tensor | None, strength: Tensor | None, slot: Tensor | None, renormalize: bool,
    lr: float, momentum: float, weight_decay: float, nesterov: bool, half: bool = False, members: Tensor | None = None,
    sparse: bool = False, rate: Tensor | None = None, residual: Tensor | None = None, rounding: Tensor | None = None, plan: Plan | None = None,
) -> None:  # fmt: skip
    """`class_step` by the chunk loop, in place; classes outside the visited ones only decay (`sparse`: stay as they are)."""
    from ..triton_kernels.class_step import Sgd

    _check_rows(unit_embeddings, weight, targets, terms)
    _checks.expect(velocity is not None or momentum == 0, "class_step", "velocity with momentum > 0", None)
    check_formats(weight, velocity, residual, rounding)
    for name, value, kept in (("weight", weight, residual is not None), ("velocity", velocity, _stochastic.wanted(velocity))):
        if value is not None and not kept:
            _check_in_place(value, weight, name)
    visited, seen = _visited(members, targets, terms, weight)
    memory: Memory = (memory_rows, strength, slot)
    some, low, speed, at = weight, residual, velocity, targets
    numbers = None
    if visited is not None:
        some, memory = _compact(weight, memory, visited)
        low, speed = (None if t is None else t[visited] for t in (residual, velocity))
        at, numbers = _within(targets, visited, weight), _rows_of(visited, weight)
    classes = Classes(some, *memory, False, renormalize, _dtype(half), low)
    sweep = ClassSweep.of(unit_embeddings, classes, at, terms, scale, rules, seen, plan, weight.shape[0])
    sgd = Sgd(lr if rate is None else rate, momentum, weight_decay, nesterov)
    rows = None if speed is None else speed.view_as(classes.rows)

    def loop(own: Inputs) -> tuple[Tensor, ...]:
        there = classes.with_strengths(own["strengths"])
        for start, stop, d_rows in sweep.reading(own).chunks(there):
            first, last = start * there.subcenters, stop * there.subcenters
            run_class_epilogue(
                d_rows, there.rows[start:stop].flatten(0, 1), there.injection_of(start, stop), renormalize=renormalize,
                velocity=None if rows is None else rows[start:stop].flatten(0, 1), rates=own["rates"], nesterov=nesterov,
                residual=there.low_of(start, stop), rounding=own["rounding"], numbers=None if own["numbers"] is None else own["numbers"][first:last],
                first=first,
            )  # fmt: skip
        return ()

    inputs = {**sweep.inputs(), "strengths": classes.strengths, "rates": sgd.packed(weight.device), "rounding": rounding, "numbers": numbers}
    place = (0, None) if rows is None else (rows.data_ptr(), rows.dtype)
    run_loop(("class_step", classes.key(), sweep.key(), place, nesterov), inputs, loop, sweep.rows.x)
    if visited is None:
        return
    if not sparse:
        _decay(weight, residual, velocity, rounding, sgd)
    for whole, part in ((weight, some), (residual, low), (velocity, speed)):
        if whole is not None and part is not None:
            whole.index_copy_(0, visited, part)


def _rows_of(ids: Tensor, weight: Tensor) -> Tensor:
    """(M K,) int64 rows of W of these classes."""
    subcenters = weight.shape[1] if weight.dim() == 3 else 1
    return (ids.unsqueeze(1) * subcenters + torch.arange(subcenters, device=ids.device)).flatten()


def _decay(weight: Tensor, residual: Tensor | None, velocity: Tensor | None, rounding: Tensor | None, sgd: Any) -> None:
    """The step of classes without a gradient, a part of W at a time."""
    for start in range(0, weight.shape[0], _REST):
        part = slice(start, start + _REST)
        rows = weight[part] if residual is None else _planes.join(weight[part], residual[part])
        speed = None if velocity is None else velocity[part].float()  # float32: itself
        reference.sgd_update(rows, speed, torch.zeros_like(rows), sgd.lr, sgd.momentum, sgd.weight_decay, sgd.nesterov)
        if residual is not None:
            _planes.split(rows, weight[part], residual[part])
        if velocity is not None and speed is not None and rounding is not None:
            numbers = _rows_of(torch.arange(start, start + rows.shape[0], device=rows.device), weight)
            _stochastic.round_into(speed, velocity[part], rounding, numbers)


def prototypes(
    weight: Tensor, memory_rows: Tensor | None, strength: Tensor | None, slot: Tensor | None, renormalize: bool, residual: Tensor | None = None
) -> Tensor:
    """`effective_prototypes` in one pass."""
    classes = Classes(weight, memory_rows, strength, slot, False, renormalize, residual=residual)
    return classes.chunk(0, classes.count).reshape(weight.shape)


def _negative_logsumexp(
    unit_embeddings: Tensor, weight: Tensor, labels: Tensor, scale: float, rules: Tensor | None, memory_rows: Tensor | None,
    strength: Tensor | None, slot: Tensor | None, unit: bool, renormalize: bool, half: bool = False, want_pull: bool = True,
    kept: Tensor | None = None, members: Tensor | None = None, floor: Tensor | None = None, listed: Tensor | None = None,
    bounded: bool = False, residual: Tensor | None = None,
) -> Sweep:  # fmt: skip
    rest = scale, rules, memory_rows, strength, slot, unit, renormalize, half, want_pull
    if _runs("negative_logsumexp", unit_embeddings, weight, memory_rows, kept=kept):
        return forward(unit_embeddings, weight, labels, *rest, members, bounded, residual=residual)
    return _forward_reference(unit_embeddings, weight, labels, *rest, kept, members, floor, listed, bounded, residual)


def _unknown_rejection(unit_embeddings: Tensor, weight: Tensor, *rest: Any) -> Sweep:
    if _runs("unknown_rejection", unit_embeddings, weight, rest[4]):
        return unknown(unit_embeddings, weight, *rest)
    return _unknown_reference(unit_embeddings, weight, *rest)


def _class_gradient(
    unit_embeddings: Tensor, targets: Tensor, terms: Tensor, weight: Tensor, scale: float, rules: Tensor | None,
    memory_rows: Tensor | None, strength: Tensor | None, slot: Tensor | None, unit: bool, renormalize: bool, half: bool = False,
    kept: Tensor | None = None, members: Tensor | None = None,
) -> Tensor:  # fmt: skip
    rest = scale, rules, memory_rows, strength, slot, unit, renormalize, half
    if _runs("class_gradient", unit_embeddings, weight, memory_rows, kept=kept):
        return gradient(unit_embeddings, targets, terms, weight, *rest, members)
    return _gradient_reference(unit_embeddings, targets, terms, weight, *rest, kept, members)


def _class_step(
    unit_embeddings: Tensor, targets: Tensor, terms: Tensor, weight: Tensor, velocity: Tensor | None, scale: float,
    rules: Tensor | None, memory_rows: Tensor | None, strength: Tensor | None, slot: Tensor | None, renormalize: bool,
    lr: float, momentum: float, weight_decay: float, nesterov: bool, half: bool = False, kept: Tensor | None = None,
    members: Tensor | None = None, sparse: bool = False, rate: Tensor | None = None, residual: Tensor | None = None,
    rounding: Tensor | None = None,
) -> None:  # fmt: skip
    rest = scale, rules, memory_rows, strength, slot, renormalize, lr, momentum, weight_decay, nesterov, half
    if _runs("class_step", unit_embeddings, weight, velocity, memory_rows, kept=kept):
        return step(unit_embeddings, targets, terms, weight, velocity, *rest, members, sparse, rate, residual, rounding)
    return _step_reference(unit_embeddings, targets, terms, weight, velocity, *rest, kept, members, sparse, rate, residual, rounding)


def _effective_prototypes(weight: Tensor, memory_rows: Tensor | None, *rest: Any) -> Tensor:
    if _runs("effective_prototypes", weight, memory_rows):
        return prototypes(weight, memory_rows, *rest)
    return _prototypes_reference(weight, memory_rows, *rest)


def _on_its_device(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Triton launches on the current device, whatever the tensors say; and a weight that requires gradients is written in place."""

    @functools.wraps(kernel)
    def run(first: Tensor, *rest: Any, **options: Any) -> Any:
        device = torch.cuda.device(first.device) if first.device.type == "cuda" else contextlib.nullcontext()
        with device, torch.no_grad():
            return kernel(first, *rest, **options)

    return run


KERNELS: dict[str, Callable[..., Any]] = {
    stem: _on_its_device(kernel)
    for stem, kernel in (
        ("negative_logsumexp", _negative_logsumexp),
        ("unknown_rejection", _unknown_rejection),
        ("class_gradient", _class_gradient),
        ("class_step", _class_step),
        ("effective_prototypes", _effective_prototypes),
    )
}
for _stem, _kernel in KERNELS.items():
    _library.register_cuda(_stem, _kernel)
