"""The training script, in reading order: settings, setup, data, model, loop.

    recog-fast train configs/synthetic.yaml
    recog-fast train configs/lfw112.yaml --data.path train.rec --val_targets '[lfw_fold05.bin]' --output runs/lfw
    recog-fast train configs/lfw112.yaml --output runs/lfw --resume true          # goes on where it stopped, bit for bit

A run writes to `output`: config.yaml (resolved), metrics.jsonl, tensorboard/, checkpoints/step_*, model.pt (the backbone).
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
from torch import Tensor, nn

from recog_fast.checkpoint import (
    checkpoint_path,
    latest_checkpoint,
    load_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)
from recog_fast.training.config import TrainConfig, to_yaml
from recog_fast.training.data import Batch, TrainingImages, step_loader
from recog_fast.training.logs import Log, Meter, dropped_share
from recog_fast.training.model import (
    MarginRamp,
    build_backbone,
    build_head,
    build_optimizers,
    learning_rate,
    set_learning_rate,
)
from recog_fast.training.verification import pair_sets, verify_all


class NonFiniteError(ArithmeticError):
    """Embeddings, loss or gradient of a step are not finite; the message names step, rows and images."""


@dataclass
class Run:
    """Everything a step reads and changes."""

    config: TrainConfig
    images: TrainingImages
    device: torch.device
    autocast: bool
    backbone: nn.Module
    prepare: Any  # the network's own pixel convention: (B, H, W, 3) uint8 -> (B, 3, H, W) float32
    head: Any
    optimizer: torch.optim.Optimizer
    head_optimizer: Any
    encoder: Any  # momentum encoder of the memory, or None
    ramp: MarginRamp
    meter: Meter
    position: Any  # ResumableBatches: where in the data the run is
    loader: Any
    steps_per_epoch: int
    total: int
    step: int = 0  # optimizer steps done
    skipped: int = 0  # steps left out for non-finite values
    corrupt: int = 0  # unreadable images reported on the console


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
    run = setup(config)
    rate = learning_rate(config, run.steps_per_epoch, run.total)
    verify_every = config.verbose or run.steps_per_epoch
    save_every = config.save_interval or run.steps_per_epoch
    pairs = pair_sets(config, run.images)
    metrics: dict[str, float] = {}
    with Log(Path(config.output), run.step, run.total) as log, stop_signals() as stop:
        _announce(run, log)
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
                _log_training(run, log, lr, seen / max(1e-9, time.monotonic() - clock))
                clock, seen = time.monotonic(), 0
            log.advance(run.step)
            if pairs and (run.step % verify_every == 0 or last):
                metrics = verify_all(run.backbone, pairs, config, run.device)
                _log_verification(run, log, metrics)
                clock, seen = time.monotonic(), 0
            if run.step % save_every == 0 or last or stopping:
                save(run)
            if stopping and not last:
                log.line(
                    f"Stopped by a signal after step {run.step}; checkpoint saved, --resume true goes on from there"
                )
                break
    torch.save(run.backbone.state_dict(), Path(config.output) / "model.pt")
    return TrainResult(run.step, run.step == run.total, metrics, Path(config.output))


# --- setup ----------------------------------------------------------------------------------------------------------


def setup(config: TrainConfig) -> Run:
    """Data, model and optimizers of a run, restored from its last checkpoint with `resume`."""
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
    head = build_head(config, images.num_classes).to(device)
    optimizer, head_optimizer = build_optimizers(config, backbone, head)
    ramp = MarginRamp(head, round(config.margin_ramp * steps_per_epoch), config.margin)
    encoder = None
    if config.memory is not None and config.memory_momentum:
        from recog_fast import MomentumEncoder

        encoder = MomentumEncoder(backbone, config.memory_momentum)
    run = Run(
        config=config, images=images, device=device, autocast=autocast, backbone=backbone,
        prepare=backbone.preprocessing, head=head, optimizer=optimizer, head_optimizer=head_optimizer, encoder=encoder,
        ramp=ramp, meter=Meter(), position=position, loader=loader,
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
        random=_random_state(),
        meter=run.meter.state,
        skipped=run.skipped,
        position=run.position.state_dict(),
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


# --- one step -------------------------------------------------------------------------------------------------------


def _steps(run: Run) -> Iterator[Batch]:
    """The batches of the steps left, epoch after epoch."""
    while run.step < run.total:
        for batch in run.position.track(run.loader):
            yield batch
            if run.step >= run.total:
                return


def train_step(run: Run, batch: Batch, lr: float, head_lr: float) -> None:
    """Forward and backward of each micro-batch of a step's rows, then one step of both optimizers.

    The mean is over the labelled rows of the whole step: each micro-batch divides by that count, so accumulation changes nothing.
    """
    config = run.config
    run.backbone.train()
    run.head.train()
    run.ramp.set(run.step)
    set_learning_rate(run.optimizer, lr)
    set_learning_rate(run.head_optimizer, head_lr)
    run.optimizer.zero_grad(set_to_none=True)
    run.head_optimizer.zero_grad()
    if run.encoder is not None:
        run.encoder.update(run.backbone)
    labelled = max(1, int((batch.labels >= 0).sum()))
    unlabelled = max(1, int((batch.labels < 0).sum()))
    loss = 0.0
    try:
        for micro_batch in batch.split(config.batch_size):
            # The head's mean over unlabelled rows is that of one forward: weigh it by its share of the step.
            run.head.unknown_weight = config.unknown_weight * int((micro_batch.labels < 0).sum()) / unlabelled
            loss += _forward_backward(run, micro_batch, labelled)
        if config.clip_grad_norm:
            norm = nn.utils.clip_grad_norm_(run.backbone.parameters(), config.clip_grad_norm)
            if not bool(torch.isfinite(norm)):
                raise NonFiniteError(f"train: step {run.step}: the backbone's gradient is not finite (loss {loss:.4g})")
            run.meter.add({"gradient_norm": (float(norm), 1)})
    except NonFiniteError:
        if config.nonfinite == "raise":
            raise
        run.skipped += 1
        run.optimizer.zero_grad(set_to_none=True)
        run.head_optimizer.zero_grad()
        if run.head.memory is not None:
            run.head.memory.flush()
        return
    run.optimizer.step()
    run.head_optimizer.step()
    run.meter.add({"loss": (loss, 1)})


def _forward_backward(run: Run, batch: Batch, labelled: int) -> float:
    # Pixels cross to the device as bytes and become floats there.
    images = run.prepare(batch.images.to(run.device, non_blocking=True))
    labels = batch.labels.to(run.device, non_blocking=True)
    with torch.autocast(run.device.type, dtype=torch.bfloat16, enabled=run.autocast):
        embeddings = run.backbone(images)
        _refuse_nonfinite(run, batch, "embeddings", torch.isfinite(embeddings.detach()).all(dim=1))
        keys = None
        if run.head.memory is not None:
            keys = run.encoder(images) if run.encoder is not None else embeddings.detach()
        # HeadSGD moves the head's clock once a step; other optimizers leave it counting forwards.
        step = None if run.config.head_optimizer == "headsgd" else run.step
        loss, stats = run.head(embeddings, labels, normalizer=labelled, keys=keys, step=step, return_stats=True)
    if not bool(torch.isfinite(loss.detach())):
        rows = torch.isfinite(stats.lse) & torch.isfinite(stats.target_cosine)
        _refuse_nonfinite(run, batch, "loss", rows if not bool(rows.all()) else torch.zeros_like(rows))
    loss.backward()
    run.meter.add(_statistics(embeddings.detach(), labels, stats))
    if run.config.drop_mass or run.config.drop_elements:
        run.meter.add(dropped_share(labels, stats))
    return float(loss.detach())


def _statistics(embeddings: Tensor, labels: Tensor, stats: Any) -> dict[str, tuple[float, float]]:
    """(sum, count) over the labelled rows of what the sweep says about them, and of the feature norm over all rows."""
    known = labels >= 0
    count = float(known.sum())
    sums = torch.stack(
        [
            stats.target_cosine[known].double().sum(),
            stats.nearest_cosine[known].double().sum(),
            stats.target_probability[known].double().sum(),
            stats.max_probability[~known].double().sum(),
            embeddings.double().norm(dim=1).sum(),
        ]
    ).tolist()
    unknown = len(labels) - count
    return {
        "target_cosine": (sums[0], count),
        "nearest_cosine": (sums[1], count),
        "target_probability": (sums[2], count),
        "unknown_max_probability": (sums[3], unknown),
        "feature_norm": (sums[4], float(len(labels))),
    }


def _refuse_nonfinite(run: Run, batch: Batch, what: str, finite: Tensor) -> None:
    if bool(finite.all()):
        return
    rows = (~finite).nonzero().flatten().tolist()
    paths = ", ".join(run.images.path(batch.samples[row]) for row in rows[:3])
    more = f" and {len(rows) - 3} more" if len(rows) > 3 else ""
    raise NonFiniteError(
        f"train: step {run.step}: non-finite {what} in rows {rows[:8]} of {len(finite)} (images {paths}{more})"
    )


# --- reports --------------------------------------------------------------------------------------------------------


def _announce(run: Run, log: Log) -> None:
    parameters = sum(p.numel() for p in run.backbone.parameters())
    log.line(to_yaml(run.config).rstrip())
    log.line(
        f"{run.images.num_classes} identities, {len(run.images)} images; {run.config.network} with {parameters / 1e6:.2f} M parameters on {run.device}; "
        f"{run.steps_per_epoch} steps an epoch, {run.total} in all, starting at {run.step}"
    )


def _log_training(run: Run, log: Log, lr: float, speed: float) -> None:
    means = run.meter.flush()
    epoch = (run.step - 1) // run.steps_per_epoch
    values = {**means, "lr": lr, "epoch": float(epoch), "images_per_second": speed}
    if corrupt := run.images.corrupt():
        values["corrupt_images"] = float(corrupt)
        if corrupt > run.corrupt:
            log.line(f"{corrupt} unreadable images replaced so far, listed in {run.config.output}/corrupt_*.jsonl")
            run.corrupt = corrupt
    if run.skipped:
        values["skipped_steps"] = float(run.skipped)
    log.scalars(run.step, values)
    log.training_line(run.step, epoch, speed, means.get("loss", float("nan")), lr)


def _log_verification(run: Run, log: Log, metrics: dict[str, float]) -> None:
    log.scalars(run.step, metrics)
    text = "   ".join(f"{name.removeprefix('val/')} {value:.4f}" for name, value in metrics.items())
    log.line(f"Verification at step {run.step}: {text}")
