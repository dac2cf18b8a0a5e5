"""ArcFace (m = 0.3) against plain softmax on cosines: OMNI, everything else equal."""

from __future__ import annotations

import sys

from recipes import omniglot
from recipes.common import Gate, Outcome, main


def run(seeds: list[int]) -> Outcome:
    """Paired means: +2 points of TAR at FAR 1e-2, +0.3 points of accuracy."""
    outcome = Outcome(
        "margin_gain",
        "ArcFace against no margin (Omniglot)",
        seeds,
        gates=[
            Gate("TAR@1e-2 clean, points", 2.0),
            Gate("accuracy clean, points", 0.3),
            Gate("accuracy clean, with", 0.92),
        ],
        note="paired differences, ArcFace minus softmax",
    )
    for seed in seeds:
        better = omniglot.run(omniglot.baseline(seed), "ArcFace")
        worse = omniglot.run(omniglot.without_margin(seed), "softmax")
        outcome.put(omniglot.differences(better, worse))
        outcome.put({f"{name}, with": value for name, value in better.items()})
    return outcome


if __name__ == "__main__":
    sys.exit(main("margin_gain", run, seeds=(0, 1, 2)))
