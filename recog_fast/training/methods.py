"""Methods of the papers as names for settings: `method: qaface+uir` fills in what those papers need.

| method | fills in | paper |
|---|---|---|
| margin | nothing: a margin softmax, and whatever the other settings say | |
| vpl | memory {name: VPL} | Variational Prototype Learning |
| qaface | memory {name: QAFace}, memory_momentum 0.99 | Quality Aware Sample-to-Sample Comparison |
| uir | unknown_weight 0.1, unlabelled_share 0.25 | Unknown Identity Rejection |
| ri | recognizability {regression 5, diversion 2, attention 1} | Recognizability Embedding Enhancement |

Joined by "+" they combine; vpl and qaface exclude each other (a class has one memory entry). Only null settings are filled
in, so `method: uir` with `unknown_weight: 0` is the paper's baseline with the same batches.
"""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

from recog_fast.training.config import RecognizabilityConfig, TrainConfig

METHODS = ("margin", "vpl", "qaface", "uir", "ri")
_POLICY = {"vpl": "VPL", "qaface": "QAFace"}


def method_names(config: TrainConfig) -> tuple[str, ...]:
    """The methods named by `config.method`, in its order. Raises ValueError for an unknown or impossible combination."""
    names = tuple(part.strip() for part in config.method.split("+"))
    for name in names:
        if name not in METHODS:
            near = difflib.get_close_matches(name, METHODS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"train: expected method of {', '.join(METHODS)} (several joined by +), got {name!r}{hint}"
            )
    if len(set(names)) < len(names) or {"vpl", "qaface"} <= set(names):
        raise ValueError(f"train: expected each method once, and vpl or qaface, got {config.method!r}")
    return names


def apply_method(config: TrainConfig) -> TrainConfig:
    """The settings with the nulls its methods decide filled in; applying it again changes nothing.

    Raises ValueError for an unknown method and for a memory of another policy than the method's.
    """
    names = method_names(config)
    filled: dict[str, Any] = {}
    for name in ("vpl", "qaface"):
        if name not in names:
            continue
        if config.memory is None:
            filled["memory"] = {"name": _POLICY[name]}
        else:
            memory = {"name": _POLICY[name], **config.memory}
            if memory["name"] != _POLICY[name]:
                raise ValueError(
                    f"train: expected memory.name {_POLICY[name]!r} with method {config.method!r}, got {memory['name']!r}"
                )
            filled["memory"] = memory
    if "qaface" in names and config.memory_momentum is None:
        filled["memory_momentum"] = 0.99
    if "uir" in names:
        if config.unknown_weight is None:
            filled["unknown_weight"] = 0.1
        if config.unlabelled_share is None:
            filled["unlabelled_share"] = 0.25
    if "ri" in names and config.recognizability is None:
        filled["recognizability"] = RecognizabilityConfig()
    return dataclasses.replace(config, **filled)
