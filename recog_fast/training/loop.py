"""The training script, in reading order: settings, setup, data, model, loop.

    recog-fast train configs/synthetic.yaml
    recog-fast train configs/lfw112.yaml --data.path train.rec --val_targets '[lfw_fold05.bin]' --output runs/lfw
    recog-fast train configs/lfw112.yaml --output runs/lfw --resume true          # goes on where it stopped, bit for bit
    torchrun --nproc-per-node 8 --max-restarts 10 -m recog_fast train configs/insightface_r50.yaml ...     # docs/scale.md

A run writes to `output`: config.yaml (resolved), metrics.jsonl, tensorboard/, checkpoints/step_*, model.pt (the backbone),
recognizability.pt (method ri: the quality head beside it); the command line adds findings.npz and report.html.
SIGTERM and SIGUSR1 to any rank save a checkpoint after the step in progress (over ranks: or the next one) and end the run normally (exit code 0).
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

import numpy as np
import torch
from torch import nn

from recog_fast.checkpoint import latest_checkpoint
from recog_fast.sharding import World, is_spread, joined, whole
from recog_fast.training.batches import Batch
from recog_fast.training.checkpoints import finish_save, restore, save, try_save
from recog_fast.training.config import TrainConfig, to_yaml
from recog_fast.training.data import TrainingImages, step_loader
from recog_fast.training.logs import Log, Meter, SilentLog
from recog_fast.training.methods import apply_method
from recog_fast.training.model import (
    MarginRamp,
    build_backbone,
    build_branches,
    build_encoder,
    build_head,
    build_optimizers,
    learning_rate,
)
from recog_fast.training.ranks import (
    agree_on_data,
    agree_on_settings,
    check_over_ranks,
    choose_device,
    make_scaler,
    spread,
)
from recog_fast.training.reports import announce, log_norms, log_training, log_verification, reads_norms
from recog_fast.training.run import NonFiniteError, Run
from recog_fast.training.saved import load_pretrained
from recog_fast.training.step import train_step
from recog_fast.training.unrecognizable import unrecognizable_images
from recog_fast.training.verification import PairSet, pair_sets, verify_all

__all__ = ["NonFiniteError", "Run", "TrainResult", "restore", "save", "setup", "stop_signals", "train", "train_step"]


@dataclass(frozen=True)
class TrainResult:
    """What a run ended with; the same on every rank."""

    step: int
    finished: bool  # False: a signal stopped it; resume goes on
    metrics: dict[str, float]  # the last verification
    output: Path
    rank: int = 0


def train(config: TrainConfig, world: World | None = None) -> TrainResult:
    """Trains as the settings say, from the start or, with `resume`, from the last checkpoint in `output`.

    One process, or every rank of torchrun's (or `world`'s). Raises ValueError and FileNotFoundError for settings that do not fit the
    data, the checkpoint or the other ranks, NonFiniteError when values become non-finite and `nonfinite` is "raise", RanksError where
    another rank hangs or is gone; what one rank refuses is raised on all.
    """
    if world is not None:
        return _train(config, world)
    cuda = config.device.startswith("cuda") or (config.device == "auto" and torch.cuda.is_available())
    with joined(config.timeout, cuda) as ranks:
        return _train(config, ranks)


def _train(config: TrainConfig, world: World) -> TrainResult:
    at = ["train: setup"]
    with world.watch(lambda: at[0]):
        run = setup(config, world)
        metrics: dict[str, float] = {}
        with _log(run) as log, stop_signals() as run.stop:
            announce(run, log)
            pairs = _pairs(run, log)
            rate = learning_rate(run.config, run.steps_per_epoch, run.total)
            clock = time.monotonic()
            for batch in _steps(run):
                at[0] = f"train: step {run.step}"
                clock = _one_step(run, batch, rate(run.step), log, clock)
                last = run.step == run.total
                if run.config.val_targets and (run.step % (run.config.verbose or run.steps_per_epoch) == 0 or last):
                    at[0] = f"train: verification after step {run.step}"
                    metrics = _verify(run, pairs, log)
                    clock, run.rows = time.monotonic(), 0
                at[0] = f"train: saving after step {run.step}"
                if _save_if_due(run, log):
                    break
        at[0] = "train: end"
        _write_model(run)
    return TrainResult(run.step, run.step == run.total, metrics, Path(run.config.output), world.rank)


def _one_step(run: Run, batch: Batch, rate: float, log: Log, clock: float) -> float:
    """A step and its log line; when the next line's time began."""
    config = run.config
    lr = config.lr * rate
    train_step(run, batch, lr, (config.lr if config.head_lr is None else config.head_lr) * rate)
    run.step += 1
    if run.world.size == 1:
        run.stopping = run.stop.is_set()
    if run.step % config.frequent == 0 or run.step == run.total:
        log_training(run, log, lr, run.rows / max(1e-9, time.monotonic() - clock))
        clock, run.rows = time.monotonic(), 0
    log.advance(run.step)
    if run.step % run.steps_per_epoch == 0 and reads_norms(run):
        plain = _plain(run)
        run.world.first(lambda: log_norms(run, log, plain))
    return clock


def _save_if_due(run: Run, log: Log) -> bool:
    """Saves after the steps that want it; whether a signal ends the run here."""
    last = run.step == run.total
    if last or run.stopping:
        save(run)
    elif run.step % (run.config.save_interval or run.steps_per_epoch) == 0:
        try_save(run)
    for text in run.warnings:
        log.line(text)
    run.warnings.clear()
    if run.stopping and not last:
        log.line(f"Stopped by a signal after step {run.step}; checkpoint saved, --resume true goes on from there")
    return run.stopping and not last


def _pairs(run: Run, log: Log) -> list[PairSet]:
    """The pair sets, on rank 0: it verifies alone."""
    pairs: list[PairSet] = []

    def read() -> None:
        pairs.extend(pair_sets(run.config, run.images))
        for chosen in pairs:
            if chosen.unreadable:
                log.line(f"{chosen.name}: {chosen.unreadable} unreadable images are in no verification pair")

    run.world.first(read)
    return pairs


def _verify(run: Run, pairs: list[PairSet], log: Log) -> dict[str, float]:
    plain = _plain(run)

    def verify() -> dict[str, float]:
        metrics = verify_all(plain, pairs, run.config, run.device)
        log_verification(run, log, metrics)
        return metrics

    return run.world.first(verify)


def _plain(run: Run) -> nn.Module:
    """A backbone that one rank can call; every rank calls this. With fsdp2 a copy, gathered."""
    if not is_spread(run.backbone):
        return run.backbone
    state = whole(run.backbone.state_dict())
    with torch.random.fork_rng(devices=[]):
        made = build_backbone(run.config).to(run.device)
    made.load_state_dict(state)
    return made


def _write_model(run: Run) -> None:
    finish_save(run)
    state = whole(run.backbone.state_dict())

    def write() -> None:
        torch.save(state, Path(run.config.output) / "model.pt")
        if run.branches is not None:
            torch.save(run.branches.state_dict(), Path(run.config.output) / "recognizability.pt")

    run.world.first(write)


def _log(run: Run) -> Log:
    return Log(Path(run.config.output), run.step, run.total) if run.world.rank == 0 else SilentLog()


# --- setup ----------------------------------------------------------------------------------------------------------


def setup(config: TrainConfig, world: World | None = None) -> Run:
    """Data, model and optimizers of a run, restored from its last checkpoint with `resume`. Every rank calls it."""
    world = world or World()
    config = apply_method(config)
    agree_on_settings(config, world)
    check_over_ranks(config, world)
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    random.seed(config.seed)
    np.random.seed(config.seed % 2**32)
    torch.manual_seed(config.seed)
    device = world.together("train", lambda: choose_device(config, world))
    images = world.together("train", lambda: TrainingImages(config))
    agree_on_data(images, world)
    position, loader = step_loader(images, config, device.type == "cuda", world)
    steps_per_epoch = position.batches_per_epoch
    total = steps_per_epoch * config.num_epoch
    total = min(total, config.max_steps) if config.max_steps else total

    backbone = build_backbone(config).to(device)
    head = build_head(config, images.num_classes, steps_per_epoch, world.group).to(device)
    if world.shards is not None and head.shards is not None:
        head.shards.timeout = world.shards.timeout
    if config.pretrained:
        world.together("train", lambda: load_pretrained(config, backbone, head))
    branches = build_branches(config, backbone)
    branches = None if branches is None else branches.to(device)
    wrapped = spread(config, backbone, world, device)
    optimizer, head_optimizer = build_optimizers(config, backbone, head, branches)
    ui = [] if branches is None else world.together("train", lambda: unrecognizable_images(config, images))
    autocast, scaler = make_scaler(config, world, device)
    run = Run(
        config=config, images=images, device=device, autocast=autocast, backbone=backbone, prepare=backbone.preprocessing, head=head,
        optimizer=optimizer, head_optimizer=head_optimizer, encoder=build_encoder(config, backbone), branches=branches, ui=ui,
        ramp=MarginRamp(head, round(config.margin_ramp * steps_per_epoch), config.margin), meter=Meter(), position=position, loader=loader,
        steps_per_epoch=steps_per_epoch, total=total, world=world, wrapped=wrapped, scaler=scaler,
    )  # fmt: skip
    _open_output(run)
    return run


def _open_output(run: Run) -> None:
    """Goes on from the last checkpoint, or starts in a folder without any."""
    config, output = run.config, Path(run.config.output)
    # torchrun started all ranks again after one was lost: only this run's own checkpoints can be there
    again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    restored = restore(run) if config.resume or again else False

    def check() -> None:
        output.mkdir(parents=True, exist_ok=True)
        if not restored and latest_checkpoint(output / "checkpoints") is not None:
            raise ValueError(
                f"train: {output} holds checkpoints of an earlier run: set resume to go on with it, or another output"
            )
        (output / "config.yaml").write_text(to_yaml(config))

    run.world.first(check)


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
