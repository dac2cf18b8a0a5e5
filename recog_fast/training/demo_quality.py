"""What the demo measures beside recognition: the learned quality, ERS, rejecting by either, and strangers' p_max."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recog_fast import evaluation
from recog_fast.recognizability import (
    RecognizabilityModel,
    embedding_recognizability,
    pair_decision,
    unrecognizable_center,
)
from recog_fast.training.unrecognizable import corrupt

Images = NDArray[np.uint8]  # (N, S, S, 3)
Floats = NDArray[np.float64]
# Every picture once: whole, at 16x16 or at 8x8, with these shares.
MIX = (0.55, 0.2, 0.25)
FMR = 1e-2
REJECT = (0.0, 0.2, 0.4, 0.6)


@torch.no_grad()
def embed_with_quality(model: RecognizabilityModel, images: Images, batch_size: int = 100) -> tuple[Tensor, Tensor]:
    """(embeddings (N, D), learned quality (N,)) of images in eval mode."""
    model.eval()
    prepare: Any = model.backbone.preprocessing
    parts = [model(prepare(torch.from_numpy(images[i : i + batch_size]))) for i in range(0, len(images), batch_size)]
    return torch.cat([e for e, _ in parts]), torch.cat([q for _, q in parts])


def quality_report(
    model: RecognizabilityModel,
    levels: dict[str, Images],  # the same pictures under each condition, best first
    people: NDArray[np.int64],  # (N,)
    true_quality: NDArray[np.float32],  # (N,) of the drawing, before any condition
    seed: int,
) -> dict[str, Any]:
    """What stands under "quality" in results.json.

    For each condition the mean of learned quality, ERS and feature norm; rank correlation of each with resolution, and of
    the learned quality with the drawing's; FNMR at FMR 1e-2 over all pairs of the mix, threshold re-estimated, after rejecting
    0 ... 60 % of the pairs by each of them and at random; FRR with and without ERS's pair decision.
    """
    rng = np.random.default_rng((seed, 0xDE40))
    found = {name: embed_with_quality(model, images) for name, images in levels.items()}
    first = next(iter(levels.values()))
    bad = np.stack([corrupt(image, rng) for image in first[rng.permutation(len(first))[:200]]])
    center, _ = unrecognizable_center(embed_with_quality(model, bad)[0])
    scores: dict[str, list[Tensor]] = {
        "learned": [quality for _, quality in found.values()],
        "ers": [embedding_recognizability(e, center, cap=False) for e, _ in found.values()],
        "norm": [e.norm(dim=1) for e, _ in found.values()],
    }
    resolution = -np.repeat(np.arange(len(levels)), len(first))
    report: dict[str, Any] = {
        "mean": {n: dict(zip(levels, (float(v.mean()) for v in values), strict=True)) for n, values in scores.items()},
        "rank_correlation_with_resolution": {
            n: _rank_correlation(torch.cat(values).numpy(), resolution) for n, values in scores.items()
        },
        "rank_correlation_with_drawn_quality": _rank_correlation(scores["learned"][0].numpy(), true_quality),
    }
    which = torch.from_numpy(rng.choice(len(levels), len(first), p=MIX))
    rows = torch.arange(len(first))
    unit = torch.nn.functional.normalize(torch.stack([e for e, _ in found.values()])[which, rows], dim=1)
    a, b = torch.triu_indices(len(first), len(first), 1)
    cosine, same = (unit @ unit.t())[a, b], people[a.numpy()] == people[b.numpy()]
    mixed = {n: torch.stack(values)[which, rows] for n, values in scores.items()}
    mixed["random"] = torch.from_numpy(rng.random(len(first)))
    report["fnmr_after_rejecting"] = {
        n: dict(zip(map(str, REJECT), _curve(cosine, same, torch.minimum(q[a], q[b])), strict=True))
        for n, q in mixed.items()
    }
    decided = pair_decision(cosine, mixed["ers"][a], mixed["ers"][b])
    report["frr_of_ers"] = {
        n: float(1 - evaluation.tar_at_far(s, same, [FMR])[0]) for n, s in (("all", cosine), ("gamma 0.6", decided))
    }
    return report


def _curve(cosine: Tensor, same: NDArray[np.bool_], quality: Tensor) -> list[float]:
    curve, _ = evaluation.error_versus_reject(cosine, same, quality, FMR, fixed_threshold=False, reject=REJECT)
    return [float(value) for value in curve]


def _rank_correlation(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Spearman's, ties averaged; 0 where either is constant."""

    def ranks(values: NDArray[Any]) -> Floats:
        _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
        middle: Floats = (np.cumsum(counts) - (counts - 1) / 2)[place.reshape(-1)]
        return middle

    x, y = ranks(a), ranks(b)
    return float(np.corrcoef(x, y)[0, 1]) if x.std() > 0 and y.std() > 0 else 0.0

