"""Templates weighted by ERS against plain average: 149 people of LFW fold 5, two templates each, four draws a template.

A person's images are halved (no image is in both templates); a template is four draws of (image of its half, condition).
"""

from __future__ import annotations

import sys

import numpy as np

from recipes import fold5
from recipes.common import Gate, Outcome, main
from recog_fast.evaluation import identification, tar_at_far, template_embeddings

DRAWS = 4
MIXES = {"": fold5.MIX, ", 70 % at 8x8": (0.2, 0.1, 0.7)}


def templates(seed: int, mix: tuple[float, float, float]) -> dict[str, tuple[float, float]]:
    """weighting -> (TAR at FAR 1e-2 over all template pairs of two sides, rank-1)."""
    fold, rng = fold5.load(), np.random.default_rng(seed)
    rows, ids = [], []
    for person in np.flatnonzero(np.bincount(fold.people) >= 2):
        images = rng.permutation(np.flatnonzero(fold.people == person))
        half = len(images) // 2
        for side, part in enumerate((images[:half], images[half:])):
            drawn, level = rng.choice(part, DRAWS), rng.choice(3, DRAWS, p=mix)
            rows += [fold.rows[fold5.CONDITIONS[k]][i] for i, k in zip(drawn, level, strict=True)]
            ids += [2 * int(person) + side] * DRAWS
    x = np.array(rows)
    found = {}
    weightings = {
        "plain": None,
        "ERS": np.maximum(fold5.recognizability(x, fold.center), 0.0),
        "feature norm": np.linalg.norm(x, axis=1),
    }
    for name, weights in weightings.items():
        _, made = template_embeddings(fold5.unit(x), ids, weights=weights)
        similarity = made[0::2] @ made[1::2].T
        same = np.eye(len(similarity), dtype=bool)
        rank, _ = identification(similarity, same, ranks=(1,))
        found[name] = (float(tar_at_far(similarity.ravel(), same.ravel(), [1e-2])[0]), float(rank[0]))
    return found


def run(seeds: list[int]) -> Outcome:
    """Gate on the mix .55/.2/.25; the mix with 70 % unrecognizable images is reported."""
    outcome = Outcome(
        "ers_templates", "templates weighted by ERS (LFW fold 5)", seeds,
        gates=[Gate("TAR@1e-2 gain, ERS", 0.08), Gate("rank-1 gain, ERS", 0.02)],
        note="gains over the plain average of unit embeddings, 149 people",
    )  # fmt: skip
    for seed in seeds:
        values: dict[str, float] = {}
        for label, mix in MIXES.items():
            found = templates(seed, mix)
            values |= {f"TAR@1e-2, plain{label}": found["plain"][0], f"rank-1, plain{label}": found["plain"][1]}
            for name in ("ERS", "feature norm"):
                values[f"TAR@1e-2 gain, {name}{label}"] = found[name][0] - found["plain"][0]
                values[f"rank-1 gain, {name}{label}"] = found[name][1] - found["plain"][1]
        outcome.put(values)
    return outcome


if __name__ == "__main__":
    sys.exit(main("ers_templates", run, seeds=(0, 1, 2, 3, 4)))
