"""From settings to backbone, head, margin and optimizers."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

import recog_fast as rf
from recog_fast.models import Backbone, build_model, model_names
from recog_fast.training import schedules
from recog_fast.training.config import TrainConfig
from recog_fast.training.methods import apply_method

MARGINS = (
    "Softmax SphereFace CosFace CombinedMargin ArcFace MagFace AdaFace CurricularFace MVSoftmax CircleMargin InterclassFilter"
).split()
POLICIES = ("VPL", "QAFace")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# What the margin is without its parameters: the start of a ramp.
_NEUTRAL = {"m": 0.0, "m1": 1.0, "m2": 0.0, "m3": 0.0, "lm": 0.0, "um": 0.0}
_RAMPED = ("CosFace", "CombinedMargin", "ArcFace", "MagFace", "AdaFace", "CurricularFace", "MVSoftmax")


def named(settings: Mapping[str, Any], names: tuple[str, ...] | list[str], what: str) -> Any:
    """The object of `recog_fast` that settings["name"] names, built with the other entries; a nested {name: ...} is built first.

    Raises ValueError for an unknown name or parameter, naming the nearest one, and for values the object refuses.
    """
    arguments = dict(settings)
    name = arguments.pop("name", None)
    if name not in names:
        near = difflib.get_close_matches(str(name), names, n=1)
        raise ValueError(
            f"train: expected {what}.name in {', '.join(names)}, got {name!r}"
            + (f"; did you mean {near[0]!r}?" if near else "")
        )
    made = getattr(rf, name)
    known = list(inspect.signature(made).parameters)
    for key, value in arguments.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; {name} takes: {', '.join(known) or 'nothing'}"
            raise ValueError(f"train: unknown key '{what}.{key}'{hint}")
        if isinstance(value, Mapping):
            arguments[key] = named(value, names, f"{what}.{key}")
    missing = [key for key, one in inspect.signature(made).parameters.items() if one.default is one.empty and key not in arguments]
    if missing:
        raise ValueError(f"train: expected {', '.join(f'{what}.{key}' for key in missing)} with {what}.name {name}, got none")
    try:
        return made(**arguments)
    except TypeError as error:
        raise ValueError(f"train: {what}: {error}") from error


def check_names(config: TrainConfig) -> None:
    """Raises ValueError or TypeError for what can be told from the settings before data is read: a method, network, margin, memory policy or
    device that is none, and options of these that they refuse."""
    config = apply_method(config)
    if config.network not in model_names():
        near = difflib.get_close_matches(config.network, model_names(), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"train: expected network in {', '.join(model_names())}, got {config.network!r}{hint}")
    named(config.margin, MARGINS, "margin")
    if config.memory is not None:
        named({k: v for k, v in config.memory.items() if k not in ("capacity", "start_epoch")}, POLICIES, "memory")
    if config.device != "auto":
        try:
            torch.device(config.device)
        except RuntimeError as error:
            raise ValueError(f"train: expected device auto, cpu, cuda or cuda:N, got {config.device!r}") from error


class MarginRamp:
    """Sets `head.margin` to its settings times a share that grows from 0 to 1 over `steps`; a pure function of the step."""

    def __init__(self, head: rf.MarginHead, steps: int, settings: Mapping[str, Any]) -> None:
        if steps and settings.get("name") not in _RAMPED:
            raise ValueError(
                f"train: expected margin_ramp = 0 with margin {settings.get('name')!r}; a ramp is known for {', '.join(_RAMPED)}"
            )
        self.head, self.steps = head, steps
        self.full = {k: float(getattr(head.margin, k)) for k in _NEUTRAL if hasattr(head.margin, k)} if steps else {}

    def set(self, step: int) -> None:
        """The margin of optimizer step `step`."""
        if not self.full:
            return
        share = schedules.ramp(step, self.steps)
        values = {k: _NEUTRAL[k] + share * (v - _NEUTRAL[k]) for k, v in self.full.items()}
        margin: Any = self.head.margin
        if isinstance(margin, nn.Module):
            for name, value in values.items():
                setattr(margin, name, value)
        else:
            self.head.margin = dataclasses.replace(margin, **values)


def build_backbone(config: TrainConfig) -> Backbone:
    """The network of the settings, on the CPU, initialised from the global torch generator."""
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in config.network_options.items()}
    return build_model(config.network, embedding_dim=config.embedding_size, input_size=config.data.size, **options)


def build_memory(config: TrainConfig, num_classes: int, steps_per_epoch: int) -> rf.PrototypeMemory | None:
    """The prototype memory of the settings: `start_epoch` becomes a step, the capacity what can be valid at once."""
    if config.memory is None:
        return None
    settings = dict(config.memory)
    capacity = settings.pop("capacity", None)
    start = settings.pop("start_epoch", None)
    if start is not None:
        if "start" in settings or not isinstance(start, int | float) or start < 0:
            raise ValueError(f"train: expected memory.start_epoch >= 0 without memory.start, got {config.memory}")
        settings["start"] = round(start * steps_per_epoch)
    policy = named(settings, POLICIES, "memory")
    if capacity is None:
        capacity = min(num_classes, max(1, policy.delta) * config.batch_size * config.gradient_acc)
    return rf.PrototypeMemory(num_classes, config.embedding_size, policy, capacity=capacity)


def build_branches(config: TrainConfig, backbone: Backbone) -> rf.recognizability.RecognizabilityBranches | None:
    """The modules of the recognizability index for this backbone's last feature map.

    Drawn from a generator of their own, so that runs of one seed with and without them stay paired.
    """
    own = config.recognizability
    if own is None:
        return None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed + 1)
        return rf.recognizability.RecognizabilityBranches(
            backbone.feature_shape,
            config.embedding_size,
            regression=own.regression,
            diversion=own.diversion,
            attention=own.attention,
            tau=own.tau,
            beta=own.beta,
            dropout=own.dropout,
            elements=own.elements,
            seed=config.seed,
        )


def build_encoder(config: TrainConfig, backbone: nn.Module) -> rf.MomentumEncoder | None:
    """The momentum encoder that makes the memory's keys, where the settings want one."""
    return rf.MomentumEncoder(backbone, config.memory_momentum) if config.memory is not None and config.memory_momentum else None


def build_head(config: TrainConfig, num_classes: int, steps_per_epoch: int = 1, group: Any = None) -> rf.MarginHead:
    """MarginHead with the margin and memory of the settings, its classes spread over the ranks of `group`."""
    return rf.MarginHead(
        num_classes,
        config.embedding_size,
        margin=named(config.margin, MARGINS, "margin"),
        scale=config.scale,
        subcenters=config.subcenters,
        memory=build_memory(config, num_classes, steps_per_epoch),
        unknown_weight=config.unknown_weight or 0.0,
        keep_exponentials=False if config.keep_exponentials is None else _DTYPES[config.keep_exponentials],
        drop_mass=config.drop_mass,
        drop_elements=config.drop_elements,
        weight_format=config.weight_format,
        sample_rate=config.sample_rate,
        sample_seed=config.seed,
        group=group,
    )


def build_optimizers(
    config: TrainConfig, backbone: nn.Module, head: rf.MarginHead, branches: nn.Module | None = None
) -> tuple[torch.optim.Optimizer, Any]:
    """(backbone's and branches', head's): separate, because HeadSGD updates the head inside its sweep and is not clipped."""
    decay = config.weight_decay
    head_decay = decay if config.head_weight_decay is None else config.head_weight_decay
    head_lr = config.lr if config.head_lr is None else config.head_lr
    first = _torch_optimizer(config.optimizer, backbone, config.lr, config.momentum, decay)
    if branches is not None:
        first.add_param_group({"params": list(branches.parameters())})
    if config.head_optimizer == "headsgd":
        return first, rf.HeadSGD(
            head, lr=head_lr, momentum=config.momentum, weight_decay=head_decay, momentum_dtype=_DTYPES[config.momentum_dtype], unsampled=config.unsampled
        )
    return first, _torch_optimizer(config.head_optimizer, head, head_lr, config.momentum, head_decay)


def _torch_optimizer(name: str, module: nn.Module, lr: float, momentum: float, decay: float) -> torch.optim.Optimizer:
    parameters = [p for p in module.parameters() if p.requires_grad]
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=decay)
    return torch.optim.SGD(parameters, lr=lr, momentum=momentum, weight_decay=decay)


def learning_rate(config: TrainConfig, steps_per_epoch: int, total: int) -> Callable[[int], float]:
    """step -> share of the base rate, in [0, 1]."""
    warmup = round(config.warmup_epoch * steps_per_epoch)
    arguments: dict[str, Any] = {"base": 1.0, "warmup": min(warmup, total - 1), "total": total}
    schedule: Callable[..., float] = getattr(schedules, config.lr_schedule)
    if config.lr_schedule == "multistep":
        arguments |= {"milestones": [round(e * steps_per_epoch) for e in config.lr_epochs], "gamma": config.lr_gamma}
    return lambda step: schedule(step, **arguments)


def set_learning_rate(optimizer: Any, lr: float) -> None:
    """Sets the rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = lr
