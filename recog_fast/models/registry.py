"""One name per backbone, for configuration files and the command line."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial

from .backbone import Backbone
from .iresnet import IResNet
from .mobilefacenet import MobileFaceNet
from .mobilenet import MobileNetV1, MobileNetV2
from .tiny import TinyNet

_FACTORIES: dict[str, Callable[..., Backbone]] = {
    "iresnet18": partial(IResNet, 18),
    "iresnet34": partial(IResNet, 34),
    "iresnet50": partial(IResNet, 50),
    "iresnet100": partial(IResNet, 100),
    "iresnet200": partial(IResNet, 200),
    "mobilefacenet": MobileFaceNet,
    "mobilenet_v1": MobileNetV1,
    "mobilenet_v2": MobileNetV2,
    "tiny": TinyNet,
}


def model_names() -> tuple[str, ...]:
    """The names `build_model` knows."""
    return tuple(_FACTORIES)


def build_model(
    name: str, *, embedding_dim: int = 512, input_size: int | tuple[int, int] = 112, **options: object
) -> Backbone:
    """A freshly initialised backbone in training mode.

    name: one of `model_names()`. embedding_dim: D. input_size: side in pixels, or (height, width); the head is sized for it.
    options: the model's own keywords, such as dropout, widths, blocks, scale, preprocessing.

    Raises ValueError for an unknown name or option (listing those that exist), or a value the model refuses.
    """
    factory = _FACTORIES.get(name)
    if factory is None:
        raise ValueError(f"build_model: expected name in {list(_FACTORIES)}, got {name!r}")
    known = set(inspect.signature(factory).parameters) - {"depth", "embedding_dim", "input_size"}
    unknown = sorted(set(options) - known)
    if unknown:
        raise ValueError(f"build_model: expected options of {name} in {sorted(known)}, got {unknown}")
    return factory(embedding_dim=embedding_dim, input_size=input_size, **options)
