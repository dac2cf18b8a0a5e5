"""Batch normalisation with the statistics of all ranks' rows, any number on each, on the CPU too (torch's own is for GPUs)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .group import ShardGroup


class _Sum(torch.autograd.Function):
    """Sum over the ranks; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, ranks: ShardGroup) -> Tensor:
        ctx.ranks = ranks
        return ranks.sum_(values.clone())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_sum: Tensor) -> tuple[Tensor, None]:
        return ctx.ranks.sum_(d_sum.clone()), None


class RanksBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm1d or 2d whose training statistics are those of all ranks' rows (N, C, ...); names and state as there."""

    ranks: ShardGroup

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"RanksBatchNorm: expected input of shape (N, C, ...), got {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, ...) -> the same shape; every rank calls it in training mode, with 0 rows too."""
        self._check_input_dim(input)
        if not self.training:
            return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        rows = input.transpose(0, 1).reshape(self.num_features, -1).double()  # (C, N ...)
        count = torch.full_like(rows[:1, :1].sum(), float(rows.shape[1]))
        told: Tensor = _Sum.apply(torch.cat([rows.sum(dim=1), count.reshape(1)]), self.ranks)
        size = told[-1].detach()
        mean = (told[:-1] / size).unsqueeze(1)
        square: Tensor = _Sum.apply((rows - mean).square().sum(dim=1), self.ranks)
        variance = square / size
        self._track(mean.detach().squeeze(1), variance.detach(), size)
        unit = (rows - mean) * torch.rsqrt(variance + self.eps).unsqueeze(1)
        shape = (1, self.num_features, *[1] * (input.dim() - 2))
        unit = unit.to(input.dtype).reshape(self.num_features, input.shape[0], *input.shape[2:]).transpose(0, 1)
        if self.weight is None:
            return unit
        return unit * self.weight.reshape(shape).to(input.dtype) + self.bias.reshape(shape).to(input.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor, size: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        unbiased = variance * size / (size - 1).clamp_min(1)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), share)


def synchronise_batch_norm(module: nn.Module, ranks: ShardGroup, cuda: bool) -> nn.Module:
    """Batch normalisation layers of `module` take the statistics of all ranks: torch's SyncBatchNorm on GPUs, ours on the CPU.

    Layers inside `module` are replaced in place, with their parameters and buffers; `module` is returned.
    The layers raise ValueError for an input that is not (N, C, ...).
    """
    if cuda:
        made: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(module, ranks.group)
        return made
    for name, child in module.named_children():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            shared = RanksBatchNorm(child.num_features, child.eps, child.momentum, child.affine, child.track_running_stats)
            shared.weight, shared.bias = child.weight, child.bias
            shared.running_mean, shared.running_var = child.running_mean, child.running_var
            shared.num_batches_tracked, shared.ranks = child.num_batches_tracked, ranks
            shared.train(child.training)
            setattr(module, name, shared)
        else:
            synchronise_batch_norm(child, ranks, cuda)
    return module
