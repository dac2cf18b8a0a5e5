"""QAFace (inject_scale 0.176) on Omniglot, paired with ArcFace: no effect was seen there; it must do no harm."""

from __future__ import annotations

import sys

import recog_fast as rf
from recipes import omniglot
from recipes.common import Gate, Outcome, main

START = 250  # steps: injection after the first of four epochs


def run(seeds: list[int]) -> Outcome:
    """Gate: not worse by more than 1.5 points of accuracy, clean, at 8x8 and across."""
    outcome = Outcome(
        "memory_characters", "QAFace against ArcFace (Omniglot): no harm", seeds,
        gates=[Gate(f"accuracy {name}, points", -1.5) for name in ("clean", "8x8", "clean against 8x8")],
        note="paired differences, QAFace (inject_scale 0.176, injected after the first epoch) minus ArcFace",
    )  # fmt: skip
    for seed in seeds:
        plain = omniglot.run(omniglot.baseline(seed), "ArcFace")
        other = omniglot.run(omniglot.baseline(seed), "QAFace", rf.QAFace(inject_scale=0.176, start=START))
        outcome.put(omniglot.differences(other, plain))
    return outcome


if __name__ == "__main__":
    sys.exit(main("memory_characters", run, seeds=(0, 1, 2)))
