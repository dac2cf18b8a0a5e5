"""Who enters the prototype memory, how strongly it is injected and for how long: VPL and QAFace (math.md section 2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from .._arguments import is_choice, is_number
from ..ops._cuda_native import norm_statistics


class NormStatistics(NamedTuple):
    """Running statistics of the embedding norms; 0-dim tensors."""

    mean: Tensor  # () float64
    std: Tensor  # () float64
    batches: Tensor  # () int64, batches with labelled rows seen so far; 0 = mean and std mean nothing yet


@runtime_checkable
class MemoryPolicy(Protocol):
    """What a `PrototypeMemory` asks of its policy; anything with these members serves."""

    @property
    def delta(self) -> int:
        """Largest age, in steps, of an entry that is injected; 0 = no injection."""

    @property
    def skips_rejected(self) -> bool:
        """Whether a rejected sample leaves the entry of its class as it was."""

    def started(self, step: int) -> bool:
        """Whether entries are injected at `step`."""

    def update(self, norms: Tensor, labelled: Tensor, statistics: NormStatistics) -> NormStatistics:
        """Statistics after a batch of norms (N,), of which the rows in the bool mask `labelled` (N,) count."""

    def strengths(self, norms: Tensor, statistics: NormStatistics) -> tuple[Tensor, Tensor]:
        """Strength (N,) of each sample and whether it is rejected, (N,) bool, given the statistics after `update`."""


@dataclass(frozen=True)
class VPL:
    """Variational Prototype Learning: every sample enters with the same strength `lam`.

    P_j = normalize(W^_j + lam M_j), M_j the unit feature of the last sample of class j; the paper's (1 - l) W^ + l M is
    lam = l / (1 - l), so its l = 0.15 is 0.17647. An entry is injected while step - stamp <= `delta` and only at
    step > `start` (both in optimizer steps).

    Raises ValueError for a lam that is negative or not finite, and for a negative delta or start.
    """

    lam: float = 0.17647
    delta: int = 200
    start: int = 8000

    def __post_init__(self) -> None:
        _check_non_negative("VPL", lam=self.lam)
        _check_steps("VPL", delta=self.delta, start=self.start)

    @property
    def skips_rejected(self) -> bool:
        """VPL rejects nothing."""
        return False

    def started(self, step: int) -> bool:
        """step > start, as the official code."""
        return step > self.start

    def update(self, norms: Tensor, labelled: Tensor, statistics: NormStatistics) -> NormStatistics:
        """VPL does not look at norms."""
        return statistics

    def strengths(self, norms: Tensor, statistics: NormStatistics) -> tuple[Tensor, Tensor]:
        """lam for every sample (N,); none is rejected."""
        return torch.full_like(norms, self.lam), torch.zeros_like(norms, dtype=torch.bool)


@dataclass(frozen=True)
class QAFace:
    """Quality-aware sample-to-sample comparison (QAFace): the strength of a sample falls with its norm (math.md 2).

    n^ = (|x| - mu) / sigma and strength = `inject_scale` e^{-n^}, or 0 (rejected: too poor to be recognised) where n^ <
    -`tau`. mu and the unbiased sigma are those of the labelled rows: the first batch as it is (sigma = 1 when it has
    one row), then `ema` times the old value plus (1 - ema) times the batch's (the paper prints the weights the other
    way round, against its own text: `literal=True`), updated before use; a batch with one row keeps sigma, one with
    none changes nothing. Sigma counts as at least 1e-6 mu, so equal norms give n^ = 0. An entry is injected while step
    - stamp <= `delta`, at step >= `start`. `on_reject`: "overwrite" stores a rejected sample with strength 0, "skip"
    leaves the entry of its class alone. `inject_scale` = 1 is literal; 0.176 the safe preset (e^tau = 7.39 makes the
    literal prototype almost the sample).

    Raises ValueError for an ema outside [0, 1], a negative or infinite tau or inject_scale, a negative delta or start
    and an unknown on_reject.
    """

    tau: float = 2.0
    delta: int = 1000
    start: int = 0
    inject_scale: float = 1.0
    ema: float = 0.99
    on_reject: str = "overwrite"
    literal: bool = False

    def __post_init__(self) -> None:
        _check_non_negative("QAFace", tau=self.tau, inject_scale=self.inject_scale)
        _check_steps("QAFace", delta=self.delta, start=self.start)
        if not is_number(self.ema, 0.0, 1.0):
            raise ValueError(f"QAFace: expected ema in [0, 1], got {self.ema!r}")
        if not is_choice(self.on_reject, ("overwrite", "skip")):
            raise ValueError(f'QAFace: expected on_reject "overwrite" or "skip", got {self.on_reject!r}')

    @property
    def skips_rejected(self) -> bool:
        """on_reject == "skip"."""
        return self.on_reject == "skip"

    @property
    def reads_norms(self) -> bool:
        """The norm is the quality: a memory warns about embeddings that were normalised before."""
        return True

    def started(self, step: int) -> bool:
        """step >= start."""
        return step >= self.start

    def update(self, norms: Tensor, labelled: Tensor, statistics: NormStatistics) -> NormStatistics:
        """EMA of mean and unbiased deviation of the labelled norms (N,), in float64, without synchronisation."""
        old = 1.0 - self.ema if self.literal else self.ema
        fused = norm_statistics(norms, labelled, *statistics, old)
        if fused is not None:
            return NormStatistics(*fused)
        norms = norms.double()
        count = labelled.sum()
        mean = torch.where(labelled, norms, 0.0).sum() / count.clamp(min=1)
        square = torch.where(labelled, norms - mean, 0.0).square().sum()
        std = (square / (count - 1).clamp(min=1)).sqrt()
        first = statistics.batches == 0
        new_mean = torch.where(first, mean, old * statistics.mean + (1.0 - old) * mean)
        new_std = torch.where(first, std, old * statistics.std + (1.0 - old) * std)
        kept_std = torch.where(first, torch.ones_like(std), statistics.std)
        return NormStatistics(
            torch.where(count > 0, new_mean, statistics.mean),
            torch.where(count > 1, new_std, torch.where(count == 1, kept_std, statistics.std)),
            statistics.batches + (count > 0),
        )

    def strengths(self, norms: Tensor, statistics: NormStatistics) -> tuple[Tensor, Tensor]:
        """inject_scale e^{-n^} (N,) float64, 0 where n^ < -tau, and that mask."""
        sigma = torch.maximum(statistics.std, 1e-6 * statistics.mean.abs()).clamp(min=1e-12)
        normalized = (norms.double() - statistics.mean) / sigma
        rejected = normalized < -self.tau
        return torch.where(rejected, 0.0, self.inject_scale * torch.exp(-normalized)), rejected


def _check_non_negative(name: str, **values: float) -> None:
    for argument, value in values.items():
        if not is_number(value, 0.0):
            raise ValueError(f"{name}: expected {argument} >= 0 and finite, got {value!r}")


def _check_steps(name: str, **values: int) -> None:
    for argument, value in values.items():
        if not isinstance(value, int):
            raise TypeError(f"{name}: expected {argument} as an int (steps), got {type(value).__name__}")
        if value < 0:
            raise ValueError(f"{name}: expected {argument} >= 0 (steps), got {value!r}")
