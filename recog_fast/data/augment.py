"""Random augmentation that is a pure function of (seed, epoch, index): the same pixels in every worker, process and
resumed run."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recog_fast._arguments import are_numbers, is_number, is_whole

from . import degradations
from .images import Image, LabelledImages, images_to_tensor, resize_image
from .wrappers import Wrapper, checked_sides

COINS = 8  # what decides which steps happen to an image
Key = int | tuple[int, int]  # index, or (epoch, index) as ResumableBatches yields it


@dataclass(frozen=True)
class Augmentation:
    """Probability of each step, applied in this order, and the ranges they draw from; see `degradations` for what each
    does.

    flip, rotation, affine, crop, light, occlusion, motion, blur, low_resolution  probabilities in [0, 1]
    degrees         rotation turns by up to so many         crop_scale  area kept by crop
    occlusion_area  share covered                           motion_length  pixels, at any angle
    blur_sigma      pixels, Gaussian                        smallest  shortest side low_resolution goes to, pixels
    QAFace: crop and low_resolution 0.2 each.
    Raises ValueError for a probability outside [0, 1], and ranges that are not two numbers.
    """

    flip: float = 0.5
    affine: float = 0.0
    crop: float = 0.0
    light: float = 0.0
    occlusion: float = 0.0
    motion: float = 0.0
    blur: float = 0.0
    low_resolution: float = 0.0
    crop_scale: tuple[float, float] = (0.7, 1.0)
    occlusion_area: tuple[float, float] = (0.05, 0.3)
    motion_length: tuple[float, float] = (3.0, 12.0)
    blur_sigma: tuple[float, float] = (0.5, 2.5)
    smallest: int = 12
    rotation: float = 0.0
    degrees: float = 20.0

    def __post_init__(self) -> None:
        for name in (*(field.name for field in dataclasses.fields(self)[:COINS]), "rotation"):
            value = getattr(self, name)
            if not is_number(value, 0.0, 1.0):
                raise ValueError(f"Augmentation: expected {name} in [0, 1], got {value!r}")
        for name in ("crop_scale", "occlusion_area", "motion_length", "blur_sigma"):
            if not are_numbers(getattr(self, name), 2, 0.0):
                raise ValueError(f"Augmentation: expected {name} as two numbers >= 0, got {getattr(self, name)!r}")
        if not is_whole(self.smallest, 1) or not is_number(self.degrees, 0.0):
            name, value = ("degrees", self.degrees) if is_whole(self.smallest, 1) else ("smallest", self.smallest)
            raise ValueError(f"Augmentation: expected {name} {'>= 0' if name == 'degrees' else 'as an integer >= 1'}, got {value!r}")

    @functools.cached_property
    def _chances(self) -> tuple[float, ...]:
        return tuple(getattr(self, field.name) for field in dataclasses.fields(self)[:COINS])

    @property
    def steps(self) -> bool:
        """Whether any step can happen."""
        return self.rotation > 0 or any(self._chances)

    def __call__(self, image: Image, rng: np.random.Generator) -> Image:
        """(H, W, 3) uint8 -> (H, W, 3) uint8; the input is left alone."""
        coin = rng.random(COINS)
        if coin[0] < self.flip:
            # Pixels of three bytes are NumPy's slowest copy: torch mirrors them four times as fast.
            image = torch.flip(torch.from_numpy(np.ascontiguousarray(image)), (1,)).numpy()
        return self.after_flip(image, rng, coin)

    def draw(self, seed: int, epochs: NDArray[np.int64], samples: NDArray[np.int64]) -> NDArray[np.float64]:
        """(N, 8) `coins` of samples (N,) in epochs (N,); 1, which is never below a probability, from the last step in use on."""
        used = max((k + 1 for k, chance in enumerate(self._chances) if chance > 0), default=0)
        if used == COINS:
            return coins(seed, epochs, samples)
        found = np.ones((len(samples), COINS))
        if used:
            found[:, :used] = coins(seed, epochs, samples, used)
        return found

    def goes_on(self, coins: NDArray[np.float64]) -> NDArray[np.bool_]:
        """(N,) bool: whether `after_flip` may change an image with coins (N, 8)."""
        if not any(self._chances[1:]) and not self.rotation:
            return np.zeros(len(coins), bool)
        if self.rotation:
            return np.ones(len(coins), bool)
        return np.asarray((coins[:, 1:] < self._chances[1:]).any(axis=1))

    def after_flip(self, image: Image, rng: np.random.Generator, coin: NDArray[np.float64]) -> Image:
        """The steps after the first: `coin` (8,) in [0, 1) says which of them, `rng` with what parameters."""
        # Rotation's coin comes after the others and only where it is asked for: runs without it keep their pixels.
        if self.rotation and rng.random() < self.rotation:
            image = degradations.rotate(image, rng.uniform(-self.degrees, self.degrees))
        if coin[1] < self.affine:
            image = degradations.affine(image, rng)
        if coin[2] < self.crop:
            image = degradations.crop(image, rng, self.crop_scale)
        if coin[3] < self.light:
            image = degradations.light(image, rng)
        if coin[4] < self.occlusion:
            image = degradations.occlude(image, rng, self.occlusion_area)
        if coin[5] < self.motion:
            image = degradations.motion_blur(image, rng.uniform(*self.motion_length), rng.uniform(0, 180))
        if coin[6] < self.blur:
            image = degradations.gaussian_blur(image, rng.uniform(*self.blur_sigma))
        if coin[7] < self.low_resolution:
            image = degradations.low_resolution(image, rng, self.smallest)
        return image


_GOLDEN, _WORD = 0x9E3779B97F4A7C15, (1 << 64) - 1


def _mixed(x: Any) -> Any:
    """The output function of SplitMix64, a bijection of 64 bits, of an array of uint64 or of a Python number (whose bits above 64
    are the caller's to cut)."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = x & _WORD if isinstance(x, int) else x
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    x = x & _WORD if isinstance(x, int) else x
    return x ^ (x >> 31)


@functools.lru_cache(maxsize=64)
def _start(seed: int, epoch: int) -> int:
    return int(_mixed((_mixed((seed + _GOLDEN) & _WORD) + epoch + _GOLDEN) & _WORD))


def coins(seed: int, epochs: NDArray[np.int64], samples: NDArray[np.int64], count: int = COINS) -> NDArray[np.float64]:
    """(N, count) uniform numbers in [0, 1) of samples (N,) in epochs (N,), count <= 8: a function of (seed, epoch, sample) alone.

    Counter-based, so that a whole batch is drawn at once where a generator for each image would cost a tenth of its decoding:
    numbers 8 sample ... 8 sample + 7 of SplitMix64 (Steele, Lea, Flood 2014) started at mix(mix(seed + g) + epoch + g),
    g = 2^64 / golden ratio; the upper 53 bits of each.
    """
    present = set(epochs.tolist())
    starts: Any = _start(seed, present.pop()) if len(present) == 1 else None
    if starts is None:
        starts = np.array([_start(seed, epoch) for epoch in epochs.tolist()], np.uint64)[:, None]
    places = samples.astype(np.uint64)[:, None] * COINS + np.arange(1, count + 1, dtype=np.uint64)
    drawn: NDArray[np.float64] = (_mixed(starts + places * _GOLDEN) >> 11) * 2.0**-53
    return drawn


class Augmented(Wrapper):
    """Images resized to `size`, augmented, as the network's input: items are (tensor (3, H, W) float32 in [-1, 1], label int).

    A key is (epoch, index), as `ResumableBatches` yields them, or an index, which takes the epoch of `set_epoch` (that
    call does not reach workers that already run). The random numbers come from (seed, epoch, index) alone.
    augmentation=None leaves pixels alone.

    Raises ValueError for a seed or epoch below 0 or a size below 1, TypeError for a dataset without images and labels, and for an
    augmentation that cannot be called.
    """

    def __init__(
        self,
        dataset: LabelledImages,
        augmentation: Augmentation | None = None,
        seed: int = 0,
        size: int | tuple[int, int] | None = None,
    ) -> None:
        if not is_whole(seed, 0):
            raise ValueError(f"Augmented: expected seed as an integer >= 0, got {seed!r}")
        if augmentation is not None and not callable(augmentation):
            raise TypeError(f"Augmented: expected augmentation as an Augmentation or None, got {augmentation!r}")
        if size is not None:
            checked_sides("Augmented", size)
        super().__init__(dataset)
        self.augmentation = augmentation
        self.seed = seed
        self.size = size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """The epoch of keys that are bare indices."""
        if epoch < 0:
            raise ValueError(f"Augmented: expected epoch >= 0, got {epoch}")
        self.epoch = epoch

    def __getitem__(self, key: Key) -> tuple[Tensor, int]:
        epoch, index = key if isinstance(key, tuple) else (self.epoch, key)
        image, label = self.dataset[index]
        if self.size is not None:
            image = resize_image(image, self.size)
        if self.augmentation is not None and self.augmentation.steps:
            image = self.augmentation(image, np.random.default_rng((self.seed, epoch, index % len(self))))
        return images_to_tensor(image), label
