"""What a run writes while it runs: metrics.jsonl always, TensorBoard, and the console."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from recog_fast.sharding import World
from recog_fast.terminal.progress import progress, say

logger = logging.getLogger("recog_fast.training")


class Meter:
    """Running means between two log lines; its state travels with the checkpoint, so a resumed line equals an uninterrupted one."""

    def __init__(self, state: Mapping[str, tuple[float, float]] | None = None) -> None:
        self.state: dict[str, tuple[float, float]] = {k: (float(v[0]), float(v[1])) for k, v in (state or {}).items()}

    def add(self, values: Mapping[str, tuple[float, float]]) -> None:
        """Adds (sum, count) pairs."""
        for name, (total, count) in values.items():
            before = self.state.get(name, (0.0, 0.0))
            self.state[name] = (before[0] + total, before[1] + count)

    def total(self, world: World) -> dict[str, tuple[float, float]]:
        """The sums of all ranks; every rank calls it."""
        whole = Meter()
        for state in world.exchange(self.state):
            whole.add(state)
        return whole.state

    def flush(self, world: World | None = None) -> dict[str, float]:
        """Means over all ranks since the last flush; what was never counted is left out."""
        state = self.state if world is None else self.total(world)
        self.state = {}
        return {name: total / count for name, (total, count) in state.items() if count}


def dropped_share(labels: Tensor, stats: Any) -> dict[str, tuple[float, float]]:
    """(sum, whole) of the gradient mass q that `drop_mass` or `drop_elements` left out of the head's gradient, over the labelled rows."""
    mass = (1 - stats.target_probability.double())[labels >= 0]
    return {"dropped_mass": (float(stats.dropped_mass.double().sum()), float(mass.sum()))}


class Log:
    """Scalars by step to `output/metrics.jsonl` and TensorBoard (`output/tensorboard`), lines to the console, and a progress bar where it is a terminal.

    Starting at `step` > 0 drops what an interrupted run wrote past that step. Without tensorboard installed it says so once.
    """

    def __init__(self, output: Path, step: int, total: int) -> None:
        self.total, self.first, self.began = total, step, time.monotonic()
        self.path = output / "metrics.jsonl"
        output.mkdir(parents=True, exist_ok=True)
        _truncate(self.path, step)
        self.file = self.path.open("a", encoding="utf-8")
        self.board = _tensorboard(output / "tensorboard", step)
        self.bar = contextlib.ExitStack()
        self.step = self.bar.enter_context(progress("step", lines=True))
        self.advance(step)

    def __enter__(self) -> Log:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.file.close()
        if self.board is not None:
            self.board.close()
        self.bar.close()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One line of metrics.jsonl: {"step": step, name: value, ...}; non-finite values are written as null."""
        clean = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self.file.write(json.dumps({"step": step, **clean}, allow_nan=False) + "\n")
        self.file.flush()
        if self.board is not None:
            for name, value in values.items():
                self.board.add_scalar(name if "/" in name else f"train/{name}", value, step)

    def line(self, text: str) -> None:
        """A line for people."""
        say(text)

    def advance(self, step: int) -> None:
        """Moves the progress bar, where there is one."""
        if self.step is not None:
            self.step(step, self.total)

    def training_line(self, step: int, epoch: int, speed: float, loss: float, lr: float) -> None:
        """InsightFace's console line, which people grep."""
        elapsed = time.monotonic() - self.began
        required = elapsed / max(1, step - self.first) * (self.total - step) / 3600
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        self.line(
            f"Training: {stamp}-Speed {speed:.2f} samples/sec   Loss {loss:.4f}   LearningRate {lr:.6f}   Epoch: {epoch}   "
            f"Global Step: {step}   Required: {required:.2f} hours"
        )


class SilentLog(Log):
    """What ranks other than 0 have: writes and says nothing."""

    def __init__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Nothing."""

    def line(self, text: str) -> None:
        """Nothing."""

    def advance(self, step: int) -> None:
        """Nothing."""

    def training_line(self, step: int, epoch: int, speed: float, loss: float, lr: float) -> None:
        """Nothing."""


def _truncate(path: Path, step: int) -> None:
    """Keeps the lines up to `step`; a half-written last line goes too."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            break
        if record.get("step", 0) <= step and step > 0:
            kept.append(line + "\n")
    path.write_text("".join(kept), encoding="utf-8")


def _tensorboard(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        logger.warning("tensorboard is not installed: only metrics.jsonl is written (pip install recog_fast[train])")
        return None
    return SummaryWriter(str(folder), purge_step=step + 1 if step else None)
