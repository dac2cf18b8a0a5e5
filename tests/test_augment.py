"""Augmentation is a pure function of (seed, epoch, index), in any worker."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from recog_fast.data import Augmentation, Augmented, ResumableBatches, images_to_tensor
from recog_fast.data.augment import _mixed, coins

ALL = Augmentation(0.5, affine=0.5, crop=0.5, light=0.5, occlusion=0.5, motion=0.5, blur=0.5, low_resolution=0.5)


class Pictures:
    """Twelve random images of four classes."""

    num_classes = 4
    labels = np.arange(12, dtype=np.int64) % 4

    def __init__(self) -> None:
        self.paths = [str(i) for i in range(12)]
        self.images = np.random.default_rng(0).integers(0, 256, (12, 20, 16, 3), np.uint8)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.images[index], int(self.labels[index])


STEPS = [*(field.name for field in dataclasses.fields(Augmentation)[:8]), "rotation"]


@pytest.mark.parametrize("name", STEPS)
def test_each_step(name: str) -> None:
    """Probability 1 changes the image (flip: mirrors it), 0 leaves it, 1/2 does either; the input stays."""
    image = Pictures().images[0]
    before = image.copy()
    off = dict.fromkeys(STEPS, 0.0)
    assert np.array_equal(Augmentation(**off)(image, np.random.default_rng(0)), image)
    out = Augmentation(**{**off, name: 1.0})(image, np.random.default_rng(0))
    assert out.shape == image.shape and out.dtype == np.uint8 and not np.array_equal(out, image)
    if name == "flip":
        assert np.array_equal(out, image[:, ::-1])
    half = Augmentation(**{**off, name: 0.5})
    changed = [not np.array_equal(half(image, np.random.default_rng(seed)), image) for seed in range(64)]
    assert 10 < sum(changed) < 54
    assert np.array_equal(image, before)


def test_ranges_reach_their_step() -> None:
    image = np.random.default_rng(1).integers(0, 256, (40, 40, 3), np.uint8)
    none = {"flip": 0.0}
    for weak, strong in [
        (Augmentation(**none, crop=1, crop_scale=(0.99, 1.0)), Augmentation(**none, crop=1, crop_scale=(0.1, 0.1))),
        (
            Augmentation(**none, occlusion=1, occlusion_area=(0.01, 0.01)),
            Augmentation(**none, occlusion=1, occlusion_area=(0.9, 0.9)),
        ),
        (
            Augmentation(**none, motion=1, motion_length=(1, 1)),
            Augmentation(**none, motion=1, motion_length=(15, 15)),
        ),
        (Augmentation(**none, blur=1, blur_sigma=(0.3, 0.3)), Augmentation(**none, blur=1, blur_sigma=(5, 5))),
        (Augmentation(**none, rotation=1, degrees=1), Augmentation(**none, rotation=1, degrees=90)),
        (Augmentation(**none, low_resolution=1, smallest=38), Augmentation(**none, low_resolution=1, smallest=2)),
    ]:
        change = [
            np.mean([np.abs(a(image, np.random.default_rng(s)).astype(int) - image).mean() for s in range(8)])
            for a in (weak, strong)
        ]
        assert change[0] < change[1]


@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan")])
def test_probabilities_are_checked(value: float) -> None:
    with pytest.raises(ValueError, match=r"Augmentation: expected blur in \[0, 1\], got"):
        Augmentation(blur=value)


def test_seed_epoch_and_index_decide() -> None:
    pictures = Pictures()
    dataset = Augmented(pictures, ALL, seed=3, size=24)
    assert (len(dataset), dataset.num_classes) == (12, 4)
    assert dataset.labels is pictures.labels and dataset.paths is pictures.paths
    image, label = dataset[2, 5]
    assert image.shape == (3, 24, 24) and image.dtype == torch.float32 and label == 1
    assert -1 <= float(image.min()) < float(image.max()) <= 1
    dataset.set_epoch(2)
    assert torch.equal(dataset[5][0], image) and torch.equal(dataset[-7][0], image)
    others = [dataset[3, 5][0], Augmented(pictures, ALL, seed=4, size=24)[2, 5][0], dataset[2, 6][0]]
    assert not any(torch.equal(image, other) for other in others)
    plain = Augmented(pictures)
    assert torch.equal(plain[5][0], images_to_tensor(pictures.images[5]))
    for call in (lambda: Augmented(pictures, seed=-1), lambda: dataset.set_epoch(-1)):
        with pytest.raises(ValueError, match=">= 0, got -1"):
            call()


def test_workers_and_persistence_change_nothing() -> None:
    """Two epochs of two persistent workers equal the main process, pixel for pixel: keys carry the epoch."""
    dataset = Augmented(Pictures(), ALL, seed=1)
    runs = []
    for workers in (0, 2):
        batches = ResumableBatches(dataset, 5, seed=2, drop_last=False)
        loader = DataLoader(dataset, batch_sampler=batches, num_workers=workers, persistent_workers=workers > 0)
        runs.append([batch for _ in range(2) for batch in batches.track(loader)])
    assert len(runs[0]) == len(runs[1]) == 6
    for (images, labels), (others, same) in zip(*runs, strict=True):
        assert torch.equal(images, others) and torch.equal(labels, same)


def test_coins_are_splitmix64() -> None:
    """The published outputs of SplitMix64 for seed 1234567, and coins as numbers 8 i ... 8 i + 7 of one such stream per epoch."""
    step, word = 0x9E3779B97F4A7C15, 2**64 - 1
    first = [_mixed((1234567 + k * step) & word) for k in (1, 2, 3)]
    assert first == [6457827717110365317, 3203168211198807973, 9817491932198370423]
    start = _mixed((_mixed((3 + step) & word) + 5 + step) & word)
    expected = [(_mixed((start + (8 * 7 + k) * step) & word) >> 11) * 2.0**-53 for k in range(1, 9)]
    assert coins(3, np.array([5]), np.array([7]))[0].tolist() == expected


def test_coins_depend_on_seed_epoch_and_sample_alone() -> None:
    epochs, samples = np.array([0, 1, 1, 0]), np.array([4, 4, 2, 2**40])
    whole = coins(9, epochs, samples)
    assert np.array_equal(whole, np.concatenate([coins(9, epochs[k : k + 1], samples[k : k + 1]) for k in range(4)]))
    assert np.array_equal(whole[:, :3], coins(9, epochs, samples, 3)) and len(np.unique(whole)) == 32
    many = coins(2**70 + 1, np.zeros(4096, np.int64), np.arange(4096))
    assert 0 <= many.min() < 0.001 and 0.999 < many.max() < 1 and abs(many.mean() - 0.5) < 0.01
    assert np.abs(np.corrcoef(many.T) - np.eye(8)).max() < 0.1


def test_coins_of_steps_that_cannot_happen_are_not_drawn() -> None:
    epochs, samples = np.zeros(64, np.int64), np.arange(64)
    flips = Augmentation(flip=0.5)
    drawn = flips.draw(1, epochs, samples)
    assert np.array_equal(drawn[:, 0], coins(1, epochs, samples)[:, 0]) and (drawn[:, 1:] == 1).all()
    assert not flips.goes_on(drawn).any() and Augmentation(rotation=0.1).goes_on(drawn).all()
    assert np.array_equal(ALL.goes_on(ALL.draw(1, epochs, samples)), (coins(1, epochs, samples)[:, 1:] < 0.5).any(axis=1))
