"""What a run says about itself: the announcement, a line every few steps, verifications."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from recog_fast import QAFace
from recog_fast.training.logs import Log
from recog_fast.training.run import Run
from recog_fast.training.unrecognizable import norms_by_resolution

resource: ModuleType | None
try:
    import resource
except ImportError:  # Windows
    resource = None

_OPPOSITE = -0.15  # two standard errors of a correlation over 64 images at three sizes


def announce(run: Run, log: Log) -> None:
    parameters = sum(p.numel() for p in run.backbone.parameters())
    log.line(f"Settings: {Path(run.config.output) / 'config.yaml'}")
    log.line(
        f"{run.images.num_classes} identities, {len(run.images)} images; {run.config.network} with {parameters / 1e6:.2f} M parameters on {run.device}; "
        f"{run.steps_per_epoch} steps an epoch, {run.total} in all, starting at {run.step}"
    )


def log_training(run: Run, log: Log, lr: float, speed: float) -> None:
    """Of all ranks, which all call it."""
    means = run.meter.flush(run.world)
    epoch = (run.step - 1) // run.steps_per_epoch
    values = {**means, "lr": lr, "epoch": float(epoch), "images_per_second": speed, "peak_memory_mb": peak_memory(run.device) / 1e6}
    if corrupt := run.images.corrupt():
        values["corrupt_images"] = float(corrupt)
        if corrupt > run.corrupt:
            log.line(f"{corrupt} unreadable images replaced so far, listed in {run.config.output}/quarantine*.jsonl")
            run.corrupt = corrupt
    if run.head.memory is not None:
        values |= {f"memory/{name}": float(count) for name, count in _memory_stats(run).items()}
    if run.skipped:
        values |= {"skipped_steps": float(run.skipped), "nonfinite_rows": float(run.nonfinite_rows)}
    log.scalars(run.step, values)
    log.training_line(run.step, epoch, speed, means.get("loss", float("nan")), lr)


def peak_memory(device: torch.device) -> float:
    """Most bytes so far: allocated on a CUDA device, else resident in this process (0 where the system does not say)."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    if resource is None:
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak) if sys.platform == "darwin" else 1024.0 * peak


def _memory_stats(run: Run) -> dict[str, int]:
    """Entries are counted by the rank that keeps their class; every rank sees every rejected sample."""
    told = run.world.exchange(run.head.memory.stats(run.step))
    return {name: told[0][name] if name == "rejected" else sum(stats[name] for stats in told) for name in told[0]}


def reads_norms(run: Run) -> bool:
    """Whether a memory takes the feature norm for quality."""
    return run.head.memory is not None and isinstance(run.head.memory.policy, QAFace)


def log_norms(run: Run, log: Log, backbone: nn.Module | None = None) -> None:
    """Feature norm by resolution where a memory takes it for quality, and a warning where it is none; by rank 0 alone."""
    if not reads_norms(run):
        return
    found = norms_by_resolution(run, backbone=backbone)
    log.scalars(run.step, {f"norm/{name}": value for name, value in found.items()})
    if found["correlation"] < _OPPOSITE:
        norms = ", ".join(f"{name} {value:.2f}" for name, value in found.items())
        log.line(
            f"Warning: feature norm and resolution anti-correlate at step {run.step} (mean norm: {norms}): in this network the "
            "norm QAFace weighs samples by says the opposite of quality"
        )


def log_verification(run: Run, log: Log, metrics: dict[str, float]) -> None:
    log.scalars(run.step, metrics)
    text = "   ".join(f"{name.removeprefix('val/')} {value:.4f}" for name, value in metrics.items())
    log.line(f"Verification at step {run.step}: {text}")
