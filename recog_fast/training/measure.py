"""Measures what a report shows of a trained network: verification, quality, rejection, confusions, attention maps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from recog_fast import data as sources
from recog_fast import evaluation
from recog_fast.evaluation import Gallery, GalleryItem, QualityComparison, VerificationResult, pair_galleries, strip
from recog_fast.recognizability import embedding_recognizability, unrecognizable_center
from recog_fast.training.batches import Image
from recog_fast.training.findings import Findings, Floats
from recog_fast.training.unrecognizable import corrupt
from recog_fast.training.verification import PairSet

UNRECOGNIZABLE = "beyond recognition"
NORM, ERS, LEARNED = "feature norm", "ERS", "learned quality"
_CORRUPTED = 200  # pictures the UI centre comes from
_SHOWN = 6  # pictures of a gallery
_CONFUSIONS = 6
# Multiplications of the search for confusions: a few seconds on a core, however many classes there are.
_SEARCH = 2e11
REJECT = np.arange(13) * 0.05  # up to 60 % of the pairs
_FALSE_ACCEPTS = 10  # behind the FMR of the rejection curve


@dataclass
class Embedded:
    """Pictures under one condition."""

    flipped: Tensor  # (M, D) f(x) + f(mirrored x), for verification
    plain: Tensor  # (M, D) f(x), whose norm is a quality
    learned: Tensor | None  # (M,) quality by the network's own head


class Network:
    """A backbone, and the recognizability branches trained with it where there are any."""

    def __init__(self, backbone: nn.Module, branches: nn.Module | None = None, batch_size: int = 64) -> None:
        self.backbone, self.branches, self.batch_size = backbone.eval(), branches, batch_size
        if branches is not None:
            branches.eval()
        self.device = next(backbone.parameters()).device

    def prepare(self, images: Sequence[Image] | NDArray[np.uint8]) -> Tensor:
        """(B, 3, H, W) the network's input."""
        own: Any = getattr(self.backbone, "preprocessing", None)
        batch = np.stack(list(images))
        return (evaluation.to_input(batch) if own is None else own(torch.from_numpy(batch))).to(self.device)

    @torch.no_grad()
    def embed(self, images: Sequence[Image], mirrored: bool = True) -> Embedded:
        """Each picture once, and once mirrored."""
        plain, other, learned = [], [], []
        for start in range(0, len(images), self.batch_size):
            x = self.prepare(images[start : start + self.batch_size])
            if self.branches is None:
                plain.append(self.backbone(x).float().cpu())
            else:
                embeddings, features = self.backbone(x, return_features=True)
                plain.append(embeddings.float().cpu())
                learned.append(self.branches(features).float().cpu())
            if mirrored:
                other.append(self.backbone(x.flip(3)).float().cpu())
        e = torch.cat(plain)
        return Embedded(e + torch.cat(other) if mirrored else e, e, torch.cat(learned) if learned else None)


def condition(size: int) -> str:
    """What a resolution is called."""
    return f"{size}x{size}" if size else "full size"


def measure_pairs(
    network: Network, pairs: PairSet, sizes: Sequence[int], seed: int, people: NDArray[np.int64] | None = None
) -> Findings:
    """Verification at full size and at `sizes`, quality histograms, rejection curves, pictures: all of one pair set.

    people (M,): whose pictures they are; the rejection curves are then those of all pairs of pictures.
    """
    found = Findings()
    embedded: dict[str, Embedded] = {}
    for size in (0, *sizes):
        images = pairs.images if not size else [sources.degradations.down_up(image, size) for image in pairs.images]
        name = condition(size)
        embedded[name] = network.embed(images)
        found.results[name] = verification(embedded[name].flipped, pairs)
    measured = measure_images(network, pairs.images, embedded, seed)
    found.quality, found.galleries = measured.quality, measured.galleries
    all_pairs = None if people is None else np.triu_indices(len(people), 1)
    if people is None or all_pairs is None:
        first, second, same = pairs.first, pairs.second, pairs.same
    else:
        (first, second), same = all_pairs, people[all_pairs[0]] == people[all_pairs[1]]
    try:
        found.rejection, found.rejected = rejection(embedded, found.quality, first, second, same, seed)
    except ValueError as error:
        found.missing.append(f"Error-versus-reject curves: {error}.")
    shown = [image for a, b in zip(pairs.first, pairs.second, strict=True) for image in (pairs.images[a], pairs.images[b])]
    found.galleries += pair_galleries(shown, next(iter(found.results.values())))
    return found


def verification(embeddings: Tensor, pairs: PairSet) -> VerificationResult:
    """Ten folds in the pairs' order, flip sum, normalised."""
    form = evaluation.post_processing(flip=True, normalize=True)
    return evaluation.verification_result(embeddings[pairs.first], embeddings[pairs.second], pairs.same, form=form)


def measure_images(network: Network, images: Sequence[Image], embedded: dict[str, Embedded], seed: int) -> Findings:
    """Feature norm, ERS and learned quality by condition (first: as they are), and the pictures at both ends."""
    rng = np.random.default_rng((seed, 0x5EE))
    chosen = rng.permutation(len(images))[:_CORRUPTED]
    bad = network.embed([corrupt(images[i], rng) for i in chosen], mirrored=False)
    center, _ = unrecognizable_center(bad.plain)
    groups = {**embedded, UNRECOGNIZABLE: bad}
    found = Findings()
    found.quality[NORM] = {name: e.plain.norm(dim=1).double().numpy() for name, e in groups.items()}
    found.quality[ERS] = {
        name: embedding_recognizability(e.plain, center, cap=False).double().numpy() for name, e in groups.items()
    }
    if bad.learned is not None:
        found.quality[LEARNED] = {
            name: e.learned.double().numpy() for name, e in groups.items() if e.learned is not None
        }
    by = LEARNED if LEARNED in found.quality else ERS
    quality = next(iter(found.quality[by].values()))
    order = np.argsort(quality, kind="stable")

    def shown(title: str, note: str, rows: NDArray[np.int64]) -> Gallery:
        return Gallery(title, note, [GalleryItem(images[i], f"{by} {quality[i]:.2f}") for i in rows])

    found.galleries = [
        shown("Least recognizable", f"The pictures with the lowest {by}, lowest first.", order[:_SHOWN]),
        shown("Most recognizable", f"The pictures with the highest {by}, highest first.", order[::-1][:_SHOWN]),
    ]
    return found


def rejection(
    embedded: dict[str, Embedded],
    quality: dict[str, dict[str, Floats]],
    first: NDArray[np.int64],  # (P,)
    second: NDArray[np.int64],  # (P,)
    same: NDArray[np.bool_],  # (P,)
    seed: int,
) -> tuple[QualityComparison, str]:
    """(curves, which pairs they are of): every picture under one condition, drawn by the seed, so that qualities differ.

    Raises ValueError where rejecting leaves no pair of a kind.
    """
    rng = np.random.default_rng((seed, 0xE2C))
    names = list(embedded)
    count = len(next(iter(embedded.values())).plain)
    which, rows = rng.integers(len(names), size=count), np.arange(count)
    flipped = torch.stack([e.flipped for e in embedded.values()])[which, rows]
    unit = nn.functional.normalize(flipped.double(), dim=1).numpy()
    scores: Floats = np.einsum("pd,pd->p", unit[first], unit[second]) if len(first) < 1e5 else (unit @ unit.T)[first, second]
    mixed = {measure: np.stack([groups[name] for name in names])[which, rows] for measure, groups in quality.items()}
    pictures = f"every picture once, at {' or '.join(names)}, drawn by chance" if len(names) > 1 else "the pictures as they are"
    genuine, impostor = int(same.sum()), int((~same).sum())
    # A threshold that rests on fewer false accepts would move with each of them.
    fmr = float(f"{min(0.5, max(1e-2, _FALSE_ACCEPTS / impostor)):.2g}")
    qualities = {measure: evaluation.pair_minimum(values, first, second) for measure, values in mixed.items()}
    compared = evaluation.compare_qualities(scores, same, qualities, fmr, fixed_threshold=False, reject=REJECT)
    return compared, f"{genuine:,} genuine and {impostor:,} impostor pairs of {pictures}"


def confusions(network: Network, head: Any, images: Any, labels: NDArray[np.int64], seed: int) -> list[Gallery]:
    """Training pictures nearest to a class not their own, and where own and other class see them.

    images(i) is picture i without augmentation; labels (M,), -1 unknown. So many pictures, drawn by the seed, as a few
    seconds allow: at 10 million classes it is 16.
    """
    known = np.flatnonzero(labels >= 0)
    rows, dimension = head.num_classes, head.embedding_dim
    count = int(np.clip(_SEARCH / (2 * rows * dimension), 16, 512))
    if rows < 2 or not len(known):
        return []
    drawn = np.random.default_rng((seed, 0xC0F)).permutation(known)[:count]
    clean = [images(int(i)) for i in drawn]
    embeddings = network.embed(clean, mirrored=False).plain.to(network.device)
    own = torch.from_numpy(labels[drawn]).to(network.device)
    with torch.no_grad():
        cosine, ids = head.topk(embeddings, 2)
        target = head.cosine(embeddings, own)
    first_is_own = ids[:, 0] == own
    other = torch.where(first_is_own, ids[:, 1], ids[:, 0]).cpu().numpy()
    nearest = torch.where(first_is_own, cosine[:, 1], cosine[:, 0]).cpu().numpy()
    target = target.cpu().numpy()
    pictured = np.isin(other, labels)  # a class that was just added may have none
    seen: set[tuple[int, int]] = set()
    chosen = []
    for i in np.argsort(target - nearest, kind="stable"):
        pair = (int(labels[drawn[i]]), int(other[i]))
        if pictured[i] and pair not in seen and pair[::-1] not in seen:
            seen.add(pair)
            chosen.append(int(i))
    chosen = chosen[:_CONFUSIONS]
    representative = {int(k): int(np.flatnonzero(labels == k)[0]) for k in other[chosen]}
    items = [
        GalleryItem(
            strip([clean[i], images(representative[int(other[i])])]),
            f"class {labels[drawn[i]]} next to class {other[i]}",
            f"cosine: own {target[i]:.2f}, other {nearest[i]:.2f}".replace("-", "\N{MINUS SIGN}"),
            "right" if target[i] >= nearest[i] else "wrong",
        )
        for i in chosen
    ]
    share = float((nearest > target).mean())
    note = (
        f"Left a training picture, right one of its nearest other class; the closest of {len(drawn)} pictures of "
        f"{head.num_classes:,} classes. Of them, {100 * share:.1f} % are nearer to another class than to their own (no margin)."
    )
    found = [Gallery("Confused with the nearest class", note, items)]
    if hasattr(network.backbone, "forward_features") and hasattr(network.backbone, "embed"):
        found.append(_attention(network, head, [clean[i] for i in chosen], own[chosen], torch.from_numpy(other[chosen])))
    return found


def _attention(network: Network, head: Any, images: Sequence[Image], own: Tensor, other: Tensor) -> Gallery:
    x = network.prepare(images)

    def maps_of(ids: Tensor) -> NDArray[np.float32]:
        ids = ids.to(network.device)
        return evaluation.class_activation(network.backbone, x, lambda e: head.cosine(e, ids), method="hires")

    items = [
        GalleryItem(
            strip([image, evaluation.overlay(image, mine), evaluation.overlay(image, theirs)]),
            f"class {int(a)}, and class {int(b)}",
        )
        for image, mine, theirs, a, b in zip(images, maps_of(own), maps_of(other), own, other, strict=True)
    ]
    note = (
        "The same pictures: as they are, where the cosine to the own class comes from, and where that to the nearest other class "
        "does (HiResCAM at the last feature map, dark blue none to yellow most)."
    )
    return Gallery("Attention", note, items)
