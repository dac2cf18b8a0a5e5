"""What bad cameras do to images, on uint8 arrays (H, W, 3) or (N, H, W, 3): resolution, blur, occlusion, geometry,
light; `unrecognizable` is all of it at once.

All results have the input's shape and dtype. Resampling and blur are separable matrices (out, in) applied to both axes;
borders repeat the edge pixel. Random ones draw from the numpy Generator given, one draw per image. Every function
raises ValueError for other arrays.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from numpy.typing import NDArray

from .images import Image

Floats = NDArray[np.float32]


def _batch(images: Image, where: str) -> Floats:
    """(N, 3, H, W) float32 of (H, W, 3) or (N, H, W, 3) uint8."""
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or images.shape[-1] != 3 or 0 in images.shape[-3:]:
        raise ValueError(f"{where}: expected images (H, W, 3) or (N, H, W, 3) uint8, got {images.shape} {images.dtype}")
    batch = images[None] if images.ndim == 3 else images
    return np.ascontiguousarray(batch.transpose(0, 3, 1, 2), dtype=np.float32)


def _quantise(batch: Floats) -> Floats:
    """Nearest grey level in [0, 255]: what a stored image would hold."""
    levels: Floats = np.clip(np.rint(batch), 0, 255)
    return levels


def _resample(rows: Floats, batch: Floats, columns: Floats) -> Floats:
    """rows (h, H) and columns (w, W) applied to the last two axes of (..., H, W) -> (..., h, w)."""
    # torch, not NumPy: a DataLoader worker has one thread of torch, while NumPy's BLAS would start one for every core there.
    left, middle, right = (torch.from_numpy(part) for part in (rows, batch, columns))
    resampled: Floats = torch.matmul(torch.matmul(left, middle), right.T).numpy()
    return resampled


def _like(batch: Floats, images: Image) -> Image:
    return np.ascontiguousarray(_quantise(batch).astype(np.uint8).transpose(0, 2, 3, 1)).reshape(images.shape)


def _range(where: str, name: str, value: tuple[float, float], low: float, high: float) -> tuple[float, float]:
    if not low <= value[0] <= value[1] <= high:
        raise ValueError(f"{where}: expected {name} = (low, high) in [{low:g}, {high:g}], got {value}")
    return value


@functools.lru_cache(maxsize=512)
def _area_matrix(size: int, out: int) -> Floats:
    """(out, size): mean over the exact, fractional cell of each output pixel."""
    edges = np.arange(out + 1) * (size / out)
    pixels = np.arange(size)
    overlap = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    return np.asarray(np.clip(overlap, 0, None) * (out / size), np.float32)


@functools.lru_cache(maxsize=512)
def _cubic_matrix(size: int, out: int) -> Floats:
    """(out, size): bicubic interpolation with a = -0.75, half-pixel centres (torch's and OpenCV's)."""
    a = -0.75
    centre = (np.arange(out) + 0.5) * (size / out) - 0.5
    matrix = np.zeros((out, size))
    for tap in range(-1, 3):
        place = np.floor(centre).astype(int) + tap
        x = np.abs(centre - place)
        near = ((a + 2) * x - (a + 3)) * x * x + 1
        far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
        np.add.at(matrix, (np.arange(out), np.clip(place, 0, size - 1)), np.where(x <= 1, near, far))
    return matrix.astype(np.float32)


@functools.lru_cache(maxsize=512)
def _gauss_matrix(size: int, sigma: float) -> Floats:
    """(size, size): Gaussian of `sigma` pixels cut at 4 sigma."""
    radius = math.ceil(4 * sigma)
    taps = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    taps /= taps.sum()
    matrix = np.zeros((size, size))
    rows = np.arange(size)
    for offset, weight in zip(range(-radius, radius + 1), taps, strict=True):
        np.add.at(matrix, (rows, np.clip(rows + offset, 0, size - 1)), weight)
    return matrix.astype(np.float32)


def down_up(images: Image, size: int | tuple[int, int]) -> Image:
    """Area mean down to `size` (shorter side; or (height, width)), stored as 8 bits, bicubic back: the image a distant
    camera gives.

    Raises ValueError for a size below 1 or above the image's.
    """
    batch = _batch(images, "down_up")
    height, width = batch.shape[2:]
    if isinstance(size, tuple):
        low_height, low_width = size
    else:
        short = min(height, width)
        low_height, low_width = round(size * height / short), round(size * width / short)
    if not (1 <= low_height <= height and 1 <= low_width <= width):
        raise ValueError(f"down_up: expected size in [1, {min(height, width)}], got {size}")
    if (low_height, low_width) == (height, width):
        return images.copy()
    small = _quantise(_resample(_area_matrix(height, low_height), batch, _area_matrix(width, low_width)))
    return _like(_resample(_cubic_matrix(low_height, height), small, _cubic_matrix(low_width, width)), images)


def gaussian_blur(images: Image, sigma: float) -> Image:
    """Gaussian blur of standard deviation `sigma` pixels (0: none). Raises ValueError for a negative or non-finite
    sigma."""
    batch = _batch(images, "gaussian_blur")
    if not 0 <= sigma < math.inf:
        raise ValueError(f"gaussian_blur: expected sigma >= 0, got {sigma}")
    if sigma < 1e-3:
        return images.copy()
    height, width = batch.shape[2:]
    # A blur wider than the image is the image's mean; the bound keeps the kernel finite.
    sigma = min(sigma, 4.0 * max(height, width))
    return _like(_resample(_gauss_matrix(height, sigma), batch, _gauss_matrix(width, sigma)), images)


def motion_blur(images: Image, length: float, angle: float = 0.0) -> Image:
    """Mean along a line of `length` pixels at `angle` degrees from the x axis, counter-clockwise. Raises ValueError
    outside [1, 256]."""
    batch = _batch(images, "motion_blur")
    if not 1 <= length <= 256 or not math.isfinite(angle):
        raise ValueError(f"motion_blur: expected length in [1, 256] and a finite angle, got {length}, {angle}")
    reach = math.ceil(length / 2)
    points = (np.arange(math.ceil(4 * length)) + 0.5) / math.ceil(4 * length) * length - length / 2
    x, y = points * math.cos(math.radians(angle)) + reach, -points * math.sin(math.radians(angle)) + reach
    kernel = np.zeros((2 * reach + 2, 2 * reach + 2))
    for dy in (0, 1):
        for dx in (0, 1):
            weight = np.abs(1 - dy - y + np.floor(y)) * np.abs(1 - dx - x + np.floor(x))
            np.add.at(kernel, (np.floor(y).astype(int) + dy, np.floor(x).astype(int) + dx), weight / len(points))
    height, width = batch.shape[2:]
    padded = np.pad(batch, ((0, 0), (0, 0), (reach, reach + 1), (reach, reach + 1)), mode="edge")
    total = np.zeros_like(batch)
    for row, column in zip(*np.nonzero(kernel > 1e-6), strict=True):
        total += np.float32(kernel[row, column]) * padded[:, :, row : row + height, column : column + width]
    return _like(total, images)


def _warp(image: Floats, matrix: NDArray[np.float64]) -> Floats:
    """Bilinear warp of (3, H, W): output pixel p takes the input at centre + matrix (2, 3) applied to p - centre; edges
    repeat."""
    height, width = image.shape[1:]
    centre_x, centre_y = (width - 1) / 2, (height - 1) / 2
    x, y = np.arange(width) - centre_x, np.arange(height)[:, None] - centre_y
    from_x = np.clip(matrix[0, 0] * x + matrix[0, 1] * y + (matrix[0, 2] + centre_x), 0, width - 1)
    from_y = np.clip(matrix[1, 0] * x + matrix[1, 1] * y + (matrix[1, 2] + centre_y), 0, height - 1)
    # The last pixel is reached with weight 1 from the one before it, so that its neighbour always exists.
    left = np.minimum(from_x.astype(np.int64), max(width - 2, 0))
    top = np.minimum(from_y.astype(np.int64), max(height - 2, 0))
    wx, wy = (from_x - left).astype(np.float32), (from_y - top).astype(np.float32)
    flat, corner = image.reshape(3, -1), top * width + left
    right, down = min(width - 1, 1), width * min(height - 1, 1)
    upper_left, upper_right = flat.take(corner, axis=1), flat.take(corner + right, axis=1)
    lower_left, lower_right = flat.take(corner + down, axis=1), flat.take(corner + down + right, axis=1)
    upper = upper_left + (upper_right - upper_left) * wx
    lower = lower_left + (lower_right - lower_left) * wx
    warped: Floats = upper + (lower - upper) * wy
    return warped


def _inverse(angle: float, scale: float, shear: float, shift: tuple[float, float]) -> NDArray[np.float64]:
    """Inverse (2, 3) of: shear, scale, turn counter-clockwise by `angle` degrees, shift by (x, y) pixels."""
    turn, slope = math.radians(angle), math.tan(math.radians(shear))
    # y points down: a counter-clockwise turn is (x, y) -> (x cos + y sin, -x sin + y cos).
    rotation = np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])
    linear = np.linalg.inv(rotation @ np.array([[1.0, slope], [0.0, 1.0]]) * scale)
    return np.column_stack([linear, -linear @ np.array(shift)])


def rotate(images: Image, angle: float) -> Image:
    """Turn about the centre by `angle` degrees counter-clockwise, bilinear."""
    batch = _batch(images, "rotate")
    if not math.isfinite(angle):
        raise ValueError(f"rotate: expected a finite angle, got {angle}")
    inverse = _inverse(angle, 1.0, 0.0, (0.0, 0.0))
    for image in batch:
        image[...] = _warp(image, inverse)
    return _like(batch, images)


def affine(
    images: Image,
    rng: np.random.Generator,
    degrees: float = 10.0,
    translate: float = 0.05,
    scale: tuple[float, float] = (0.9, 1.1),
    shear: float = 5.0,
) -> Image:
    """Random turn (+-degrees), shift (+-translate of each side), scale and shear (+-degrees), each uniform,
    bilinear."""
    batch = _batch(images, "affine")
    low, high = _range("affine", "scale", scale, 1e-2, 1e2)
    height, width = batch.shape[2:]
    for image in batch:
        angle, lean = rng.uniform(-degrees, degrees), rng.uniform(-shear, shear)
        factor = rng.uniform(low, high)
        shift = (rng.uniform(-translate, translate) * width, rng.uniform(-translate, translate) * height)
        image[...] = _warp(image, _inverse(angle, factor, lean, shift))
    return _like(batch, images)


def occlude(images: Image, rng: np.random.Generator, fraction: tuple[float, float] = (0.05, 0.3)) -> Image:
    """Cover a random rectangle of `fraction` of the area, aspect 1/2 to 2, by one random colour."""
    height, width = _batch(images, "occlude").shape[2:]
    low, high = _range("occlude", "fraction", fraction, 0.0, 1.0)
    covered = images.copy()
    for image in covered[None] if covered.ndim == 3 else covered:
        area, aspect = rng.uniform(low, high) * height * width, math.exp(rng.uniform(-math.log(2), math.log(2)))
        tall, wide = min(height, round(math.sqrt(area * aspect))), min(width, round(math.sqrt(area / aspect)))
        top, left = int(rng.integers(height - tall + 1)), int(rng.integers(width - wide + 1))
        image[top : top + tall, left : left + wide] = rng.integers(0, 256, 3)
    return covered


def low_resolution(images: Image, rng: np.random.Generator, smallest: int = 8) -> Image:
    """`down_up` to a shorter side drawn log-uniformly from [smallest, the image's]; smaller images stay as they are."""
    short = min(_batch(images, "low_resolution").shape[2:])
    if smallest < 1:
        raise ValueError(f"low_resolution: expected smallest >= 1, got {smallest}")
    first = min(smallest, short)

    def one(image: Image) -> Image:
        return down_up(image, min(short, round(math.exp(rng.uniform(math.log(first), math.log(short))))))

    return (
        one(images) if images.ndim == 3 else np.array([one(image) for image in images], np.uint8).reshape(images.shape)
    )


def crop(images: Image, rng: np.random.Generator, scale: tuple[float, float] = (0.7, 1.0)) -> Image:
    """A random part of `scale` of the area, aspect 3/4 to 4/3, enlarged to the whole (bicubic): torchvision's
    RandomResizedCrop."""
    batch = _batch(images, "crop")
    low, high = _range("crop", "scale", scale, 1e-3, 1.0)
    height, width = batch.shape[2:]
    cropped = np.empty_like(batch)
    for place, image in enumerate(batch):
        area, aspect = rng.uniform(low, high), math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        tall = min(height, max(1, round(height * math.sqrt(area * aspect))))
        wide = min(width, max(1, round(width * math.sqrt(area / aspect))))
        top, left = int(rng.integers(height - tall + 1)), int(rng.integers(width - wide + 1))
        part = image[:, top : top + tall, left : left + wide]
        cropped[place] = _resample(_cubic_matrix(tall, height), part, _cubic_matrix(wide, width))
    return _like(cropped, images)


def light(images: Image, rng: np.random.Generator, brightness: float = 0.2, contrast: float = 0.2) -> Image:
    """Grey levels times 1 +- contrast about their mean, plus +- brightness of full scale, each uniform per image."""
    batch = _batch(images, "light")
    for image in batch:
        mean = image.mean()
        image -= mean
        image *= np.float32(1 + rng.uniform(-contrast, contrast))
        image += mean + np.float32(255 * rng.uniform(-brightness, brightness))
    return _like(batch, images)


def unrecognizable(
    images: Image,
    rng: np.random.Generator,
    sides: tuple[int, int] = (4, 8),
    blur: float = 0.5,
    motion: float = 0.5,
    occlusion: float = 0.3,
    geometry: float = 0.3,
) -> Image:
    """Faces nobody can recognize, for the UI centre's direct approach: every image is taken down to a shorter side drawn
    from `sides` pixels and back, after each of the others with its probability.

    geometry   `affine` (10 degrees, 10 % shift, 0.8 to 1.2 of the size), then `rotate` by up to 30 degrees
    occlusion  a tenth to four tenths of the area
    motion     a line of a twelfth to a quarter of the shorter side, any angle
    blur       sigma of a fiftieth to a twentieth of the shorter side
    Shape and dtype as they come in; one draw per image. The centre depends on the kind of corruption more than on the
    people (docs/reproduction.md): state which was used.
    Raises ValueError for other arrays, sides outside [1, shorter side] or a probability outside [0, 1].
    Source: Deng et al., Harnessing Unrecognizable Faces for Improving Face Recognition, 2021 (about 1000 such faces).
    """
    short = min(_batch(images, "unrecognizable").shape[2:])
    if not 1 <= sides[0] <= sides[1] <= short:
        raise ValueError(f"unrecognizable: expected sides = (low, high) in [1, {short}], got {sides}")
    for name, value in (("blur", blur), ("motion", motion), ("occlusion", occlusion), ("geometry", geometry)):
        _range("unrecognizable", name, (value, value), 0.0, 1.0)

    def one(image: Image) -> Image:
        coin = rng.random(4)
        if coin[0] < geometry:
            image = affine(image, rng, 10.0, 0.1, (0.8, 1.2))
            image = rotate(image, rng.uniform(-30.0, 30.0))
        if coin[1] < occlusion:
            image = occlude(image, rng, (0.1, 0.4))
        if coin[2] < motion:
            image = motion_blur(image, min(256.0, max(1.0, short * rng.uniform(1 / 12, 1 / 4))), rng.uniform(0, 180))
        if coin[3] < blur:
            image = gaussian_blur(image, short * rng.uniform(1 / 50, 1 / 20))
        return down_up(image, int(rng.integers(sides[0], sides[1] + 1)))

    return (
        one(images) if images.ndim == 3 else np.array([one(image) for image in images], np.uint8).reshape(images.shape)
    )
