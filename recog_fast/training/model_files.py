"""Trained backbones with their cards, from wherever they lie, and the embeddings of a source."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recog_fast import data as sources
from recog_fast import evaluation
from recog_fast.models import Backbone, ModelCard, load_model
from recog_fast.models.card import CARD
from recog_fast.training.config import read_config
from recog_fast.training.verification import load_backbone


def open_model(path: str | Path) -> tuple[Backbone, ModelCard]:
    """(backbone in eval mode, card) from a model folder, a run's output folder or one of its checkpoints; a run's card says
    what its settings and its last verification say.

    Raises FileNotFoundError or ValueError when nothing loadable is there.
    """
    place = Path(path)
    if (place / CARD).is_file():
        return load_model(place)
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


def embed_dataset(
    backbone: Backbone, dataset: Any, size: tuple[int, int], batch_size: int = 64
) -> tuple[Tensor, list[int]]:
    """(flip-summed embeddings (N, D), the places of their images): images that do not decode are left out.

    Raises ValueError where none does.
    """
    kept: list[int] = []

    def images() -> Any:
        for index in range(len(dataset)):
            try:
                image = dataset[index][0]
            except sources.CorruptImage:
                continue
            kept.append(index)
            yield sources.resize_image(image, size)

    embeddings = evaluation.embed_images(
        backbone, images(), batch_size, True, prepare=lambda batch: backbone.preprocessing(torch.from_numpy(batch))
    )
    return embeddings, kept
