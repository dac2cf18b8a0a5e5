"""The training script, in reading order: settings, setup, data, model, loop.

    recog-fast train configs/synthetic.yaml
    recog-fast train configs/lfw112.yaml --data.path train.rec --val_targets '[lfw_fold05.bin]' --output runs/lfw
    recog-fast train configs/lfw112.yaml --output runs/lfw --resume true          # goes on where it stopped, bit for bit

A run writes to `output`: config.yaml (resolved), metrics.jsonl, tensorboard/, checkpoints/step_*, model.pt (the backbone),
recognizability.pt (method ri: the quality head beside it); the command line adds findings.npz and report.html.
SIGTERM and SIGUSR1 save a checkpoint after the step in progress and end the run normally (exit code 0).
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recog_fast.checkpoint import (
    checkpoint_path,
    latest_checkpoint,
    load_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)
from recog_fast.training.batches import Batch
from recog_fast.training.config import TrainConfig, to_yaml
from recog_fast.training.data import TrainingImages, step_loader
from recog_fast.training.logs import Log, Meter
from recog_fast.training.methods import apply_method
from recog_fast.training.model import (
    MarginRamp,
    build_backbone,
    build_branches,
    build_head,
    build_optimizers,
    learning_rate,
)
from recog_fast.training.reports import announce, log_norms, log_training, log_verification
from recog_fast.training.run import NonFiniteError, Run
from recog_fast.training.saved import load_pretrained
from recog_fast.training.step import train_step
from recog_fast.training.unrecognizable import unrecognizable_images
from recog_fast.training.verification import pair_sets, verify_all

__all__ = ["NonFiniteError", "Run", "TrainResult", "restore", "save", "setup", "stop_signals", "train", "train_step"]


@dataclass(frozen=True)
class TrainResult:
    """What a run ended with."""

    step: int
    finished: bool  # False: a signal stopped it; resume goes on
    metrics: dict[str, float]  # the last verification
    output: Path


def train(config: TrainConfig) -> TrainResult:
    """Trains as the settings say, from the start or, with `resume`, from the last checkpoint in `output`.

    Raises ValueError and FileNotFoundError for settings that do not fit the data or the checkpoint, NonFiniteError when values
    become non-finite and `nonfinite` is "raise".
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world != 1:
        raise ValueError(
            f"train: expected one process, got WORLD_SIZE={world}: this version trains in a single process"
        )
    config = apply_method(config)
    run = setup(config)
    rate = learning_rate(config, run.steps_per_epoch, run.total)
    verify_every = config.verbose or run.steps_per_epoch
    save_every = config.save_interval or run.steps_per_epoch
    pairs = pair_sets(config, run.images)
    metrics: dict[str, float] = {}
    with Log(Path(config.output), run.step, run.total) as log, stop_signals() as stop:
        announce(run, log)
        for chosen in pairs:
            if chosen.unreadable:
                log.line(f"{chosen.name}: {chosen.unreadable} unreadable images are in no verification pair")
        clock, seen = time.monotonic(), 0
        for batch in _steps(run):
            lr = config.lr * rate(run.step)
            head_lr = (config.lr if config.head_lr is None else config.head_lr) * rate(run.step)
            train_step(run, batch, lr, head_lr)
            run.step += 1
            seen += len(batch.samples)
            last, stopping = run.step == run.total, stop.is_set()
            if run.step % config.frequent == 0 or last:
                log_training(run, log, lr, seen / max(1e-9, time.monotonic() - clock))
                clock, seen = time.monotonic(), 0
            log.advance(run.step)
            if run.step % run.steps_per_epoch == 0:
                log_norms(run, log)
            if pairs and (run.step % verify_every == 0 or last):
                metrics = verify_all(run.backbone, pairs, config, run.device)
                log_verification(run, log, metrics)
                clock, seen = time.monotonic(), 0
            if run.step % save_every == 0 or last or stopping:
                save(run)
            if stopping and not last:
                log.line(
                    f"Stopped by a signal after step {run.step}; checkpoint saved, --resume true goes on from there"
                )
                break
    torch.save(run.backbone.state_dict(), Path(config.output) / "model.pt")
    if run.branches is not None:
        torch.save(run.branches.state_dict(), Path(config.output) / "recognizability.pt")
    return TrainResult(run.step, run.step == run.total, metrics, Path(config.output))


# --- setup ----------------------------------------------------------------------------------------------------------


def setup(config: TrainConfig) -> Run:
    """Data, model and optimizers of a run, restored from its last checkpoint with `resume`."""
    config = apply_method(config)
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    random.seed(config.seed)
    np.random.seed(config.seed % 2**32)
    torch.manual_seed(config.seed)
    device = torch.device(
        ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    )
    autocast = config.precision == "bf16" or (config.precision == "auto" and device.type == "cuda")
    images = TrainingImages(config)
    position, loader = step_loader(images, config, pin_memory=device.type == "cuda")
    steps_per_epoch = position.batches_per_epoch
    total = steps_per_epoch * config.num_epoch
    total = min(total, config.max_steps) if config.max_steps else total

    backbone = build_backbone(config).to(device)
    head = build_head(config, images.num_classes, steps_per_epoch).to(device)
    if config.pretrained:
        load_pretrained(config, backbone, head)
    branches = build_branches(config, backbone)
    branches = None if branches is None else branches.to(device)
    optimizer, head_optimizer = build_optimizers(config, backbone, head, branches)
    ramp = MarginRamp(head, round(config.margin_ramp * steps_per_epoch), config.margin)
    encoder = None
    if config.memory is not None and config.memory_momentum:
        from recog_fast import MomentumEncoder

        encoder = MomentumEncoder(backbone, config.memory_momentum)
    run = Run(
        config=config, images=images, device=device, autocast=autocast, backbone=backbone,
        prepare=backbone.preprocessing, head=head, optimizer=optimizer, head_optimizer=head_optimizer, encoder=encoder,
        branches=branches, ui=[] if branches is None else unrecognizable_images(config, images), ramp=ramp, meter=Meter(), position=position, loader=loader,
        steps_per_epoch=steps_per_epoch, total=total,
    )  # fmt: skip
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    restored = restore(run) if config.resume else False
    if not restored and latest_checkpoint(output / "checkpoints") is not None:
        raise ValueError(
            f"train: {output} holds checkpoints of an earlier run: set resume to go on with it, or another output"
        )
    (output / "config.yaml").write_text(to_yaml(config))
    return run


def save(run: Run) -> None:
    """A checkpoint of the whole run after the current step; the last `keep_last` stay."""
    folder = Path(run.config.output) / "checkpoints"
    if run.head.memory is not None:
        # Without HeadSGD writes wait for the next forward, which would apply them before anything else.
        run.head.memory.flush()
    save_checkpoint(
        checkpoint_path(folder, run.step),
        head=run.head,
        optimizer=run.head_optimizer,
        step=run.step,
        model=run.backbone.state_dict(),
        backbone_optimizer=run.optimizer.state_dict(),
        encoder=None if run.encoder is None else run.encoder.state_dict(),
        recognizability=None if run.branches is None else run.branches.state_dict(),
        random=_random_state(),
        meter=run.meter.state,
        skipped=run.skipped,
        position=run.position.state_dict(),
        steps_per_epoch=run.steps_per_epoch,
        rows_per_step=run.config.batch_size * run.config.gradient_acc,
    )
    prune_checkpoints(folder, run.config.keep_last)


def restore(run: Run) -> bool:
    """Puts the last checkpoint of the run's output back; False when there is none.

    Raises ValueError when the number of images, the seed or the rows of a step differ: the position would mean something else.
    """
    path = latest_checkpoint(Path(run.config.output) / "checkpoints", verified=True)
    if path is None:
        return False
    saved = load_checkpoint(path, head=run.head, optimizer=run.head_optimizer)
    rows = run.config.batch_size * run.config.gradient_acc
    if saved["rows_per_step"] != rows:
        raise ValueError(
            f"train: expected batch_size * gradient_acc = {saved['rows_per_step']} as in {path}, got {rows}"
        )
    run.position.load_state_dict(saved["position"])
    run.backbone.load_state_dict(saved["model"])
    run.optimizer.load_state_dict(saved["backbone_optimizer"])
    if run.encoder is not None and saved["encoder"] is not None:
        run.encoder.load_state_dict(saved["encoder"])
    if run.branches is not None and saved.get("recognizability") is not None:
        run.branches.load_state_dict(saved["recognizability"])
    run.step, run.skipped = saved["step"], saved["skipped"]
    run.meter = Meter(saved["meter"])
    _set_random_state(saved["random"])
    return True


def _random_state() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state(), "cuda": cuda}


def _set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """An event that SIGTERM and SIGUSR1 set instead of killing the process; handlers are put back at the end."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = {number: signal.signal(number, lambda *_: event.set()) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _steps(run: Run) -> Iterator[Batch]:
    """The batches of the steps left, epoch after epoch."""
    while run.step < run.total:
        for batch in run.position.track(run.loader):
            yield batch
            if run.step >= run.total:
                return
