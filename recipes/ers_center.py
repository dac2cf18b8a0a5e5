"""The UI centre by clustering against the direct one, on LFW fold 5 with the pretrained MobileFaceNet: no training.

Clean and severely corrupted images of the fold are embedded; single-linkage clusters (Euclidean distance of unit
embeddings, threshold t); the largest one's re-normalised mean against the mean over the corrupted images. And what the
direct centre depends on: the kind of corruption, and the people.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.hierarchy import fcluster, linkage  # type: ignore[import-untyped, unused-ignore]

from recipes import fold5
from recipes.common import Gate, Outcome, data_dir, main, progress
from recog_fast.data import decode_image, degradations, read_bin
from recog_fast.evaluation import embed_images
from recog_fast.models import build_model, load_backbone

Images = NDArray[np.uint8]
THRESHOLDS = (0.8, 0.9, 1.0)


@functools.cache
def images() -> Images:
    """The 737 distinct images (112, 112, 3) of the fold's pairs."""
    folder = data_dir() / "lfw112"
    encoded, _ = read_bin(folder / "lfw_fold05.bin")
    names = [name for line in (folder / "lfw_fold05.tsv").read_text().splitlines() for name in line.split("\t")[:2]]
    first = np.unique(names, return_index=True)[1]
    return np.stack([decode_image(bytes(encoded[i])) for i in first])


def embed(made: Images) -> fold5.Floats:
    """(M, 128) unit rows of the pretrained network."""
    model = build_model("mobilenet_v2", embedding_dim=128)
    load_backbone(model, data_dir() / "weights" / "mobilefacenet_foamliu.pt")
    return fold5.unit(embed_images(model, made, 64, flip=False).double().numpy())


def center(rows: fold5.Floats) -> fold5.Floats:
    """Re-normalised mean."""
    return fold5.unit(rows.mean(axis=0))


def kinds(seed: int) -> dict[str, Callable[[Images], Images]]:
    """Corruptions of one kind each."""
    rng = np.random.default_rng(seed)
    return {
        "8x8": lambda x: degradations.down_up(x, 8),
        "Gaussian blur": lambda x: degradations.gaussian_blur(x, 9.0),
        "motion blur": lambda x: np.stack([degradations.motion_blur(i, 40.0, rng.uniform(0, 180)) for i in x]),
        "occlusion": lambda x: degradations.occlude(x, rng, (0.6, 0.8)),
    }


def run(seeds: list[int]) -> Outcome:
    """Gate at t = 0.9: purity >= .98, distance <= .0135 (the paper's own distance of its two centres)."""
    outcome = Outcome(
        "ers_center", "clustered UI centre = direct centre (LFW fold 5, severe corruption)", seeds,
        gates=[
            Gate("purity, t = 0.9", 0.98),
            Gate("distance to the direct centre, t = 0.9", 0.0135, at_least=False),
        ],
        note="cosine distances; degradations.unrecognizable with its defaults, 737 clean and 737 corrupted images",
    )  # fmt: skip
    clean = embed(images())
    people = fold5.load().people
    for seed in seeds:
        bad = embed(degradations.unrecognizable(images(), np.random.default_rng(seed)))
        direct, rows = center(bad), np.concatenate([clean, bad])
        corrupted = np.arange(len(rows)) >= len(clean)
        tree, values = linkage(rows, "single"), {}
        for t in THRESHOLDS:
            label = fcluster(tree, t, "distance")
            cluster = label == np.bincount(label).argmax()
            values[f"purity, t = {t:g}"] = corrupted[cluster].mean()
            values[f"distance to the direct centre, t = {t:g}"] = 1 - center(rows[cluster]) @ direct
            values[f"share of corrupted images in it, t = {t:g}"] = cluster[corrupted].mean()
        # Resolutions in between bridge the two clusters: the 8x8 and 16x16 images of the fold beside the clean ones.
        stored = [fold5.unit(fold5.load().rows[name]) for name in ("clean", "down16", "down8")]
        label = fcluster(linkage(np.concatenate(stored), "single"), 0.9, "distance")
        small = np.arange(len(label)) >= 2 * len(clean)
        values["purity with 16x16 images among them, t = 0.9"] = small[label == np.bincount(label).argmax()].mean()
        half = np.random.default_rng(seed).permutation(people.max() + 1)[people] % 2 == 0
        values["distance between two halves of the people"] = 1 - center(bad[half]) @ center(bad[~half])
        some = np.random.default_rng(seed).permutation(len(clean))[:150]
        centers = {name: center(embed(corrupt(images()[some]))) for name, corrupt in kinds(seed).items()}
        for name, other in centers.items():
            values[f"distance to the centre of {name} alone"] = 1 - other @ direct
        outcome.put({name: float(value) for name, value in values.items()})
        progress(f"seed {seed}: purity at 0.9 {values['purity, t = 0.9']:.4f}")
    return outcome


if __name__ == "__main__":
    sys.exit(main("ers_center", run, seeds=(0, 1, 2)))
