"""What ranks run in test_shards_warnings.py and test_shards_exit.py."""

from __future__ import annotations

import gc
import sys
import warnings
from typing import Any

import torch

import recog_fast as rf
from recog_fast.sharding.group import free_groups


def evicting_steps(group: Any) -> list[int]:
    """How many warnings about evictions each step of a rank with a memory of three rows gives."""
    rank = torch.distributed.get_rank(group)
    head = rf.MarginHead(40, 8, group=group, memory=rf.PrototypeMemory(40, 8, rf.VPL(), capacity=3))
    optimizer = rf.HeadSGD(head, lr=0.1)
    found = []
    for step in range(3):
        x = torch.randn(6, 8, requires_grad=True)
        loss = head(x, (torch.arange(6) + 6 * rank + 10 * step) % 40, keys=x.detach())
        loss.backward()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            optimizer.step()
        found.append(sum("evicts" in str(one.message) for one in said))
    return found


def references_at_exit(group: Any) -> list[int]:
    """References to a process group: before a head, with head and HeadSGD, after both are dropped, and after what Python does at the end."""
    free_groups()  # what earlier tests of this process left
    counts = [sys.getrefcount(group)]
    gc.disable()
    head = rf.MarginHead(40, 8, group=group)
    optimizer = rf.HeadSGD(head, lr=0.1)
    counts.append(sys.getrefcount(group))
    del head, optimizer
    counts.append(sys.getrefcount(group))
    free_groups()
    counts.append(sys.getrefcount(group))
    gc.enable()
    return counts
