"""Margins that also rewrite negatives, by one NegativeRule each (math.md 1.2)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from recog_fast.margins.angle import (
    MarginFunction,
    arc_linear,
    check_choice,
    check_number,
    cosine_of_sum,
    slope_of_sum,
    with_slope,
)
from recog_fast.rules import NegativeRule


class CurricularFace(nn.Module):
    """ArcFace with the linear fallback; hard negatives c > cos(theta_y + m) get f(c) = c^2 + t c.

    CurricularFace, Huang et al. 2020. `t` (0-dim buffer, starting at 0) is the running mean of the target cosine
    over labelled rows, moved by `update` before use: t <- (1 - momentum) mean + momentum t. The threshold is the
    bare cos(theta_y + m), without the fallback.

    Raises ValueError for m outside [0, pi] or momentum outside [0, 1].
    """

    t: Tensor

    def __init__(self, m: float = 0.5, momentum: float = 0.99) -> None:
        check_number("CurricularFace", "m", m, 0.0, math.pi)
        check_number("CurricularFace", "momentum", momentum, 0.0, 1.0)
        super().__init__()
        self.m, self.momentum = float(m), float(momentum)
        self.register_buffer("t", torch.tensor(0.0, dtype=torch.float64))

    def extra_repr(self) -> str:
        """The constructor's arguments."""
        return f"m={self.m}, momentum={self.momentum}"

    @torch.no_grad()
    def update(self, cosine: Tensor, norms: Tensor, labelled: Tensor) -> None:
        """Move t by the target cosines (N,) of the rows in `labelled` (N,) bool; nothing in eval mode.

        A non-finite cosine is left out, so one bad row cannot spoil t. Synchronises nothing.
        """
        if not self.training or cosine.numel() == 0:
            return
        used = labelled & cosine.isfinite()
        count = used.sum()
        mean = torch.where(used, cosine.to(self.t.dtype), 0.0).sum() / count.clamp_min(1)
        self.t.copy_(torch.where(count > 0, (1.0 - self.momentum) * mean + self.momentum * self.t, self.t))

    @torch.no_grad()
    def rule(self, cosine: Tensor) -> tuple[NegativeRule, Tensor]:
        """The negatives' rule at the present t and thresholds cos(theta_y + m) (N,); on CUDA t stays on the device."""
        if self.t.is_cuda:  # |t| <= 1: it is a mean of cosines
            return NegativeRule(above=(1.0, self.t, 0.0, 2.0, self.t), f_max=2.0), cosine_of_sum(cosine, self.m)
        t = float(self.t)
        return NegativeRule(above=(1.0, t, 0.0, 2.0, t), f_max=1.0 + abs(t)), cosine_of_sum(cosine, self.m)

    def forward(self, cosine: Tensor, norms: Tensor) -> Tensor:
        """Target logit / s (N,) of target cosines (N,); `norms` are not used."""
        return arc_linear(cosine, self.m)


@dataclass(frozen=True)
class MVSoftmax:
    """Mis-classified vectors weigh more: negatives c > thr_y get f(c) = (1 + t) c + t (MV-Softmax).

    kind "arc": phi = cos(theta + m), kind "am": phi = c - m; with `easy` phi = c where c <= 0. thr_y is
    cos(theta_y + m) or c_y - m, whatever `easy` says. The paper's code has t = 0.2, s = 32, m = 0.5 (arc), 0.35 (am).

    Raises ValueError for another kind, m outside [0, pi] ("am": [0, 2]) or t outside [0, 10].
    """

    kind: Literal["arc", "am"] = "arc"
    m: float = 0.5
    t: float = 0.2
    easy: bool = True

    def __post_init__(self) -> None:
        check_choice("MVSoftmax", "kind", self.kind, ("arc", "am"))
        check_number("MVSoftmax", "m", self.m, 0.0, math.pi if self.kind == "arc" else 2.0)
        check_number("MVSoftmax", "t", self.t, 0.0, 10.0)

    def __call__(self, cosine: Tensor, norms: Tensor) -> Tensor:
        """Target logit / s (N,) of target cosines (N,); `norms` are not used."""
        with torch.no_grad():
            value = self._shifted(cosine)
            slope = slope_of_sum(cosine, float(self.m)) if self.kind == "arc" else torch.ones_like(cosine)
            if self.easy:
                value = torch.where(cosine > 0.0, value, cosine)
                slope = torch.where(cosine > 0.0, slope, torch.ones_like(slope))
        return with_slope(cosine, value, slope)

    def _shifted(self, cosine: Tensor) -> Tensor:
        return cosine_of_sum(cosine, float(self.m)) if self.kind == "arc" else cosine - self.m

    @torch.no_grad()
    def rule(self, cosine: Tensor) -> tuple[NegativeRule, Tensor]:
        """The negatives' rule and the thresholds (N,) of target cosines (N,)."""
        t = float(self.t)
        return NegativeRule(above=(0.0, 1.0 + t, t, 0.0, 1.0 + t), f_max=1.0 + 2.0 * t), self._shifted(cosine)


@dataclass(frozen=True)
class CircleMargin:
    """Circle loss in its class-level form (Circle Loss, Sun et al. 2020), made for scale 256.

    Target: phi(c) = w (c - (1 - m)), w = max(1 + m - c, 0) without gradient, so phi' = w. Negatives: c > -m get
    f(c) = c^2 - m^2 with derivative c + m (weight detached, so g is not f'); the others f = 0, g = 0.

    Raises ValueError for m outside [0, 1].
    """

    m: float = 0.25

    def __post_init__(self) -> None:
        check_number("CircleMargin", "m", self.m, 0.0, 1.0)

    def __call__(self, cosine: Tensor, norms: Tensor) -> Tensor:
        """Target logit / s (N,) of target cosines (N,); `norms` are not used."""
        weight = (1.0 + self.m - cosine.detach()).clamp_min(0.0)
        return weight * (cosine - (1.0 - self.m))

    @torch.no_grad()
    def rule(self, cosine: Tensor) -> tuple[NegativeRule, Tensor]:
        """The negatives' rule and its threshold -m for every row (N,)."""
        m = float(self.m)
        # f itself stays below 1 - m^2; 1 also covers the plain rule of the unlabelled rows in the same sweep.
        rule = NegativeRule(above=(1.0, 0.0, -m * m, 1.0, m), below=(0.0, 0.0, 0.0, 0.0, 0.0), f_max=1.0)
        return rule, torch.full_like(cosine, -m)


class InterclassFilter(nn.Module):
    """Any margin, with negatives c > threshold filtered: logit 0 and gradient 0 (InsightFace, Partial FC).

    A negative that close is taken for a mislabelled image of the same person. The margin's penalty, clamp and update
    are passed on, and a margin that is a module is a submodule, so its state is saved.

    Raises TypeError for a margin that is not callable, ValueError for one that already has a rule for the negatives or
    a threshold outside [-1, 1].
    """

    def __init__(self, margin: MarginFunction, threshold: float = 0.4) -> None:
        if not callable(margin):
            raise TypeError(f"InterclassFilter: expected margin callable as (cosine, norms), got {margin!r}")
        if getattr(margin, "rule", None) is not None:
            raise ValueError(
                f"InterclassFilter: expected a margin without a rule for the negatives, got {type(margin).__name__}"
            )
        check_number("InterclassFilter", "threshold", threshold, -1.0, 1.0)
        super().__init__()
        self.margin = margin
        self.threshold = float(threshold)

    def extra_repr(self) -> str:
        """The constructor's arguments; a margin that is a module prints itself."""
        inner = "" if isinstance(self.margin, nn.Module) else f"margin={self.margin!r}, "
        return f"{inner}threshold={self.threshold}"

    @property
    def clamp(self) -> float:
        """The inner margin's clamp; 1 where it has none."""
        return float(getattr(self.margin, "clamp", 1.0))

    def penalty(self, norms: Tensor) -> Tensor:
        """The inner margin's penalty (N,); zeros where it has none."""
        inner: Any = getattr(self.margin, "penalty", None)
        result: Tensor = torch.zeros_like(norms) if inner is None else inner(norms)
        return result

    def update(self, cosine: Tensor, norms: Tensor, labelled: Tensor) -> None:
        """The inner margin's update; nothing where it has none, or in eval mode."""
        inner: Any = getattr(self.margin, "update", None)
        if self.training and inner is not None:
            inner(cosine, norms, labelled)

    @torch.no_grad()
    def rule(self, cosine: Tensor) -> tuple[NegativeRule, Tensor]:
        """f = 0, g = 0 above the threshold, which is the same for every row (N,)."""
        zero = (0.0, 0.0, 0.0, 0.0, 0.0)
        return NegativeRule(above=zero, f_max=1.0), torch.full_like(cosine, self.threshold)

    def forward(self, cosine: Tensor, norms: Tensor) -> Tensor:
        """The inner margin's target logit / s (N,)."""
        return self.margin(cosine, norms)
