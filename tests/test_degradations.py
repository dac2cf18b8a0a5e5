"""Degradations: shapes, dtypes, determinism, and each against what it is by definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from recog_fast.data import degradations as d

RNG = np.random.default_rng(0)
IMAGE = RNG.integers(0, 256, (24, 18, 3), np.uint8)
BATCH = RNG.integers(0, 256, (3, 16, 16, 3), np.uint8)

FIXED = {
    "down_up": lambda x: d.down_up(x, 5),
    "gaussian_blur": lambda x: d.gaussian_blur(x, 1.3),
    "motion_blur": lambda x: d.motion_blur(x, 5.5, 30),
    "rotate": lambda x: d.rotate(x, 17.0),
}
RANDOM = {
    "occlude": d.occlude,
    "affine": d.affine,
    "low_resolution": d.low_resolution,
    "crop": d.crop,
    "light": d.light,
    "unrecognizable": d.unrecognizable,
}


@pytest.mark.parametrize("name", FIXED)
def test_fixed_ones(name: str) -> None:
    """Same shape and dtype, input untouched, changed pixels, each image of a batch as if alone."""
    for images in (IMAGE, BATCH, BATCH[:0]):
        before = images.copy()
        out = FIXED[name](images)
        assert out.shape == images.shape and out.dtype == np.uint8 and out.flags.c_contiguous
        assert np.array_equal(images, before)
        assert len(images) == 0 or not np.array_equal(out, images)
    # Another batch size may round a float32 product otherwise: one grey level.
    alone = np.stack([FIXED[name](image) for image in BATCH])
    assert np.abs(alone.astype(int) - FIXED[name](BATCH)).max() <= 1


@pytest.mark.parametrize("name", RANDOM)
def test_random_ones(name: str) -> None:
    """The generator alone decides; images of one batch draw differently."""
    for images in (IMAGE, BATCH, BATCH[:0]):
        before = images.copy()
        first, again = (RANDOM[name](images, np.random.default_rng(7)) for _ in range(2))
        other = RANDOM[name](images, np.random.default_rng(8))
        assert first.shape == images.shape and first.dtype == np.uint8 and np.array_equal(images, before)
        assert np.array_equal(first, again) and (len(images) == 0 or not np.array_equal(first, other))
    same = RANDOM[name](np.stack([IMAGE, IMAGE]), np.random.default_rng(9))
    assert not np.array_equal(same[0], same[1])


@pytest.mark.parametrize("name", [*FIXED, *RANDOM])
def test_other_arrays_are_refused(name: str) -> None:
    for wrong in (IMAGE.astype(np.float32), IMAGE[:, :, 0], IMAGE[:, :, :2], IMAGE[:0]):
        with pytest.raises(ValueError, match=rf"{name}: expected images \(H, W, 3\) or \(N, H, W, 3\) uint8, got"):
            FIXED[name](wrong) if name in FIXED else RANDOM[name](wrong, np.random.default_rng(0))


@pytest.mark.parametrize("name", [*FIXED, *RANDOM])
def test_flat_images_stay_flat(name: str) -> None:
    """Every kernel sums to one; only light and occlusion (here in `unrecognizable` too) may change a flat image."""
    flat = np.full((20, 20, 3), 77, np.uint8)
    out = FIXED[name](flat) if name in FIXED else RANDOM[name](flat, np.random.default_rng(3))
    assert np.array_equal(out, flat) == (name not in ("occlude", "light", "unrecognizable"))


@pytest.mark.parametrize("size", [4, 8, 16])
def test_down_up_is_area_and_bicubic(size: int) -> None:
    """Whole factors: torch's area mean, stored as 8 bits, and its bicubic."""
    image = RNG.integers(0, 256, (32, 32, 3), np.uint8)
    x = torch.from_numpy(image).permute(2, 0, 1)[None].double()
    small = functional.interpolate(x, size=(size, size), mode="area").round()
    back = functional.interpolate(small, size=(32, 32), mode="bicubic", align_corners=False).round().clamp(0, 255)
    assert np.abs(d.down_up(image, size).astype(int) - back[0].permute(1, 2, 0).numpy()).max() <= 1


def test_area_of_broken_cells() -> None:
    """3 pixels to 2: each cell holds one and a half."""
    matrix = d._area_matrix(3, 2)
    assert matrix == pytest.approx(np.array([[2, 1, 0], [0, 1, 2]]) / 3, abs=1e-7)


def test_down_up_sizes() -> None:
    assert np.array_equal(d.down_up(IMAGE, 18), IMAGE)
    # The shorter side is meant; the other follows.
    assert np.array_equal(d.down_up(IMAGE, 9), d.down_up(IMAGE, (12, 9)))
    for size in (0, 19, (25, 18)):
        with pytest.raises(ValueError, match=r"size in \[1, 18\]"):
            d.down_up(IMAGE, size)


def test_gaussian_blur_of_a_point() -> None:
    point = np.zeros((21, 21, 3), np.uint8)
    point[10, 10] = 255
    out = d.gaussian_blur(point, 1.5)[:, :, 0]
    y, x = np.mgrid[-10:11, -10:11]
    expected = 255 * np.exp(-(x**2 + y**2) / (2 * 1.5**2)) / (2 * np.pi * 1.5**2)
    assert np.abs(out - expected).max() <= 1
    assert np.array_equal(d.gaussian_blur(IMAGE, 0), IMAGE)
    # A huge blur is the mean of each channel.
    assert np.ptp(d.gaussian_blur(IMAGE, 1e9).astype(int), axis=(0, 1)).max() <= 255 * 0.5
    with pytest.raises(ValueError, match="sigma >= 0"):
        d.gaussian_blur(IMAGE, -1.0)


def test_motion_blur_direction() -> None:
    point = np.zeros((31, 31, 3), np.uint8)
    point[15, 15] = 255
    flat = d.motion_blur(point, 9, 0)[:, :, 0]
    # Nine pixels of 255 / 9, their ends spread over one more by the sampling.
    assert np.flatnonzero(flat.sum(1)).tolist() == [15] and flat[15, 12:19].tolist() == [28] * 7
    assert flat[15].sum() == pytest.approx(255, abs=6) and not flat[15, :10].any() and not flat[15, 21:].any()
    assert np.array_equal(d.motion_blur(point, 9, 90)[:, :, 0], flat.T)
    # 45 degrees counter-clockwise: from lower left to upper right.
    rising = d.motion_blur(point, 9, 45)[:, :, 0]
    assert rising[12, 18] > 0 and rising[18, 12] > 0 and rising[12, 12] == 0
    for length in (0.5, 300):
        with pytest.raises(ValueError, match=r"length in \[1, 256\]"):
            d.motion_blur(point, length)


def test_rotate_is_counter_clockwise() -> None:
    square = RNG.integers(0, 256, (15, 15, 3), np.uint8)
    for quarter in range(4):
        assert np.array_equal(d.rotate(square, 90.0 * quarter), np.rot90(square, quarter))


@pytest.mark.parametrize("shape", [(1, 1, 3), (1, 9, 3), (9, 1, 3), (2, 2, 3)])
def test_slivers(shape: tuple[int, int, int]) -> None:
    """One row, one column, one pixel: no index falls outside."""
    sliver = RNG.integers(0, 256, shape, np.uint8)
    out = [d.down_up(sliver, 1), d.gaussian_blur(sliver, 2.0), d.motion_blur(sliver, 4, 20), d.rotate(sliver, 33)]
    out += [function(sliver, np.random.default_rng(0)) for name, function in RANDOM.items() if name != "unrecognizable"]
    out.append(d.unrecognizable(sliver, np.random.default_rng(0), (1, 1), 1.0, 1.0, 1.0, 1.0))
    assert all(image.shape == shape for image in out)


def test_affine_shift_and_scale() -> None:
    """With all ranges closed but one, the transform is that one."""
    smooth = np.repeat(np.arange(0, 200, 5, dtype=np.uint8)[None, :, None], 40, 0).repeat(3, 2)
    still = d.affine(smooth, np.random.default_rng(0), 0, 0, (1, 1), 0)
    assert np.array_equal(still, smooth)
    # Twice as large about the centre: half the slope.
    large = d.affine(smooth, np.random.default_rng(0), 0, 0, (2, 2), 0).astype(int)
    assert large[20, 30, 0] - large[20, 10, 0] == pytest.approx(50, abs=1)
    with pytest.raises(ValueError, match="affine: expected scale"):
        d.affine(smooth, np.random.default_rng(0), scale=(0, 1))


def test_occlude_covers_its_share() -> None:
    grey = np.full((50, 50, 3), 128, np.uint8)
    for seed in range(20):
        covered = (d.occlude(grey, np.random.default_rng(seed), (0.2, 0.2)) != 128).any(2)
        assert covered.mean() == pytest.approx(0.2, abs=0.03)
    with pytest.raises(ValueError, match="occlude: expected fraction"):
        d.occlude(grey, np.random.default_rng(0), (0.5, 1.5))


def test_low_resolution_range() -> None:
    """Sizes lie between the smallest and the image's own; a smaller image stays."""
    assert np.array_equal(d.low_resolution(IMAGE, np.random.default_rng(0), 40), IMAGE)
    options = [d.down_up(BATCH[0], size) for size in range(4, 17)]
    for seed in range(20):
        out = d.low_resolution(BATCH[0], np.random.default_rng(seed), 4)
        assert any(np.array_equal(out, option) for option in options)
    with pytest.raises(ValueError, match="smallest >= 1"):
        d.low_resolution(IMAGE, np.random.default_rng(0), 0)


def test_crop_enlarges_a_part() -> None:
    """Of a smooth ramp a part of a quarter of the area keeps about half the slope; all of it keeps everything."""
    ramp = np.repeat(np.arange(0, 160, 4, dtype=np.uint8)[None, :, None], 40, 0).repeat(3, 2)
    slopes = []
    for seed in range(20):
        out = d.crop(ramp, np.random.default_rng(seed), (0.25, 0.25)).astype(int)
        slopes.append((out[20, 30, 0] - out[20, 10, 0]) / 80)
    assert 0.4 < np.mean(slopes) < 0.6 and min(slopes) > 0.4 and max(slopes) < 0.62
    with pytest.raises(ValueError, match="crop: expected scale"):
        d.crop(ramp, np.random.default_rng(0), (0.5, 1.5))


def test_light_is_affine_in_grey_levels() -> None:
    middle = RNG.integers(100, 156, (20, 20, 3), np.uint8)
    out = d.light(middle, np.random.default_rng(2), 0.1, 0.3).astype(float)
    slope, offset = np.polyfit(middle.ravel(), out.ravel(), 1)
    assert np.abs(slope * middle + offset - out).max() < 1.1 and abs(slope - 1) > 0.01


def test_unrecognizable_keeps_nothing_fine() -> None:
    """What is left has no more detail than the largest side allowed: few of the image's frequencies."""
    image = RNG.integers(0, 256, (48, 48, 3), np.uint8)
    for seed in range(10):
        out = d.unrecognizable(image, np.random.default_rng(seed), (4, 6))
        power = np.abs(np.fft.fft2(out[:, :, 0] - out[:, :, 0].mean())) ** 2
        fine = power.copy()
        fine[np.ix_(*[[*range(7), *range(-6, 0)]] * 2)] = 0
        assert fine.sum() < 0.1 * power.sum()
    # With every probability 0 it is down_up and nothing else.
    plain = d.unrecognizable(image, np.random.default_rng(0), (5, 5), 0, 0, 0, 0)
    assert np.array_equal(plain, d.down_up(image, 5))
    for seed in range(5):
        once = d.unrecognizable(image, np.random.default_rng(seed), (5, 5), 0, 0, 1, 0)
        assert not np.array_equal(once, plain)
    with pytest.raises(ValueError, match=r"unrecognizable: expected sides = \(low, high\) in \[1, 48\], got \(8, 4\)"):
        d.unrecognizable(image, np.random.default_rng(0), (8, 4))
    with pytest.raises(ValueError, match="unrecognizable: expected motion"):
        d.unrecognizable(image, np.random.default_rng(0), motion=1.5)
