"""Margins that do about as well: ArcFace with its exact and its straight-through gradient, CosFace, AdaFace (OMNI).

A floor, no ranking: they lie within a point of each other, as seeds do.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import recog_fast as rf
from recipes import omniglot
from recipes.common import Gate, Outcome, main


def adaface() -> Callable[[float], Any]:
    """One AdaFace for the whole run, its margin growing."""
    margin = rf.AdaFace(m=0.3)

    def at(share: float) -> rf.AdaFace:
        margin.m = 0.3 * share
        return margin

    return at


VARIANTS: dict[str, Callable[[], Callable[[float], Any]]] = {
    "ArcFace": lambda: lambda share: rf.ArcFace(0.3 * share),
    "ArcFace straight-through": lambda: lambda share: rf.ArcFace(0.3 * share, gradient="straight_through"),
    "CosFace": lambda: lambda share: rf.CosFace(0.2 * share),
    "AdaFace": adaface,
}


def run(seeds: list[int]) -> Outcome:
    """Accuracy on clean pairs >= .92 with each."""
    outcome = Outcome(
        "margins", "exact and straight-through ArcFace, CosFace, AdaFace (Omniglot): a floor", seeds,
        gates=[Gate(f"{name}, accuracy clean", 0.92) for name in VARIANTS],
        note="m = 0.3 (CosFace 0.2), ramped over the first half; not ranked",
    )  # fmt: skip
    for seed in seeds:
        values: dict[str, float] = {}
        for name, margin in VARIANTS.items():
            found = omniglot.run(replace(omniglot.baseline(seed), margin=margin()), name)
            values |= {f"{name}, {key}": found[key] for key in ("accuracy clean", "TAR@1e-2 clean", "TAR@1e-2 8x8")}
        outcome.put(values)
    return outcome


if __name__ == "__main__":
    sys.exit(main("margins", run, seeds=(0, 1, 2)))
