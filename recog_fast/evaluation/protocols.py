"""Published protocols as small functions over embeddings: YTF, SCFace, SurvFace, TinyFace, robustness pair sets.

Each says what it takes; none reads a file (recog_fast.data does that) and none knows a network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from recog_fast._arguments import is_whole
from recog_fast.evaluation._arrays import BoolArray, FloatArray, IntArray, floats, integers, unit_rows
from recog_fast.evaluation.embed import VerificationResult, evaluate_bin, verification_result
from recog_fast.evaluation.identification import identification
from recog_fast.evaluation.templates import template_embeddings
from recog_fast.evaluation.verification import tar_at_far

Rows = ArrayLike | torch.Tensor
SURVFACE_FARS = (0.3, 0.1, 0.01, 0.001)
SURVFACE_FPIRS = (0.3, 0.2, 0.1)
TINYFACE_IMPOSTORS = 50_000


def four_forms(embeddings: Rows, mirrored: Rows) -> dict[str, FloatArray]:
    """The four post-processing forms of N embeddings and those of the mirrored images, (N, D) each, by their names.

    flip summed: f(x) + f(mirrored x); feature norm removed: divided by its L2 norm (a zero row stays zero). Templates
    built from the forms with the norm kept weigh images by it. The names are those of `post_processing`.
    Raises ValueError for shapes that differ. Source: InsightFace's IJB evaluation (use_flip_test, use_norm_score).
    """
    where = "four_forms"
    plain, other = floats(where, "embeddings", embeddings, 2), floats(where, "mirrored", mirrored, 2)
    if plain.shape != other.shape:
        raise ValueError(f"{where}: expected mirrored of shape {plain.shape}, got {other.shape}")
    both = plain + other
    return {
        "flip summed, feature norm kept": both,
        "flip summed, feature norm removed": unit_rows(both),
        "no flip, feature norm kept": plain,
        "no flip, feature norm removed": unit_rows(plain),
    }


def template_scores(ids: Rows, templates: Rows, first: Rows, second: Rows) -> FloatArray:
    """(P,) cosines of template pairs: ids (T,) ascending and templates (T, D) as `template_embeddings` gives them, first
    and second (P,) template ids.

    Raises ValueError naming a template id that is not there.
    """
    where = "template_scores"
    rows = unit_rows(floats(where, "templates", templates, 2))
    known = integers(where, "ids", ids, len(rows))
    if not len(known) or (np.diff(known) <= 0).any():
        raise ValueError(f"{where}: expected ids of at least one template, ascending, got {known}")
    places = []
    for name, asked in (("first", first), ("second", second)):
        wanted = integers(where, name, asked)
        place = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
        if (known[place] != wanted).any():
            raise ValueError(
                f"{where}: expected template ids of {name} among ids, got {wanted[known[place] != wanted][0]}"
            )
        places.append(place)
    if len(places[0]) != len(places[1]):
        raise ValueError(f"{where}: expected second of shape ({len(places[0])},) as first, got ({len(places[1])},)")
    scores: FloatArray = (rows[places[0]] * rows[places[1]]).sum(axis=1)
    return scores


def ytf(
    embeddings: Rows,  # (M, D) of frames
    video_ids: Rows,  # (M,) int
    first: Rows,  # (P,) video ids; the official list has 5,000 pairs in ten folds of 500
    second: Rows,
    same: Rows,
    weights: Rows | None = None,  # (M,) >= 0, e.g. ERS; None: plain average
    folds: int = 10,
) -> VerificationResult:
    """YouTube Faces: frames to one template per video (average, or weighted by quality), then 10-fold verification.

    embeddings (M, D) and weights (M,) of frames, video_ids (M,); first, second, same (P,) of pairs of videos.
    Raises what `template_embeddings` and `verification_result` raise, and ValueError for a video that has no frame.
    Source: Wolf, Hassner, Maoz, Face Recognition in Unconstrained Videos with Matched Background Similarity, 2011.
    """
    ids, templates = template_embeddings(embeddings, video_ids, weights=weights)
    rows = []
    for name, asked in (("first", first), ("second", second)):
        wanted = integers("ytf", name, asked)
        if not np.isin(wanted, ids).all():
            raise ValueError(f"ytf: expected {name} among video_ids, got {wanted[~np.isin(wanted, ids)][0]}")
        rows.append(templates[np.searchsorted(ids, wanted)])
    return verification_result(rows[0], rows[1], same, folds=folds, form="templates")


def scface(
    probes: Rows,  # (Q, D)
    probe_ids: Rows,
    distances: Rows,  # (Q,) metres: 4.2, 2.6, 1.0
    gallery: Rows,  # (G, D) frontal mugshots
    gallery_ids: Rows,
) -> dict[str, float]:
    """SCFace: rank-1 of the probes of each distance, farthest first, as {"4.2 m": ..., ..., "average": mean of them}.

    probes (Q, D), probe_ids and distances (Q,); gallery (G, D), gallery_ids (G,).
    Raises ValueError for a probe without a mate in the gallery.
    """
    where = "scface"
    q, g = floats(where, "probes", probes, 2), floats(where, "gallery", gallery, 2)
    who, whom = integers(where, "probe_ids", probe_ids, len(q)), integers(where, "gallery_ids", gallery_ids, len(g))
    metres = floats(where, "distances", distances, 1)
    if len(metres) != len(q):
        raise ValueError(f"{where}: expected distances of shape ({len(q)},), got {metres.shape}")
    if not np.isin(who, whom).all():
        raise ValueError(
            f"{where}: expected a mate in the gallery for every probe, got none for identity {who[~np.isin(who, whom)][0]}"
        )
    similarity = unit_rows(q) @ unit_rows(g).T
    found: dict[str, float] = {}
    for distance in np.unique(metres)[::-1]:
        rows = metres == distance
        found[f"{distance:g} m"] = float(
            identification(similarity[rows], who[rows, None] == whom[None], ranks=(1,))[0][0]
        )
    found["average"] = float(np.mean(list(found.values())))
    return found


def survface_verification(scores: Rows, same: Rows) -> dict[float, float]:
    """SurvFace 1:1: TPR at FAR 0.3, 0.1, 0.01, 0.001 (conservative), {far: tpr}; scores (P,), same (P,) bool.

    Raises what `tar_at_far` raises.
    """
    return dict(zip(SURVFACE_FARS, map(float, tar_at_far(scores, same, SURVFACE_FARS)), strict=True))


def survface_identification(similarity: Rows, mated: Rows) -> dict[float, float]:
    """SurvFace open set: TPIR20 at FPIR 0.3, 0.2, 0.1, {fpir: tpir}; queries without a mate set the threshold.

    similarity (Q, G), mated (Q, G) bool. Raises what `identification` raises.
    """
    _, tpir = identification(similarity, mated, fpirs=SURVFACE_FPIRS, tpir_rank=20)
    return dict(zip(SURVFACE_FPIRS, map(float, tpir), strict=True))


def tinyface_identification(
    probes: Rows, probe_ids: Rows, gallery: Rows, gallery_ids: Rows, distractors: Rows | None = None
) -> dict[int, float]:
    """TinyFace 1:N: rank-1, 5 and 20 of every probe against the gallery and, with them, the distractors, {rank: rate}.

    probes (Q, D), gallery (G, D), their ids; distractors (K, D): faces of nobody (the protocol's 153,428), more of them can only lower
    a rate. Raises ValueError for widths that differ and without a probe that has a mate. Source: Cheng et al., TinyFace, 2018.
    """
    where = "tinyface_identification"
    q, g = floats(where, "probes", probes, 2), floats(where, "gallery", gallery, 2)
    who, whom = integers(where, "probe_ids", probe_ids, len(q)), integers(where, "gallery_ids", gallery_ids, len(g))
    far = np.empty((0, q.shape[1])) if distractors is None else floats(where, "distractors", distractors, 2)
    for name, rows in (("gallery", g), ("distractors", far)):
        if rows.shape[1] != q.shape[1]:
            raise ValueError(f"{where}: expected {name} (n, D = {q.shape[1]}) as probes, got {rows.shape}")
    queries = unit_rows(q)
    similarity, mated = queries @ unit_rows(g).T, who[:, None] == whom[None]
    if distractors is None:
        rates, _ = identification(similarity, mated, ranks=(1, 5, 20))
        return dict(zip((1, 5, 20), map(float, rates), strict=True))
    # Only how many distractors beat each probe's best mate matters: their similarities are never stored together.
    others = unit_rows(far)
    has = mated.any(axis=1)
    if not has.any():
        raise ValueError(f"{where}: expected a probe with a mate in the gallery, got none")
    best = np.where(mated, similarity, -np.inf)[has].max(axis=1)
    rank = 1 + (similarity[has] > best[:, None]).sum(axis=1)
    for i in range(0, len(others), 4096):
        rank += (queries[has] @ others[i : i + 4096].T > best[:, None]).sum(axis=1)
    return {k: float((rank <= k).mean()) for k in (1, 5, 20)}


def tinyface_pairs(
    ids: Rows,  # (M,) of probes and matched gallery together: 8,171 images
    impostors: int = TINYFACE_IMPOSTORS,
    seed: int = 0,
) -> tuple[IntArray, IntArray, BoolArray]:
    """TinyFace 1:1 as RI and QAFace use it: (first, second, same), all genuine pairs (20,888) and `impostors` distinct
    impostor pairs drawn by `seed`. State the seed. ids (M,) int -> rows of the pairs (P,) int64 and same (P,) bool.

    Raises ValueError where there are not that many impostor pairs, or no genuine one.
    """
    where = "tinyface_pairs"
    who = integers(where, "ids", ids)
    if not is_whole(impostors, 1) or not is_whole(seed, 0):
        raise ValueError(f"{where}: expected impostors >= 1 and seed >= 0, integers, got {impostors!r} and {seed!r}")
    order = np.argsort(who, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(who[order]) != 0])
    groups = np.split(order, starts[1:])
    genuine = np.array([(a, b) for g in groups for k, a in enumerate(g) for b in g[k + 1 :]], dtype=np.int64)
    total = len(who) * (len(who) - 1) // 2 - len(genuine)
    if not len(genuine) or total < impostors:
        raise ValueError(
            f"{where}: expected genuine pairs and at least {impostors} impostor pairs, got {len(genuine)} and {total}"
        )
    rng, codes = np.random.default_rng(seed), np.empty(0, dtype=np.int64)
    # Codes keep their order of drawing, so a smaller number of impostors is the beginning of a larger one.
    while len(codes) < impostors:
        a, b = rng.integers(0, len(who), (2, 2 * impostors))
        drawn = (np.minimum(a, b) * len(who) + np.maximum(a, b))[who[a] != who[b]]
        codes = np.concatenate([codes, drawn])
        codes = codes[np.sort(np.unique(codes, return_index=True)[1])]
    drawn_pairs = np.stack(np.divmod(codes[:impostors], len(who)), axis=1)
    both = np.concatenate([genuine, drawn_pairs])
    return both[:, 0], both[:, 1], np.arange(len(both)) < len(genuine)


def robustness(
    model: Callable[[torch.Tensor], torch.Tensor],
    pairs: Any,  # as in `evaluate_bin`
    down_up: Callable[[NDArray[np.uint8], int], NDArray[np.uint8]],  # recog_fast.data.degradations.down_up
    sizes: Sequence[int] = (16, 8),
    **options: Any,  # of `evaluate_bin`
) -> dict[str, VerificationResult]:
    """The same pair set at full size and down-sampled to each of `sizes` and back: {"full size", "16x16", "8x8"}.

    images (H, W, 3) uint8, as in `evaluate_bin`. Raises what `evaluate_bin` raises.
    """
    results = {"full size": evaluate_bin(model, pairs, **options)}
    for size in sizes:

        def degrade(image: NDArray[np.uint8], size: int = size) -> NDArray[np.uint8]:
            return down_up(image, size)

        results[f"{size}x{size}"] = evaluate_bin(model, pairs, degrade=degrade, **options)
    return results
