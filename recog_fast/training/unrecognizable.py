"""The recognizability index while training: unrecognizable images, and the centre they give, refreshed every epoch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from recog_fast import data as sources
from recog_fast.training.batches import Image
from recog_fast.training.config import DataConfig, TrainConfig
from recog_fast.training.data import TrainingImages, open_source, read_image
from recog_fast.training.run import Run


def corrupt(image: Image, rng: np.random.Generator) -> Image:
    """(H, W, 3) uint8 -> the same face beyond recognition: affine, rotation, occlusion, motion blur, Gaussian blur and
    down-sampling to 1/20 to 1/10 of the side, one after the other (the direct approach of ERS, math.md 5)."""
    side = min(image.shape[:2])
    image = sources.degradations.affine(image, rng)
    image = sources.degradations.rotate(image, rng.uniform(-15, 15))
    image = sources.degradations.occlude(image, rng, (0.1, 0.4))
    image = sources.degradations.motion_blur(image, rng.uniform(0.05, 0.2) * side + 1, rng.uniform(0, 180))
    image = sources.degradations.gaussian_blur(image, rng.uniform(0.02, 0.08) * side)
    return sources.degradations.down_up(image, max(2, round(side / rng.uniform(10, 20))))


def unrecognizable_images(config: TrainConfig, images: TrainingImages) -> list[Image]:
    """At most `ui_images` unrecognizable faces: of the source `recognizability.ui` (folder, list, record, ...), drawn by the seed,
    or training images corrupted by `corrupt`.

    Raises ValueError where the source has fewer than two readable images, as its loader where it has none at all.
    """
    own = config.recognizability
    assert own is not None
    rng = np.random.default_rng((config.seed, 0x0DD5))
    if own.ui is None:
        chosen = rng.permutation(len(images))[: own.ui_images]
        return [corrupt(images.clean(int(i)), rng) for i in chosen]
    return _read(own.ui, own.ui_images, config.data.size, rng)


def _read(config: DataConfig, limit: int, size: int, rng: np.random.Generator) -> list[Image]:
    source = open_source(config, "recognizability.ui")
    found: list[Image] = []
    for i in rng.permutation(len(source)).tolist():
        image = read_image(source, i, size)
        if image is not None:
            found.append(image)
        if len(found) == limit:
            break
    if len(found) < 2:
        raise ValueError(
            f"train: expected two or more readable images in recognizability.ui ({config.path or config.kind}), "
            f"got {len(found)} of {len(source)}"
        )
    return found


@torch.no_grad()
def embed_clean(
    backbone: nn.Module,
    prepare: Any,
    images: Sequence[Image],
    device: torch.device,
    batch_size: int,
    features: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Embeddings (M, D), and feature maps (M, C, h, w) if asked for, in eval mode; training flags are put back.

    No generator is drawn from and no running statistic moves: a resumed run stays the uninterrupted one.
    """
    modes = [(module, module.training) for module in backbone.modules()]
    backbone.eval()
    try:
        parts: list[Tensor] = []
        maps: list[Tensor] = []
        for start in range(0, len(images), batch_size):
            batch = torch.from_numpy(np.stack(images[start : start + batch_size]))
            if not features:
                parts.append(backbone(prepare(batch.to(device))))
                continue
            embeddings, last = backbone(prepare(batch.to(device)), return_features=True)
            parts.append(embeddings)
            maps.append(last)
    finally:
        for module, training in modes:
            module.training = training
    return torch.cat(parts), torch.cat(maps) if features else None


def refresh_center(run: Run) -> None:
    """The UI centre by the present network and, with `statistics: images`, mu and sigma of the diversion."""
    own = run.config.recognizability
    assert own is not None and run.branches is not None
    embeddings, features = embed_clean(
        run.backbone, run.prepare, run.ui, run.device, run.config.batch_size, own.statistics == "images"
    )
    run.branches.refresh(embeddings, features)
    run.world.copy_first(run.branches.buffers())  # running statistics of the networks differ


def norms_by_resolution(run: Run, count: int = 64, backbone: nn.Module | None = None) -> dict[str, float]:
    """Mean feature norm of `count` training images at full size and taken down to 16 and 8 pixels and up again, and the
    correlation of norm and log2 size over all of them (0 where the norms are all the same).

    By the network whose norms a memory takes for quality: the momentum encoder where there is one.
    """
    chosen = np.random.default_rng((run.config.seed, 0x40B5)).permutation(len(run.images))[:count]
    clean = [run.images.clean(int(i)) for i in chosen]
    side = run.config.data.size
    sizes = sorted({side, *(small for small in (16, 8) if small < side)}, reverse=True)
    network = (backbone or run.backbone) if run.encoder is None else run.encoder.key
    norms = []
    for size in sizes:
        images = clean if size == side else [sources.degradations.down_up(image, size) for image in clean]
        embeddings, _ = embed_clean(network, run.prepare, images, run.device, run.config.batch_size)
        norms.append(embeddings.double().norm(dim=1).cpu().numpy())
    values, levels = np.concatenate(norms), np.log2(np.repeat(sizes, len(clean)))
    flat = len(sizes) == 1 or values.std() <= 1e-9 * values.mean()
    means = {str(size): float(norm.mean()) for size, norm in zip(sizes, norms, strict=True)}
    return {**means, "correlation": 0.0 if flat else float(np.corrcoef(values, levels)[0, 1])}
