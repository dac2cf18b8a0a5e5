"""How sure a model is about people it has never seen: overlap filter, statistics of p_max, centre sparsity (math.md 3)."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import recog_fast as rf
from recog_fast.counting import Progress, counted
from recog_fast.data.formats import DRAWN
from recog_fast.training.batches import Image
from recog_fast.training.config import DataConfig
from recog_fast.training.data import open_source, read_image, split_classes
from recog_fast.training.kept import write_kept
from recog_fast.training.saved import load_run

Probabilities = NDArray[np.float64]
LEVELS = tuple(round(0.1 * step, 1) for step in range(1, 10))


@torch.no_grad()
def max_probabilities(
    backbone: Any, head: rf.MarginHead, images: Iterable[Image], batch_size: int = 64
) -> Probabilities:
    """p_max = max_j softmax(s c)_j over all classes, (M,), of images (S, S, 3) uint8: exp(s c_max - lse) of the sweep, no
    N x C tensor.

    Backbone and head run in eval mode as they are given. A head of one class is sure of everything: 1.
    """
    device = head.weight.device
    found: list[torch.Tensor] = []
    waiting: list[Image] = []

    def flush() -> None:
        embeddings = backbone(backbone.preprocessing(torch.from_numpy(np.stack(waiting)).to(device)))
        nobody = torch.full((len(waiting),), -1, device=device)
        found.append(head(embeddings, nobody, return_stats=True)[1].max_probability.double().cpu())
        waiting.clear()

    for image in images:
        waiting.append(image)
        if len(waiting) == batch_size:
            flush()
    if waiting:
        flush()
    probabilities: Probabilities = torch.cat(found).clamp(0, 1).numpy() if found else np.empty(0)
    return probabilities


def unknown_statistics(probabilities: Probabilities, head: rf.MarginHead) -> dict[str, Any]:
    """The UIR paper's report: images, mean of p_max, its cumulative distribution (share of images with p_max <= 0.1 ... 0.9)
    and the sparsity of the class centres, mean_{j<k}(1 - <W^_j, W^_k>).

    Raises ValueError for no images.
    """
    if not len(probabilities):
        raise ValueError("unknowns: expected images of unseen people, got none")
    weight = head.weight.detach().reshape(-1, head.embedding_dim)
    return {
        "images": len(probabilities),
        "mean": float(probabilities.mean()),
        "cumulative": {f"{level:g}": float((probabilities <= level).mean()) for level in LEVELS},
        "center_sparsity": float(rf.center_sparsity(weight)) if len(weight) > 1 else None,
    }


def statistics_of_run(run: str | Path, data: DataConfig | None, progress: Progress | None = None) -> dict[str, Any]:
    """`unknown_statistics` of a run on a source whose people it was not trained on; None: the run's own held-out identities.
    progress(done, total) is called at the start and after every image.

    Raises FileNotFoundError, and ValueError where there are no such images.
    """
    config, backbone, head = load_run(run)
    if data is None:
        if not config.data.holdout_classes:
            raise ValueError("unknowns: expected --path, or a run with data.holdout_classes > 0, got neither")
        _, held = split_classes(open_source(config.data), config.data, config.seed)
        source: Any = held
    else:
        source = open_source(data, "unknowns")
    images = (read_image(source, i, config.data.size) for i in counted(range(len(source)), len(source), progress))
    return unknown_statistics(max_probabilities(backbone, head, (i for i in images if i is not None)), head)


def filter_overlap(
    run: str | Path, data: DataConfig, output: str | Path, threshold: float = 0.9, progress: Progress | None = None
) -> dict[str, Any]:
    """Writes the list of the images of `data` that the stage-1 model is NOT sure to know: p_max <= threshold (UIR: 0.9).

    The others are probably people of the training set: UIR would push them away from their own centre. Images that cannot be
    decoded are left out too. Give the list to a run as `unlabelled.keep`. Returns what `unknown_statistics` says about all
    images, with "kept", "overlapping" and "unreadable". progress(done, total) is called at the start and after every image.

    Raises ValueError for a threshold outside [0, 1] and where nothing is kept, FileNotFoundError for a run that is not there.
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"filter-overlap: expected threshold in [0, 1], got {threshold}")
    config, backbone, head = load_run(run)
    source = open_source(data, "filter-overlap")
    readable: list[int] = []

    def images() -> Iterable[Image]:
        for i in counted(range(len(source)), len(source), progress):
            image = read_image(source, i, config.data.size)
            if image is not None:
                readable.append(i)
                yield image

    probabilities = max_probabilities(backbone, head, images())
    report = unknown_statistics(probabilities, head)
    kept = probabilities <= threshold
    if not kept.any():
        raise ValueError(f"filter-overlap: expected images with p_max <= {threshold}, got none of {len(kept)}")
    write_kept(output, source, np.array(readable, dtype=np.int64)[kept], probabilities[kept])
    counts = {"kept": int(kept.sum()), "overlapping": int((~kept).sum()), "unreadable": len(source) - len(readable)}
    return {**report, **counts}


def describe(report: dict[str, Any]) -> str:
    """The report as lines for people."""
    lines = [
        f"{report['images']} images   mean p_max {report['mean']:.4f}   centre sparsity {report['center_sparsity']}"
    ]
    lines.append("p_max <=  " + "   ".join(f"{level} {share:.4f}" for level, share in report["cumulative"].items()))
    if "kept" in report:
        lines.append("   ".join(f"{name} {report[name]}" for name in ("kept", "overlapping", "unreadable")))
    return "\n".join(lines)


def data_of(kind: str, path: str, options: str) -> DataConfig:
    """A source named on the command line; options is a JSON object. Raises ValueError naming what does not fit."""
    try:
        given = json.loads(options)
        if not isinstance(given, dict):
            raise ValueError(f"expected an object, got {type(given).__name__}")
    except ValueError as error:
        raise ValueError(f"expected --options as a JSON object, got {options!r} ({error})") from error
    if kind != DRAWN and not path:
        raise ValueError(f"expected --path with --kind {kind}, got none")
    return DataConfig(kind=kind, path=path, options=given)
