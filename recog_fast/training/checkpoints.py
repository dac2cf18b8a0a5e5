"""A run's checkpoints: saved by all ranks together, resumed by any number of them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recog_fast.checkpoint import (
    CheckpointError,
    checkpoint_path,
    latest_checkpoint,
    load_checkpoint,
    prune_checkpoints,
    save_checkpoint,
    save_checkpoint_async,
)
from recog_fast.sharding import load_module, load_optimizer, whole
from recog_fast.training.logs import Meter
from recog_fast.training.run import Run


def save(run: Run, wait: bool = True) -> None:
    """A checkpoint of the whole run after the current step; the last `keep_last` stay. Every rank calls it.

    wait=False with `async_save`: a thread writes it; `finish_save` (or the next save) waits for it. Raises OSError (on other ranks
    CheckpointError) where it cannot be written: the ones before are as they were.
    """
    _collect(run)
    if run.head.memory is not None:
        # Without HeadSGD writes wait for the next forward, which would apply them before anything else.
        run.head.memory.flush()
    write = save_checkpoint_async if run.config.async_save and not wait else save_checkpoint
    content = {
        "model": whole(run.backbone.state_dict()),
        "backbone_optimizer": whole(run.optimizer.state_dict()),
        "encoder": None if run.encoder is None else run.encoder.state_dict(),
        "recognizability": None if run.branches is None else run.branches.state_dict(),
        "scaler": None if run.scaler is None else run.scaler.state_dict(),
        "random": _random_state(run.device),
        "meter": run.meter.total(run.world),
        "skipped": run.skipped,
        "nonfinite_rows": run.nonfinite_rows,
        "position": run.position.state_dict(),
        "steps_per_epoch": run.steps_per_epoch,
        "rows_per_step": run.config.batch_size * run.config.gradient_acc,
    }
    path = checkpoint_path(_folder(run), run.step)
    try:
        run.saving = write(path, head=run.head, optimizer=run.head_optimizer, step=run.step, **content)
    except (OSError, CheckpointError):
        _prune(run)  # gives the room of what was half written back
        raise
    if run.saving is None:
        _prune(run)


def finish_save(run: Run) -> None:
    """Waits for a checkpoint that a thread writes; raises what went wrong."""
    if run.saving is None:
        return
    saving, run.saving = run.saving, None
    try:
        saving.result()
    finally:
        _prune(run)


def _collect(run: Run) -> None:
    """`finish_save` of an earlier step that may have failed: a warning, a later one is about to be written."""
    try:
        finish_save(run)
    except (OSError, CheckpointError) as error:
        run.warnings.append(f"Warning: a checkpoint before step {run.step} was not written: {type(error).__name__}: {error}")


def try_save(run: Run) -> None:
    """`save` that may fail: training goes on, a warning says so, and the next one is tried again. Losing a disk for a while loses nothing."""
    try:
        save(run, wait=False)
    except (OSError, CheckpointError) as error:
        run.warnings.append(f"Warning: no checkpoint at step {run.step}, training goes on: {type(error).__name__}: {error}")


def _folder(run: Run) -> Path:
    return Path(run.config.output) / "checkpoints"


def _prune(run: Run) -> None:
    if run.world.rank == 0:
        prune_checkpoints(_folder(run), run.config.keep_last)


def restore(run: Run) -> bool:
    """Puts the last whole checkpoint of the run's output back; False when there is none. Every rank calls it.

    Raises ValueError when the number of images, the seed or the rows of a step differ: the position would mean something else.
    """

    def newest() -> str | None:
        found = latest_checkpoint(_folder(run), verified=True)
        return None if found is None else str(found)

    path = run.world.first(newest)
    if path is None:
        return False
    saved = load_checkpoint(path, head=run.head, optimizer=run.head_optimizer)
    run.world.together("train", lambda: _restore(run, saved, path))
    return True


def _restore(run: Run, saved: dict[str, Any], path: str) -> None:
    rows = run.config.batch_size * run.config.gradient_acc
    if saved["rows_per_step"] != rows:
        raise ValueError(f"train: expected batch_size * gradient_acc = {saved['rows_per_step']} as in {path}, got {rows}")
    run.position.load_state_dict(saved["position"])
    load_module(run.backbone, saved["model"])
    load_optimizer(run.optimizer, saved["backbone_optimizer"])
    if run.encoder is not None and saved["encoder"] is not None:
        run.encoder.load_state_dict(saved["encoder"])
    if run.branches is not None and saved.get("recognizability") is not None:
        run.branches.load_state_dict(saved["recognizability"])
    if run.scaler is not None and saved.get("scaler"):
        run.scaler.load_state_dict(saved["scaler"])
    run.step, run.skipped, run.nonfinite_rows = saved["step"], saved["skipped"], saved.get("nonfinite_rows", 0)
    if run.world.rank == 0:
        run.meter = Meter(saved["meter"])
    _set_random_state(saved["random"], run.device)


def _random_state(device: torch.device) -> dict[str, Any]:
    """Of rank 0, which is what a checkpoint holds: the others draw from (seed, step, rank)."""
    cuda = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state(), "cuda": cuda}


def _set_random_state(state: dict[str, Any], device: torch.device) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"]:
        torch.cuda.set_rng_state(state["cuda"][(device.index or 0) % len(state["cuda"])], device)
