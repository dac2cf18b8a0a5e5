"""The momentum encoder of QAFace and VPL (math.md section 2)."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .._arguments import is_number


class MomentumEncoder(nn.Module):
    """A slowly moving copy of the backbone, which makes the keys a `PrototypeMemory` stores (QAFace; math.md 2).

    theta_k <- gamma theta_k + (1 - gamma) theta_q for parameters, buffers copied, at every `update`; call it before the
    key forward. `key` is the copy: its parameters need no gradient and are part of state_dict under "key.". It keeps
    the backbone's train/eval mode until `train()` or `eval()` is called on this module; in train mode its BatchNorm
    layers use the statistics of the batch of keys, in eval mode the running ones copied from the backbone. A
    DistributedDataParallel, DataParallel or torch.compile wrapper around the backbone is looked through.

    Args: backbone, any nn.Module; gamma in [0, 1]: 0 copies, 1 never moves.
    Raises ValueError for a gamma outside [0, 1], TypeError for a backbone that is no nn.Module.
    """

    def __init__(self, backbone: nn.Module, gamma: float = 0.99) -> None:
        super().__init__()
        if not isinstance(backbone, nn.Module):
            raise TypeError(f"MomentumEncoder: expected backbone as an nn.Module, got {type(backbone).__name__}")
        if not is_number(gamma, 0.0, 1.0):
            raise ValueError(f"MomentumEncoder: expected gamma in [0, 1], got {gamma!r}")
        self.gamma = gamma
        self.key = copy.deepcopy(_unwrap(backbone)).requires_grad_(False)
        self.training = self.key.training

    @torch.no_grad()
    def update(self, backbone: nn.Module) -> None:
        """Moves the key towards `backbone` in place.

        Raises ValueError when parameters or buffers differ in name or shape from those of the key; nothing is changed
        then.
        """
        source = _unwrap(backbone)
        parameters = _pairs("parameter", self.key.named_parameters(), source.named_parameters())
        buffers = _pairs("buffer", self.key.named_buffers(), source.named_buffers())
        for key, query in parameters:
            key.mul_(self.gamma).add_(query.to(key.device, key.dtype), alpha=1.0 - self.gamma)
        for key, query in buffers:
            key.copy_(query)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Keys (N, D) of images (N, 3, H, W), without gradient."""
        keys: Tensor = self.key(images)
        return keys

    def extra_repr(self) -> str:
        """gamma, for print."""
        return f"gamma={self.gamma}"


def _unwrap(backbone: nn.Module) -> nn.Module:
    """The module inside DDP, DataParallel or torch.compile."""
    while True:
        inner: nn.Module
        if isinstance(backbone, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            inner = backbone.module
        else:
            inner = getattr(backbone, "_orig_mod", backbone)
        if inner is backbone:
            return backbone
        backbone = inner


def _pairs(
    kind: str, keys: Iterable[tuple[str, Tensor]], queries: Iterable[tuple[str, Tensor]]
) -> list[tuple[Tensor, Tensor]]:
    """(key, query) tensors of the same name; ValueError naming the first that does not fit."""
    ours, theirs = dict(keys), dict(queries)
    for name in [*ours, *theirs]:
        if name not in ours or name not in theirs:
            where = "the backbone given" if name not in theirs else "the key"
            raise ValueError(
                f"MomentumEncoder.update: expected backbone with the key's {kind}s, got {name!r} missing in {where}"
            )
        expected, got = tuple(ours[name].shape), tuple(theirs[name].shape)
        if expected != got:
            raise ValueError(f"MomentumEncoder.update: expected {kind} {name!r} of shape {expected}, got {got}")
    return [(ours[name], theirs[name]) for name in ours]
