"""Element lists: which logits are large enough to enter the pull and the class gradient (docs/math.md 1.4)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import reference
from ._rows import Injection

SAMPLE = 1024  # classes, at least, whose logits estimate a row's whole sum
SAMPLE_SHARE = 64  # and at least one in so many


def _sample(classes: int, members: Tensor | None) -> tuple[Tensor | None, float]:
    """(ids (M,) ascending or None for all, how many classes each stands for): every k-th class of the sweep."""
    count = classes if members is None else members.numel()
    stride = count // max(SAMPLE, count // SAMPLE_SHARE) if count else 1
    if stride <= 1:
        return members, 1.0
    ids = torch.arange(0, classes, stride) if members is None else members[::stride].contiguous()
    return ids, count / ids.numel()


def _largest(cosine: Tensor, index: Tensor, rules: Tensor | None, scale: float) -> Tensor:
    """(N,) float64 logit of the nearest negative; -inf where there is none."""
    f = cosine if rules is None else reference._apply_rules(cosine.unsqueeze(1), rules)[0].squeeze(1)
    return torch.where(index >= 0, scale * f.double(), torch.full_like(cosine, -math.inf, dtype=torch.float64))


def list_floor(
    unit: Tensor,  # (N, D)
    weight: Tensor,  # (C, D) or (C, K, D)
    labels: Tensor,  # (N,)
    target: Tensor,  # (N,) margin output
    scale: float,
    rules: Tensor | None,  # (12, N)
    injection: Injection,
    half: bool,
    members: Tensor | None,  # (M,)
    share: float,
) -> Tensor:
    """(N,) float32: the logit below which p_ij = e^{z_ij} / (e^{L_i} + e^{s t_i}) < share; +inf for unlabelled rows.

    L_i is estimated from every k-th class: their sum without the nearest one is multiplied by k, the nearest counts once, so
    that a single look-alike class among them does not pass for k of them. The estimate decides only what is listed: what is
    left out is summed exactly.
    """
    ids, stands_for = _sample(weight.shape[0], members)
    labelled = labels != -1  # -2: of a class elsewhere
    lse, cosine, index, _ = torch.ops.recog_fast.negative_logsumexp(
        unit, weight, torch.where(labelled, labels, -2), scale, rules, *injection.arguments(), False, True, half, False, None, ids
    )
    first = torch.exp(_largest(cosine, index, rules, scale) - lse).clamp(0.0, 1.0).nan_to_num(1.0)
    whole = lse + torch.log(stands_for - (stands_for - 1) * first)
    floor = torch.logaddexp(whole, scale * target.double()) + math.log(share)
    return torch.where(labelled, floor, torch.full_like(floor, math.inf)).float()
