"""What a synthetic identity and one picture of it are: named numbers drawn from a counter-based generator.

Every number is a pure function of (seed, split, identity, image, name), so item i costs O(1) and depends neither on
order nor on how many identities there are. The generator is Philox4x32-10 (Salmon et al., "Parallel random numbers: as
easy as 1, 2, 3", SC 2011) on integer arrays, and what follows uses only + - * / and comparisons, which IEEE 754 fixes
to the last bit: the same numbers on every machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]
# float32 throughout; the type checker is told less, because it takes float32 times a Python number for float64.
Floats = NDArray[np.floating[Any]]
Draws = dict[str, NDArray[np.float32]]

SPLITS = ("labelled", "unlabelled", "unrecognizable")
IDENTITY, PICTURE, NOISE, PAIRS = range(4)

OCCLUSIONS = ("none", "glasses", "sunglasses", "mask", "bar", "hat")
# Share of the face each occlusion hides (a bar: its width instead).
HIDDEN = (0.0, 0.06, 0.3, 0.45, 0.0, 0.1)

# name: (mean, standard deviation) of a bell curve bounded at 3.46 deviations; lengths in half image widths, x right,
# y down, centre (0, 0).
IDENTITY_NORMAL: dict[str, tuple[float, float]] = {
    "skull_width": (0.66, 0.05), "skull_top": (0.9, 0.055), "chin": (0.86, 0.065), "jaw_taper": (0.22, 0.13),
    "jaw_square": (0.25, 0.16), "ear_size": (0.13, 0.03), "ear_y": (0.02, 0.04), "eye_x": (0.275, 0.032),
    "eye_y": (-0.07, 0.03), "eye_width": (0.122, 0.019), "eye_height": (0.064, 0.017), "eye_slant": (0.06, 0.15),
    "iris": (0.056, 0.007), "iris_tone": (0.5, 0.3), "lid": (0.020, 0.007), "crease": (0.35, 0.25),
    "socket": (0.16, 0.09), "brow_gap": (0.15, 0.032), "brow_length": (0.165, 0.028), "brow_thick": (0.027, 0.012),
    "brow_arch": (0.04, 0.032), "brow_tilt": (0.02, 0.17), "brow_dark": (0.75, 0.15), "brow_inner": (0.0, 0.025),
    "nose_y": (0.235, 0.045), "nose_width": (0.125, 0.03), "nose_bridge": (0.055, 0.017), "nose_tip": (0.055, 0.015),
    "nose_relief": (0.55, 0.2), "mouth_y": (0.485, 0.037), "mouth_width": (0.215, 0.04), "lip_upper": (0.04, 0.016),
    "lip_lower": (0.055, 0.02), "cupid": (0.35, 0.2), "lip_red": (0.35, 0.2), "mouth_bend": (0.0, 0.025),
    "cheek": (0.10, 0.10), "chin_cleft": (0.05, 0.12), "folds": (0.12, 0.14), "asymmetry": (0.0, 0.018),
    "skin_red": (0.0, 0.03), "skin_yellow": (0.0, 0.025), "hairline": (-0.60, 0.10), "hair_curve": (0.35, 0.45),
    "hair_side": (0.0, 0.22), "hair_volume": (0.11, 0.05), "hair_wave": (0.03, 0.03), "hair_streak": (0.10, 0.07),
    "hair_red": (0.0, 0.05), "mole_size": (0.012, 0.012),
}  # fmt: skip
# name: (low, high), uniform.
IDENTITY_UNIFORM: dict[str, tuple[float, float]] = {
    "skin_tone": (0.05, 0.9), "hair_tone": (0.0, 1.0), "hair_length": (-0.9, 1.1), "beard": (-1.6, 1.0),
    "beard_line": (0.30, 0.62), "moustache": (-1.6, 1.0), "freckles": (-1.2, 0.7), "freckle_phase": (0.0, 1.0),
    "mole1_u": (-0.5, 0.5), "mole1_v": (-0.4, 0.7), "mole2_u": (-0.5, 0.5), "mole2_v": (-0.4, 0.7),
    "mole3_u": (-0.5, 0.5), "mole3_v": (-0.4, 0.7),
}  # fmt: skip
# Per picture. Angles in degrees, light and colour as gains.
PICTURE_NORMAL: dict[str, tuple[float, float]] = {
    "yaw": (0.0, 17.0), "pitch": (0.0, 9.0), "roll": (0.0, 5.0), "shift_x": (0.0, 0.03), "shift_y": (0.0, 0.03),
    "zoom": (1.0, 0.04), "light_x": (0.0, 0.55), "light_y": (-0.25, 0.35), "contrast": (0.0, 0.3),
    "warmth": (0.0, 0.11), "green": (0.0, 0.03), "smile": (0.25, 0.6), "squint": (0.95, 0.16),
    "brow_raise": (0.0, 0.02), "gaze": (0.0, 0.3), "fringe": (0.0, 0.05), "puff": (0.0, 0.02), "make_up": (0.0, 0.10),
    "tan": (0.0, 0.08),
}  # fmt: skip
PICTURE_UNIFORM: dict[str, tuple[float, float]] = {
    "exposure": (0.55, 1.25), "ambient": (0.35, 0.8), "open": (-0.16, 0.12), "occlusion": (0.0, 1.0),
    "occlusion_tone": (0.0, 1.0), "occlusion_hue": (0.0, 1.0), "bar_angle": (-1.0, 1.0), "bar_x": (-0.6, 0.6),
    "bar_y": (-0.5, 0.7), "bar_width": (0.08, 0.28), "back_r": (0.0, 1.0), "back_g": (0.0, 1.0), "back_b": (0.0, 1.0),
    "back_r2": (0.0, 1.0), "back_g2": (0.0, 1.0), "back_b2": (0.0, 1.0), "back_angle": (-1.0, 1.0),
    "back_stripes": (-3.0, 8.0), "back_x": (-1.0, 1.0), "back_y": (-1.0, 0.2), "shirt_r": (0.0, 1.0),
    "shirt_g": (0.0, 1.0), "shirt_b": (0.0, 1.0), "low": (0.0, 1.0), "low_depth": (0.0, 1.0), "blurred": (0.0, 1.0),
    "blur_depth": (0.0, 1.0), "grain": (0.0, 1.0), "ruin": (0.0, 1.0),
}  # fmt: skip


def philox(counter: tuple[Words, Words, Words, Words], seed: int) -> tuple[Words, Words, Words, Words]:
    """Philox4x32-10: a counter (four broadcastable uint64 arrays of 32-bit words), a 64-bit key -> four such arrays."""
    c0, c1, c2, c3 = np.broadcast_arrays(*counter)
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    k0, k1 = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    for _ in range(10):
        p0, p1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (p1 >> half) ^ c1 ^ np.uint64(k0), p1 & low, (p0 >> half) ^ c3 ^ np.uint64(k1), p0 & low
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def _draw(
    normal: Mapping[str, tuple[float, float]],
    uniform: Mapping[str, tuple[float, float]],
    seed: int,
    stream: int,
    identity: Words,
    image: Words,
) -> Draws:
    """The numbers of both tables, float32 (B,) each: one block of random words per name (in table order) and item."""
    names = [*normal, *uniform]
    blocks = np.arange(len(names), dtype=np.uint64)[:, None]
    words = philox((blocks, image[None, :], identity[None, :], np.full((1, 1), stream, dtype=np.uint64)), seed)
    drawn: Draws = {}
    unit = [(w.astype(np.float64) + 0.5) / 4294967296.0 for w in words]
    # The sum of four uniforms has variance 1/3.
    bell = 1.7320508075688772 * (unit[0] + unit[1] + unit[2] + unit[3] - 2.0)
    for row, name in enumerate(names):
        if name in normal:
            mean, deviation = normal[name]
            value = mean + deviation * bell[row]
        else:
            low, high = uniform[name]
            value = low + (high - low) * unit[0][row]
        drawn[name] = value.astype(np.float32)
    return drawn


def identity_draws(seed: int, split: int, identity: Words) -> Draws:
    """Shape and colour of each identity (B,), as IDENTITY_NORMAL and IDENTITY_UNIFORM name them."""
    return _draw(IDENTITY_NORMAL, IDENTITY_UNIFORM, seed, IDENTITY + 16 * split, identity, np.zeros_like(identity))


@dataclass(frozen=True)
class _Shares:
    """How often and how badly pictures of one quality are degraded."""

    low: float  # share of pictures of low resolution
    blurred: float  # share of blurred pictures
    grain: float  # largest amplitude of the sensor's noise, in grey levels
    turn: float  # factor on yaw, pitch and roll
    occlusion: tuple[float, ...]  # from which draw in [0, 1) on each of OCCLUSIONS[1:] begins


_SHARES = {
    "mixed": _Shares(low=0.45, blurred=0.35, grain=14.0, turn=1.0, occlusion=(0.64, 0.76, 0.82, 0.89, 0.95)),
    "clean": _Shares(low=0.0, blurred=0.0, grain=3.0, turn=0.4, occlusion=(1.0, 1.0, 1.0, 1.0, 1.0)),
}
QUALITIES = tuple(_SHARES)


def picture_draws(seed: int, split: int, identity: Words, image: Words, size: int, quality: str) -> Draws:
    """Nuisance of each picture (B,), degraded as `quality` and the split say; to the two tables it adds

    resolution  pixels across the picture before it is enlarged to `size`, at most `size`
    blur        radius of the blur kernel as a share of the picture's width
    noise       amplitude of the sensor's noise in grey levels
    kind        index into OCCLUSIONS
    hidden      share of the face that is hidden
    """
    p = _draw(PICTURE_NORMAL, PICTURE_UNIFORM, seed, PICTURE + 16 * split, identity, image)
    shares = _SHARES[quality]
    for name in ("yaw", "pitch", "roll"):
        p[name] = p[name] * np.float32(shares.turn)
    fine = 1.0 - p["low_depth"]
    # From 64 pixels down to 7, denser at the low end than a uniform resolution.
    p["resolution"] = np.where(p["low"] < shares.low, 7.0 + 57.0 * fine * fine, 112.0).astype(np.float32)
    p["blur"] = ((p["blurred"] < shares.blurred) * (0.01 + 0.06 * p["blur_depth"] * p["blur_depth"])).astype(np.float32)
    p["noise"] = shares.grain * p["grain"] * p["grain"]
    kind = np.zeros(len(identity), dtype=np.int64)
    for begin in shares.occlusion:
        kind += p["occlusion"] >= np.float32(begin)
    if SPLITS[split] == "unrecognizable":
        _ruin(p)
    p["resolution"] = np.minimum(p["resolution"], np.float32(size))
    p["kind"] = kind.astype(np.float32)
    p["hidden"] = np.asarray(HIDDEN, dtype=np.float32)[kind] + (kind == 4) * p["bar_width"] * np.float32(1.6)
    return p


def _ruin(p: Draws) -> None:
    """Takes each picture past recognition: 3 to 5 pixels, a blur as wide as the face, or dark, small and noisy."""
    way = np.minimum((p["ruin"] * 3.0).astype(np.int64), 2)
    ruined = {
        "resolution": (3.0 + 2.0 * p["low_depth"], p["resolution"], 8.0 + 8.0 * p["low_depth"]),
        "blur": (p["blur"], 0.17 + 0.10 * p["blur_depth"], p["blur"]),
        "noise": (p["noise"], p["noise"], 30.0 + 30.0 * p["grain"]),
        "exposure": (p["exposure"], p["exposure"], 0.3 * p["exposure"]),
    }
    for name, choices in ruined.items():
        p[name] = np.choose(way, choices).astype(np.float32)


def quality_factors(p: Draws) -> Draws:
    """Factors of the true quality, each (B,) float32 in [0, 1]; their product is the quality.

    resolution  0 at 4 pixels, 0.28 more per doubling (linear inside an octave), 1 at 48
    blur        (1 - r / 0.2)^2 for a kernel radius of r picture widths, 0 beyond
    occlusion   1 - hidden share of the face
    pose        1 - sin^2(yaw) - sin^2(pitch), at least 0
    noise       1 / (1 + (amplitude / (45 exposure))^2)
    """
    resolution = np.zeros_like(p["resolution"])
    for low, high, gain in ((4, 8, 0.28), (8, 16, 0.28), (16, 32, 0.28), (32, 48, 0.16)):
        resolution += np.float32(gain) * np.clip((p["resolution"] - low) / (high - low), 0.0, 1.0)
    yaw, pitch = sine(p["yaw"]), sine(p["pitch"])
    sharp = np.maximum(1.0 - p["blur"] / 0.2, 0.0)
    grain = p["noise"] / (45.0 * p["exposure"])
    factors = {
        "resolution": np.minimum(resolution, 1.0),
        "blur": sharp * sharp,
        "occlusion": 1.0 - p["hidden"],
        "pose": np.maximum(1.0 - yaw * yaw - pitch * pitch, 0.0),
        "noise": 1.0 / (1.0 + grain * grain),
    }
    return {name: value.astype(np.float32) for name, value in factors.items()}


def sine(degrees: Floats) -> NDArray[np.float32]:
    """sin of angles within 90 degrees by its Taylor polynomial (error < 2e-4): a library's sin varies by machine."""
    x = degrees * np.float32(0.017453292519943295)
    s = x * x
    return (x * (1 - s / 6 * (1 - s / 20 * (1 - s / 42)))).astype(np.float32)
