"""The papers' figures drawn from real data: LFW fold 5 (stored embeddings) and, with --train, two Omniglot networks.

python -m recipes.figures [--output runs/figures] [--train]
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recipes import fold5, omniglot
from recipes.common import progress
from recipes.ers_center import images as face_images
from recog_fast.data import degradations
from recog_fast.evaluation import class_activation, compare_qualities, figures, overlay, pair_minimum, strip
from recog_fast.evaluation.drawing import Picture
from recog_fast.evaluation.gallery import Gallery

CONDITIONS = {"clean": "clean", "16x16": "down16", "8x8": "down8"}


def face_figures() -> dict[str, Picture]:
    """What needs no training."""
    fold, seed = fold5.load(), 0
    rows = {name: fold.rows[key] for name, key in CONDITIONS.items()}
    cosine = {name: fold5.unit(x) @ fold.center for name, x in rows.items()}
    norm = {name: np.linalg.norm(x, axis=1) for name, x in rows.items()}
    x = fold5.mixed(seed)
    first, second, same = fold5.pairs()
    scores = (fold5.unit(x) @ fold5.unit(x).T)[first, second]
    ers = fold5.recognizability(x, fold.center)
    qualities = {
        "ERS": pair_minimum(ers, first, second),
        "feature norm": pair_minimum(np.linalg.norm(x, axis=1), first, second),
    }
    everything = np.concatenate(list(rows.values()))
    kinds = [name for name, part in rows.items() for _ in part]
    return {
        "ui_distance": figures.ui_distance_plot({k: 1 - c for k, c in cosine.items()}, threshold=0.6),
        "norm_against_center": figures.norm_against_center_plot({k: (norm[k], cosine[k]) for k in rows}),
        "embedding": figures.embedding_plot(rows, fold.center),
        "ers_against_norm": figures.score_comparison_plot(
            fold5.recognizability(everything, fold.center), np.linalg.norm(everything, axis=1), ("ERS", "feature norm"), kinds
        ),
        "erc_fixed": figures.erc_plot(compare_qualities(scores, same, qualities, 1e-2)),
        "erc": figures.erc_plot(compare_qualities(scores, same, qualities, 1e-2, fixed_threshold=False)),
        "recognizability": figures.quality_histograms({"pretrained": {k: 1 - c for k, c in cosine.items()}}),
        "template_weights": _templates(),
    }  # fmt: skip


def _templates() -> Picture:
    fold, rng, rows = fold5.load(), np.random.default_rng(3), []
    for person in np.flatnonzero(np.bincount(fold.people) >= 5)[:2]:
        chosen = rng.permutation(np.flatnonzero(fold.people == person))[:5]
        keys = rng.permutation(["clean", "clean", "down16", "down8", "down8"])
        pictures = [_degraded(face_images()[i], str(key)) for i, key in zip(chosen, keys, strict=True)]
        x = np.stack([fold.rows[str(key)][i] for i, key in zip(chosen, keys, strict=True)])
        rows.append((pictures, np.maximum(fold5.recognizability(x, fold.center), 0.0)))
    return figures.template_weights_plot(rows)


def _degraded(image: np.ndarray[Any, np.dtype[np.uint8]], key: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return image if key == "clean" else degradations.down_up(image, int(key.removeprefix("down")))


def cluster() -> Gallery:
    """The least recognizable of clean and 8x8 images of the fold."""
    fold = fold5.load()
    pictures = [*face_images(), *degradations.down_up(face_images(), 8)]
    return figures.ui_cluster_gallery(pictures, np.concatenate([fold.rows["clean"], fold.rows["down8"]]), fold.center)


def trained_figures(seed: int = 0) -> dict[str, Picture]:
    """Two networks, with and without low-resolution augmentation; norms by epoch, p_y against cosine, agreement."""
    split = omniglot.load()
    classes, sample = int(split.labels.max()) + 1, slice(0, 1200)
    model, stages = omniglot.start(seed, classes), {}
    settings = replace(omniglot.baseline(seed), ramp=0.0, epochs=1)
    for epoch, lr in enumerate((0.1, 0.05, 0.02), 1):
        omniglot.train(model, split.images, split.labels, replace(settings, seed=seed + epoch, lr=lr))
        stages[f"epoch {epoch}"] = {
            name: omniglot.embed(model, split.test_images[sample], size).norm(dim=1).numpy()
            for name, size in (("full size", 0), ("16x16", 16), ("8x8", 8))
        }
    other = omniglot.start(seed, classes)
    omniglot.train(other, split.images, split.labels, replace(omniglot.without_low_resolution(seed), epochs=3))
    a, b, same = omniglot.pairs(split.test_labels, 1200)
    alike = []
    for one in (other, model):
        x = torch.nn.functional.normalize(omniglot.embed(one, split.test_images, 8), dim=1)
        alike.append((x[a] * x[b]).sum(1)[torch.from_numpy(same)])
    known = np.random.default_rng(0).choice(len(split.images), 700, replace=False)
    labels, points = torch.from_numpy(split.labels[known]), {}
    for name, size in (("full size", 0), ("8x8", 8)):
        x = omniglot.embed(model, split.images[known], size)
        with torch.no_grad():
            logits = model.head.logits(x)
            points[name] = (
                model.head.cosine(x, labels).numpy(),
                torch.softmax(logits, 1).gather(1, labels[:, None])[:, 0].numpy(),
            )
    return {
        "norms_by_epoch": figures.quality_histograms(stages, "feature norm"),
        "similarity_of_two": figures.similarity_agreement_plot(
            alike[0], alike[1], ("without low-resolution augmentation", "with it")
        ),
        "probability": figures.probability_against_cosine_plot(points),
    }


def main() -> int:
    """Writes the PNGs, a strip of the UI cluster and one of class-activation maps."""
    parser = argparse.ArgumentParser(prog="python -m recipes.figures")
    parser.add_argument("--output", type=Path, default=Path("runs/figures"))
    parser.add_argument(
        "--train", action="store_true", help="also the figures that need two Omniglot networks (minutes)"
    )
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    drawn = face_figures() | (trained_figures() if chosen.train else {})
    for name, picture in drawn.items():
        progress(str(picture.save(chosen.output / f"{name}.png")))
    _save(chosen.output / "ui_cluster.png", strip([item.image for item in cluster().items[:8]]))
    _save(chosen.output / "class_activation.png", activation())
    return 0


def activation() -> np.ndarray[Any, np.dtype[np.uint8]]:
    """HiResCAM of the cosine to another image of the person, for six people of the fold, beside the images."""
    from recipes.common import data_dir
    from recog_fast.models import build_model, load_backbone

    fold = fold5.load()
    people = np.flatnonzero(np.bincount(fold.people) >= 2)[:6]
    first, second = (np.array([np.flatnonzero(fold.people == p)[k] for p in people]) for k in (0, 1))
    model = build_model("mobilenet_v2", embedding_dim=128)
    load_backbone(model, data_dir() / "weights" / "mobilefacenet_foamliu.pt")
    shown = face_images()[first]
    directions = torch.from_numpy(fold.rows["clean"][second]).float()
    maps = class_activation(model, model.preprocessing(torch.from_numpy(shown)), directions, method="hires")
    return np.concatenate([strip(list(shown)), strip([overlay(i, m) for i, m in zip(shown, maps, strict=True)])])


def _save(path: Path, image: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
    import base64

    from recog_fast.evaluation import png_data_uri

    path.write_bytes(base64.b64decode(png_data_uri(image).partition(",")[2]))
    progress(str(path))


if __name__ == "__main__":
    sys.exit(main())
