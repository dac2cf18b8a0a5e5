"""Shared by the margins: stable trigonometry of the target angle, its derivative, and the check of arguments."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real
from typing import Any, Literal

import torch
from torch import Tensor

from recog_fast._arguments import is_choice

Fallback = Literal["linear", "easy", "keep", "clip", "none"]
MarginFunction = Callable[[Tensor, Tensor], Tensor]

FALLBACKS: tuple[Fallback, ...] = ("linear", "easy", "keep", "clip", "none")
# sin(theta) is never taken smaller than this in a derivative, so phi' stays finite at cosine = +-1.
SINE_FLOOR = 1e-6
# ArcFace's fallback "clip" keeps theta + m inside [CLIP, pi - CLIP].
CLIP = 1e-4


def check_number(owner: str, name: str, value: Any, low: float, high: float, *, open_low: bool = False) -> None:
    """Raise unless `value` is a finite real number in [low, high], or (low, high] with `open_low`.

    Raises TypeError for anything that is no real number (bool included), ValueError outside the range.
    """
    interval = f"{'(' if open_low or low == -math.inf else '['}{low:g}, {high:g}{')' if high == math.inf else ']'}"
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{owner}: expected {name} to be a number in {interval}, got {value!r}")
    number = float(value)
    if not math.isfinite(number) or not low <= number <= high or (open_low and number == low):
        raise ValueError(f"{owner}: expected {name} in {interval}, got {value!r}")


def check_choice(owner: str, name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if not is_choice(value, choices):
        raise ValueError(f"{owner}: expected {name} one of {', '.join(choices)}, got {value!r}")


class _WithSlope(torch.autograd.Function):
    """The given values with the given derivatives: a formula that is singular under autograd gets a finite gradient."""

    @staticmethod
    def forward(
        cosine: Tensor,  # (N,)
        other: Tensor,  # (N,) second argument; unused where other_slope is None
        value: Tensor,  # (N,)
        slope: Tensor,  # (N,) d value / d cosine
        other_slope: Tensor | None,  # (N,) d value / d other
    ) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, _, _, slope, other_slope = inputs
        ctx.save_for_backward(slope, other_slope)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        slope, other_slope = ctx.saved_tensors
        d_cosine = upstream * slope if ctx.needs_input_grad[0] else None
        d_other = upstream * other_slope if other_slope is not None and ctx.needs_input_grad[1] else None
        return d_cosine, d_other, None, None, None


def with_slope(cosine: Tensor, value: Tensor, slope: Tensor) -> Tensor:
    """`value` (N,) whose derivative with respect to `cosine` (N,) is `slope` (N,); no second derivative."""
    result: Tensor = _WithSlope.apply(cosine, cosine, value, slope, None)  # type: ignore[no-untyped-call]
    return result


def with_slopes(cosine: Tensor, other: Tensor, value: Tensor, slope: Tensor, other_slope: Tensor) -> Tensor:
    """As `with_slope`, with `other_slope` the derivative with respect to a second argument `other` (N,)."""
    result: Tensor = _WithSlope.apply(cosine, other, value, slope, other_slope)  # type: ignore[no-untyped-call]
    return result


def sine(cosine: Tensor) -> Tensor:
    """sin(acos c) >= 0; (1-c)(1+c) rather than 1-c^2 because 1-c is exact near 1 and c^2 rounds."""
    return ((1.0 - cosine) * (1.0 + cosine)).clamp_min(0.0).sqrt()


def angle(cosine: Tensor) -> Tensor:
    """acos c, with c beyond +-1 by rounding taken as +-1."""
    return cosine.clamp(-1.0, 1.0).acos()


def cosine_of_sum(cosine: Tensor, m: float | Tensor) -> Tensor:
    """cos(theta + m) without acos: c cos m - sin(theta) sin m. `cosine` (N,); `m` a number or (N,)."""
    if isinstance(m, Tensor):
        return cosine * m.cos() - sine(cosine) * m.sin()
    return cosine * math.cos(m) - sine(cosine) * math.sin(m)


def slope_of_sum(cosine: Tensor, m: float | Tensor) -> Tensor:
    """d cos(theta + m) / d c = sin(theta + m) / sin(theta) = cos m + c sin m / sin(theta), the sine floored."""
    cotangent = cosine / sine(cosine).clamp_min(SINE_FLOOR)
    if isinstance(m, Tensor):
        return m.cos() + cotangent * m.sin()
    return math.cos(m) + cotangent * math.sin(m)


def additive_angle(
    cosine: Tensor,  # (N,)
    m: Tensor,  # (N,) or 0-dim, radians
    fallback: Fallback,
) -> tuple[Tensor, Tensor, Tensor]:
    """cos(theta + m) with its fallback past theta + m = pi: (phi, d phi / d c, d phi / d m), (N,) each, detached.

    linear: c - m sin m; keep: c; easy: c wherever c <= 0; clip: theta + m clipped to [1e-4, pi - 1e-4], derivative 0
    outside; none: cos(theta + m) everywhere.
    """
    with torch.no_grad():
        value = cosine_of_sum(cosine, m)
        slope = slope_of_sum(cosine, m)
        m_slope = -(sine(cosine) * m.cos() + cosine * m.sin())
        if fallback == "none":
            return value, slope, m_slope
        zero = torch.zeros_like(value)
        if fallback == "clip":
            shifted = angle(cosine) + m
            clipped = shifted.clamp(CLIP, math.pi - CLIP)
            inside = shifted == clipped
            value = torch.where(inside, value, clipped.cos())
            return value, torch.where(inside, slope, zero), torch.where(inside, m_slope, zero)
        inside = cosine > 0.0 if fallback == "easy" else cosine > -m.cos()
        outside, outside_m = cosine, zero
        if fallback == "linear":
            outside = cosine - m * m.sin()
            outside_m = zero - (m.sin() + m * m.cos())
        return (
            torch.where(inside, value, outside),
            torch.where(inside, slope, zero + 1.0),
            torch.where(inside, m_slope, outside_m),
        )


def arc_linear(cosine: Tensor, m: float) -> Tensor:
    """ArcFace with the linear fallback, differentiable in `cosine` (N,)."""
    value, slope, _ = additive_angle(cosine, cosine.new_full((), m), "linear")
    return with_slope(cosine, value, slope)
