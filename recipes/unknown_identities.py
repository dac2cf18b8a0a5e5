"""UIR on Omniglot: half of the characters labelled, the others as unknown identities; p_max on characters of neither half.

Stage 1 (supervised, shared by all variants of a seed) trains on the labelled half; stage 2 goes on jointly, a quarter of
every batch unknown, with w = 0, 0.1, 1 and 10. w = 0 sees the same batches.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import torch

import recog_fast as rf
from recipes import omniglot
from recipes.common import Gate, Outcome, main, progress

WEIGHTS = (0.1, 1.0, 10.0)


def statistics(model: omniglot.Trained, images: omniglot.Images) -> dict[str, float]:
    """Mean of p_max = max_j softmax(s c)_j over images of unseen characters, and the centre sparsity."""
    with torch.no_grad():
        highest = torch.softmax(model.head.logits(omniglot.embed(model, images)), dim=1).amax(dim=1)
    return {"p_max": float(highest.mean()), "sparsity": float(rf.center_sparsity(model.head.weight.detach()))}


def run(seeds: list[int]) -> Outcome:
    """Gate: mean p_max on unseen characters falls monotonically with w, by >= 0.015 at w = 10."""
    outcome = Outcome(
        "unknown_identities",
        "UIR lowers p_max on unseen identities (Omniglot)",
        seeds,
        gates=[
            Gate("p_max fall, w = 10", 0.015),
            Gate("p_max fall, w = 10 beyond w = 1", 0.0),
            Gate("p_max fall, w = 1 beyond w = 0.1", 0.0),
            Gate("p_max fall, w = 0.1", 0.0),
        ],
        note="paired with w = 0: falls of mean p_max, gains in verification and in centre sparsity",
    )
    split = omniglot.load()
    half = int(split.labels.max() + 1) // 2
    place = np.random.default_rng(7).permutation(split.labels.max() + 1)[split.labels]
    known = place < half
    images, labels, unknown = split.images[known], place[known], split.images[~known]
    for seed in seeds:
        first = omniglot.start(seed, half)
        omniglot.train(first, images, labels, omniglot.baseline(seed))
        joint = replace(
            omniglot.baseline(seed + 1000),
            epochs=2,
            lr=0.05,
            ramp=0.0,
            unknown_share=0.25,
            margin=lambda _: rf.ArcFace(0.3),
        )
        found = {}
        for weight in (0.0, *WEIGHTS):
            model = omniglot.train(first.copy(), images, labels, replace(joint, unknown_weight=weight), unknown)
            found[weight] = statistics(model, split.test_images) | omniglot.verify(model, split, (0,))
            progress(f"seed {seed} w {weight:g}: " + ", ".join(f"{k} {v:.4f}" for k, v in found[weight].items()))
        falls = [found[0.0]["p_max"] - found[w]["p_max"] for w in WEIGHTS]
        steps = np.diff([0.0, *falls])
        outcome.put(
            {
                "p_max, w = 0": found[0.0]["p_max"],
                **{f"p_max fall, w = {w:g}": fall for w, fall in zip(WEIGHTS, falls, strict=True)},
                "p_max fall, w = 1 beyond w = 0.1": float(steps[1]),
                "p_max fall, w = 10 beyond w = 1": float(steps[2]),
                **{
                    f"accuracy, w = {w:g}, points": 100 * (found[w]["accuracy clean"] - found[0.0]["accuracy clean"])
                    for w in WEIGHTS
                },
                **{f"sparsity gain, w = {w:g}": found[w]["sparsity"] - found[0.0]["sparsity"] for w in WEIGHTS},
            }
        )
    return outcome


if __name__ == "__main__":
    sys.exit(main("unknown_identities", run, seeds=(0, 1, 2)))
