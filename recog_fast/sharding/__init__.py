"""Classes spread over ranks: `MarginHead(group=...)` keeps torch.chunk's range of them and works on the global batch."""

from .backbone import gradient_scaler, gradients_travel, is_spread, load_module, load_optimizer, spread_backbone, whole
from .batch_norm import synchronise_batch_norm
from .group import ShardGroup, class_range, join_group
from .queries import ClassQueries
from .rows import GlobalBatch, gather_batch, initial_rows
from .softmax import Shard, sharded_margin_softmax
from .world import RanksError, World, environment, joined, one_process

__all__ = [
    "ClassQueries",
    "GlobalBatch",
    "RanksError",
    "Shard",
    "ShardGroup",
    "World",
    "class_range",
    "environment",
    "gather_batch",
    "gradient_scaler",
    "gradients_travel",
    "initial_rows",
    "is_spread",
    "join_group",
    "joined",
    "load_module",
    "load_optimizer",
    "one_process",
    "sharded_margin_softmax",
    "spread_backbone",
    "synchronise_batch_norm",
    "whole",
]
