"""Checkpoints: folders written by torch.distributed.checkpoint, atomic, verified on reading, never unpickling foreign objects.

A checkpoint folder holds the tensors (`*.distcp`, `.metadata`: torch.distributed.checkpoint), `state.json` (everything that is
no tensor, and where each tensor belongs) and `manifest.json` (size and CRC-32 of every other file). A sharded head's ranks write
their own classes into one folder; it loads on any number of ranks, and one process's does too.
"""

from .editing import add_classes, merge_classes
from .errors import CheckpointError
from .files import checkpoint_path, latest_checkpoint, prune_checkpoints
from .loading import load_checkpoint, read_checkpoint
from .saving import save_checkpoint, save_checkpoint_async

__all__ = [
    "CheckpointError",
    "add_classes",
    "checkpoint_path",
    "latest_checkpoint",
    "load_checkpoint",
    "merge_classes",
    "prune_checkpoints",
    "read_checkpoint",
    "save_checkpoint",
    "save_checkpoint_async",
]
