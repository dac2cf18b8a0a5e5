"""Low-resolution augmentation: OMNI with and without down-sampling of a fifth of the training images (crop in both)."""

from __future__ import annotations

import sys

from recipes import omniglot
from recipes.common import Gate, Outcome, main


def run(seeds: list[int]) -> Outcome:
    """Three runs' worth of seeds by default: +3 points at 8x8, at most 1.5 points lost on clean images."""
    outcome = Outcome(
        "low_resolution",
        "low-resolution augmentation (Omniglot)",
        seeds,
        gates=[
            Gate("accuracy 8x8, points", 3.0),
            Gate("accuracy clean, points", -1.5),
        ],
        note="paired differences, with minus without down-sampling (p = 0.2, to 8 pixels or more)",
    )
    for seed in seeds:
        better = omniglot.run(omniglot.baseline(seed), "with")
        worse = omniglot.run(omniglot.without_low_resolution(seed), "without")
        outcome.put(omniglot.differences(better, worse))
        outcome.put({f"{name}, with": value for name, value in better.items()})
    return outcome


if __name__ == "__main__":
    sys.exit(main("low_resolution", run, seeds=(0, 1, 2)))
