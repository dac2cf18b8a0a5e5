"""Synthetic identities: face-like renderings with known identity and true quality, the data the library brings along.

Nothing is downloaded or stored: pixels are a pure function of (seed, split, identity, image, size, quality), the same
on every machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from recog_fast._arguments import is_choice

from .names import MadeNames, Names
from .synthetic_drawing import draw
from .synthetic_parameters import (
    PAIRS,
    QUALITIES,
    SPLITS,
    Draws,
    Words,
    identity_draws,
    philox,
    picture_draws,
    quality_factors,
)
from .synthetic_sensor import photograph

_BATCH = 8  # pictures drawn at once: their grids stay in the second-level cache


def _check_int(name: str, value: int, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"SyntheticIdentities: expected {name} an int, got {value!r}")
    if not low <= value <= high:
        raise ValueError(f"SyntheticIdentities: expected {name} between {low} and {high}, got {value}")
    return int(value)


class SyntheticIdentities(Dataset[tuple[NDArray[np.uint8], int]]):
    """Drawn faces: item i is (image uint8 (size, size, 3) RGB, label int).

    num_identities, images_per_identity  item i shows identity i // images_per_identity
    size            pixels, 32..112; the face is framed as in an aligned crop
    seed            0..2^64 - 1
    split           "labelled": labels 0..num_identities - 1; "unlabelled" (other people, pictures of the same kind) and
                    "unrecognizable" (3 to 6 pixels, or blurred or dark and noisy past recognition): label -1,
                    num_classes 0. The splits share no identity.
    quality         "mixed": low resolution, blur, noise, occlusion and large poses occur; "clean": none of them
    first_identity  shows identities first_identity, first_identity + 1, ... of the split: disjoint ranges are
                    disjoint people (train and test)

    Identities come from continuous distributions (skull, eyes, brows, nose, mouth, hair, skin, marks), so some look
    alike. Each picture has its own pose, light, expression, occlusion, background, resolution, blur and noise.

    Raises TypeError for sizes that are no int, ValueError for values out of range.
    """

    def __init__(
        self,
        num_identities: int = 1000,
        images_per_identity: int = 20,
        size: int = 56,
        seed: int = 0,
        split: str = "labelled",
        quality: str = "mixed",
        first_identity: int = 0,
    ) -> None:
        self.num_identities = _check_int("num_identities", num_identities, 1, 1 << 31)
        self.images_per_identity = _check_int("images_per_identity", images_per_identity, 1, 1 << 31)
        self.size = _check_int("size", size, 32, 112)
        self.seed = _check_int("seed", seed, 0, (1 << 64) - 1)
        self.first_identity = _check_int("first_identity", first_identity, 0, 1 << 31)
        if not is_choice(split, SPLITS):
            raise ValueError(f"SyntheticIdentities: expected split one of {SPLITS}, got {split!r}")
        if not is_choice(quality, QUALITIES):
            raise ValueError(f"SyntheticIdentities: expected quality one of {QUALITIES}, got {quality!r}")
        self.split, self.quality_mode = split, quality
        self._images: NDArray[np.uint8] | None = None
        self._factors: Draws | None = None

    def __len__(self) -> int:
        return self.num_identities * self.images_per_identity

    def __getitem__(self, index: int) -> tuple[NDArray[np.uint8], int]:
        n = len(self)
        if not -n <= index < n:
            raise IndexError(f"SyntheticIdentities: expected an index within {n} items, got {index}")
        index = int(index) % n
        image = self.render(np.asarray([index]))[0] if self._images is None else self._images[index].copy()
        return image, index // self.images_per_identity if self.split == "labelled" else -1

    @property
    def num_classes(self) -> int:
        """Number of labelled classes: 0 for the splits without labels."""
        return self.num_identities if self.split == "labelled" else 0

    @property
    def labels(self) -> NDArray[np.int64]:
        """(N,) int64, -1 for the splits without labels."""
        if self.split != "labelled":
            return np.full(len(self), -1, dtype=np.int64)
        return self.identities - self.first_identity

    @property
    def identities(self) -> NDArray[np.int64]:
        """(N,) int64: the identity shown, also where the label hides it; counted from 0 within the split and seed."""
        return np.repeat(np.arange(self.num_identities, dtype=np.int64), self.images_per_identity) + self.first_identity

    @property
    def paths(self) -> Names:
        """N names such as "synthetic/000123/07" (identity, picture); other splits: "synthetic/unlabelled/000123/07"."""
        return MadeNames(len(self), self._path)

    def _path(self, index: int) -> str:
        identity, picture = divmod(index, self.images_per_identity)
        folder = "synthetic" if self.split == "labelled" else f"synthetic/{self.split}"
        return f"{folder}/{self.first_identity + identity:06d}/{picture:02d}"

    @property
    def quality_factors(self) -> Draws:
        """Ingredients of the true quality, each (N,) float32 in [0, 1]: resolution, blur, occlusion, pose, noise.

        Nothing is rendered; what each means: `synthetic_parameters.quality_factors`.
        """
        if self._factors is None:
            parts = [
                quality_factors(self._pictures(*self._numbers(rows))) for rows in _chunks(np.arange(len(self)), 8192)
            ]
            self._factors = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        return self._factors

    @property
    def quality(self) -> NDArray[np.float32]:
        """(N,) float32 in [0, 1]: the true quality, the product of `quality_factors`."""
        product = np.ones(len(self), dtype=np.float32)
        for factor in self.quality_factors.values():
            product = product * factor
        return product

    def _numbers(self, indices: NDArray[np.int64]) -> tuple[Words, Words]:
        identity = indices // self.images_per_identity + self.first_identity
        return identity.astype(np.uint64), (indices % self.images_per_identity).astype(np.uint64)

    def _pictures(self, identity: Words, image: Words) -> Draws:
        return picture_draws(self.seed, SPLITS.index(self.split), identity, image, self.size, self.quality_mode)

    def render(self, indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Pictures of the given items, indices (B,) -> (B, size, size, 3) uint8: the same pixels as item by item.

        Raises IndexError for an index outside 0..N - 1.
        """
        indices = np.asarray(indices, dtype=np.int64)
        if len(indices) and not 0 <= indices.min() <= indices.max() < len(self):
            raise IndexError(
                f"SyntheticIdentities: expected indices in 0..{len(self) - 1}, got {indices.min()}..{indices.max()}"
            )
        out = np.empty((len(indices), self.size, self.size, 3), dtype=np.uint8)
        split = SPLITS.index(self.split)
        for start in range(0, len(indices), _BATCH):
            identity, image = self._numbers(indices[start : start + _BATCH])
            draws = {**identity_draws(self.seed, split, identity), **self._pictures(identity, image)}
            out[start : start + _BATCH] = photograph(draw(draws, self.size), draws, self.seed, split, identity, image)
        return out

    def render_all(self, workers: int = 1) -> NDArray[np.uint8]:
        """All pictures, (N, size, size, 3) uint8, drawn by `workers` threads; the cache itself if there is one.

        Threads, because numpy releases the interpreter's lock while it draws and nothing has to be copied.
        """
        workers = _check_int("workers", workers, 1, 1 << 16)
        if self._images is not None:
            return self._images
        chunks = list(_chunks(np.arange(len(self)), 16 * _BATCH))
        if workers == 1:
            return np.concatenate([self.render(rows) for rows in chunks])
        with ThreadPoolExecutor(workers) as pool:
            return np.concatenate(list(pool.map(self.render, chunks)))

    def cache(self, workers: int = 1) -> SyntheticIdentities:
        """Renders everything once and keeps it (N * size^2 * 3 bytes); returns self."""
        self._images = self.render_all(workers)
        return self

    def verification_pairs(
        self, num_pairs: int = 6000, seed: int = 0, folds: int = 10
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
        """Pairs as LFW lists them: (index_a, index_b, same), each (num_pairs,).

        `folds` contiguous folds of equal length; in each, first half the same person, then half two people; no pair
        twice, no identity in two folds.

        Raises ValueError for a split without labels, num_pairs that is no multiple of 2 * folds, or too few identities
        or pictures for that many pairs.
        """
        num_pairs = _check_int("num_pairs", num_pairs, 2, 1 << 31)
        seed, folds = _check_int("seed", seed, 0, (1 << 64) - 1), _check_int("folds", folds, 1, num_pairs)
        if self.split != "labelled":
            raise ValueError(
                f"SyntheticIdentities: expected split 'labelled' for verification pairs, got {self.split!r}"
            )
        half, rest = divmod(num_pairs, 2 * folds)
        if rest:
            raise ValueError(
                f"SyntheticIdentities: expected num_pairs a multiple of 2 * folds = {2 * folds}, got {num_pairs}"
            )
        n, m = self.num_identities, self.images_per_identity
        people = n // folds
        same_pairs, other_pairs = people * (m * (m - 1) // 2), people * (people - 1) // 2 * m * m
        if half > min(same_pairs, other_pairs):
            raise ValueError(
                f"SyntheticIdentities: expected enough identities and images for {half} same and {half} different "
                f"pairs in each of {folds} folds, got {people} identities of {m} images a fold: {same_pairs} same and "
                f"{other_pairs} different pairs"
            )
        order = np.argsort(_random_words(seed, 0, 0, n), kind="stable")
        rows: list[NDArray[np.int64]] = []
        for fold in range(folds):
            members = order[fold * people : (fold + 1) * people]
            rows.append(_same_pairs(_distinct(seed, 2 * fold + 1, same_pairs, half), members, m))
            rows.append(_different_pairs(_distinct(seed, 2 * fold + 2, other_pairs, half), members, m))
        pairs = np.concatenate(rows, axis=1)
        same = np.tile(np.repeat(np.asarray([True, False]), half), folds)
        return pairs[0], pairs[1], same


def _chunks(indices: NDArray[np.int64], length: int) -> Iterator[NDArray[np.int64]]:
    for start in range(0, len(indices), length):
        yield indices[start : start + length]


def _random_words(seed: int, stream: int, start: int, count: int) -> NDArray[np.int64]:
    """`count` random whole numbers below 2^62 of the pair stream, from number `start` on."""
    counter = np.arange(start, start + count, dtype=np.uint64)
    fixed = np.zeros(1, dtype=np.uint64)
    high, low, _, _ = philox((counter, fixed + np.uint64(stream), fixed, fixed + np.uint64(PAIRS)), seed)
    return (((high << np.uint64(32)) | low) >> np.uint64(2)).astype(np.int64)


def _distinct(seed: int, stream: int, total: int, count: int) -> NDArray[np.int64]:
    """`count` distinct numbers below `total`, in random order."""
    if count * 2 > total:
        return np.argsort(_random_words(seed, stream, 0, total), kind="stable")[:count]
    found = np.empty(0, dtype=np.int64)
    start = 0
    while len(found) < count:
        fresh = _random_words(seed, stream, start, 2 * count) % total
        start += 2 * count
        values, first = np.unique(np.concatenate([found, fresh]), return_index=True)
        found = values[np.argsort(first)]
    return found[:count]


def _corner(code: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Numbers 0, 1, 2, ... to pairs (0, 1), (0, 2), (1, 2), (0, 3), ...: code = b (b - 1) / 2 + a with a < b."""
    b = ((1.0 + np.sqrt(1.0 + 8.0 * code.astype(np.float64))) / 2.0).astype(np.int64)
    # The square root may be off by one for large codes.
    b = np.where(b * (b - 1) // 2 > code, b - 1, b)
    b = np.where((b + 1) * b // 2 <= code, b + 1, b)
    return code - b * (b - 1) // 2, b


def _same_pairs(codes: NDArray[np.int64], members: NDArray[np.int64], images: int) -> NDArray[np.int64]:
    person, code = codes % len(members), codes // len(members)
    a, b = _corner(code)
    base = members[person] * images
    return np.stack([base + a, base + b])


def _different_pairs(codes: NDArray[np.int64], members: NDArray[np.int64], images: int) -> NDArray[np.int64]:
    image_a, rest = codes % images, codes // images
    image_b, code = rest % images, rest // images
    a, b = _corner(code)
    return np.stack([members[a] * images + image_a, members[b] * images + image_b])
