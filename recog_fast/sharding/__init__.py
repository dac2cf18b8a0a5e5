"""Classes spread over ranks: `MarginHead(group=...)` keeps torch.chunk's range of them and works on the global batch."""

from .group import ShardGroup, class_range, join_group
from .queries import ClassQueries
from .rows import GlobalBatch, gather_batch, initial_rows
from .softmax import Shard, sharded_margin_softmax

__all__ = [
    "ClassQueries",
    "GlobalBatch",
    "Shard",
    "ShardGroup",
    "class_range",
    "gather_batch",
    "initial_rows",
    "join_group",
    "sharded_margin_softmax",
]
