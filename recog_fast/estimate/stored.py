"""Stored measurements (benchmarks/results/*/full.json) that tell how long a head's step takes on the CPU they were made on."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .model import Head


@dataclass(frozen=True)
class Measured:
    """Seconds of a whole step, and whose."""

    seconds: float
    source: str


def measured(head: Head, cpu: str, results: Path) -> Measured | str:
    """A stored time of this head's step on a CPU of that name, or why there is none.

    Rows and embedding size must be those measured, one process, plain HeadSGD; of several numbers of classes the nearest is taken and
    the time multiplied by the ratio (W does not fit in any cache: time grows with the classes), which `source` says.

    Raises ValueError for a file that is no JSON, KeyError for one of another layout.
    """
    if head.ranks > 1 or head.optimizer != "headsgd" or head.split or head.half_momentum or head.sample_rate < 1 or head.subcenters > 1 or head.ring:
        return "only steps of plain HeadSGD in one process are stored"
    name = f"ours, HeadSGD {'bf16' if head.half else 'float32'}"
    found = [
        (case["C"], row["steps"]["full step"]["wall_s"]["median"], path.parent.name, case["commit"], stored["environment"]["device"])
        for path in sorted(results.glob("*/full.json"))
        for stored in [json.loads(path.read_text())]
        if _key(stored["environment"]["device"]).startswith(_key(cpu))
        for case in stored["cases"]
        if (case["N"], case["D"]) == (head.total, head.dimension) and case["regime"] == "R0"
        for row in case["rows"]
        if row["name"] == name and row.get("steps")
    ]
    if not found:
        return f"{results.name} has none of {name!r} with {head.total} rows of {head.dimension} on {cpu}"
    classes, seconds, folder, commit, device = min(found, key=lambda f: _distance(f[0], head.classes))
    scaled = "" if classes == head.classes else f", times {head.classes / classes:.3g} from {classes:,} classes"
    return Measured(seconds * head.classes / classes, f"{name}, results/{folder} ({device}, commit {commit}){scaled}")


def _key(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", " ", name.lower()).strip()


def _distance(one: Any, other: Any) -> float:
    return float(max(one, other) / min(one, other))
