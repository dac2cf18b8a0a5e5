"""The camera of the synthetic faces: blur, resolution, noise, eight bits.

Its matrix products are of whole numbers, and every partial sum is one that float64 holds exactly: the same pixels
whatever the BLAS, its threads, or the order in which it adds.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .synthetic_parameters import NOISE, Draws, Floats, Words, philox

Doubles = NDArray[np.float64]

# Weights are multiples of 1 / 8192. Largest sum: 14 bits of grey (1/64 levels) times 26 bits of two weights = 40 < 53.
_UNIT = 8192.0
_FINE = 64.0


def _whole(weights: Doubles) -> Doubles:
    """Rows scaled to sum 1, in whole units; rows of zeros stay. accumulate adds from left to right everywhere."""
    total = np.add.accumulate(weights, axis=-1)[..., -1:]
    rounded: Doubles = np.rint(weights / np.maximum(total, 1e-12) * _UNIT)
    return rounded


def resampling(size: int, resolution: Floats, blur: Floats) -> tuple[Doubles, Doubles]:
    """Blur and resolution of a line of S = `size` pixels: matrices of whole numbers (down, up), each (B, S, S) float64.

    down  units of 2^-26: a kernel (1 - (x / r)^2)^2 of r = 1 + blur S pixels, then the average over each of
          ceil(resolution) cells of S / resolution pixels (further rows are unused)
    up    units of 2^-13: linear interpolation between the cells' centres
    At resolution S and blur 0 both are the identity.
    """
    pixels = np.arange(size, dtype=np.float64)
    row, column = pixels[None, :, None], pixels[None, None, :]
    radius = 1.0 + blur.astype(np.float64)[:, None, None] * size
    cells = resolution.astype(np.float64)[:, None, None]
    away = (row - column) / radius
    kernel = np.square(np.maximum(1.0 - away * away, 0.0))
    step = size / cells
    start = row * step
    overlap = np.maximum(np.minimum(start + step, column + 1.0) - np.maximum(start, column), 0.0)
    down = np.matmul(_whole(overlap), _whole(kernel))
    centre = np.clip((row + 0.5) / step - 0.5, 0.0, np.ceil(cells) - 1.0)
    up = _whole(np.maximum(1.0 - np.abs(centre - column), 0.0))
    return down, up


def photograph(
    planes: NDArray[np.float32], draws: Draws, seed: int, split: int, identity: Words, image: Words
) -> NDArray[np.uint8]:
    """Blurs, shrinks, adds the sensor's noise, enlarges: grey levels (3, B, S, S) to pictures (B, S, S, 3) uint8."""
    size = planes.shape[-1]
    low = np.rint(planes * 8.0)
    soft = np.flatnonzero((draws["resolution"] < size) | (draws["blur"] > 0))
    down, up = resampling(size, draws["resolution"][soft], draws["blur"][soft])
    # 1/8 level, times 2^26, over 2^23: 1/64 level.
    rows = np.rint(np.matmul(down, low[:, soft].astype(np.float64)) / 2.0**23)
    low *= 8.0
    low[:, soft] = np.rint(np.matmul(rows, down.transpose(0, 2, 1)) / 2.0**26)
    low += np.rint(_grain(size, seed, split, identity, image) * (draws["noise"][:, None, None] * np.float32(_FINE)))
    np.clip(low, 0.0, 255.0 * _FINE, out=low)
    high = np.matmul(np.matmul(up, low[:, soft].astype(np.float64)), up.transpose(0, 2, 1))
    low[:, soft] = high / (_UNIT * _UNIT)
    pictures = np.clip(np.rint(low / _FINE), 0.0, 255.0).astype(np.uint8)
    return np.ascontiguousarray(pictures.transpose(1, 2, 3, 0))


def _grain(size: int, seed: int, split: int, identity: Words, image: Words) -> NDArray[np.float32]:
    """Noise of about unit variance, (3, B, S, S): each colour two random bytes summed, and a part all three share."""
    count = 3 * size * size
    blocks = np.arange(-(-count // 8), dtype=np.uint64)[None, :]
    stream = np.full((1, 1), NOISE + 16 * split, dtype=np.uint64)
    words = philox((blocks, image[:, None], identity[:, None], stream), seed)
    bytes_ = np.concatenate([word.astype("<u4") for word in words], axis=1).view(np.uint8)
    sums = bytes_[:, 0::2].astype(np.float32) + bytes_[:, 1::2]
    own = ((sums[:, :count] - 255.0) / 104.5).reshape(-1, 3, size, size).transpose(1, 0, 2, 3)
    return np.ascontiguousarray(own * np.float32(0.8) + own[1] * np.float32(0.5))
