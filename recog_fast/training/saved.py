"""What a run left behind: networks, heads and quality models, to start from or to use."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

import recog_fast as rf
from recog_fast.checkpoint import latest_checkpoint, read_checkpoint
from recog_fast.checkpoint.state import restore_head
from recog_fast.training.config import TrainConfig, read_config
from recog_fast.training.methods import apply_method
from recog_fast.training.model import build_backbone, build_branches, build_head


def find_run(path: str | Path) -> tuple[TrainConfig, Path]:
    """(settings, checkpoint) of a run's output folder (its last checkpoint) or of one of its checkpoints.

    Raises FileNotFoundError where there is no such run.
    """
    place = Path(path)
    checkpoint = place if (place / "manifest.json").is_file() else latest_checkpoint(place / "checkpoints")
    run = place.parent.parent if checkpoint == place else place
    if checkpoint is None or not (run / "config.yaml").is_file():
        raise FileNotFoundError(f"find_run: expected config.yaml and checkpoints of a run in {run}, found none")
    return apply_method(read_config(run / "config.yaml")), checkpoint


def load_run(path: str | Path) -> tuple[TrainConfig, nn.Module, rf.MarginHead]:
    """(settings, backbone, head) of a run in eval mode, on the CPU; the head has its classes, memory and clock.

    Raises FileNotFoundError where there is no run, ValueError for a damaged checkpoint.
    """
    config, checkpoint = find_run(path)
    saved = read_checkpoint(checkpoint, keys=("model", "head", "steps_per_epoch"))
    backbone = build_backbone(config)
    backbone.load_state_dict(saved["model"])
    head = build_head(config, len(saved["head"]["weight"]), saved.get("steps_per_epoch", 1))
    restore_head(head, saved["head"], str(checkpoint))
    return config, backbone.eval(), head.eval()


def load_quality_model(path: str | Path) -> tuple[rf.recognizability.RecognizabilityModel, int]:
    """(model, input size) of a run of method ri: images (N, 3, S, S) -> (embeddings (N, D), quality (N,)), in eval mode.

    Raises FileNotFoundError, and ValueError for a run without recognizability.
    """
    config, checkpoint = find_run(path)
    saved = read_checkpoint(checkpoint, keys=("model", "recognizability"))
    backbone = build_backbone(config)
    branches = build_branches(config, backbone)
    if branches is None or saved.get("recognizability") is None:
        raise ValueError(f"load_quality_model: expected a run of method ri, got {path} of method {config.method!r}")
    backbone.load_state_dict(saved["model"])
    branches.load_state_dict(saved["recognizability"])
    return rf.recognizability.RecognizabilityModel(backbone, branches).eval(), config.data.size


def load_pretrained(config: TrainConfig, backbone: nn.Module, head: rf.MarginHead) -> None:
    """Puts the weights at `config.pretrained` into the backbone and, with `pretrained_head`, the class centres into the head.

    Raises FileNotFoundError, and ValueError for weights of another network or another number of classes, and for a head
    asked of a file that has none.
    """
    place = Path(config.pretrained)
    if place.is_dir():
        _, checkpoint = find_run(place)
        saved: Mapping[str, Any] = read_checkpoint(checkpoint, keys=("model", "head"))
    elif place.is_file():
        saved = {"model": place}
    else:
        raise FileNotFoundError(f"train: no run, checkpoint or weights file {place} to start from")
    rf.models.load_backbone(backbone, saved["model"])
    if not config.pretrained_head:
        return
    if "head" not in saved:
        raise ValueError(f"train: expected a run or checkpoint with pretrained_head, got the weights file {place}")
    weight = saved["head"]["weight"]
    if weight.shape != head.weight.shape:
        raise ValueError(
            f"train: expected a pretrained head of shape {tuple(head.weight.shape)} (the same identities), got {tuple(weight.shape)} in {place}"
        )
    with torch.no_grad():
        head.weight.copy_(weight)
