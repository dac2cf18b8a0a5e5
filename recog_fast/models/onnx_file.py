"""An .onnx file with a card as a network: to evaluate and to search with what others exported."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .backbone import Backbone, Preprocessing, Triple
from .card import CARD, README, ModelCard, file_hash, read_card, write_texts

NETWORK, MODEL = "onnx", "model.onnx"
RAW = Preprocessing((0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255))  # pixels 0 .. 255 as they are: normalised inside
_DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64}


class OnnxModel(nn.Module):
    """images (B, 3, H, W) -> embeddings (B, D) float32 of an ONNX file, by onnxruntime on the CPU, without gradients.

    preprocessing: how 8-bit pixels become the input. A file with a fixed batch is run in parts of that size.
    Raises ImportError without onnxruntime, ValueError for a file that is no such network.
    """

    def __init__(self, path: str | os.PathLike[str], input_size: tuple[int, int], preprocessing: Preprocessing) -> None:
        import onnxruntime

        super().__init__()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        try:
            self._session = onnxruntime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime has an exception type for each status
            raise ValueError(f"OnnxModel: expected an ONNX network in {os.fspath(path)}, got {' '.join(str(error).split()):.300}") from error
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        shape = list(inputs[0].shape) if inputs else []
        if len(inputs) != 1 or len(outputs) != 1 or len(shape) != 4 or inputs[0].type not in _DTYPES:
            raise ValueError(
                f"OnnxModel: expected one floating input (batch, 3, H, W) and one output in {os.fspath(path)}, got "
                f"{[(one.name, one.shape, one.type) for one in inputs]} and {[one.name for one in outputs]}"
            )
        for place, expected in zip((1, 2, 3), (3, *input_size), strict=True):
            if isinstance(shape[place], int) and shape[place] != expected:
                raise ValueError(f"OnnxModel: expected input (batch, 3, {input_size[0]}, {input_size[1]}) in {os.fspath(path)}, got {shape}")
        self.input_size, self.preprocessing = input_size, preprocessing
        self._name, self._dtype = inputs[0].name, _DTYPES[inputs[0].type]
        self._batch = shape[0] if isinstance(shape[0], int) else 0
        self.embedding_dim = self(torch.zeros(1, 3, *input_size)).shape[1]

    def forward(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) float -> embeddings (B, D) float32; ValueError for another shape, or an output that is not (B, D)."""
        if images.ndim != 4 or tuple(images.shape[1:]) != (3, *self.input_size):
            raise ValueError(f"OnnxModel: expected images of shape (B, 3, {self.input_size[0]}, {self.input_size[1]}), got {tuple(images.shape)}")
        x = images.detach().cpu().numpy().astype(self._dtype)
        step = self._batch or max(1, len(x))
        parts = []
        for start in range(0, len(x), step):
            part = x[start : start + step]
            padded = part if not self._batch else np.concatenate([part, np.zeros((step - len(part), *part.shape[1:]), part.dtype)])
            y = np.asarray(self._session.run(None, {self._name: padded})[0])
            if y.ndim != 2 or len(y) != len(padded):
                raise ValueError(f"OnnxModel: expected an output of shape ({len(padded)}, D), got {y.shape}")
            parts.append(y[: len(part)].astype(np.float32))
        return torch.from_numpy(np.concatenate(parts) if parts else np.zeros((0, self.embedding_dim), np.float32))

    def metadata(self) -> dict[str, str]:
        """The file's own properties."""
        return dict(self._session.get_modelmeta().custom_metadata_map)


def card_path(path: str | os.PathLike[str]) -> Path:
    """Where the card of one .onnx file lies: model.onnx has model.card.json."""
    return Path(path).with_suffix(".card.json")


def save_onnx_card(path: str | os.PathLike[str], backbone: Backbone, card: ModelCard, inside: bool) -> ModelCard:
    """Write the card of an exported ONNX file beside it: `card` with the input the file takes and its hash.

    inside: what `export_onnx` returned. Raises FileNotFoundError where there is no such file.
    """
    written = dataclasses.replace(
        card, embedding_dim=backbone.embedding_dim, input_size=backbone.input_size,
        preprocessing=RAW if inside else backbone.preprocessing, sha256=file_hash(Path(path)),
    )  # fmt: skip
    write_texts({card_path(path): written.to_json()})
    return written


def load_onnx(path: str | os.PathLike[str]) -> tuple[OnnxModel, ModelCard]:
    """(network, card) of an ONNX file; how pixels are prepared comes from the card beside it (<name>.card.json, or card.json).

    Raises FileNotFoundError; ValueError for no card, a card whose hash is of another file, or one that contradicts what
    `export_onnx` noted in the file; ImportError without onnxruntime.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"load_onnx: no file {file}")
    own, shared = card_path(file), file.parent / CARD
    place = own if own.is_file() else shared
    if not place.is_file():
        raise ValueError(
            f"load_onnx: expected the card {own.name} or {CARD} beside {file}, which says how pixels are prepared, got none; "
            "`recog-fast import` makes one for a file from elsewhere"
        )
    card = read_card(place)
    if (place == own or card.network == NETWORK) and card.sha256 and file_hash(file) != card.sha256:
        raise ValueError(f"load_onnx: expected {file} of sha256 {card.sha256} as {place} says, got another file")
    model = OnnxModel(file, card.input_size, card.preprocessing)
    noted = _noted(model.metadata())
    if noted == RAW:
        model.preprocessing = RAW  # card.json beside it is of the network without the normalisation
    elif noted is not None and not _alike(noted, card.preprocessing):
        raise ValueError(f"load_onnx: expected {place} to say {noted} as {file} does, got {card.preprocessing}")
    if model.embedding_dim != card.embedding_dim:
        raise ValueError(f"load_onnx: expected {card.embedding_dim} numbers as {place} says, got {model.embedding_dim} from {file}")
    return model, card


def import_onnx(path: str | os.PathLike[str], folder: str | os.PathLike[str], card: ModelCard, pixels: Preprocessing | None) -> ModelCard:
    """Copy another's ONNX file into a model folder with a card. pixels: what it takes; None: what its metadata say, else
    what InsightFace's reader concludes from the names of its first nodes (`reader_pixels`, needs onnx).

    Raises FileNotFoundError where there is no file, ValueError for one that is no network of one input and one output.
    """
    source, place = Path(path), Path(folder)
    if not source.is_file():
        raise FileNotFoundError(f"import: no file {source}")
    model = OnnxModel(source, card.input_size, RAW)
    found = pixels or _noted(model.metadata()) or reader_pixels(source)
    place.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, place / MODEL)
    written = dataclasses.replace(card, network=NETWORK, embedding_dim=model.embedding_dim, preprocessing=found, sha256=file_hash(place / MODEL))
    write_texts({place / CARD: written.to_json(), place / README: written.to_markdown()})
    return written


def reader_pixels(path: str | os.PathLike[str]) -> Preprocessing:
    """What InsightFace's reader feeds a file: pixels 0 .. 255 where a node Sub* (or _minus*) and a node Mul* (or _mul*) are
    among the first eight, else (pixel - 127.5) / 127.5, RGB."""
    import onnx

    names = [node.name for node in onnx.load(os.fspath(path), load_external_data=False).graph.node[:8]]
    inside = all(any(name.startswith(signs) for name in names) for signs in (("Sub", "_minus"), ("Mul", "_mul")))
    return RAW if inside else Preprocessing()


def _noted(metadata: dict[str, str]) -> Preprocessing | None:
    """The input that `export_onnx` described in the file, None where it did not."""
    if not {"color_order", "mean", "std", "input_range"} <= metadata.keys():
        return None
    if metadata["input_range"] == "0..255":
        return RAW
    order: Any = metadata["color_order"]
    return Preprocessing(_three(metadata["mean"]), _three(metadata["std"]), order)


def _three(text: str) -> Triple:
    a, b, c = (float(part) for part in text.split(","))
    return a, b, c


def _alike(a: Preprocessing, b: Preprocessing) -> bool:
    return a.color_order == b.color_order and np.allclose([*a.mean, *a.std], [*b.mean, *b.std], rtol=1e-5, atol=1e-6)
