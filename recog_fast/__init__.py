"""recog_fast: fused margin-softmax kernels for training recognition over very many classes.

    head = recog_fast.MarginHead(num_classes, embedding_dim, margin=recog_fast.ArcFace(0.5))
    optimizer = recog_fast.HeadSGD(head, lr=0.1)
    head(backbone(images), labels).backward(); optimizer.step()

No N x C tensor is made. `recog_fast.backends()` says which kernels run.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import _version, ops
from ._backends import backends
from .heads import MarginHead
from .losses import margin_softmax_loss, unknown_rejection_loss
from .margins import (
    AdaFace,
    ArcFace,
    CircleMargin,
    CombinedMargin,
    CosFace,
    CurricularFace,
    InterclassFilter,
    MagFace,
    MVSoftmax,
    Softmax,
    SphereFace,
)
from .memory import VPL, MomentumEncoder, PrototypeMemory, QAFace
from .ops import effective_prototypes, negative_logsumexp
from .optim import HeadSGD
from .reference import center_sparsity
from .rules import NegativeRule, RowStats

__version__ = _version.__version__

# Loaded when first used: `import recog_fast` costs torch and numpy only.
_LAZY = {
    "compat": ".compat",
    "data": ".data",
    "evaluation": ".evaluation",
    "models": ".models",
    "recognizability": ".recognizability",
    "training": ".training",
    "triton_kernels": ".triton_kernels",
    "save_checkpoint": ".checkpoint",
    "load_checkpoint": ".checkpoint",
}

if TYPE_CHECKING:
    from . import compat, data, evaluation, models, recognizability, training
    from .checkpoint import load_checkpoint, save_checkpoint


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'recog_fast' has no attribute {name!r}")
    module = importlib.import_module(_LAZY[name], __name__)
    return getattr(module, name) if hasattr(module, name) else module


__all__ = [
    "VPL",
    "AdaFace",
    "ArcFace",
    "CircleMargin",
    "CombinedMargin",
    "CosFace",
    "CurricularFace",
    "HeadSGD",
    "InterclassFilter",
    "MVSoftmax",
    "MagFace",
    "MarginHead",
    "MomentumEncoder",
    "NegativeRule",
    "PrototypeMemory",
    "QAFace",
    "RowStats",
    "Softmax",
    "SphereFace",
    "backends",
    "center_sparsity",
    "compat",
    "data",
    "effective_prototypes",
    "evaluation",
    "load_checkpoint",
    "margin_softmax_loss",
    "models",
    "negative_logsumexp",
    "ops",
    "recognizability",
    "save_checkpoint",
    "training",
    "unknown_rejection_loss",
]
