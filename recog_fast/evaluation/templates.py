"""Templates: one embedding for many images of a person (IJB, YTF; math.md section 6)."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike

from recog_fast.evaluation._arrays import FloatArray, IntArray, floats, integers, unit_rows


def template_embeddings(
    embeddings: ArrayLike | torch.Tensor,  # (M, D); keep the feature norm here to weight by it
    template_ids: ArrayLike | torch.Tensor,  # (M,) int
    media_ids: ArrayLike | torch.Tensor | None = None,  # (M,) int: frames of one video share an id
    weights: ArrayLike | torch.Tensor | None = None,  # (M,) >= 0: quality of each image (ERS)
) -> tuple[IntArray, FloatArray]:
    """(ids (T,) ascending, templates (T, D) unit): media means, then their sum per template, then L2.

    With `media_ids` the images of one medium inside a template are averaged first, so a long video counts once. With
    `weights` the mean inside a medium and the sum over media are weighted (a medium weighs as its images do on
    average); a template whose weights are all zero takes the plain mean. A template whose sum is zero stays a zero row.
    Raises ValueError for lengths that do not match, non-finite rows, negative weights or an empty set.
    Source: IJB-B/C 1:1 protocol; Deng et al., Harnessing Unrecognizable Faces (weighting by ERS).
    """
    where = "template_embeddings"
    rows = floats(where, "embeddings", embeddings, 2)
    count = len(rows)
    if count == 0:
        raise ValueError(f"{where}: expected at least one embedding, got shape {rows.shape}")
    templates = integers(where, "template_ids", template_ids, count)
    media = np.arange(count) if media_ids is None else integers(where, "media_ids", media_ids, count)
    weight = np.ones(count) if weights is None else floats(where, "weights", weights, 1)
    if weight.shape != (count,):
        raise ValueError(f"{where}: expected weights of shape ({count},), got {weight.shape}")
    if (weight < 0).any():
        raise ValueError(f"{where}: expected weights >= 0, got {weight.min()} at {int(weight.argmin())}")
    ids, template_of = np.unique(templates, return_inverse=True)
    zero = np.bincount(template_of, weights=weight, minlength=len(ids)) == 0
    weight = np.where(zero[template_of], 1.0, weight)
    # One medium = one (template, media id) pair; its share of the template is sum(w f) / images.
    pairs, medium_of = np.unique(np.stack([template_of, media], axis=1), axis=0, return_inverse=True)
    medium_of = medium_of.reshape(-1)
    images = np.bincount(medium_of, minlength=len(pairs))
    share = weight / images[medium_of]
    sums = np.zeros((len(ids), rows.shape[1]))
    np.add.at(sums, template_of, share[:, None] * rows)
    return ids.astype(np.int64), unit_rows(sums)
