"""One optimizer step: forward and backward of its micro-batches, clipping, both optimizers; over ranks as in one process.

Every rank makes every call, with its own rows (none, too), and comes to the same decisions: the counts of a step and a signal to any rank
are summed in host memory before it; what only a failing step needs is exchanged when it fails.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from recog_fast.recognizability import RecognizabilityBranches
from recog_fast.sharding import gradients_travel
from recog_fast.training.batches import Batch
from recog_fast.training.logs import dropped_share
from recog_fast.training.model import set_learning_rate
from recog_fast.training.run import NonFiniteError, Run
from recog_fast.training.unrecognizable import refresh_center


class _Counts(NamedTuple):
    """Rows of a step over all ranks."""

    labelled: int  # at least 1: what the mean divides by
    unlabelled: list[int]  # of each micro-batch


def train_step(run: Run, batch: Batch, lr: float, head_lr: float) -> None:
    """Forward and backward of each micro-batch of a step's rows, then one step of both optimizers.

    The mean is over the labelled rows of the whole step and of all ranks: each micro-batch divides by that count, so neither
    accumulation nor the number of ranks changes anything.
    """
    config = run.config
    branches = _active_branches(run)
    if run.world.rank:  # rank 0 goes on with its generator; the others' draws are a function of the step, in a resumed run too
        torch.manual_seed(((config.seed * 1_000_003 + run.step) * 65_537 + run.world.rank) % 2**63)
    if branches is not None:
        if run.step % run.steps_per_epoch == 0 or not branches.ready:
            refresh_center(run)
        branches.train()
    run.network.train()
    run.head.train()
    run.ramp.set(run.step)
    set_learning_rate(run.optimizer, lr)
    set_learning_rate(run.head_optimizer, head_lr)
    run.optimizer.zero_grad(set_to_none=True)
    run.head_optimizer.zero_grad()
    if run.encoder is not None:
        run.encoder.update(run.backbone)
    parts = batch.split(config.batch_size)
    counts = _count(run, parts)
    weight = config.unknown_weight or 0.0
    if run.step < round(config.unknown_start * run.steps_per_epoch):
        weight = 0.0
    loss = 0.0
    try:
        for number, part in enumerate(parts):
            # The head's mean over unlabelled rows is that of one forward: weigh it by its share of the step.
            run.head.unknown_weight = weight * counts.unlabelled[number] / max(1, sum(counts.unlabelled))
            with gradients_travel(run.network, number == len(parts) - 1):
                loss += _forward_backward(run, part, counts.labelled)
        if branches is not None:
            run.world.average_gradients(branches.parameters())
        _clip_all(run, branches, loss)
    except NonFiniteError as error:
        if config.nonfinite == "raise":
            raise
        _skip(run, error)
        return
    if run.scaler is None:
        run.optimizer.step()
        run.head_optimizer.step()
    else:
        _scaled_step(run)
    run.meter.add({"loss": (loss, run.world.rank == 0)})


def _count(run: Run, parts: list[Batch]) -> _Counts:
    """Rows of each kind, and whether a signal came to any rank: one all-reduce of a few integers."""
    labelled = [int((part.labels >= 0).sum()) for part in parts]
    unlabelled = [len(part.samples) - known for part, known in zip(parts, labelled, strict=True)]
    stopped, known, *unknown = run.world.sum([int(run.stop.is_set()), sum(labelled), *unlabelled])
    run.stopping = bool(stopped)
    run.rows += known + sum(unknown)
    return _Counts(max(1, known), unknown)


def _skip(run: Run, error: NonFiniteError) -> None:
    """Leaves the step out: nothing moves, the memory's queue is applied as after a step."""
    run.skipped += 1
    run.nonfinite_rows += error.rows
    run.warnings.append(f"Skipped: {error}")
    run.optimizer.zero_grad(set_to_none=True)
    run.head_optimizer.zero_grad()
    if run.head.memory is not None:
        run.head.memory.flush()


def _scaled_step(run: Run) -> None:
    """Both optimizers under the gradient scaler, which leaves out what overflowed on any rank."""
    before = run.scaler.get_scale()
    run.scaler.step(run.optimizer)
    run.scaler.step(run.head_optimizer)
    run.scaler.update()
    run.skipped += run.scaler.get_scale() < before


def _clip_all(run: Run, branches: RecognizabilityBranches | None, loss: float) -> None:
    config = run.config
    if run.scaler is not None:
        run.scaler.unscale_(run.optimizer)
    _clip(run, run.backbone, config.clip_grad_norm, "backbone", "gradient_norm", loss)
    if branches is not None and config.recognizability is not None:
        limit = config.recognizability.clip_grad_norm
        _clip(run, branches, limit, "recognizability modules", "recognizability/gradient_norm", loss)


def _clip(run: Run, module: nn.Module, limit: float, name: str, entry: str, loss: float) -> None:
    """Clips the gradient of one module apart from every other; 0: not at all."""
    if not limit:
        return
    norm: Any = nn.utils.clip_grad_norm_(module.parameters(), limit)
    if hasattr(norm, "full_tensor"):
        norm = norm.full_tensor()
    if not bool(torch.isfinite(norm)):
        if run.scaler is not None:  # it leaves the step out and tries a smaller scale
            return
        raise NonFiniteError(f"train: step {run.step}: the gradient of the {name} is not finite (loss {loss:.4g})")
    run.note({entry: (float(norm), 1)})


def _forward_backward(run: Run, batch: Batch, labelled: int) -> float:
    """This rank's part of the micro-batch's loss: on rank 0 all of the head's, on each its own rows' other terms."""
    # Pixels cross to the device as bytes and become floats there.
    images = run.prepare(batch.images.to(run.device, non_blocking=True))
    labels = batch.labels.to(run.device, non_blocking=True)
    with torch.autocast(run.device.type, dtype=run.autocast or torch.bfloat16, enabled=run.autocast is not None):
        branches = _active_branches(run)
        if branches is None:
            embeddings, features = run.network(images), None
        else:
            embeddings, features = run.network(images, return_features=True)
        bad = _nonfinite(run, batch, "embeddings", torch.isfinite(embeddings.detach()).all(dim=1))
        if bad is not None and run.world.size == 1:
            raise NonFiniteError(*bad)
        keys = None
        if run.head.memory is not None:
            keys = run.encoder(images) if run.encoder is not None else embeddings.detach()
        # HeadSGD moves the head's clock once a step; other optimizers leave it counting forwards.
        step = None if run.config.head_optimizer == "headsgd" else run.step
        try:
            loss, stats = run.head(embeddings, labels, normalizer=labelled, keys=keys, step=step, return_stats=True)
        except ValueError:  # every rank is here when one of them is
            if run.world.size > 1:
                _raise_together(run, bad)
            raise
        own = None
        if branches is not None and features is not None:
            own = _recognizability(run, branches, embeddings, features, labels, stats) / labelled
    _refuse_loss(run, batch, loss, own, stats)
    # DistributedDataParallel divides by the ranks; the head's own gradient is prepared for that.
    objective = loss if own is None else loss + own * run.world.size
    (objective if run.scaler is None else run.scaler.scale(objective)).backward()
    run.meter.add(_statistics(embeddings.detach(), labels, stats))
    if run.config.drop_mass or run.config.drop_elements:
        run.meter.add(dropped_share(labels, stats))
    shared = float(loss.detach()) if run.world.rank == 0 else 0.0
    return shared + (0.0 if own is None else float(own.detach()))


def _refuse_loss(run: Run, batch: Batch, loss: Tensor, own: Tensor | None, stats: Any) -> None:
    """NonFiniteError on every rank where the loss is not finite on one: the head's is the same on all, other terms are of own rows."""
    finite = bool(torch.isfinite(loss.detach() if own is None else loss.detach() + own.detach()))
    if own is not None:
        finite = run.world.sum([int(not finite)]) == [0]
    if finite:
        return
    rows = torch.isfinite(stats.lse) & torch.isfinite(stats.target_cosine)
    bad = _nonfinite(run, batch, "loss", rows)
    _raise_together(run, bad)
    raise NonFiniteError(f"train: step {run.step}: the loss is not finite")


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


def _nonfinite(run: Run, batch: Batch, what: str, finite: Tensor) -> tuple[str, int] | None:
    """(what is wrong, with how many rows) of this rank, None where nothing is."""
    if bool(finite.all()):
        return None
    rows = (~finite).nonzero().flatten().tolist()
    paths = ", ".join(run.images.path(batch.samples[row]) for row in rows[:3])
    more = f" and {len(rows) - 3} more" if len(rows) > 3 else ""
    rank = f" of rank {run.world.rank}" if run.world.size > 1 else ""
    message = f"train: step {run.step}: non-finite {what} in rows {rows[:8]} of {len(finite)}{rank} (images {paths}{more})"
    return message, len(rows)


def _raise_together(run: Run, bad: tuple[str, int] | None) -> None:
    """NonFiniteError on every rank, naming the rows of all, where one has such rows; every rank calls it."""
    told = [said for said in run.world.exchange(bad) if said is not None]
    if told:
        raise NonFiniteError("; ".join(message for message, _ in told), sum(rows for _, rows in told))
