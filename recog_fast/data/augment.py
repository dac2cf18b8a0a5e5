"""Random augmentation that is a pure function of (seed, epoch, index): the same pixels in every worker, process and
resumed run."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from recog_fast._arguments import are_numbers, is_number, is_whole

from . import degradations
from .images import Image, LabelledImages, images_to_tensor, resize_image
from .wrappers import Wrapper, checked_sides

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
        for name in (*(field.name for field in dataclasses.fields(self)[:8]), "rotation"):
            value = getattr(self, name)
            if not is_number(value, 0.0, 1.0):
                raise ValueError(f"Augmentation: expected {name} in [0, 1], got {value!r}")
        for name in ("crop_scale", "occlusion_area", "motion_length", "blur_sigma"):
            if not are_numbers(getattr(self, name), 2, 0.0):
                raise ValueError(f"Augmentation: expected {name} as two numbers >= 0, got {getattr(self, name)!r}")
        if not is_whole(self.smallest, 1) or not is_number(self.degrees, 0.0):
            name, value = ("degrees", self.degrees) if is_whole(self.smallest, 1) else ("smallest", self.smallest)
            raise ValueError(f"Augmentation: expected {name} {'>= 0' if name == 'degrees' else 'as an integer >= 1'}, got {value!r}")

    @property
    def steps(self) -> bool:
        """Whether any step can happen."""
        return self.rotation > 0 or any(getattr(self, field.name) > 0 for field in dataclasses.fields(self)[:8])

    def __call__(self, image: Image, rng: np.random.Generator) -> Image:
        """(H, W, 3) uint8 -> (H, W, 3) uint8; the input is left alone."""
        coin = rng.random(8)
        if coin[0] < self.flip:
            # Pixels of three bytes are NumPy's slowest copy: torch mirrors them four times as fast.
            image = torch.flip(torch.from_numpy(np.ascontiguousarray(image)), (1,)).numpy()
        # Its coin comes after the others and only where it is asked for: runs without it keep their pixels.
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


class Augmented(Wrapper):
    """Images resized to `size`, augmented, as the network's input: ((3, H, W) float32 in [-1, 1], label).

    A key is (epoch, index), as `ResumableBatches` yields them, or an index, which takes the epoch of `set_epoch` (that
    call does not reach workers that already run). The random numbers come from (seed, epoch, index) alone.
    augmentation=None leaves pixels alone.
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
