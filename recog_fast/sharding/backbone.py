"""A backbone whose rows are spread over ranks: DistributedDataParallel, or its weights too (FSDP2), and its state as one process has it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .world import World

Parallel = Literal["ddp", "fsdp2"]
_SHARDED = 1 << 16  # parameters a child must have to be gathered by itself


def spread_backbone(backbone: nn.Module, world: World, parallel: Parallel, device: torch.device) -> nn.Module | None:
    """What to call instead of `backbone` so that its gradient is the mean over the ranks; None: `backbone` itself (one process, or
    fsdp2, whose parameters become DTensors in place: make optimizers afterwards).

    Raises RuntimeError (DistributedDataParallel's) for a backbone without a parameter to train, or of other shapes on other ranks.
    """
    if world.group is None:
        return None
    if parallel == "ddp":
        ids = [device.index] if device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(backbone, device_ids=ids, process_group=world.group, gradient_as_bucket_view=True)
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    for parameter in backbone.parameters():  # FSDP takes no other memory format
        parameter.data = parameter.data.contiguous()
    mesh = DeviceMesh.from_group(world.group, device.type)
    for child in backbone.children():
        if sum(p.numel() for p in child.parameters()) >= _SHARDED:
            fully_shard(child, mesh=mesh)
    fully_shard(backbone, mesh=mesh)
    return None


@contextmanager
def gradients_travel(network: nn.Module, now: bool) -> Iterator[None]:
    """Whether backward inside averages gradients over the ranks: once a step, in its last micro-batch."""
    if isinstance(network, nn.parallel.DistributedDataParallel) and not now:
        with network.no_sync():
            yield
        return
    switch: Any = getattr(network, "set_requires_gradient_sync", None)  # fsdp2's
    if switch is not None:
        switch(now)
    yield


def gradient_scaler(world: World, device: torch.device) -> torch.amp.GradScaler:
    """A scaler for float16; what overflows on one rank is left out by all, which agree on the scale (torch's ShardedGradScaler)."""
    if world.group is None:
        return torch.amp.GradScaler(device.type)
    from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

    return ShardedGradScaler(device.type, process_group=world.group)


def is_spread(module: nn.Module) -> bool:
    """Whether the weights are spread over ranks (fsdp2): then every rank takes part in each forward and in `whole`."""
    return hasattr(module, "set_requires_gradient_sync")


def whole(value: Any) -> Any:
    """A state (nested dicts and lists) with every DTensor gathered, as one process has it; every rank calls it."""
    if isinstance(value, Mapping):
        return {name: whole(item) for name, item in value.items()}
    if isinstance(value, list):
        return [whole(item) for item in value]
    return value.full_tensor() if isinstance(value, Tensor) and hasattr(value, "full_tensor") else value


def load_module(module: nn.Module, state: Mapping[str, Any]) -> None:
    """`module.load_state_dict` of a whole state. Raises RuntimeError as there."""
    own = module.state_dict()
    module.load_state_dict({name: _like(own.get(name), value) for name, value in state.items()})


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """`optimizer.load_state_dict` of a whole state. Raises ValueError as there, for other groups of parameters."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    spread = {
        number: {name: _like(parameters[int(number)], value) if int(number) < len(parameters) else value for name, value in buffers.items()}
        for number, buffers in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": spread})


def _like(model: Any, value: Any) -> Any:
    """A whole tensor spread as `model` is, where that has its shape and is a DTensor."""
    if not hasattr(model, "full_tensor") or not isinstance(value, Tensor) or value.shape != model.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(model.device), model.device_mesh, model.placements)
