"""Trains a head of millions of classes a few steps and compares its peak memory with `recog-fast estimate`: Linux, one process.

    python tools/large_head.py --classes 4e6 --batch 8 --steps 3 --output benchmarks/results

Random unit embeddings and labels stand for a backbone. W is drawn in place and the velocity made at the first step, so nothing of
C x D is ever there twice. Peak = VmHWM of the whole process (interpreter and torch included). Exit code 1
where peak and estimate differ by more than `--tolerance`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

import recog_fast as rf
from recog_fast import estimate as model
from recog_fast.commands import host

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks/ is no part of the installed package
from benchmarks import machine


def status(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def count(text: str) -> int:
    """A whole number, also written 4e6."""
    return int(float(text))


def main(arguments: list[str] | None = None) -> int:
    """Measures, prints and stores; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=count, default=4_000_000)
    parser.add_argument("--dim", type=count, default=512)
    parser.add_argument("--batch", type=count, default=8)
    parser.add_argument("--steps", type=count, default=3)
    parser.add_argument("--split", action="store_true", help='weight_format="split"')
    parser.add_argument("--bf16-momentum", action="store_true", help="momentum_dtype=torch.bfloat16")
    parser.add_argument("--tolerance", type=float, default=0.05, help="of peak against estimate (0.05)")
    parser.add_argument("--output", type=Path, help="folder for <device>/large_head.json (default: print only)")
    options = parser.parse_args(arguments)
    needed, there = estimated(options), host.memory()["available"]
    if needed * 1.05 > there:
        print(f"large_head: {needed / 1e9:.1f} GB are needed, {there / 1e9:.1f} GB are there", file=sys.stderr)
        return 2
    result = measure(options)
    result["estimate"], result["ratio"] = needed, result["peak"] / needed
    print(json.dumps(result, indent=1))
    if options.output is not None:
        store(options.output / machine.slug(), result)
    return int(abs(result["ratio"] - 1) > options.tolerance)


def estimated(options: argparse.Namespace) -> int:
    """Bytes that the cost model says of a process on a CPU."""
    cpu = model.Device("cpu", host.memory()["total"], 1.0, 1.0, 1.0, None, None, host=True)
    return model.estimate(
        options.classes, 1, options.batch, dimension=options.dim, device=cpu, half=False, weight_format="split" if options.split else "float32",
        momentum_dtype="bfloat16" if options.bf16_momentum else "float32",
    ).bytes  # fmt: skip


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Steps of HeadSGD: seconds and loss of each, the high-water mark."""
    classes, d, n = options.classes, options.dim, options.batch
    torch.manual_seed(0)
    began = time.perf_counter()
    head = rf.MarginHead(classes, d, weight_format="split" if options.split else "float32")
    optimizer = rf.HeadSGD(head, lr=0.1, momentum_dtype=torch.bfloat16 if options.bf16_momentum else torch.float32)
    made, seconds, losses = time.perf_counter() - began, [], []
    x = torch.randn(n, d, requires_grad=True)
    labels = torch.linspace(0, classes - 1, n).long()
    for _ in range(options.steps):
        began = time.perf_counter()
        loss = head(x, labels)
        loss.backward()
        optimizer.step()
        seconds.append(time.perf_counter() - began)
        losses.append(float(loss.detach()))
    return {
        "classes": classes, "dimension": d, "batch": n, "weight_format": head.weight_format, "momentum": str(optimizer.momentum_dtype).split(".")[1],
        "peak": status("VmHWM"), "made_in": made, "step": seconds, "loss": losses,
        "environment": machine.describe() | {"device": f"{host.cpu_name()}, {torch.get_num_threads()} threads"}, "host_memory": host.memory()["total"],
    }  # fmt: skip


def store(folder: Path, result: dict[str, Any]) -> None:
    """Into large_head.json, in place of an entry of the same sizes and formats."""
    path = folder / "large_head.json"
    entries = json.loads(path.read_text()) if path.is_file() else []
    keys = ("classes", "dimension", "batch", "weight_format", "momentum")
    others = [e for e in entries if any(e[k] != result[k] for k in keys)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([*others, result], indent=1) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
