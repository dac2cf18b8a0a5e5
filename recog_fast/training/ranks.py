"""What a run over several ranks needs beside its step: a device each, agreement on settings and data, the spread backbone."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import torch
from torch import nn

from recog_fast.sharding import World, environment, gradient_scaler, spread_backbone, synchronise_batch_norm
from recog_fast.training.config import TrainConfig
from recog_fast.training.data import TrainingImages

_OWN = ("device", "num_workers", "num_threads")  # settings that may differ from rank to rank


def choose_device(config: TrainConfig, world: World) -> torch.device:
    """The device of the settings; of several ranks on one machine each has its own GPU.

    Raises ValueError where there are fewer GPUs than ranks.
    """
    name = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    device = torch.device(name)
    if device.type != "cuda" or world.size == 1:
        return device
    local = environment()[2]
    if device.index is not None or local >= torch.cuda.device_count():
        raise ValueError(
            f"train: expected device auto, cuda or cpu and a GPU for each rank of a machine, got {name!r} and {torch.cuda.device_count()} "
            f"GPUs for local rank {local}"
        )
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def agree_on_settings(config: TrainConfig, world: World) -> None:
    """ValueError on every rank, naming the setting, where their settings differ."""
    world.agree("train", {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name not in _OWN})


def agree_on_data(images: TrainingImages, world: World) -> None:
    """ValueError on every rank where they see other images or classes."""
    digest = hashlib.blake2b(images.labels.tobytes(), digest_size=8).hexdigest()
    facts = {"number of images": len(images), "number of classes": images.num_classes, "labels of the images (digest)": digest}
    world.agree("train", facts)


def check_over_ranks(config: TrainConfig, world: World) -> None:
    """ValueError for settings that one process has and several ranks do not."""
    if world.size == 1:
        return
    if config.weight_format != "float32":
        raise ValueError(f"train: expected weight_format 'float32' over {world.size} ranks (planes of W are not spread over ranks yet), got {config.weight_format!r}")
    if config.parallel == "fsdp2" and config.memory is not None and config.memory_momentum:
        raise ValueError(
            "train: expected parallel 'ddp' with memory_momentum > 0 (the momentum encoder is a whole copy of the backbone on every rank), got 'fsdp2'"
        )
    if config.parallel == "fsdp2" and config.precision == "fp16":
        raise ValueError("train: expected precision bf16 or float32 with parallel 'fsdp2', got 'fp16'")


def spread(config: TrainConfig, backbone: nn.Module, world: World, device: torch.device) -> nn.Module | None:
    """`spread_backbone` of the settings, batch normalisation over all ranks first where they say so.

    Raises ValueError where a rank's rows are too few for batch statistics of its own.
    """
    if world.shards is None:
        return None
    normalises = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in backbone.modules())
    if config.sync_batchnorm:
        synchronise_batch_norm(backbone, world.shards, device.type == "cuda")
    elif normalises and config.batch_size < 2 * world.size:
        raise ValueError(
            f"train: expected batch_size >= {2 * world.size}, two rows on each of {world.size} ranks, for batch normalisation (batch_size counts the rows "
            f"of all ranks), or sync_batchnorm, got {config.batch_size}"
        )
    return spread_backbone(backbone, world, config.parallel, device)


def make_scaler(config: TrainConfig, world: World, device: torch.device) -> tuple[torch.dtype | None, Any]:
    """(autocast's dtype or None, gradient scaler of fp16 or None); over ranks what overflows on one is left out by all."""
    if config.precision == "fp16":
        return torch.float16, gradient_scaler(world, device)
    half = config.precision == "bf16" or (config.precision == "auto" and device.type == "cuda")
    return torch.bfloat16 if half else None, None
