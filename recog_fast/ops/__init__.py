"""The operations: schema, reference, compiled kernel, fake and autograd of each; `torch.ops.recog_fast.<stem>`."""

from . import _cuda as _cuda  # registers the CUDA kernels of the others
from . import class_gradient, class_step, margin_softmax, memory_write, unknown_rejection
from ._library import SCHEMAS, use_backend
from .effective_prototypes import effective_prototypes
from .negative_logsumexp import negative_logsumexp

__all__ = [
    "SCHEMAS",
    "class_gradient",
    "class_step",
    "effective_prototypes",
    "margin_softmax",
    "memory_write",
    "negative_logsumexp",
    "unknown_rejection",
    "use_backend",
]
