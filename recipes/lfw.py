"""The LFWFT set-up: the pretrained MobileFaceNet, frozen up to its last stage, whose maps of clean / 16x16 / 8x8 images are
cached; the last stage is fine-tuned on the 649 people of LFW sets 1-4 with two or more images, and verified on fold 5.

Caching runs the network over 12,800 images once (minutes of CPU; runs/recipes/lfw_maps.npz); a run then takes under a minute.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import recog_fast as rf
from recipes import ers_center, fold5
from recipes.common import ROOT, data_dir, progress
from recog_fast.data import RecordDataset, degradations
from recog_fast.evaluation import all_pairs, verification_accuracy
from recog_fast.models import build_model, load_backbone
from recog_fast.training.schedules import polynomial_smooth

CACHE = ROOT / "runs" / "recipes" / "lfw_maps.npz"
SIZES = (0, 16, 8)  # 0: clean
SHARES = (0.5, 0.25, 0.25)  # of the training images in each epoch
NAMES = ("clean", "16x16", "8x8")
Maps = NDArray[np.float16]  # (3, M, 128, 7, 7)


@dataclass(frozen=True)
class Faces:
    """Cached maps and people of the training images and of fold 5."""

    maps: Maps
    people: NDArray[np.int64]
    test_maps: Maps
    test_people: NDArray[np.int64]


def network() -> Any:
    """The pretrained MobileFaceNet, eval mode."""
    model = build_model("mobilenet_v2", embedding_dim=128)
    load_backbone(model, data_dir() / "weights" / "mobilefacenet_foamliu.pt")
    return model.eval()


class Tail(nn.Module):
    """Its last stage and head: maps (B, 128, 7, 7) -> embeddings (B, 128); `forward_features` gives the last map."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.stage = nn.Sequential(*copy.deepcopy(list(model.features[-2:])))
        self.conv2, self.gdconv, self.conv3, self.bn = (
            copy.deepcopy(m) for m in (model.conv2, model.gdconv, model.conv3, model.bn)
        )
        # A quarter off a step on CPU.
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward_features(self, maps: Tensor) -> Tensor:
        """(B, 128, 7, 7) -> (B, 512, 7, 7)."""
        features: Tensor = self.conv2(self.stage(maps.contiguous(memory_format=torch.channels_last)))
        return features

    def embed(self, features: Tensor) -> Tensor:
        """(B, 512, 7, 7) -> (B, 128)."""
        return torch.flatten(self.bn(self.conv3(self.gdconv(features))), 1)

    def forward(self, maps: Tensor) -> Tensor:
        """Maps to embeddings."""
        return self.embed(self.forward_features(maps))


@functools.cache
def load() -> Faces:
    """The cache, made where it is missing."""
    if not CACHE.is_file():
        _make()
    with np.load(CACHE) as arrays:
        return Faces(*(arrays[name] for name in ("maps", "people", "test_maps", "test_people")))


def _make() -> None:
    source = RecordDataset(data_dir() / "lfw112" / "train_sets1-4" / "train.rec")
    labels = np.asarray(source.labels, dtype=np.int64)
    rows = np.flatnonzero(np.bincount(labels)[labels] >= 2)
    people = np.unique(labels[rows], return_inverse=True)[1].astype(np.int64)
    images = np.stack([source[int(i)][0] for i in rows])
    progress(f"caching maps of {len(images)} training images of {people.max() + 1} people")
    CACHE.parent.mkdir(parents=True, exist_ok=True)
    partial = CACHE.with_suffix(".partial.npz")
    np.savez(
        partial,
        maps=_maps(images),
        people=people,
        test_maps=_maps(ers_center.images()),
        test_people=fold5.load().people,
    )
    partial.replace(CACHE)


def _maps(images: NDArray[np.uint8]) -> Maps:
    model = network()
    frozen = nn.Sequential(model.conv1, model.dw_conv, *model.features[:-2])
    made = np.empty((len(SIZES), len(images), 128, 7, 7), np.float16)
    with torch.inference_mode():
        for k, size in enumerate(SIZES):
            for i in range(0, len(images), 64):
                batch = images[i : i + 64]
                batch = degradations.down_up(batch, size) if size else batch
                made[k, i : i + 64] = frozen(model.preprocessing(torch.from_numpy(batch))).numpy()
            progress(f"  {NAMES[k]}")
    return made


@dataclass
class Settings:
    """One fine-tuning run."""

    seed: int
    policy: Any = None  # rf.QAFace, rf.VPL or None
    epochs: int = 3
    batch: int = 64
    lr: float = 0.03
    head_lr: float = 0.1
    scale: float = 32.0
    margin: float = 0.3


def batches(faces: Faces, settings: Settings) -> Iterator[tuple[Tensor, Tensor]]:
    """(maps, labels) of every step: order and condition of each image are a pure function of the seed and the epoch."""
    for epoch in range(settings.epochs):
        rng = np.random.default_rng((settings.seed, epoch))
        order, level = rng.permutation(len(faces.people)), rng.choice(3, len(faces.people), p=SHARES)
        for i in range(0, len(order) - settings.batch + 1, settings.batch):
            rows = order[i : i + settings.batch]
            yield (
                torch.from_numpy(faces.maps[level[rows], rows].astype(np.float32)),
                torch.from_numpy(faces.people[rows]),
            )


def fine_tune(faces: Faces, settings: Settings) -> Tail:
    """ArcFace with or without a prototype memory fed by a momentum encoder (gamma 0.99)."""
    torch.manual_seed(settings.seed)
    tail, classes = Tail(network()), int(faces.people.max()) + 1
    memory = None if settings.policy is None else rf.PrototypeMemory(classes, 128, settings.policy)
    torch.manual_seed(settings.seed)
    head = rf.MarginHead(classes, 128, margin=rf.ArcFace(settings.margin), scale=settings.scale, memory=memory)
    encoder = None if memory is None else rf.MomentumEncoder(tail, 0.99)
    first = torch.optim.SGD(tail.parameters(), lr=settings.lr, momentum=0.9, weight_decay=5e-4)
    second = rf.HeadSGD(head, lr=settings.head_lr, momentum=0.9, weight_decay=5e-4)
    total = settings.epochs * (len(faces.people) // settings.batch)
    tail.train()
    head.train()
    for step, (maps, labels) in enumerate(batches(faces, settings)):
        share = polynomial_smooth(step, base=1.0, warmup=total // 10, total=total)
        for optimizer, lr in ((first, settings.lr), (second, settings.head_lr)):
            optimizer.param_groups[0]["lr"] = lr * share
            optimizer.zero_grad()
        keys = None
        if encoder is not None:
            encoder.update(tail)
            with torch.no_grad():
                keys = encoder(maps)
        head(tail(maps), labels, keys=keys).backward()
        nn.utils.clip_grad_norm_(tail.parameters(), 5.0)
        first.step()
        second.step()
    return tail.eval()


def embed(tail: Tail, maps: Maps) -> list[NDArray[np.float64]]:
    """Embeddings of the three conditions."""
    found = []
    with torch.inference_mode():
        for condition in maps:
            parts = [
                tail(torch.from_numpy(condition[i : i + 256].astype(np.float32))) for i in range(0, len(condition), 256)
            ]
            found.append(torch.cat(parts).double().numpy())
    return found


def verify(tail: Tail, faces: Faces) -> dict[str, float]:
    """TAR at FAR 1e-2 over all pairs of the fold at each resolution and over the mix, and accuracy of the 600 listed pairs."""
    rows, found = embed(tail, faces.test_maps), {}
    with np.load(data_dir() / "embeddings" / "lfw_fold05_mobilefacenet128.npz") as arrays:
        a, b, same = arrays["a"], arrays["b"], arrays["same"].astype(bool)
    order = np.argsort(
        np.r_[np.arange(same.sum()), np.arange((~same).sum())], kind="stable"
    )  # both kinds in every fold
    for name, x in zip(NAMES, rows, strict=True):
        tar, _ = all_pairs(x, faces.test_people).tar_at_far([1e-2])
        found[f"TAR@1e-2 {name}"] = float(tar[0])
        found[f"accuracy {name}"] = verification_accuracy(x[a][order], x[b][order], same[order])[0]
    return found
