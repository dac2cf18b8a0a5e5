"""Two threads against one in wall time, on a machine left alone and on one that is busy."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch

from .contenders import Arena, Contender
from .problems import Problem
from .protocol import STEPS, Times, paired_ratio, run_once, spread


@contextlib.contextmanager
def busy(processes: int) -> Iterator[None]:
    """`processes` other processes that do nothing but count, inside the block."""
    # they end with their parent, should it be killed
    code = f"import os\nwhile os.getppid() == {os.getpid()}: pass"
    running = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def thread_scaling(kind: type[Contender], problem: Problem, rounds: int, load: str) -> dict[str, Any]:
    """Wall time of the full step on one and on two threads, alternated in random order. load: "quiet" or "busy" (one
    counting process per core). `one_thread_cpu_over_wall` tells how much of a core one thread got."""
    contender = kind(Arena(problem))
    times = {1: Times(), 2: Times()}
    before, shuffler, order = torch.get_num_threads(), random.Random(2), [1, 2]
    others = busy(os.cpu_count() or 1) if load == "busy" else contextlib.nullcontext()
    try:
        run_once(contender)
        with others:
            for _ in range(rounds):
                shuffler.shuffle(order)
                for count in order:
                    torch.set_num_threads(count)
                    run_once(contender, times[count])
    finally:
        torch.set_num_threads(before)
    one, two = (times[count].wall[STEPS[-1]] for count in (1, 2))
    rows, classes, _ = problem.shape
    return {
        "name": kind.name,
        "load": load,
        "N": rows,
        "C": classes,
        "one_wall_s": asdict(spread(one)),
        "two_wall_s": asdict(spread(two)),
        "same_loss": len({*times[1].losses, *times[2].losses}) == 1,
        "ratio": asdict(paired_ratio(one, two)),
        "one_thread_cpu_over_wall": spread([min(c / w, 1.0) for c, w in zip(times[1].cpu[STEPS[-1]], one, strict=True)]).median,
    }
