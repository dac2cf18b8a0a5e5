"""Margins that are a fixed function of the target cosine: softmax, SphereFace, CosFace, ArcFace, combined."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from recog_fast.margins.angle import (
    FALLBACKS,
    SINE_FLOOR,
    Fallback,
    additive_angle,
    angle,
    check_choice,
    check_number,
    cosine_of_sum,
    slope_of_sum,
    with_slope,
)


@dataclass(frozen=True)
class Softmax:
    """No margin: phi(c) = c (NormFace, Wang et al. 2017)."""

    def __call__(self, cosine: Tensor, norms: Tensor) -> Tensor:
        """Target logit / s (N,) of target cosines (N,); `norms` are not used."""
        return cosine


@dataclass(frozen=True)
class CosFace:
    """phi(c) = c - m (CosFace eq. 4; AM-Softmax). m = 0.35 in the paper, 0.40 in InsightFace.

    Raises ValueError for m outside [-2, 2] (a negative margin is a published choice for few-shot transfer).
    """

    m: float = 0.35

    def __post_init__(self) -> None:
        check_number("CosFace", "m", self.m, -2.0, 2.0)

    def __call__(self, cosine: Tensor, norms: Tensor) -> Tensor:
        """Target logit / s (N,) of target cosines (N,); `norms` are not used."""
        return cosine - self.m


@dataclass(frozen=True)
class SphereFace:
    """phi(c) = (lam c + psi)/(1 + lam), psi = (-1)^k cos(m theta) - 2k, k = floor(m theta / pi) (SphereFace eq. 7).

    Integer m: cos(m theta) = T_m(c) and psi' = (-1)^k m U_{m-1}(c) by the Chebyshev recurrences, exact and finite at
    cosine = +-1 (m^2 there). Other m: psi' = (-1)^k m sin(m theta) / sin(theta).
    `lam` weighs the plain softmax; training starts high and lowers it: `SphereFace(4, SphereFace.annealed(step))`.

    Raises ValueError for m outside [1, 64] or lam < 0.
    """

    m: float = 4
    lam: float = 5.0

    def __post_init__(self) -> None:
        check_number("SphereFace", "m", self.m, 1.0, 64.0)
        check_number("SphereFace", "lam", self.lam, 0.0, math.inf)

    @staticmethod
    def annealed(it: int) -> float:
        """lam of iteration `it` (from 0) in the paper's schedule: max(5, 1500 / (1 + 0.1 it))."""
        if it < 0:
            raise ValueError(f"SphereFace.annealed: expected it >= 0, got {it!r}")
        return max(5.0, 1500.0 / (1.0 + 0.1 * it))

    def __call__(self, cosine: Tensor, norms: Tensor) -> Tensor:
        """Target logit / s (N,) of target cosines (N,); `norms` are not used."""
        with torch.no_grad():
            m = float(self.m)
            theta = angle(cosine)
            # At theta = pi the last segment's own k is meant: floor would step one too far and turn the slope around.
            k = (m * theta / math.pi).floor().clamp_max(math.ceil(m) - 1.0)
            sign = 1.0 - 2.0 * k.remainder(2.0)
            if m.is_integer():
                multiple, ratio = _chebyshev(cosine.clamp(-1.0, 1.0), int(m))
            else:
                multiple = (m * theta).cos()
                ratio = _sine_ratio(theta, m, 0.0)
            value = (self.lam * cosine + sign * multiple - 2.0 * k) / (1.0 + self.lam)
            slope = (self.lam + sign * m * ratio) / (1.0 + self.lam)
        return with_slope(cosine, value, slope)


def _chebyshev(c: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """(T_m(c), U_{m-1}(c)) = (cos m theta, sin m theta / sin theta), m >= 1."""
    t_before, t = torch.ones_like(c), c
    u_before, u = torch.zeros_like(c), torch.ones_like(c)
    for _ in range(m - 1):
        t_before, t = t, 2.0 * c * t - t_before
        u_before, u = u, 2.0 * c * u - u_before
    return t, u


def _sine_ratio(theta: Tensor, m: float, shift: float) -> Tensor:
    """sin(m theta + shift) / sin(theta) with theta kept 1e-6 away from 0 and pi, so 0/0 gives its limit."""
    theta = theta.clamp(SINE_FLOOR, math.pi - SINE_FLOOR)
    return (m * theta + shift).sin() / theta.sin().clamp_min(SINE_FLOOR)


@dataclass(frozen=True)
class ArcFace:
    """phi(c) = cos(theta + m), theta = acos c (ArcFace eq. 3), m in radians.

    `fallback` says what holds past theta = pi - m, where cos(theta + m) would rise again: "linear" (c - m sin m, the
    default), "keep" (c), "easy" (c wherever c <= 0), "clip" (theta + m clipped to [1e-4, pi - 1e-4], gradient 0
    outside), "none" (cos(theta + m) everywhere, as InsightFace's arcface_torch).

    `gradient`: "exact" gives phi' = sin(theta + m)/sin(theta). "straight_through" gives 1, as arcface_torch does, whose
    acos and cos run without gradient; its recipes were tuned with it. The exact factor is 28 at 1 degree, 2.2 at 20,
    1.15 at 60, 0.88 at 90, 0.05 at 150; whole gradients differ by 25-33 %. Both work with every fallback.

    Raises ValueError for m outside [0, pi] (degrees given?), an unknown fallback or gradient.
    """

    m: float = 0.5
    fallback: Fallback = "linear"
    gradient: Literal["exact", "straight_through"] = "exact"

    def __post_init__(self) -> None:
        check_number("ArcFace", "m", self.m, 0.0, math.pi)
        check_choice("ArcFace", "fallback", self.fallback, FALLBACKS)
        check_choice("ArcFace", "gradient", self.gradient, ("exact", "straight_through"))

    def __call__(self, cosine: Tensor, norms: Tensor) -> Tensor:
        """Target logit / s (N,) of target cosines (N,); `norms` are not used."""
        value, slope, _ = additive_angle(cosine, cosine.new_full((), float(self.m)), self.fallback)
        if self.gradient == "straight_through":
            slope = torch.ones_like(slope)
        return with_slope(cosine, value, slope)


@dataclass(frozen=True)
class CombinedMargin:
    """phi(c) = cos(m1 theta + m2) - m3 (ArcFace eq. 4).

    InsightFace silently ignores m1 and m2 when m3 > 0; this does not. No fallback: past m1 theta + m2 = pi the target
    logit rises again, as in the paper.

    Raises ValueError for m1 outside (0, 64], m2 outside [-pi, pi] or m3 outside [-2, 2].
    """

    m1: float
    m2: float
    m3: float

    def __post_init__(self) -> None:
        check_number("CombinedMargin", "m1", self.m1, 0.0, 64.0, open_low=True)
        check_number("CombinedMargin", "m2", self.m2, -math.pi, math.pi)
        check_number("CombinedMargin", "m3", self.m3, -2.0, 2.0)

    def __call__(self, cosine: Tensor, norms: Tensor) -> Tensor:
        """Target logit / s (N,) of target cosines (N,); `norms` are not used."""
        m1, m2 = float(self.m1), float(self.m2)
        with torch.no_grad():
            if m1 == 1.0:
                value, slope = cosine_of_sum(cosine, m2), slope_of_sum(cosine, m2)
            else:
                theta = angle(cosine)
                value, slope = (m1 * theta + m2).cos(), m1 * _sine_ratio(theta, m1, m2)
        return with_slope(cosine, value - self.m3, slope)
