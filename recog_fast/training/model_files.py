"""Trained backbones with their cards, from wherever they lie, and the embeddings of a source."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recog_fast import data as sources
from recog_fast import evaluation
from recog_fast.counting import Progress, counted
from recog_fast.models import Backbone, ModelCard, OnnxModel
from recog_fast.models.card import CARD
from recog_fast.training.config import read_config
from recog_fast.training.verification import load_backbone, open_card

Network = Backbone | OnnxModel


def open_model(path: str | Path) -> tuple[Network, ModelCard]:
    """(network in eval mode, card) from a model folder, an .onnx file with its card, a run's output folder or one of its
    checkpoints; a run's card says what its settings and its last verification say.

    Raises FileNotFoundError or ValueError when nothing loadable is there.
    """
    place = Path(path)
    if place.suffix == ".onnx" or (place / CARD).is_file():
        return open_card(place)
    if not place.is_dir():
        raise FileNotFoundError(
            f"expected a run, a checkpoint or a model folder (see `recog-fast import`), got {place}"
        )
    backbone, _ = load_backbone(place, None, 0, 0)
    assert isinstance(backbone, Backbone)
    run = place if (place / "config.yaml").is_file() else place.parent.parent
    config = read_config(run / "config.yaml")
    card = ModelCard(
        config.network,
        config.embedding_size,
        network_options=config.network_options,
        input_size=backbone.input_size,
        training_data=f"{config.data.kind} {Path(config.data.path).name}".strip(),
        alignment=f"as in the training data, resized to {config.data.size} pixels",
        metrics=_last_metrics(run / "metrics.jsonl"),
        protocol="10-fold accuracy on pairs, cosine of flip-summed embeddings, as trained",
    )
    return backbone, card


def _last_metrics(file: Path) -> tuple[dict[str, Any], ...]:
    """The last verification a run logged."""
    from recog_fast.evaluation.report import read_metrics

    rows = [row for row in read_metrics(file) if any(k.startswith("val/") for k in row)] if file.is_file() else []
    return (
        tuple({"set": k.removeprefix("val/"), "value": v} for k, v in rows[-1].items() if k.startswith("val/"))
        if rows
        else ()
    )


def embed_blocks(
    backbone: Network, dataset: Any, size: tuple[int, int], rows: int = 4096, batch_size: int = 64, progress: Progress | None = None
) -> Iterator[tuple[Tensor, list[int]]]:
    """(flip-summed embeddings (n, D), the places of their images) of `rows` images of a source at a time, so that memory does
    not grow with it; images that do not decode are left out, and so are blocks without any. progress(done, total) is called
    at the start and after every image of the source."""
    places = counted(range(len(dataset)), len(dataset), progress)
    for start in range(0, len(dataset), rows):
        kept: list[int] = []
        images = _readable(dataset, itertools.islice(places, min(rows, len(dataset) - start)), size, kept)
        first = next(images, None)
        if first is not None:
            yield evaluation.embed_images(backbone, itertools.chain([first], images), batch_size), kept
    next(places, None)  # past the last one: all are done


def _readable(dataset: Any, places: Iterable[int], size: tuple[int, int], kept: list[int]) -> Iterator[Any]:
    """The images that decode; their places go to `kept`."""
    for index in places:
        try:
            image = dataset[index][0]
        except sources.CorruptImage:
            continue
        kept.append(index)
        yield sources.resize_image(image, size)


def embed_dataset(
    backbone: Network, dataset: Any, size: tuple[int, int], batch_size: int = 64, progress: Progress | None = None
) -> tuple[Tensor, list[int]]:
    """All blocks of `embed_blocks` as one. Raises ValueError where no image decodes."""
    blocks = list(embed_blocks(backbone, dataset, size, batch_size=batch_size, progress=progress))
    if not blocks:
        raise ValueError(f"embed_dataset: expected at least one image that decodes, got none of {len(dataset)}")
    return torch.cat([block for block, _ in blocks]), [place for _, kept in blocks for place in kept]
