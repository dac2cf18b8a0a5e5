"""Tiny image folders made on the spot: coloured blocks, one pattern per identity, plus noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from recog_fast.training.config import TrainConfig, read_config


def make_folder(root: Path, identities: int = 14, images: int = 5, seed: int = 0) -> Path:
    """root/idNN/M.png: 32x32 noisy images of `identities` patterns."""
    import PIL.Image

    rng = np.random.default_rng(seed)
    for identity in range(identities):
        pattern = rng.integers(0, 256, (4, 4, 3)).repeat(8, 0).repeat(8, 1)
        folder = root / f"id{identity:02d}"
        folder.mkdir(parents=True)
        for image in range(images):
            noisy = np.clip(pattern + rng.normal(0, 60, (32, 32, 3)), 0, 255).astype(np.uint8)
            PIL.Image.fromarray(noisy).save(folder / f"{image}.png")
    return root


def settings(tmp_path: Path, folder: Path, **changes: Any) -> TrainConfig:
    """A run of a few steps on `folder`, with `changes` (double underscore for nested keys) on top, through YAML as users do it."""
    import yaml

    values: dict[str, Any] = {
        "data": {"kind": "folder", "path": str(folder), "size": 32},
        "augment": {"crop": 0.5},
        "network": "tiny",
        "network_options": {"widths": [4, 8, 8, 8], "dropout": 0.2},
        "embedding_size": 16,
        "margin": {"name": "ArcFace", "m": 0.2},
        "scale": 16,
        "batch_size": 16,
        "num_epoch": 2,
        "num_workers": 0,
        "num_threads": 1,
        "frequent": 1,
        "output": str(tmp_path / "run"),
    }
    for key, value in changes.items():
        place, *rest = key.split("__")
        if rest:
            values[place][rest[0]] = value
        else:
            values[place] = value
    file = tmp_path / "settings.yaml"
    file.write_text(yaml.safe_dump(values))
    return read_config(file)
