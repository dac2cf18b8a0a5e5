"""A long soak: training steps of every margin, memory and method in turn, watching what the process holds.

    python tools/soak.py --minutes 60 --output benchmarks/results/soak.json    # exit code 1 where memory grew
    python tools/soak.py --minutes 0.2 --parts heads --steps 1                    # what tests/test_soak.py runs

A cycle runs every leg of the parts asked for. A leg of `heads` lives as long as the soak and takes some steps a cycle, and a
second one of its kind is built, stepped, saved, loaded and dropped: the first finds what grows by steps, the second what is never
freed. `training` runs the training script itself, one method a cycle, on drawn people. After every cycle the resident memory
(RSS), the live tensors, open files and threads are noted. The verdict: median RSS of the last quarter of the cycles against
that of the second quarter, and the tensors, files and threads of the last cycles against the most of the second quarter's.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import io
import itertools
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import recog_fast as rf

N, C, D = 48, 1500, 64  # rows, classes, dimensions of the heads' legs
METHODS = ("margin", "vpl", "qaface", "uir", "ri", "qaface+uir+ri")
PARTS = ("heads", "training")

Step = Callable[[], None]


@dataclass
class Watch:
    """What the process held after each cycle."""

    seconds: list[float]
    rss: list[float]  # MB
    tensors: list[int]
    files: list[int]
    threads: list[int]

    def note(self, seconds: float) -> None:
        gc.collect()
        self.seconds.append(round(seconds, 2))
        self.rss.append(round(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6, 2))
        self.tensors.append(sum(issubclass(type(o), Tensor) for o in gc.get_objects()))
        self.files.append(len(os.listdir("/proc/self/fd")))
        self.threads.append(len(os.listdir("/proc/self/task")))

    def verdict(self, limit: float) -> dict[str, Any]:
        """Growth after the first quarter, and what of it is too much; the slope of RSS is of the same part."""
        count = len(self.rss)
        if count < 8:
            raise ValueError(f"soak: expected at least 8 cycles, got {count}: give it more minutes")
        early, late = slice(count // 4, count // 2), slice(count - count // 4, count)
        growth = float(np.median(self.rss[late]) - np.median(self.rss[early]))
        hours = np.array(self.seconds[count // 4 :]) / 3600
        slope = float(np.polyfit(hours, self.rss[count // 4 :], 1)[0])
        wrong = [f"RSS grew by {growth:.1f} MB (at most {limit:g})"] if growth > limit else []
        for name, values in (("tensors", self.tensors), ("files", self.files), ("threads", self.threads)):
            if min(values[late]) > max(values[early]):
                wrong.append(f"{name} went from at most {max(values[early])} to at least {min(values[late])}")
        return {
            "cycles": count, "minutes": round(self.seconds[-1] / 60, 2), "rss_mb_first": self.rss[0], "rss_mb_last": self.rss[-1],
            "rss_mb_most": max(self.rss), "growth_mb": round(growth, 2), "slope_mb_per_hour": round(slope, 2), "limit_mb": limit,
            "tensors": [self.tensors[count // 4], self.tensors[-1]], "files": [self.files[count // 4], self.files[-1]],
            "threads": [self.threads[count // 4], self.threads[-1]], "wrong": wrong,
        }  # fmt: skip


def margins() -> dict[str, Any]:
    """One of every margin."""
    return {
        "softmax": rf.Softmax(), "sphereface": rf.SphereFace(), "cosface": rf.CosFace(), "arcface": rf.ArcFace(), "combined": rf.CombinedMargin(1, 0.3, 0.2),
        "straight": rf.ArcFace(gradient="straight_through"), "magface": rf.MagFace(), "adaface": rf.AdaFace(), "curricular": rf.CurricularFace(),
        "mv-arc": rf.MVSoftmax("arc"), "mv-am": rf.MVSoftmax("am"), "circle": rf.CircleMargin(), "filter": rf.InterclassFilter(rf.ArcFace(), 0.1),
    }  # fmt: skip


def with_margin(margin: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {"margin": margin}


def memory(policy: Any, **options: Any) -> dict[str, Any]:
    return {"memory": rf.PrototypeMemory(C, D, policy, **options), "momentum_encoder": True}


def variants() -> dict[str, Callable[[], dict[str, Any]]]:
    """Name -> arguments of a head, and of what is around it."""
    return {
        **{name: with_margin(margin) for name, margin in margins().items()},
        "sgd": lambda: {"sgd": True},
        "subcenters": lambda: {"subcenters": 3},
        "sampled": lambda: {"sample_rate": 0.1},
        "sampled-sparse": lambda: {"sample_rate": 0.1, "unsampled": "sparse"},
        "sampled-sgd": lambda: {"sample_rate": 0.1, "sgd": True},
        "vpl": lambda: memory(rf.VPL(start=0)),
        "qaface": lambda: memory(rf.QAFace(start=0), capacity=200),
        "uir": lambda: {"unknown_weight": 0.1, "unlabelled": True},
        "bfloat16": lambda: {"compute_dtype": torch.bfloat16},
        "kept": lambda: {"keep_exponentials": True},
        "dropped": lambda: {"drop_elements": 2**-16},
        "split": lambda: {"weight_format": "split", "momentum_dtype": torch.bfloat16},
    }


class Leg:
    """A backbone, a head and their optimizers."""

    def __init__(self, options: dict[str, Any], seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        around = {name: options.pop(name, None) for name in ("sgd", "unsampled", "momentum_dtype", "momentum_encoder", "unlabelled")}
        self.unlabelled = bool(around["unlabelled"])
        self.backbone = nn.Linear(32, D)
        self.head = rf.MarginHead(C, D, **options)
        self.encoder = rf.MomentumEncoder(self.backbone) if around["momentum_encoder"] else None
        fused = {name: around[name] for name in ("unsampled", "momentum_dtype") if around[name] is not None}
        self.optimizers: list[torch.optim.Optimizer] = [torch.optim.SGD(self.backbone.parameters(), lr=0.01)]
        if around["sgd"]:
            self.optimizers.append(torch.optim.SGD(self.head.parameters(), lr=0.1, momentum=0.9))
        else:
            self.optimizers.append(rf.HeadSGD(self.head, lr=0.1, **fused))

    def step(self) -> None:
        images = torch.randn(N, 32, generator=self.generator)
        labels = torch.randint(-1 if self.unlabelled else 0, C, (N,), generator=self.generator)
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        keys = None
        if self.encoder is not None:
            self.encoder.update(self.backbone)
            keys = self.encoder(images)
        loss, _ = self.head(self.backbone(images), labels, keys=keys, return_stats=True)
        if not bool(torch.isfinite(loss)):
            raise ArithmeticError("soak: a loss is not finite")
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()

    def questions(self) -> None:
        """What a head is asked beside training, and an evaluation of its embeddings."""
        with torch.no_grad():
            embeddings = self.backbone(torch.randn(N, 32, generator=self.generator))
            self.head.topk(embeddings, 5)
            self.head.logits(embeddings[:4])
        scores = torch.nn.functional.cosine_similarity(embeddings[0::2], embeddings[1::2]).double().numpy()
        rf.evaluation.tar_at_far(scores, np.arange(len(scores)) % 2 == 0, [0.1])

    def save_and_load(self, folder: str) -> None:
        path = Path(folder) / "checkpoint"
        fused = self.optimizers[1] if isinstance(self.optimizers[1], rf.HeadSGD) else None
        rf.save_checkpoint(path, head=self.head, optimizer=fused, step=1)
        rf.load_checkpoint(path, head=self.head, optimizer=fused)
        self.head.load_state_dict(self.head.state_dict())


def heads(steps: int) -> Iterator[Step]:
    """Endless: one cycle over all variants each time it is asked."""
    kinds = variants()
    living = {name: Leg(make(), seed) for seed, (name, make) in enumerate(kinds.items())}
    saved = itertools.cycle(kinds)

    def cycle() -> None:
        chosen = next(saved)  # a checkpoint writes many files: of one variant a cycle
        for name, make in kinds.items():
            for _ in range(steps):
                living[name].step()
            fresh = Leg(make(), 0)
            fresh.step()
            fresh.questions()
            if name == chosen:
                with tempfile.TemporaryDirectory() as folder:
                    fresh.save_and_load(folder)

    while True:
        yield cycle


def training() -> Iterator[Step]:
    """Endless: one short run of the training script a cycle, methods in turn."""
    import dataclasses

    from recog_fast.training.config import DataConfig, RecognizabilityConfig, TrainConfig
    from recog_fast.training.loop import train

    def people(seed: int) -> DataConfig:
        return DataConfig(kind="synthetic", size=32, options={"num_identities": 12, "images_per_identity": 4, "seed": seed})

    def run(method: str) -> None:
        with tempfile.TemporaryDirectory() as folder:
            config = TrainConfig(
                method=method, data=people(0), network_options={"widths": [4, 8, 8, 8]}, embedding_size=16, scale=16.0, batch_size=16,
                num_epoch=2, num_workers=0, num_threads=1, device="cpu", output=folder, val_targets=["synthetic"], val_pairs=40,
            )  # fmt: skip
            if "qaface" in method or method == "vpl":
                config = dataclasses.replace(config, memory={"start_epoch": 1})
            if "uir" in method:
                config = dataclasses.replace(config, unlabelled=people(1))
            if "ri" in method.split("+"):
                config = dataclasses.replace(config, recognizability=RecognizabilityConfig(ui_images=16))
            with contextlib.redirect_stdout(io.StringIO()):
                train(config)

    for method in itertools.cycle(METHODS):
        yield functools.partial(run, method)


def soak(minutes: float, parts: list[str], limit: float, steps: int = 6, output: Path | None = None) -> dict[str, Any]:
    """Cycles until the time is over; writes the report so far every five minutes."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sources = [heads(steps) if part == "heads" else training() for part in parts]
    watch = Watch([], [], [], [], [])
    start = written = time.monotonic()
    while (now := time.monotonic()) - start < 60 * minutes or len(watch.rss) < 8:
        for source in sources:
            next(source)()
        watch.note(time.monotonic() - start)
        if output is not None and now - written > 300 and len(watch.rss) >= 8:
            written = now
            output.write_text(json.dumps(report(watch, parts, limit), indent=1) + "\n")
    result = report(watch, parts, limit)
    if output is not None:
        output.write_text(json.dumps(result, indent=1) + "\n")
    return result


def report(watch: Watch, parts: list[str], limit: float) -> dict[str, Any]:
    """The verdict, and up to 120 samples spread over the soak."""
    chosen = np.unique(np.linspace(0, len(watch.rss) - 1, 120).astype(int))
    samples = [[watch.seconds[i], watch.rss[i], watch.tensors[i], watch.files[i], watch.threads[i]] for i in chosen]
    head = {"recog_fast": rf.__version__, "torch": torch.__version__, "cpu": rf.backends()["cpu"], "parts": parts}
    return {**head, **watch.verdict(limit), "columns": ["seconds", "rss_mb", "tensors", "files", "threads"], "samples": samples}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--limit", type=float, default=16.0, help="MB that RSS may grow after the first quarter (16)")
    parser.add_argument("--steps", type=int, default=6, help="of every living head a cycle (6)")
    parser.add_argument("--output", type=Path, help="JSON report")
    options = parser.parse_args()
    result = soak(options.minutes, options.parts, options.limit, options.steps, options.output)
    print(json.dumps({key: value for key, value in result.items() if key not in ("samples", "columns")}, indent=1))
    print(f"threads now: {threading.active_count()}" if result["wrong"] else "memory is flat")
    return 1 if result["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
