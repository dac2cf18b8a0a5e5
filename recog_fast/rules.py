"""What a margin says about the negatives (math.md 1.2), and what a sweep says about each row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ._arguments import is_number

Coefficient = float | Tensor  # a 0-dim tensor: state that lives on a device, read there
Coefficients = tuple[Coefficient, Coefficient, Coefficient, Coefficient, Coefficient]

PLAIN: Coefficients = (0.0, 1.0, 0.0, 0.0, 1.0)

# Rows of the packed (RULE_ROWS, N) float32 matrix every kernel reads: clamp, threshold, above (a2 a1 a0 b1 b0), below (a2 a1 a0 b1 b0).
RULE_ROWS = 12
NO_CLAMP = 4.0
NO_THRESHOLD = 4.0


@dataclass(frozen=True)
class NegativeRule:
    """Hard-negative epilogue of one paper, math.md 1.2.

    A negative logit is z = s f(c) and its derivative dz/dc = s g(c), with
    f(c) = a2 c^2 + a1 c + a0 and g(c) = b1 c + b0; `above` = (a2, a1, a0, b1, b0) holds where c > threshold of the row,
    `below` elsewhere. g is stated apart from f because some papers detach their weights (g != f').
    `f_max` bounds f over [-1, 1]: for sweeps with a fixed exponent offset (the CPU kernels' offset moves).
    A coefficient may be a 0-dim tensor on the embeddings' device (state of the margin): it is copied, never waited for.

    Raises ValueError for coefficients that are not five finite numbers (on CUDA their values are not looked at) or a
    non-finite f_max.
    """

    above: Coefficients
    below: Coefficients = PLAIN
    f_max: float = 1.0

    def __post_init__(self) -> None:
        for name in ("above", "below"):
            value = getattr(self, name)
            if not isinstance(value, tuple | list) or len(value) != 5 or not all(_finite_number(v) for v in value):
                raise ValueError(f"NegativeRule: expected {name} = five finite numbers (a2, a1, a0, b1, b0), got {value!r}")
        if not is_number(self.f_max):
            raise ValueError(f"NegativeRule: expected a finite f_max, got {self.f_max!r}")


class RowStats(NamedTuple):
    """What the forward sweep learned of each row (math.md 1, 3); every field is (N,), detached.

    lse                 float32  logsumexp over the negatives' logits s f(c) (C = 1: -inf); unlabelled rows: plain logsumexp over all classes
    target_cosine       float32  <x^, P_y>; 0 for unlabelled rows
    nearest_cosine      float32  raw cosine of the nearest negative (C = 1: -2); unlabelled rows: over all classes
    nearest_index       int64    its global class id (C = 1: -1); ties: the lowest
    target_probability  float32  p_y = 1 - sigmoid(lse - s t); 0 for unlabelled rows
    subcenter           int64    which sub-center of the target class won; 0 without sub-centers
    max_probability     float32  unlabelled rows: exp(s c_max - lse); labelled rows: 0
    dropped_mass        float32  part of q = 1 - p_y left out of dW: all of it for a row that `drop_mass` dropped, that of the
                        elements that `drop_elements` did not list (out of dx too; out of dx alone where several forwards make
                        one HeadSGD step); 0 otherwise
    """

    lse: Tensor
    target_cosine: Tensor
    nearest_cosine: Tensor
    nearest_index: Tensor
    target_probability: Tensor
    subcenter: Tensor
    max_probability: Tensor
    dropped_mass: Tensor


def _finite_number(value: Coefficient) -> bool:
    if isinstance(value, Tensor) and value.is_cuda:
        return value.numel() == 1
    return is_number(value)


def pack_rules(
    labels: Tensor,  # (N,) int64; rows with label -1 get the plain rule and no clamp
    rule: NegativeRule | None,
    thresholds: Tensor | None,  # (N,)
    clamp: float,
    dtype: torch.dtype,
) -> Tensor | None:
    """One (RULE_ROWS, N) matrix of each row's clamp, threshold and coefficients; None where every row is plain. Waits for no device."""
    if rule is None and clamp >= 1.0:
        return None
    if rule is not None and thresholds is None:
        raise ValueError("negative_logsumexp: expected thresholds of shape (N,) with a rule, got None")
    plain = (NO_CLAMP, NO_THRESHOLD, *PLAIN, *PLAIN)
    own: list[Coefficient] = [*plain] if rule is None else [NO_CLAMP, NO_THRESHOLD, *rule.above, *rule.below]
    own[0] = clamp if clamp < 1.0 else NO_CLAMP
    if thresholds is not None and rule is not None:
        own[1] = thresholds.to(dtype)
    packed = torch.empty(RULE_ROWS, labels.numel(), dtype=dtype, device=labels.device)
    labelled = labels != -1
    for row, value, other in zip(packed, own, plain, strict=True):
        row.copy_(value) if isinstance(value, Tensor) else row.fill_(value)
        row.masked_fill_(~labelled, other)
    return packed


def exponent_span(rule: NegativeRule | None, clamp: float) -> float:
    """max f - min f over cosines in [-1, 1], either branch anywhere; inf where a coefficient is known to the device alone."""
    low, high = float("inf"), -float("inf")
    for branch in (PLAIN,) if rule is None else (rule.above, rule.below, PLAIN):  # rows without a label are plain
        if any(isinstance(value, Tensor) for value in branch):
            return float("inf")
        a2, a1, a0 = (float(value) for value in branch[:3])
        largest = min(clamp, 1.0) if branch is not PLAIN else 1.0
        vertex = -a1 / (2 * a2) if a2 != 0 else 0.0
        for c in (-largest, largest, *([vertex] if a2 != 0 and abs(vertex) < largest else [])):
            f = (a2 * c + a1) * c + a0
            low, high = min(low, f), max(high, f)
    return high - low
