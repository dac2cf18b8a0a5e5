"""`recog-fast sweep`: one run per point of a grid and seed, for ablation tables.

    config: ../qaface.yaml           # relative to this file
    grid: {memory.tau: [0.5, 1, 2, 3]}       # every combination
    seeds: [1, 2, 3]

Runs of one seed share weights, order and augmentation: compare them paired. A finished run is not run again, an interrupted
one goes on.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recog_fast.counting import Progress, counted
from recog_fast.sharding import one_process
from recog_fast.terminal.progress import say
from recog_fast.training.config import TrainConfig, read_config
from recog_fast.training.loop import train
from recog_fast.training.model import check_names


@dataclass(frozen=True)
class Point:
    """One run of a sweep."""

    name: str  # its folder
    changes: dict[str, Any]  # dotted setting -> value
    seed: int | None  # None: the settings' own


def read_sweep(path: str | Path) -> tuple[Path, list[Point]]:
    """(settings file, runs in order) of a sweep file.

    Raises FileNotFoundError, and ValueError for a file without `config` and a `grid` of lists.
    """
    import yaml

    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"sweep: no file {file}")
    try:
        values = yaml.safe_load(file.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"sweep: {file} is no valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, Mapping) or set(values) - {"config", "grid", "seeds"} or "config" not in values:
        raise ValueError(f"sweep: expected config, grid and seeds in {file}, got {values!r:.200}")
    grid, seeds = values.get("grid") or {}, values.get("seeds") or [None]
    if not isinstance(grid, Mapping) or not all(isinstance(v, list) and v for v in grid.values()):
        raise ValueError(f"sweep: expected grid in {file} to map settings to lists of values, got {grid!r:.200}")
    if not isinstance(seeds, list) or not all(s is None or isinstance(s, int) for s in seeds):
        raise ValueError(f"sweep: expected seeds in {file} as a list of whole numbers, got {seeds!r:.200}")
    points = []
    for chosen in itertools.product(*grid.values()):
        changes = dict(zip(grid, chosen, strict=True))
        for seed in seeds:
            parts = [f"{key}={_short(value)}" for key, value in changes.items()]
            parts += [] if seed is None else [f"seed={seed}"]
            points.append(Point(",".join(parts) or "run", changes, seed))
    if len({point.name for point in points}) < len(points):
        raise ValueError(f"sweep: expected different values in the grid of {file}, got some twice")
    return (file.parent / values["config"]).resolve(), points


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
    return re.sub(r"[^\w.+-]", "_", text)


def point_config(settings: Path, point: Point, overrides: Sequence[str], output: Path) -> TrainConfig:
    """The settings of one run: the file, the point's changes, the command line, in this order."""
    changes = dict(point.changes)
    if point.seed is not None:
        changes["seed"] = point.seed
    folder = output / point.name
    changes["output"] = str(folder)
    changes["resume"] = (folder / "checkpoints").is_dir()
    return read_config(settings, overrides, changes)


def sweep(path: str | Path, output: str | Path, overrides: Sequence[str] = (), progress: Progress | None = None) -> list[dict[str, Any]]:
    """Runs every point of the sweep file `path` below `output`; one entry {"point", "changes", "seed", "metrics", "step"} per run.

    All settings are read before the first run, so a mistake in the last one costs nothing. Results: output/sweep.json.
    progress(done, total) is called at the start and after every run.
    Raises what `plan_sweep` and `train` raise, and ValueError under several ranks.
    """
    one_process("sweep")
    return run_sweep(plan_sweep(path, output, overrides), output, progress)


def plan_sweep(path: str | Path, output: str | Path, overrides: Sequence[str] = ()) -> list[tuple[Point, TrainConfig]]:
    """Every run of the sweep file `path` with its settings.

    Raises what `read_sweep`, `read_config` and `check_names` raise, and ValueError for overrides of output, resume or seed.
    """
    for argument in overrides:
        if argument.split("=", 1)[0] in ("--output", "--resume", "--seed"):
            raise ValueError(f"sweep: expected settings other than output, resume and seed, got {argument}")
    settings, points = read_sweep(path)
    planned = [(point, point_config(settings, point, overrides, Path(output))) for point in points]
    for _, config in planned:
        check_names(config)
    return planned


def run_sweep(planned: Sequence[tuple[Point, TrainConfig]], output: str | Path, progress: Progress | None = None) -> list[dict[str, Any]]:
    """What `sweep` does, with the runs of `plan_sweep`."""
    one_process("sweep")
    folder = Path(output)
    results = []
    for point, config in counted(planned, len(planned), progress):
        place = folder / point.name / "result.json"
        if not place.is_file():
            say(f"sweep: {point.name}")
            done = train(config)
            if not done.finished:
                say(f"sweep: stopped by a signal at {point.name}; the same command goes on")
                break
            entry = {
                "point": point.name,
                "changes": point.changes,
                "seed": config.seed,
                "step": done.step,
                "metrics": done.metrics,
            }
            place.write_text(json.dumps(entry, indent=1) + "\n", encoding="utf-8")
        results.append(json.loads(place.read_text(encoding="utf-8")))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sweep.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return results


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """Mean over seeds (and deviation, from two seeds on) of every metric at every point of the grid."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for entry in results:
        groups.setdefault(json.dumps(entry["changes"]), []).append(entry)
    lines = []
    for changes, entries in groups.items():
        title = "   ".join(f"{key}={value}" for key, value in json.loads(changes).items()) or "run"
        cells = []
        for name in entries[0]["metrics"]:
            values = np.array([entry["metrics"][name] for entry in entries])
            spread = f" +- {values.std(ddof=1):.4f}" if len(values) > 1 else ""
            cells.append(f"{name.removeprefix('val/')} {values.mean():.4f}{spread}")
        lines.append(f"{title} ({len(entries)} seeds): " + "   ".join(cells))
    return "\n".join(lines)
