"""Sampled classes (Partial FC, math.md 1.3): which classes an optimizer step's negatives come from."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_WORD = 2**64
_ID_BITS = 31


def class_priorities(num_classes: int, seed: int, step: int, shard: int = 0) -> Tensor:
    """One distinct random number >= 0 per class, (C,) int64: a function of (seed, step, shard) and the class alone.

    32 random bits of class j over its 31-bit id, so that no two are equal. The bits are the j-th half word of the Philox
    counter generator with key (seed, shard), started at counter (0, 0, 0, step): the same on every machine, and nothing
    is drawn from torch's or NumPy's global generators. C < 2^31.
    """
    key = np.array([seed % _WORD, shard % _WORD], dtype=np.uint64)
    counter = np.array([0, 0, 0, step % _WORD], dtype=np.uint64)
    words = np.random.Philox(key=key, counter=counter).random_raw((num_classes + 1) // 2)
    keys = words.astype("<u8", copy=False).view("<u4")[:num_classes].astype(np.int64)
    keys <<= _ID_BITS
    keys |= np.arange(num_classes)
    return torch.from_numpy(keys)


def sample_classes(labels: Tensor, num_classes: int, count: int, seed: int, step: int, shard: int = 0) -> Tensor:
    """Sorted ids (M,) int64 of the sampled classes: the classes of `labels` first, random others until there are `count`.

    labels (N,) int, negative ones ignored. More positives than `count`: all of them. What `reference.sample_classes` picks
    by `class_priorities`, in O(C); depends on its arguments alone, not on what was drawn before.
    """
    positive: Tensor = labels[labels >= 0].cpu().long().unique()
    if positive.numel() >= count:
        return positive.to(labels.device)
    ids, missing = positive.numpy(), count - positive.numel()
    keys = class_priorities(num_classes, seed, step, shard).numpy()
    keys[ids] = np.iinfo(np.int64).max  # last: they are in already
    keys.partition(missing - 1)
    chosen = np.zeros(num_classes, dtype=bool)
    chosen[ids] = chosen[keys[:missing] & (2**_ID_BITS - 1)] = True
    return torch.from_numpy(np.flatnonzero(chosen)).to(labels.device)
