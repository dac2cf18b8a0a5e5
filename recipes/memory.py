"""Prototype memories while fine-tuning MobileFaceNet on LFW: QAFace (inject_scale 0.176 and the literal 1) and VPL against
ArcFace without one, paired by seed."""

from __future__ import annotations

import sys

import recog_fast as rf
from recipes import lfw
from recipes.common import Gate, Outcome, main, progress

VARIANTS = {
    "ArcFace": None,
    "QAFace 0.176": rf.QAFace(inject_scale=0.176),
    "QAFace 1": rf.QAFace(),
    "VPL": rf.VPL(start=0),
}


def run(seeds: list[int]) -> Outcome:
    """Reported; gate: QAFace at 0.176 is not worse than ArcFace by more than 1.5 points anywhere."""
    outcome = Outcome(
        "memory", "QAFace and VPL against ArcFace (LFW fine-tuning)", seeds,
        gates=[Gate(f"QAFace 0.176, TAR@1e-2 {name}, points", -1.5) for name in lfw.NAMES],
        note="paired differences to ArcFace in points, all pairs of fold 5",
    )  # fmt: skip
    faces = lfw.load()
    for seed in seeds:
        found = {}
        for name, policy in VARIANTS.items():
            found[name] = lfw.verify(lfw.fine_tune(faces, lfw.Settings(seed, policy)), faces)
            progress(f"seed {seed} {name}: " + ", ".join(f"{k} {v:.4f}" for k, v in found[name].items()))
        values = {f"ArcFace, {key}": value for key, value in found["ArcFace"].items()}
        for name in list(VARIANTS)[1:]:
            for key, value in found[name].items():
                values[f"{name}, {key}, points"] = 100 * (value - found["ArcFace"][key])
        outcome.put(values)
    return outcome


if __name__ == "__main__":
    sys.exit(main("memory", run, seeds=(0, 1, 2, 3, 4)))
