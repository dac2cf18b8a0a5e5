"""LFW-style verification while training: pair sets from .bin files, held-out identities or synthetic ones."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from recog_fast import data as sources
from recog_fast import evaluation
from recog_fast.counting import Progress, counted
from recog_fast.models import Backbone, ModelCard, OnnxModel, load_model, load_onnx, read_card
from recog_fast.training.batches import Image
from recog_fast.training.config import DataConfig, TrainConfig
from recog_fast.training.data import Split, TrainingImages, open_source, read_image, split_classes


@dataclass(frozen=True)
class PairSet:
    """Pairs over a list of distinct images: pair k is images first[k], second[k]."""

    name: str
    images: list[Image]  # (S, S, 3) uint8 each
    first: NDArray[np.int64]  # (P,)
    second: NDArray[np.int64]  # (P,)
    same: NDArray[np.bool_]  # (P,)
    unreadable: int = 0  # images of the split that could not be decoded and are in no pair


def pair_sets(config: TrainConfig, images: TrainingImages) -> list[PairSet]:
    """The pair sets of `config.val_targets`, decoded once."""
    found = []
    for target in config.val_targets:
        if target == "holdout":
            found.append(pairs_of_split("holdout", images.held, config.data.size, config.val_pairs, config.seed))
        elif target == "synthetic":
            found.append(_synthetic_pairs(config))
        else:
            found.append(pairs_of_bin(target, config.data.size))
    return found


def _synthetic_pairs(config: TrainConfig) -> PairSet:
    """Pairs of synthetic people that no training set draws: their numbers start far above."""
    options = {"num_identities": 200, "images_per_identity": 10, "first_identity": 1 << 30}
    settings = DataConfig(kind="synthetic", size=config.data.size, cache=True, options=options)
    split, _ = split_classes(open_source(settings), settings, config.seed)
    return pairs_of_split("synthetic", split, config.data.size, config.val_pairs, config.seed)


def pairs_of_bin(path: str | Path, size: int) -> PairSet:
    """An InsightFace `.bin` file; its images at size x size. Raises FileNotFoundError, and ValueError for a damaged file."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"verification: no pair file {path}")
    encoded, same = sources.read_bin(path)
    images = [
        sources.resize_image(sources.decode_image(bytes(data), str(path), i), size) for i, data in enumerate(encoded)
    ]
    left = np.arange(0, len(images), 2)
    return PairSet(Path(path).stem, images, left, left + 1, np.asarray(same, dtype=bool))


def pairs_of_split(name: str, split: Split, size: int, pairs: int, seed: int) -> PairSet:
    """`pairs` distinct pairs, half genuine, half impostor, alternating (so every contiguous fold is balanced), drawn by `seed`.

    Raises ValueError when the split holds fewer than two identities or no identity with two images.
    """
    rng = np.random.default_rng((seed, 0xA1B2))
    decoded = [read_image(split, i, size) for i in range(len(split))]
    readable = np.flatnonzero([image is not None for image in decoded])
    labels = split.labels[readable]
    groups = [np.flatnonzero(labels == k) for k in np.unique(labels[labels >= 0])]
    several = [group for group in groups if len(group) > 1]
    if len(groups) < 2 or not several:
        raise ValueError(
            f"verification: expected two identities and one with two images to draw pairs from for {name!r}, got {len(groups)}"
        )
    genuine: set[tuple[int, int]] = set()
    impostor: set[tuple[int, int]] = set()
    # Small splits hold fewer distinct pairs than asked for: the number of draws is bounded.
    for _ in range(20 * pairs):
        if len(genuine) < pairs // 2:
            a, b = rng.choice(several[rng.integers(len(several))], 2, replace=False)
            genuine.add((min(a, b), max(a, b)))
        if len(impostor) < pairs // 2:
            g, h = rng.choice(len(groups), 2, replace=False)
            a, b = rng.choice(groups[g]), rng.choice(groups[h])
            impostor.add((min(a, b), max(a, b)))
    count = min(len(genuine), len(impostor))
    # Sorted, then shuffled by the same generator: the order of a set is no part of the seed.
    chosen = [rng.permutation(np.array(sorted(found), dtype=np.int64))[:count] for found in (genuine, impostor)]
    both = np.stack(chosen, axis=1).reshape(-1, 2)
    images = [decoded[i] for i in readable]
    return PairSet(
        name, [image for image in images if image is not None], both[:, 0], both[:, 1], np.arange(2 * count) % 2 == 0,
        len(decoded) - len(images),
    )  # fmt: skip


def verify(
    backbone: torch.nn.Module,
    pairs: PairSet,
    size: int = 0,
    batch_size: int = 64,
    device: torch.device | None = None,
    folds: int = 10,
    progress: Progress | None = None,
) -> tuple[evaluation.VerificationResult, float]:
    """(result, accuracy over balanced folds) of a backbone on a pair set, flip sum; size > 0: images down to it and up again.

    The result's folds are the contiguous ones of the pairs' order (the LFW protocol). Files that list all genuine pairs first
    give folds of one kind, whose thresholds come from the other kind mostly: accuracies read low, by several points. The
    second number deals the pairs out alternately first; for balanced files it is the same within noise. progress(done, total) is
    called at the start and after every image.
    """
    images = pairs.images
    if size:
        images = [sources.degradations.down_up(image, size) for image in images]
    shown = counted(images, len(images), progress)
    embeddings = evaluation.embed_images(backbone, shown, batch_size, True, device, prepare=_prepare(backbone))
    first, second = embeddings[pairs.first], embeddings[pairs.second]
    form = evaluation.post_processing(True, True)
    result = evaluation.verification_result(first, second, pairs.same, folds=folds, form=form)
    order = alternating(pairs.same)
    balanced, _, _ = evaluation.verification_accuracy(first[order], second[order], pairs.same[order], folds)
    return result, balanced


def _prepare(backbone: torch.nn.Module) -> evaluation.embed.Prepare:
    """The network's own pixel convention; InsightFace's for a module that states none."""
    own = getattr(backbone, "preprocessing", None)
    return evaluation.to_input if own is None else lambda images: own(torch.from_numpy(images))


def alternating(same: NDArray[np.bool_]) -> NDArray[np.int64]:
    """An order of pairs (P,) in which both kinds are spread evenly; each kind keeps its own order."""
    place = np.empty(len(same))
    for kind in (True, False):
        where = np.flatnonzero(same == kind)
        place[where] = (np.arange(len(where)) + 0.5) / max(1, len(where))
    return np.argsort(place, kind="stable")


def verify_all(
    backbone: torch.nn.Module, found: list[PairSet], config: TrainConfig, device: torch.device
) -> dict[str, float]:
    """Accuracy (in file order and over balanced folds), its deviation and EER at full size; accuracy at `config.val_sizes`."""
    scalars: dict[str, float] = {}
    check = partial(verify, backbone, batch_size=config.batch_size, device=device)
    for pairs in found:
        full, balanced = check(pairs)
        name = f"val/{pairs.name}"
        scalars |= {name: full.accuracy, f"{name}/balanced": balanced, f"{name}/std": full.std, f"{name}/eer": full.eer}
        for size in config.val_sizes:
            degraded, balanced = check(pairs, size)
            scalars |= {f"{name}@{size}": degraded.accuracy, f"{name}@{size}/balanced": balanced}
    return scalars


def open_card(place: Path) -> tuple[Backbone | OnnxModel, ModelCard]:
    """(network in eval mode, card) from an .onnx file with its card, or a model folder of either kind."""
    from recog_fast.models.onnx_file import MODEL, NETWORK

    if place.suffix == ".onnx":
        return load_onnx(place)
    return load_onnx(place / MODEL) if read_card(place).network == NETWORK else load_model(place)


def load_backbone(path: str | Path, network: str | None, embedding_size: int, size: int) -> tuple[torch.nn.Module, int]:
    """(backbone in eval mode, input size) from a run's output folder, one of its checkpoints, a model folder (card.json), an
    .onnx file with its card, or a file of weights.

    A folder brings its settings (config.yaml or the card); a file needs `network`, `embedding_size` and `size`.
    Raises FileNotFoundError or ValueError when nothing loadable is there or the weights do not fit.
    """
    from recog_fast.checkpoint import read_checkpoint
    from recog_fast.models import load_backbone as load_weights
    from recog_fast.models.card import CARD
    from recog_fast.training.model import build_backbone
    from recog_fast.training.saved import find_run

    place = Path(path)
    if place.suffix == ".onnx" or (place / CARD).is_file():
        described, card = open_card(place)
        return described, card.input_size[0]
    if place.is_dir():
        config, checkpoint = find_run(place)
        weights: Any = read_checkpoint(checkpoint, keys=("model",))["model"]
    elif place.is_file():
        if network is None:
            raise ValueError(f"eval: expected --network for the weights file {place}, got none")
        config = TrainConfig(network=network, embedding_size=embedding_size, data=DataConfig(size=size))
        weights = place
    else:
        raise FileNotFoundError(f"eval: no run, checkpoint or weights file {place}")
    backbone = build_backbone(config)
    load_weights(backbone, weights)
    return backbone.eval(), config.data.size
