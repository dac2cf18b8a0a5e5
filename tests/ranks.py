"""Processes that are ranks: started once per test run, they run functions in groups of 2, 3 and 4 (gloo)."""

from __future__ import annotations

import contextlib
import tempfile
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # torch.optim imports it at the first step: once here, before the ranks fork
import torch.distributed as dist
import torch.distributed.tensor
import torch.multiprocessing as mp

MOST = 4
SECONDS = 60  # of one function; a rank that waits longer for another fails


class RankError(RuntimeError):
    """A function failed on some rank; the message holds every rank's traceback."""


class Ranks:
    """`run(world, function, *arguments)`: function(group, *arguments) on ranks 0 .. world - 1; their results in rank order."""

    def __init__(self, most: int = MOST) -> None:
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(["ranks", "sharded_ranks", "training_ranks"])  # torch is imported once
        self._folder = tempfile.TemporaryDirectory()
        pipes = [context.Pipe() for _ in range(most)]
        self._pipes = [ours for ours, _ in pipes]
        store = str(Path(self._folder.name) / "store")
        self._processes = [context.Process(target=_serve, args=(r, most, store, pipes[r][1]), daemon=True) for r in range(most)]
        self._asked = 0
        for process in self._processes:
            process.start()
        for rank, pipe in enumerate(self._pipes):
            assert pipe.poll(600), f"rank {rank} does not start"
            pipe.recv()

    def run(self, world: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        self._asked += 1
        for pipe in self._pipes[:world]:
            pipe.send((self._asked, world, function, arguments))
        results, failures = [], []
        for rank, pipe in enumerate(self._pipes[:world]):
            question = 0
            while question != self._asked:  # what was asked before a timeout is answered late
                if not pipe.poll(2 * SECONDS):
                    raise RankError(f"rank {rank} of {world} does not answer")
                question, result, failure = pipe.recv()
            results.append(result)
            failures += [f"rank {rank}: {failure}"] if failure else []
        if failures:
            raise RankError("\n".join(failures))
        return results

    def close(self) -> None:
        for pipe in self._pipes:
            with contextlib.suppress(OSError):
                pipe.send(None)
        for process in self._processes:
            process.join(10)
            if process.is_alive():
                process.kill()
        self._folder.cleanup()


def _serve(rank: int, most: int, store: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=most, timeout=timedelta(seconds=SECONDS))
    groups = {world: dist.group.WORLD if world == most else dist.new_group(list(range(world))) for world in range(1, most + 1)}
    pipe.send(rank)
    while (task := pipe.recv()) is not None:
        question, world, function, arguments = task
        try:
            pipe.send((question, function(groups[world], *arguments), None))
        except Exception:
            pipe.send((question, None, traceback.format_exc()))
    dist.destroy_process_group()


_started: list[Ranks] = []


def ranks() -> Iterator[Ranks]:
    """The one set of processes; a module uses it as `pytest.fixture(scope="module")(ranks)`."""
    if not _started:
        _started.append(Ranks())
    yield _started[0]
