"""The public losses over (embeddings, weight)."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from ._arguments import is_choice, is_number
from .margins import ArcFace
from .ops import _checks
from .ops._compile import outside_graphs
from .ops._flags import RowFlags, defers, flags_of
from .ops._rows import Injection
from .ops.margin_softmax import LossOptions, Margin, margin_softmax
from .rules import RowStats

Reduction = Literal["mean", "sum", "none"]


def check_options(
    where: str,
    embeddings: Tensor,
    scale: float,
    reduction: str,
    unknown_weight: float,
    sample_weight: Tensor | None,
    normalizer: float | Tensor | None,
    compute_dtype: torch.dtype | None,
) -> None:
    """What every loss refuses about its options; ValueError naming the argument."""
    _checks.check_scale(scale, where)
    _checks.expect(is_choice(reduction, ("mean", "sum", "none")), where, "reduction 'mean', 'sum' or 'none'", repr(reduction))
    _checks.expect(is_number(unknown_weight, 0), where, "unknown_weight >= 0", repr(unknown_weight))
    _checks.check_vector(sample_weight, embeddings.shape[0], where, "sample_weight")
    _checks.expect(is_choice(compute_dtype, (None, torch.float32, torch.bfloat16)), where, "compute_dtype None, torch.float32 or torch.bfloat16", compute_dtype)
    if isinstance(normalizer, Tensor):
        _checks.expect(normalizer.numel() == 1, where, "normalizer of one element", f"shape {tuple(normalizer.shape)}")
    if normalizer is not None and not (isinstance(normalizer, Tensor) and normalizer.is_cuda):
        _checks.expect(is_number(normalizer.reshape(()) if isinstance(normalizer, Tensor) else normalizer, 0, above=True), where, "normalizer > 0", repr(normalizer))


def check_rows(
    where: str, embeddings: Tensor, labels: Tensor, classes: int, dtype: torch.dtype, flags: RowFlags | None
) -> RowFlags | None:
    """Labels and finite rows: a ValueError now, or, where that would wait for a device, the flags that will hold it.

    flags: those an earlier call may have left something in, which is raised here; None: look now, whatever it costs.
    """
    _checks.check_label_tensor(labels, embeddings.shape[0], where)
    if flags is not None and defers(labels):
        flags.raise_noted()
        return flags
    _checks.check_labels(labels, embeddings.shape[0], classes, where)
    _checks.check_finite_rows(embeddings.to(dtype), where)
    return None


@overload
def margin_softmax_loss(
    embeddings: Tensor, weight: Tensor, labels: Tensor, *, margin: Margin = ..., scale: float = ...,
    memory_rows: Tensor | None = ..., strength: Tensor | None = ..., slot: Tensor | None = ..., unknown_weight: float = ...,
    sample_weight: Tensor | None = ..., reduction: Reduction = ..., normalizer: float | Tensor | None = ...,
    compute_dtype: torch.dtype | None = ..., check_labels: bool = ..., return_stats: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip
@overload
def margin_softmax_loss(
    embeddings: Tensor, weight: Tensor, labels: Tensor, *, margin: Margin = ..., scale: float = ...,
    memory_rows: Tensor | None = ..., strength: Tensor | None = ..., slot: Tensor | None = ..., unknown_weight: float = ...,
    sample_weight: Tensor | None = ..., reduction: Reduction = ..., normalizer: float | Tensor | None = ...,
    compute_dtype: torch.dtype | None = ..., check_labels: bool = ..., return_stats: Literal[True],
) -> tuple[Tensor, RowStats]: ...  # fmt: skip
@outside_graphs
def margin_softmax_loss(
    embeddings: Tensor,  # (N, D)
    weight: Tensor,  # (C, D) or (C, K, D)
    labels: Tensor,  # (N,)
    *,
    margin: Margin = ArcFace(0.5),  # noqa: B008 - frozen dataclass
    scale: float = 64.0,
    memory_rows: Tensor | None = None,  # (S, D)
    strength: Tensor | None = None,  # (S,)
    slot: Tensor | None = None,  # (C,)
    unknown_weight: float = 0.0,
    sample_weight: Tensor | None = None,  # (N,)
    reduction: Reduction = "mean",
    normalizer: float | Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
    check_labels: bool = False,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, RowStats]:
    """Cross entropy of the margin logits over all C classes, without an N x C tensor (math.md 1).

    loss_i = softplus(L_i - s t_i), L_i = log sum_{j != y_i} exp(s f(c_ij)), c_ij = <x_i/|x_i|, P_j>, t_i = phi(c_{i,y_i}).

    embeddings (N, D) raw, any float dtype; weight (C, D) or (C, K, D) raw class centres, float32 (float64: reference);
    labels (N,) int, -1 = unlabelled: loss 0, or `unknown_weight` times the UIR excess over all classes (math.md 3).
    margin: any callable (cosine (N,), norms (N,)) -> target logit / s; default ArcFace(0.5). A margin in training mode
    is updated once per call, before use. memory_rows, strength, slot inject a memory as `effective_prototypes` does.
    reduction "mean" = sum_i w_i loss_i / #labelled (`normalizer` replaces the count; 0 when none is labelled), plus
    unknown_weight times the mean excess of the unlabelled rows; "sum" adds all rows; "none" gives (N,).
    compute_dtype: None (bf16 for half-precision embeddings or under autocast), float32 or bfloat16. bfloat16 runs the
    sweeps on 16-bit operands with float32 results: on CPUs bfloat16 (AVX-512 BF16) or int16 fixed point with a step
    per row (AVX2, AVX-512), float32 where neither is (baseline) and in the reference (`backends()` says which). At
    D = 512, s = 64 dx and dW err by 2e-4 and 3e-4 (int16) or 1.3e-3 and 3e-3 (bfloat16), the loss by 1e-5 or 7e-5
    (math.md 1.4). The target cosine, the nearest cosine and the margin are float32 all the same.
    On CUDA no call waits for the device to look at values: a label outside [-1, C) gives its row loss 0 and no part in the mean, a
    non-finite row a nan loss and no gradient, nothing else is touched, and the next call raises the ValueError. check_labels=True
    waits and raises at once, as a call on CPU always does.
    Returns the loss in weight's dtype, or (loss, RowStats). Once differentiable in embeddings, weight and the margin's
    parameters. There is no label smoothing and no double backward. Inside torch.compile it is one graph break.

    Raises ValueError naming argument, value and expectation (labels out of range, a non-finite row: the first such row).
    Source: ArcFace (Deng 2019) eq. 3; UIR eq. 7; the form is math.md's.
    """
    where = "margin_softmax_loss"
    _checks.check_embeddings(embeddings, where)
    _checks.check_weight(weight, embeddings.shape[1], where)
    flags = check_rows(where, embeddings, labels, weight.shape[0], weight.dtype, None if check_labels else flags_of(embeddings.device, where))
    _checks.check_memory(weight, memory_rows, strength, slot, where)
    _checks.check_margin(margin, where)
    check_options(where, embeddings, scale, reduction, unknown_weight, sample_weight, normalizer, compute_dtype)
    options = LossOptions(
        margin=margin, scale=float(scale), injection=Injection(memory_rows, strength, slot), unknown_weight=unknown_weight,
        sample_weight=sample_weight, reduction=reduction, normalizer=normalizer, compute_dtype=compute_dtype, flags=flags,
    )  # fmt: skip
    loss, stats = margin_softmax(embeddings, weight, labels, options)
    return (loss, stats) if return_stats else loss


@outside_graphs
def unknown_rejection_loss(
    embeddings: Tensor,  # (N, D)
    weight: Tensor,  # (C, D) or (C, K, D)
    *,
    scale: float = 64.0,
    softmax: Literal["double", "single"] = "double",
    reduction: Reduction = "mean",
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, RowStats]:
    """Excess of the unknown-identity-rejection loss over its minimum C log C, for rows of no known class (math.md 3).

    p = softmax(s c) over all C classes; "double" (the paper's remedy): q = softmax(p), excess = -sum log q - C log C
    in [0, e - 2]; "single": excess = C (lse - log C) - s sum c. Gradients are those of the raw loss.
    embeddings (N, D) raw; weight raw centres, float32 or float64 (single: (C, D)). Returns the loss, 0 for no rows,
    (N,) with reduction "none"; with return_stats also RowStats (lse over all classes, max_probability).

    Raises ValueError naming the argument. Source: UIR (Yu 2019) eq. 5-7, in the exact form of math.md.
    """
    where = "unknown_rejection_loss"
    _checks.check_embeddings(embeddings, where)
    _checks.check_weight(weight, embeddings.shape[1], where)
    labels = torch.full((embeddings.shape[0],), -1, dtype=torch.int64, device=embeddings.device)
    flags = check_rows(where, embeddings, labels, weight.shape[0], weight.dtype, flags_of(embeddings.device, where))
    _checks.expect(is_choice(softmax, ("double", "single")), where, "softmax 'double' or 'single'", repr(softmax))
    check_options(where, embeddings, scale, reduction, 1.0, None, None, None)
    options = LossOptions(margin=None, scale=float(scale), unknown_weight=1.0, softmax=softmax, reduction=reduction, flags=flags)
    loss, stats = margin_softmax(embeddings, weight, labels, options)
    return (loss, stats) if return_stats else loss
