"""How fast the ranks of a process group talk: latency and bytes per second of the collectives that training makes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from .group import _gather, _reduce_scatter

KINDS = ("all-reduce", "all-gather", "reduce-scatter")


@dataclass(frozen=True)
class Timing:
    """Of one collective: bytes a rank hands over, seconds of the slowest rank (median of the repeats)."""

    kind: str
    bytes: int
    seconds: float


@contextmanager
def torchrun_group() -> Iterator[dist.ProcessGroup]:
    """The default process group; where there is none, one from torchrun's environment (NCCL with CUDA, else gloo) for as long as needed."""
    own = not dist.is_initialized()
    if own:
        cuda = torch.cuda.is_available() and dist.is_nccl_available()
        if cuda:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("nccl" if cuda else "gloo")
    world = dist.group.WORLD
    assert world is not None
    try:
        yield world
    finally:
        if own:
            dist.destroy_process_group()


def probe(group: dist.ProcessGroup, sizes: tuple[int, ...], repeats: int = 10) -> list[Timing]:
    """Times of every kind in KINDS for messages of about `sizes` bytes (float32, a multiple of the ranks); every rank calls it.

    On CUDA the device is waited for after each. Raises ValueError for sizes or repeats below 1.
    """
    if repeats < 1 or min(sizes, default=0) < 1:
        raise ValueError(f"probe: expected sizes and repeats >= 1, got {sizes} and {repeats}")
    ranks = dist.get_world_size(group)
    device = torch.device("cuda", torch.cuda.current_device()) if "nccl" in str(dist.get_backend(group)) else torch.device("cpu")
    out = []
    for size in sizes:
        elements = max(1, size // (4 * ranks)) * ranks
        whole, part = torch.zeros(elements, device=device), torch.zeros(elements // ranks, device=device)
        gathered = torch.zeros(elements * ranks, device=device)
        for kind, handed, call in (
            ("all-reduce", whole, lambda x=whole: dist.all_reduce(x, group=group)),
            ("all-gather", whole, lambda x=whole, y=gathered: _gather(y, x, group)),
            ("reduce-scatter", whole, lambda x=whole, y=part: _reduce_scatter(y, x, group)),
        ):
            out.append(Timing(kind, handed.numel() * 4, _slowest(call, group, device, repeats)))
    return out


def _slowest(call: Callable[[], object], group: dist.ProcessGroup, device: torch.device, repeats: int) -> float:
    """Median over the repeats of the slowest rank's seconds."""
    seconds = torch.zeros(repeats, dtype=torch.float64, device=device)
    call()
    for i in range(repeats):
        dist.barrier(group=group)
        _wait(device)
        began = time.perf_counter()
        call()
        _wait(device)
        seconds[i] = time.perf_counter() - began
    dist.all_reduce(seconds, dist.ReduceOp.MAX, group=group)
    return float(seconds.median())


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
