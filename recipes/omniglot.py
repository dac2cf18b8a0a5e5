"""The OMNI set-up: Omniglot at 32x32, a network of 0.4 M parameters, about a minute of CPU a run.

Variants of one seed share weights, order of images and augmentation, so compare them paired by seed: seed to seed alone
moves accuracy by 0.8 points. The 164 characters verified on are the same for every seed and in no training set.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import recog_fast as rf
from recipes.common import data_dir, progress
from recog_fast import evaluation
from recog_fast.data import Augmentation, ZipDataset, degradations, resize_image
from recog_fast.evaluation import all_pairs
from recog_fast.models import build_model
from recog_fast.training.schedules import polynomial_smooth

SIZE, HELD, PAIRS = 32, 164, 6000
Images = NDArray[np.uint8]  # (M, 32, 32, 3)
Labels = NDArray[np.int64]


@dataclass(frozen=True)
class Split:
    """Training images of 800 characters and test images of 164 others; labels count from 0 in each."""

    images: Images
    labels: Labels
    test_images: Images
    test_labels: Labels


@functools.cache
def load() -> Split:
    """Decodes the background set once; which characters are held out is fixed."""
    source = ZipDataset(data_dir() / "omniglot" / "images_background.zip")
    images = np.stack([resize_image(source[i][0], SIZE) for i in range(len(source))])
    labels = np.asarray(source.labels, dtype=np.int64)
    order = np.random.default_rng(2048).permutation(source.num_classes)

    def part(classes: NDArray[np.int64]) -> tuple[Images, Labels]:
        rows = np.flatnonzero(np.isin(labels, classes))
        return images[rows], np.searchsorted(np.sort(classes), labels[rows]).astype(np.int64)

    return Split(*part(order[HELD:]), *part(order[:HELD]))


@dataclass(frozen=True)
class Settings:
    """One run. crop, low_resolution: probabilities; smallest: pixels low_resolution goes down to."""

    seed: int
    margin: Callable[[float], Any] = lambda share: rf.ArcFace(0.3 * share)  # share: of the ramp, 0 to 1
    epochs: int = 4
    batch: int = 64
    lr: float = 0.1
    crop: float = 0.2
    low_resolution: float = 0.2
    smallest: int = 8
    scale: float = 32.0
    ramp: float = 0.5  # share of the run over which the margin grows
    unknown_weight: float = 0.0
    unknown_share: float = 0.0  # of a batch


@dataclass
class Trained:
    """A backbone and its head, with what the last steps said."""

    backbone: nn.Module
    head: rf.MarginHead
    accuracy: float  # mean of [target cosine > nearest cosine] over the last fifth of the run

    def copy(self) -> Trained:
        """A deep copy, for variants that start from one stage 1."""
        return copy.deepcopy(self)


def start(seed: int, classes: int, scale: float = 32.0, policy: Any = None) -> Trained:
    """Fresh weights, the same for every variant of a seed; policy: of a prototype memory."""
    memory = None if policy is None else rf.PrototypeMemory(classes, 128, policy)
    torch.manual_seed(seed)
    backbone = build_model("tiny", embedding_dim=128, input_size=SIZE)
    return Trained(backbone, rf.MarginHead(classes, 128, margin=rf.Softmax(), scale=scale, memory=memory), 0.0)


def train(model: Trained, images: Images, labels: Labels, settings: Settings, unknown: Images | None = None) -> Trained:
    """Trains `model` in place: SGD with momentum for the backbone, HeadSGD for the head, polynomial rate.

    unknown (U, 32, 32, 3): images of unknown characters; `unknown_share` of every batch, label -1. A head with a memory has
    it filled by a momentum encoder (gamma 0.99).
    """
    backbone, head = model.backbone, model.head
    head.unknown_weight = settings.unknown_weight
    first = torch.optim.SGD(backbone.parameters(), lr=settings.lr, momentum=0.9, weight_decay=5e-4)
    second = rf.HeadSGD(head, lr=settings.lr, momentum=0.9, weight_decay=5e-4)
    extra = round(settings.batch * settings.unknown_share) if unknown is not None else 0
    known = settings.batch - extra
    steps = settings.epochs * (len(images) // known)
    warmup, late = len(images) // known // 2, []
    backbone.train()
    head.train()
    encoder = None if head.memory is None else rf.MomentumEncoder(backbone, 0.99)
    batches = _batches(images, labels, unknown, known, extra, settings)
    for step, (x, y) in zip(range(steps), batches, strict=False):
        rate = settings.lr * polynomial_smooth(step, base=1.0, warmup=warmup, total=steps)
        for optimizer in (first, second):
            optimizer.param_groups[0]["lr"] = rate
            optimizer.zero_grad()
        head.margin = settings.margin(min(1.0, step / (settings.ramp * steps)) if settings.ramp else 1.0)
        keys = None
        if encoder is not None:
            encoder.update(backbone)
            with torch.no_grad():
                keys = encoder(x)
        loss, stats = head(backbone(x), y, keys=keys, return_stats=True)
        loss.backward()
        nn.utils.clip_grad_norm_(backbone.parameters(), 5.0)
        first.step()
        second.step()
        if step >= 0.8 * steps:
            rows = y >= 0
            late.append(float((stats.target_cosine[rows] > stats.nearest_cosine[rows]).float().mean()))
    model.accuracy = float(np.mean(late))
    return model


def _batches(
    images: Images, labels: Labels, unknown: Images | None, known: int, extra: int, settings: Settings
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless augmented batches: a pure function of the seed, whatever the margin or the weights."""
    augment = Augmentation(
        flip=0.0, crop=settings.crop, low_resolution=settings.low_resolution, smallest=settings.smallest
    )
    epoch = 0
    while True:
        order = np.random.default_rng((settings.seed, epoch)).permutation(len(images))
        others = (
            np.random.default_rng((settings.seed, epoch, 1)).permutation(len(unknown)) if unknown is not None else None
        )
        for step in range(len(images) // known):
            rows = order[step * known : (step + 1) * known]
            batch = [augment(images[i], np.random.default_rng((settings.seed, epoch, i))) for i in rows]
            target = labels[rows]
            if unknown is not None and others is not None and extra:
                chosen = others[np.arange(step * extra, (step + 1) * extra) % len(others)]
                batch += [augment(unknown[i], np.random.default_rng((settings.seed, epoch, i, 1))) for i in chosen]
                target = np.concatenate([target, np.full(extra, -1)])
            yield _input(np.stack(batch)), torch.from_numpy(target)
        epoch += 1


def _input(images: Images) -> Tensor:
    return evaluation.to_input(images)


def embed(model: Trained, images: Images, size: int = 0) -> Tensor:
    """(M, 128) embeddings, no flip; size > 0: images down to size x size and back first."""
    return evaluation.embed_images(
        model.backbone, images if not size else degradations.down_up(images, size), 256, flip=False
    )


def verify(model: Trained, split: Split, sizes: tuple[int, ...] = (0, 8)) -> dict[str, float]:
    """TAR at FAR 1e-2 over ALL pairs and accuracy over 6,000 drawn pairs at each size (0: clean), and clean against 8x8."""
    found: dict[str, float] = {}
    rows = {size: embed(model, split.test_images, size) for size in sizes}
    a, b, same = pairs(split.test_labels)
    for size, x in rows.items():
        name = f"{size}x{size}" if size else "clean"
        tar, _ = all_pairs(x, split.test_labels).tar_at_far([1e-2])
        found[f"TAR@1e-2 {name}"] = float(tar[0])
        found[f"accuracy {name}"] = evaluation.verification_accuracy(x[a], x[b], same)[0]
    if 0 in rows and 8 in rows:
        labels = split.test_labels
        tar, _ = all_pairs(rows[0], labels, rows[8], labels, skip_equal_index=True).tar_at_far([1e-2])
        found["TAR@1e-2 clean against 8x8"] = float(tar[0])
        found["accuracy clean against 8x8"] = evaluation.verification_accuracy(rows[0][a], rows[8][b], same)[0]
    return found


def pairs(labels: Labels, count: int = PAIRS, seed: int = 5) -> tuple[Labels, Labels, NDArray[np.bool_]]:
    """`count` pairs of rows, genuine and impostor in turn."""
    rng = np.random.default_rng(seed)
    first, second = rng.integers(0, len(labels), (2, 400 * count))
    same = labels[first] == labels[second]
    distinct = first != second
    genuine = np.flatnonzero(same & distinct)[: count // 2]
    impostor = np.flatnonzero(~same)[: count // 2]
    rows = np.stack([genuine, impostor], axis=1).ravel()
    return first[rows], second[rows], same[rows]


def run(settings: Settings, name: str, policy: Any = None) -> dict[str, float]:
    """Trains one variant from fresh weights and verifies it."""
    split = load()
    model = start(settings.seed, int(split.labels.max()) + 1, settings.scale, policy)
    train(model, split.images, split.labels, settings)
    found = verify(model, split)
    progress(f"seed {settings.seed} {name}: " + ", ".join(f"{k} {v:.4f}" for k, v in found.items()))
    return found


def differences(better: dict[str, float], worse: dict[str, float]) -> dict[str, float]:
    """Paired differences in points."""
    return {f"{name}, points": 100 * (better[name] - worse[name]) for name in better}


def baseline(seed: int) -> Settings:
    """ArcFace m = 0.3 with both augmentations."""
    return Settings(seed)


def without_low_resolution(seed: int) -> Settings:
    """The same without down-sampling."""
    return replace(Settings(seed), low_resolution=0.0)


def without_margin(seed: int) -> Settings:
    """The same with plain softmax on cosines."""
    return replace(Settings(seed), margin=lambda _: rf.Softmax())
