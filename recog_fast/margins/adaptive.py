"""Margins that depend on the embedding's length as a sign of image quality: MagFace and AdaFace."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from recog_fast.margins.angle import (
    FALLBACKS,
    Fallback,
    additive_angle,
    angle,
    check_choice,
    check_number,
    cosine_of_sum,
    slope_of_sum,
    with_slope,
    with_slopes,
)


@dataclass(frozen=True)
class MagFace:
    """phi(c) = cos(theta + m(a)), m(a) = lm + (um - lm)/(ua - la) (a - la), a = clip(|x|, la, ua) (MagFace).

    The gradient flows through the norm too (0 where it is clipped). `penalty` is lambda_g g(a), g = a/ua^2 + 1/a, which
    pulls every norm upwards; lambda_g = 35 is the paper's (its bound at s = 64 is 22.6). `fallback` as in ArcFace;
    "easy" (c wherever c <= 0) is the paper's code.

    Raises ValueError unless 0 < la < ua, 0 <= lm <= um <= pi, lambda_g >= 0, and for an unknown fallback.
    """

    la: float = 10.0
    ua: float = 110.0
    lm: float = 0.45
    um: float = 0.8
    lambda_g: float = 35.0
    fallback: Fallback = "easy"

    def __post_init__(self) -> None:
        check_number("MagFace", "la", self.la, 0.0, math.inf, open_low=True)
        check_number("MagFace", "ua", self.ua, self.la, math.inf, open_low=True)
        check_number("MagFace", "lm", self.lm, 0.0, math.pi)
        check_number("MagFace", "um", self.um, self.lm, math.pi)
        check_number("MagFace", "lambda_g", self.lambda_g, 0.0, math.inf)
        check_choice("MagFace", "fallback", self.fallback, FALLBACKS)

    def margin_of(self, norms: Tensor) -> Tensor:
        """m(a) in radians of norms (N,), differentiable."""
        return self.lm + (self.um - self.lm) / (self.ua - self.la) * (norms.clamp(self.la, self.ua) - self.la)

    def __call__(self, cosine: Tensor, norms: Tensor) -> Tensor:
        """Target logit / s (N,) of target cosines (N,) and embedding norms (N,); differentiable in both."""
        m = self.margin_of(norms.to(cosine.dtype))
        value, slope, m_slope = additive_angle(cosine, m, self.fallback)
        return with_slopes(cosine, m, value, slope, m_slope)

    def penalty(self, norms: Tensor) -> Tensor:
        """lambda_g (a/ua^2 + 1/a) of norms (N,), differentiable."""
        a = norms.clamp(self.la, self.ua)
        return self.lambda_g * (a / self.ua**2 + 1.0 / a)


class AdaFace(nn.Module):
    """phi(c) = cos(clip(theta - m k, eps, pi - eps)) - (m + m k), k = clip(h (n - mean)/(std + eps), -1, 1).

    n = clip(|x|, 1e-3, 100) without gradient (AdaFace, Kim et al. 2022). `mean` and `std` (0-dim buffers, starting at
    20 and 100) are running statistics of n over the labelled rows of all ranks: new = t_alpha batch + (1 - t_alpha)
    old, std unbiased, moved by `update` before use. One labelled row keeps the old std, none changes nothing.
    `clamp` = 1 - eps: all cosines of the row are clamped to +-clamp, negatives too, with gradient 0 beyond; calling the
    margin clamps the target cosine.

    Raises ValueError for m outside [0, pi], h < 0, t_alpha outside [0, 1] or eps outside (0, 0.5].
    """

    mean: Tensor
    std: Tensor

    def __init__(self, m: float = 0.4, h: float = 0.333, t_alpha: float = 0.01, eps: float = 1e-3) -> None:
        check_number("AdaFace", "m", m, 0.0, math.pi)
        check_number("AdaFace", "h", h, 0.0, math.inf)
        check_number("AdaFace", "t_alpha", t_alpha, 0.0, 1.0)
        check_number("AdaFace", "eps", eps, 0.0, 0.5, open_low=True)
        super().__init__()
        self.m, self.h, self.t_alpha, self.eps = float(m), float(h), float(t_alpha), float(eps)
        self.clamp = 1.0 - self.eps
        # float64: two numbers cost nothing, and an average over a million steps loses nothing.
        self.register_buffer("mean", torch.tensor(20.0, dtype=torch.float64))
        self.register_buffer("std", torch.tensor(100.0, dtype=torch.float64))

    def extra_repr(self) -> str:
        """The constructor's arguments."""
        return f"m={self.m}, h={self.h}, t_alpha={self.t_alpha}, eps={self.eps}"

    @torch.no_grad()
    def update(self, cosine: Tensor, norms: Tensor, labelled: Tensor) -> None:
        """Move mean and std by the norms (N,) of the rows in `labelled` (N,) bool; nothing in eval mode.

        A non-finite norm is left out, so one bad row cannot spoil the statistics. Synchronises nothing.
        """
        if not self.training or norms.numel() == 0:
            return
        n = norms.to(self.mean.dtype).clamp(1e-3, 100.0)
        used = labelled & norms.isfinite()
        count = used.sum()
        mean = torch.where(used, n, 0.0).sum() / count.clamp_min(1)
        std = (torch.where(used, n - mean, 0.0).square().sum() / (count - 1).clamp_min(1)).sqrt()
        self.mean.copy_(torch.where(count > 0, self.t_alpha * mean + (1.0 - self.t_alpha) * self.mean, self.mean))
        self.std.copy_(torch.where(count > 1, self.t_alpha * std + (1.0 - self.t_alpha) * self.std, self.std))

    def forward(self, cosine: Tensor, norms: Tensor) -> Tensor:
        """Target logit / s (N,) of target cosines (N,) and embedding norms (N,); differentiable in the cosine."""
        with torch.no_grad():
            dtype = cosine.dtype
            n = norms.to(dtype).clamp(1e-3, 100.0)
            k = (self.h * (n - self.mean.to(dtype)) / (self.std.to(dtype) + self.eps)).clamp(-1.0, 1.0)
            c = cosine.clamp(-self.clamp, self.clamp)
            shifted = angle(c) - self.m * k
            clipped = shifted.clamp(self.eps, math.pi - self.eps)
            inside = shifted == clipped
            value = torch.where(inside, cosine_of_sum(c, -self.m * k), clipped.cos()) - (self.m + self.m * k)
            slope = torch.where(inside & (c == cosine), slope_of_sum(c, -self.m * k), torch.zeros_like(c))
        return with_slope(cosine, value, slope)
