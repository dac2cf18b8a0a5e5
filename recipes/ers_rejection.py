"""ERS on mixed clean / 16x16 / 8x8 pairs of LFW fold 5: the pair decision at gamma = 0.6, and rejection curves.

All pairs of the fold, every image once in one condition (0.55 / 0.2 / 0.25); five draws. No training.
"""

from __future__ import annotations

import sys

import numpy as np

from recipes import fold5
from recipes.common import Gate, Outcome, main
from recog_fast.evaluation import compare_qualities, equal_error_rate, pair_minimum, tar_at_far

FARS = (1e-2, 1e-3, 1e-4)
GAMMA = 0.6


def frr(scores: fold5.Floats, same: np.ndarray) -> fold5.Floats:
    """False reject rates at FARS, conservative."""
    return 1 - tar_at_far(scores, same, FARS)


def decision(seed: int) -> dict[str, float]:
    """FRR without and with the pair decision, by ERS, by feature norm and at random with the same share rejected."""
    fold, (first, second, same), x = fold5.load(), fold5.pairs(), fold5.mixed(seed)
    scores = (fold5.unit(x) @ fold5.unit(x).T)[first, second]
    ers = fold5.recognizability(x, fold.center)
    rejected = (ers < GAMMA).mean()
    found = {"images below gamma": float(rejected)}
    plain = frr(scores, same)
    qualities = {
        "ERS": ers,
        "feature norm": np.linalg.norm(x, axis=1),
        "random": np.random.default_rng((seed, 1)).random(len(x)),
    }
    for name, quality in qualities.items():
        limit = GAMMA if name == "ERS" else np.sort(quality)[round(rejected * len(quality))]
        bad = pair_minimum(quality, first, second) < limit
        for far, before, after in zip(FARS, plain, frr(np.where(bad, -1.0, scores), same), strict=True):
            found |= {f"FRR@{far:g}": float(before)} if name == "ERS" else {}
            found[f"FRR fall@{far:g}, {name}"] = float(before - after)
    return found


def curves(seed: int) -> dict[str, float]:
    """EER after rejecting pairs, and FNMR at FMR 1e-2 re-estimated after rejecting pairs or images."""
    fold, (first, second, same), x = fold5.load(), fold5.pairs(), fold5.mixed(seed)
    scores = (fold5.unit(x) @ fold5.unit(x).T)[first, second]
    ers = fold5.recognizability(x, fold.center)
    worth = {"ERS": ers, "feature norm": np.linalg.norm(x, axis=1)}
    compared = compare_qualities(
        scores, same, {name: pair_minimum(q, first, second) for name, q in worth.items()}, 1e-2,
        fixed_threshold=False, reject=[0.0, 0.4, 0.6], random_seed=seed,
    )  # fmt: skip
    found = {"FNMR, all pairs": float(compared.curves["ERS"][0])}
    for name, curve in compared.curves.items():
        found |= {f"FNMR, 40 % of pairs rejected, {name}": curve[1], f"FNMR, 60 % of pairs rejected, {name}": curve[2]}
    for name, quality in (*worth.items(), ("random", np.random.default_rng((seed, 2)).random(len(x)))):
        limit = np.sort(quality)[int(0.4 * len(quality))]
        kept = pair_minimum(quality, first, second) >= limit
        found[f"FNMR, 40 % of images rejected, {name}"] = float(1 - tar_at_far(scores[kept], same[kept], [1e-2])[0])
    order = np.argsort(pair_minimum(ers, first, second), kind="stable")
    for rate in (0.0, 0.6):
        left = order[int(rate * len(order)) :]
        found[f"EER, {100 * rate:.0f} % of pairs rejected, ERS"] = equal_error_rate(scores[left], same[left])[0]
    return {name: float(value) for name, value in found.items()}


def run(seeds: list[int]) -> list[Outcome]:
    """The pair decision and the rejection curve."""
    first = Outcome(
        "ers_decision", "ERS gamma 0.6 lowers FRR on mixed pairs (LFW fold 5)", seeds,
        gates=[Gate("FRR fall@0.01, ERS", 0.10), Gate("FRR fall@0.001, ERS", 0.12)],
        note="271,216 pairs; feature norm and random reject the same share of images",
    )  # fmt: skip
    second = Outcome(
        "ers_curve", "rejecting by ERS, threshold re-estimated at FMR 1e-2 (LFW fold 5)", seeds,
        gates=[
            Gate("FNMR, 40 % of images rejected, ERS", 0.40, at_least=False),
            Gate("FNMR, 40 % of images rejected, random", 0.75),
            Gate("EER, 60 % of pairs rejected, ERS", 0.10, at_least=False),
        ],
        note="the gate reads 40 % as a share of the images; as a share of the pairs its FNMR is above 0.40 (both are listed)",
    )  # fmt: skip
    for seed in seeds:
        first.put(decision(seed))
        second.put(curves(seed))
    return [first, second]


if __name__ == "__main__":
    sys.exit(main("ers_rejection", run, seeds=(0, 1, 2, 3, 4)))
