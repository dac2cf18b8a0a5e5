"""Margins of the margin-softmax family: what each paper does to the N target cosines (math.md 1.1 and 1.2).

A margin is any callable `(cosine (N,), norms (N,)) -> (N,)` that returns the target logit divided by the scale, in the
dtype of the cosine and differentiable in both arguments. `norms` are the raw embeddings' lengths. It may also have

    rule(cosine) -> (NegativeRule, thresholds (N,))   what happens to the negatives of each row; both detached
    penalty(norms) -> (N,)                            added to the loss of each labelled row
    clamp: float                                      largest |cosine| used in the row, negatives too; gradient 0 beyond
    update(cosine, norms, labelled) -> None           moves the state; the caller calls it once per training forward,
                                                      before the margin; `labelled` is an (N,) boolean mask

so a function `lambda cosine, norms: cosine - 0.2` is a margin, and none of the classes here is special to the sweeps.
Angles are radians. Derivatives at cosine = +-1 are finite: sin(theta) is floored at 1e-6 there, never in values.
"""

from __future__ import annotations

from recog_fast.margins.adaptive import AdaFace, MagFace
from recog_fast.margins.angle import MarginFunction
from recog_fast.margins.fixed import ArcFace, CombinedMargin, CosFace, Softmax, SphereFace
from recog_fast.margins.hard_negatives import CircleMargin, CurricularFace, InterclassFilter, MVSoftmax

__all__ = [
    "AdaFace",
    "ArcFace",
    "CircleMargin",
    "CombinedMargin",
    "CosFace",
    "CurricularFace",
    "InterclassFilter",
    "MVSoftmax",
    "MagFace",
    "MarginFunction",
    "Softmax",
    "SphereFace",
]
