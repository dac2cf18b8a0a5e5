"""A head's full step in several processes against one: `python -m benchmarks.processes [--processes 2] [--classes 100000] [--store]`.

Each process has one thread, its share of the rows and its classes (gloo); the one process has all rows, all classes and one thread, and
runs while the others wait. Rounds alternate in random order. Wall time: the point of more processes is to be faster. The gate: losses of
every round and W at the end as the one process's.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

import recog_fast as rf

from . import machine
from .problems import SCALE, make_problem
from .protocol import paired_ratio, spread

KINDS: dict[str, torch.dtype | None] = {"float32": torch.float32, "bf16": torch.bfloat16}
WITHIN = {"float32": 1e-5, "bf16": 2e-3}  # relative, of W and of the losses
FILE = "processes.json"


def _head(classes: int, dimension: int, weight: Tensor, dtype: torch.dtype | None, group: Any) -> tuple[rf.MarginHead, rf.HeadSGD]:
    head = rf.MarginHead(classes, dimension, margin=rf.ArcFace(0.5), scale=SCALE, compute_dtype=dtype, group=group, ddp_average=False)
    first = head.first_class
    with torch.no_grad():
        head.weight.copy_(weight[first : first + head.weight.shape[0]])
    return head, rf.HeadSGD(head, lr=0.1, momentum=0.9, weight_decay=5e-4)


def _step(head: rf.MarginHead, optimizer: rf.HeadSGD, embeddings: Tensor, labels: Tensor) -> float:
    optimizer.zero_grad()
    loss = head(embeddings.clone().requires_grad_(), labels)
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def _serve(rank: int, size: int, store: str, shape: tuple[int, int, int], kind: str, rounds: int, answer: str) -> None:
    torch.set_num_threads(1)
    problem = make_problem("R0", *shape)
    x, labels, classes, dimension = problem.embeddings, problem.labels, shape[1], shape[2]
    one = _head(classes, dimension, problem.weight, KINDS[kind], None) if rank == 0 else None  # before the group: it would refuse
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    shared = _head(classes, dimension, problem.weight, KINDS[kind], dist.group.WORLD)
    own = slice(len(x) * rank // size, len(x) * (rank + 1) // size)
    seconds: dict[str, list[float]] = {"one": [], "several": []}
    losses: dict[str, list[float]] = {"one": [], "several": []}
    order = random.Random(1)
    for _ in range(rounds + 1):  # the first warms up
        for which in order.sample(["one", "several"], 2):
            dist.barrier()
            began = time.perf_counter()
            if which == "several":
                losses[which].append(_step(*shared, x[own], labels[own]))
            elif one is not None:
                losses[which].append(_step(*one, x, labels))
            if which == "several":
                dist.barrier()  # a step is over when the slowest has done its classes
            seconds[which].append(time.perf_counter() - began)
    shards: list[Any] = [None] * size
    dist.gather_object(shared[0].weight.detach(), shards if rank == 0 else None)
    if one is not None:
        full = torch.cat(shards)
        Path(answer).write_text(json.dumps({"seconds": {k: v[1:] for k, v in seconds.items()}, **_errors(losses, one[0].weight, full)}))
    dist.destroy_process_group()


def _errors(losses: dict[str, list[float]], weight: Tensor, full: Tensor) -> dict[str, float]:
    worst = max(abs(a - b) / abs(a) for a, b in zip(losses["one"], losses["several"], strict=True))
    moved = (weight.detach() - full).double().norm() / weight.detach().double().norm()
    return {"loss_error": worst, "weight_error": float(moved)}


def measured(processes: int, shape: tuple[int, int, int], kind: str, rounds: int) -> dict[str, Any]:
    """Wall times of the full step and the paired ratio, with the gate; RuntimeError where that fails.

    shape: (N, C, D).
    """
    with tempfile.TemporaryDirectory() as folder:
        answer = str(Path(folder) / "answer.json")
        mp.spawn(_serve, (processes, str(Path(folder) / "store"), shape, kind, rounds, answer), nprocs=processes)  # type: ignore[no-untyped-call]
        found = json.loads(Path(answer).read_text())
    worst = max(found["loss_error"], found["weight_error"])
    if worst > WITHIN[kind]:
        raise RuntimeError(f"benchmarks.processes: expected losses and W within {WITHIN[kind]:g} of one process's, got {worst:.1e}")
    one, several = found["seconds"]["one"], found["seconds"]["several"]
    return {
        "kind": kind, "processes": processes, "shape": list(shape), "rounds": rounds, "loss_error": found["loss_error"],
        "weight_error": found["weight_error"], "one_wall_s": asdict(spread(one)), "several_wall_s": asdict(spread(several)),
        "ratio": asdict(paired_ratio(one, several)),
    }  # fmt: skip


def line(row: dict[str, Any]) -> str:
    """One measurement in words."""
    ratio, (rows, classes, dimension) = row["ratio"], row["shape"]
    return (
        f"{row['kind']}, {rows} x {classes:,} x {dimension}: one process {1e3 * row['one_wall_s']['median']:.0f} ms, {row['processes']} processes "
        f"{1e3 * row['several_wall_s']['median']:.0f} ms: {ratio['median']:.2f}x ({ratio['p10']:.2f} to {ratio['p90']:.2f}), "
        f"loss within {row['loss_error']:.0e}, W within {row['weight_error']:.0e}"
    )


def main(arguments: list[str]) -> int:
    """Measures, prints and with --store keeps results/<device>/processes.json."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.processes")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--classes", type=int, default=100_000)
    parser.add_argument("--dimension", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--store", action="store_true")
    options = parser.parse_args(arguments)
    machine.commit()
    shape = (options.rows, options.classes, options.dimension)
    rows = []
    for kind in KINDS:
        rows.append(measured(options.processes, shape, kind, options.rounds))
        print(line(rows[-1]), flush=True)
    if options.store:
        path = machine.RESULTS / machine.slug() / FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"environment": machine.describe(), "rows": rows}, indent=1) + "\n")
        print(path.relative_to(machine.ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
