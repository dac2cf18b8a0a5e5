"""A trained backbone as a folder: model.safetensors, card.json (what a program needs) and README.md (what a person
needs): colour order, mean, std, licences, training data, metrics and their protocol."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .backbone import Backbone, Preprocessing
from .loading import load_backbone
from .registry import build_model

WEIGHTS, CARD, README = "model.safetensors", "card.json", "README.md"
FORMAT = 1
_UNSTATED = "not stated"


@dataclass(frozen=True)
class ModelCard:
    """What has to be known about a backbone to use it rightly.

    network, network_options, embedding_dim, input_size (height, width): what `build_model` takes. preprocessing: how 8-bit
    pixels become its input, colour order included. normalized: whether the network normalises its embeddings (those here
    do not). alignment: how faces are cropped. licence, training_data, training_data_licence: of the weights and of what
    they were trained on. metrics: one dict per result, protocol: how they were measured. sha256: of the weights file.
    """

    network: str
    embedding_dim: int
    input_size: tuple[int, int] = (112, 112)
    network_options: dict[str, Any] = field(default_factory=dict)
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    normalized: bool = False
    alignment: str = "similarity transform of five landmarks onto the ArcFace 112x112 template"
    licence: str = _UNSTATED
    training_data: str = _UNSTATED
    training_data_licence: str = _UNSTATED
    metrics: tuple[dict[str, Any], ...] = ()
    protocol: str = _UNSTATED
    notes: str = ""
    sha256: str = ""

    def to_json(self) -> str:
        """The card as JSON text that `read_card` reads back."""
        return json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=1, sort_keys=True) + "\n"

    def to_markdown(self) -> str:
        """The card as a page for people."""
        p = self.preprocessing
        mean, std = (", ".join(f"{v:g}" for v in values) for values in (p.mean, p.std))
        rows = [
            ("network", f"{self.network} {self.network_options or ''}".strip()),
            ("input", f"{self.input_size[0]} x {self.input_size[1]} pixels (height x width), {self.alignment}"),
            ("colour order", p.color_order),
            ("pixels", f"(pixel / 255 - mean) / std; mean {mean}; std {std} (in {p.color_order} order)"),
            (
                "embedding",
                f"{self.embedding_dim} numbers, {'of length 1' if self.normalized else 'not normalised: divide by their length'}",
            ),
            ("licence of the weights", self.licence),
            ("training data", self.training_data),
            ("licence of the training data", self.training_data_licence),
            ("protocol", self.protocol),
            ("sha256", self.sha256 or _UNSTATED),
        ]
        table = "\n".join(f"| {name} | {_cell(value)} |" for name, value in rows)
        metrics = "".join(
            "- " + ", ".join(f"{key} {_number(v)}" for key, v in row.items()) + "\n" for row in self.metrics
        )
        notes = f"\n{self.notes}\n" if self.notes else ""
        return (
            f"# {self.network}, {self.embedding_dim}-D face embeddings\n\n| | |\n|---|---|\n{table}\n\n## Metrics\n\n"
            f"{metrics or _UNSTATED + chr(10)}{notes}\n## Use on people\n\nThis model can identify people. Biometric data is "
            "protected by law in many places; whoever runs it is responsible for a lawful basis, and for knowing its error "
            "rates on the people it is used on.\n"
        )


def _cell(text: str) -> str:
    return " ".join(str(text).replace("|", "\\|").split())


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def read_card(path: str | os.PathLike[str]) -> ModelCard:
    """The card in `path` (a card.json, or the folder it lies in). Raises ValueError naming the file and the field."""
    file = Path(path) / CARD if os.path.isdir(path) else Path(path)
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        if values.pop("format", None) != FORMAT:
            raise ValueError(f"expected format {FORMAT}")
        pixels = values.pop("preprocessing")
        pixels = Preprocessing(tuple(pixels["mean"]), tuple(pixels["std"]), pixels["color_order"])
        height, width = values.pop("input_size")
        metrics = tuple(dict(row) for row in values.pop("metrics"))
        return ModelCard(**values, preprocessing=pixels, input_size=(int(height), int(width)), metrics=metrics)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"read_card: expected a model card in {file}, got {type(error).__name__}: {error}") from error


def save_model(backbone: Backbone, folder: str | os.PathLike[str], card: ModelCard) -> ModelCard:
    """Write model.safetensors, card.json and README.md into `folder`, made if need be; each appears whole or not at all.

    The card's embedding_dim, input_size and preprocessing are taken from the backbone. Returns the card as written, with
    the hash of the weights. Raises ValueError where `build_model(card.network, ...)` is another network. Needs
    safetensors.
    """
    from safetensors.torch import save_file

    place = Path(folder)
    expected = _shapes(
        _built(dataclasses.replace(card, embedding_dim=backbone.embedding_dim, input_size=backbone.input_size))
    )
    state = {name: value.detach().cpu().contiguous() for name, value in backbone.state_dict().items()}
    if expected != _shapes(backbone):
        raise ValueError(
            f"save_model: expected the tensors of {card.network} {card.network_options}, got {len(state)} of {type(backbone).__name__}"
        )
    place.mkdir(parents=True, exist_ok=True)
    new = place / f".{WEIGHTS}.new"
    save_file(state, new)
    written = dataclasses.replace(
        card,
        embedding_dim=backbone.embedding_dim,
        input_size=backbone.input_size,
        preprocessing=backbone.preprocessing,
        sha256=file_hash(new),
    )
    os.replace(new, place / WEIGHTS)
    write_texts({place / CARD: written.to_json(), place / README: written.to_markdown()})
    return written


def write_texts(texts: Mapping[Path, str]) -> None:
    """Write text files, each whole or not at all."""
    for file, text in texts.items():
        draft = file.with_name(f".{file.name}.new")
        draft.write_text(text, encoding="utf-8")
        os.replace(draft, file)


def load_model(folder: str | os.PathLike[str]) -> tuple[Backbone, ModelCard]:
    """(backbone in eval mode with the card's preprocessing, card) from a folder that `save_model` wrote.

    Raises ValueError for a damaged card, weights whose hash is not the card's, or that do not fit.
    """
    card = read_card(folder)
    weights = Path(folder) / WEIGHTS
    if not weights.is_file():
        raise ValueError(f"load_model: expected {WEIGHTS} in {os.fspath(folder)}, got none")
    found = file_hash(weights)
    if card.sha256 and found != card.sha256:
        raise ValueError(f"load_model: expected {weights} of sha256 {card.sha256}, got {found}")
    backbone = _built(card)
    load_backbone(backbone, weights)
    return backbone.eval(), card


def _built(card: ModelCard) -> Backbone:
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in card.network_options.items()}
    return build_model(
        card.network,
        embedding_dim=card.embedding_dim,
        input_size=card.input_size,
        preprocessing=card.preprocessing,
        **options,
    )


def _shapes(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


def file_hash(path: Path) -> str:
    """sha256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
