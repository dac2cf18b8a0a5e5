"""Brushes and palettes of the synthetic faces: soft-edged shapes over a pixel grid, painted on float32 planes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .synthetic_parameters import Floats

Grid = Floats  # (B, S, S)
Planes = NDArray[np.float32]  # (3, B, S, S)
Colour = tuple[Floats | float, Floats | float, Floats | float]  # each a number or (B, 1, 1)

SKIN = ((0.95, 0.80, 0.70), (0.87, 0.67, 0.53), (0.70, 0.49, 0.35), (0.40, 0.26, 0.19))
HAIR = ((0.07, 0.06, 0.06), (0.20, 0.13, 0.09), (0.42, 0.27, 0.15), (0.78, 0.62, 0.36), (0.66, 0.65, 0.64))
IRIS = ((0.17, 0.10, 0.06), (0.38, 0.25, 0.12), (0.28, 0.40, 0.25), (0.30, 0.48, 0.66), (0.50, 0.57, 0.62))


def ramp(t: Floats, stops: tuple[tuple[float, float, float], ...]) -> tuple[Floats, Floats, Floats]:
    """Colour at t in [0, 1] along equally spaced stops."""
    x = np.clip(t, 0.0, 1.0) * (len(stops) - 1)
    out = []
    for c in range(3):
        value = np.full_like(x, stops[0][c])
        for k in range(len(stops) - 1):
            value += np.float32(stops[k + 1][c] - stops[k][c]) * np.clip(x - k, 0.0, 1.0)
        out.append(value)
    return out[0], out[1], out[2]


def scaled(colour: Colour, gain: Floats | float) -> Colour:
    """The colour, lighter or darker."""
    return colour[0] * gain, colour[1] * gain, colour[2] * gain


def paint(planes: Planes, alpha: Grid, colour: Colour) -> None:
    """planes += alpha (colour - planes)."""
    for c in range(3):
        change = colour[c] - planes[c]
        change *= alpha
        planes[c] += change


def darken(planes: Planes, alpha: Grid, red: float = 1.0, green: float = 1.0, blue: float = 1.0) -> None:
    """planes *= 1 - alpha * (red, green, blue)."""
    for c, share in enumerate((red, green, blue)):
        planes[c] *= 1.0 - share * alpha


def inside(signed: Grid, pixel: Floats) -> Grid:
    """Coverage of a pixel by a shape whose signed distance (negative inside) is given."""
    cover: Grid = np.clip(0.5 - signed / pixel, 0.0, 1.0)
    return cover


def ellipse(u: Grid, v: Grid, a: Floats | float, b: Floats | float, pixel: Floats) -> Grid:
    """Coverage by the ellipse of half axes a, b round the origin."""
    x, y = u / a, v / b
    return inside((np.sqrt(x * x + y * y) - 1.0) * np.minimum(a, b), pixel)


def blob(u: Grid, v: Grid, a: Floats | float, b: Floats | float) -> Grid:
    """(1 - r^2)^2 inside the ellipse: a soft spot."""
    x, y = u / a, v / b
    s: Grid = np.maximum(1.0 - x * x - y * y, 0.0)
    return s * s


def triangle(x: Grid) -> Grid:
    """Triangle wave of period 1 in [-1, 1]."""
    wave: Grid = 4.0 * np.abs(x - np.floor(x) - 0.5) - 1.0
    return wave


def distance(u: Grid, v: Grid) -> Grid:
    """From the origin."""
    length: Grid = np.sqrt(u * u + v * v)
    return length
