"""Stored embeddings of LFW fold 5 (737 images of 422 people, MobileFaceNet 128-D): clean, 16x16, 8x8, 4x4; no network runs.

ERS (math.md 5): e = min(1 - <f_UI, f>, 1), f_UI the mean of the unit 8x8 embeddings of the same people.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from recipes.common import data_dir

CONDITIONS = ("clean", "down16", "down8")
MIX = (0.55, 0.2, 0.25)
Floats = NDArray[np.float64]


def unit(x: Floats) -> Floats:
    """Rows over their L2 norm."""
    rows: Floats = x / np.linalg.norm(x, axis=-1, keepdims=True)
    return rows


def recognizability(embeddings: Floats, center: Floats) -> Floats:
    """ERS (M,)."""
    score: Floats = np.minimum(1.0 - unit(embeddings) @ center, 1.0)
    return score


@dataclass(frozen=True)
class Fold:
    """rows: condition -> (737, 128) with norms; people (737,); center (128,) unit."""

    rows: dict[str, Floats]
    people: NDArray[np.int64]
    center: Floats


@functools.cache
def load() -> Fold:
    """The stored file."""
    with np.load(data_dir() / "embeddings" / "lfw_fold05_mobilefacenet128.npz") as arrays:
        rows = {name: arrays[name].astype(np.float64) for name in (*CONDITIONS, "down4")}
        people = np.unique([str(name).split("/")[0] for name in arrays["names"]], return_inverse=True)[1]
    return Fold(rows, people.astype(np.int64), unit(unit(rows["down8"]).mean(axis=0)))


def mixed(seed: int, mix: tuple[float, float, float] = MIX) -> Floats:
    """(737, 128): every image once, its condition drawn with the probabilities `mix`."""
    fold = load()
    level = np.random.default_rng(seed).choice(3, len(fold.people), p=mix)
    rows: Floats = np.stack([fold.rows[name] for name in CONDITIONS])[level, np.arange(len(fold.people))]
    return rows


def pairs() -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    """All 271,216 pairs (725 genuine): first, second, same."""
    people = load().people
    first, second = np.triu_indices(len(people), 1)
    return first, second, people[first] == people[second]
