"""One optimizer step: forward and backward of its micro-batches, clipping, both optimizers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from recog_fast.recognizability import RecognizabilityBranches
from recog_fast.training.batches import Batch
from recog_fast.training.logs import dropped_share
from recog_fast.training.model import set_learning_rate
from recog_fast.training.run import NonFiniteError, Run
from recog_fast.training.unrecognizable import refresh_center


def train_step(run: Run, batch: Batch, lr: float, head_lr: float) -> None:
    """Forward and backward of each micro-batch of a step's rows, then one step of both optimizers.

    The mean is over the labelled rows of the whole step: each micro-batch divides by that count, so accumulation changes nothing.
    """
    config = run.config
    branches = _active_branches(run)
    if branches is not None:
        if run.step % run.steps_per_epoch == 0 or not branches.ready:
            refresh_center(run)
        branches.train()
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
    weight = config.unknown_weight or 0.0
    if run.step < round(config.unknown_start * run.steps_per_epoch):
        weight = 0.0
    loss = 0.0
    try:
        for micro_batch in batch.split(config.batch_size):
            # The head's mean over unlabelled rows is that of one forward: weigh it by its share of the step.
            run.head.unknown_weight = weight * int((micro_batch.labels < 0).sum()) / unlabelled
            loss += _forward_backward(run, micro_batch, labelled)
        _clip(run, run.backbone, config.clip_grad_norm, "backbone", "gradient_norm", loss)
        if branches is not None and config.recognizability is not None:
            limit = config.recognizability.clip_grad_norm
            _clip(run, branches, limit, "recognizability modules", "recognizability/gradient_norm", loss)
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


def _clip(run: Run, module: nn.Module, limit: float, name: str, entry: str, loss: float) -> None:
    """Clips the gradient of one module apart from every other; 0: not at all."""
    if not limit:
        return
    norm = nn.utils.clip_grad_norm_(module.parameters(), limit)
    if not bool(torch.isfinite(norm)):
        raise NonFiniteError(f"train: step {run.step}: the gradient of the {name} is not finite (loss {loss:.4g})")
    run.meter.add({entry: (float(norm), 1)})


def _forward_backward(run: Run, batch: Batch, labelled: int) -> float:
    # Pixels cross to the device as bytes and become floats there.
    images = run.prepare(batch.images.to(run.device, non_blocking=True))
    labels = batch.labels.to(run.device, non_blocking=True)
    with torch.autocast(run.device.type, dtype=torch.bfloat16, enabled=run.autocast):
        branches = _active_branches(run)
        if branches is None:
            embeddings, features = run.backbone(images), None
        else:
            embeddings, features = run.backbone(images, return_features=True)
        _refuse_nonfinite(run, batch, "embeddings", torch.isfinite(embeddings.detach()).all(dim=1))
        keys = None
        if run.head.memory is not None:
            keys = run.encoder(images) if run.encoder is not None else embeddings.detach()
        # HeadSGD moves the head's clock once a step; other optimizers leave it counting forwards.
        step = None if run.config.head_optimizer == "headsgd" else run.step
        loss, stats = run.head(embeddings, labels, normalizer=labelled, keys=keys, step=step, return_stats=True)
        if branches is not None and features is not None:
            loss = loss + _recognizability(run, branches, embeddings, features, labels, stats) / labelled
    if not bool(torch.isfinite(loss.detach())):
        rows = torch.isfinite(stats.lse) & torch.isfinite(stats.target_cosine)
        _refuse_nonfinite(run, batch, "loss", rows if not bool(rows.all()) else torch.zeros_like(rows))
    loss.backward()
    run.meter.add(_statistics(embeddings.detach(), labels, stats))
    if run.config.drop_mass or run.config.drop_elements:
        run.meter.add(dropped_share(labels, stats))
    return float(loss.detach())


def _active_branches(run: Run) -> RecognizabilityBranches | None:
    """The modules of the recognizability index from their first step on."""
    own = run.config.recognizability
    if own is None or run.step < round(own.start * run.steps_per_epoch):
        return None
    return run.branches


def _recognizability(
    run: Run, branches: RecognizabilityBranches, embeddings: Tensor, features: Tensor, labels: Tensor, stats: Any
) -> Tensor:
    """The weighted terms of the recognizability index summed over the labelled rows; their values go to the log."""
    known = labels >= 0
    terms = branches.losses(embeddings[known], features[known], stats.target_cosine[known], stats.nearest_cosine[known])
    count = float(known.sum())
    sums = torch.stack([terms.regression, terms.diversion, terms.attention, terms.xi.sum(), terms.predicted.sum()])
    names = ("regression", "diversion", "attention", "index", "predicted")
    run.meter.add({f"recognizability/{n}": (v, count) for n, v in zip(names, sums.double().tolist(), strict=True)})
    return terms.total


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
