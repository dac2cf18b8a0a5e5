"""What every recipe shares: where the data lies, measurements of several seeds, gates, and how results are kept."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "recipes" / "results"


def data_dir() -> Path:
    """The folder of real data. Raises FileNotFoundError saying how to name it."""
    path = Path(os.environ.get("RECOG_FAST_DATA", ROOT.parent / "shared" / "data"))
    if not path.is_dir():
        raise FileNotFoundError(f"recipes: {path} is no folder; set RECOG_FAST_DATA to where the real data lies")
    return path


@dataclass(frozen=True)
class Gate:
    """A bound on the mean over seeds of one measurement."""

    measure: str
    bound: float
    at_least: bool = True

    def met(self, values: Sequence[float]) -> bool:
        """Whether the mean keeps the bound."""
        mean = float(np.mean(values))
        return mean >= self.bound if self.at_least else mean <= self.bound

    def __str__(self) -> str:
        return f"{self.measure} {'>=' if self.at_least else '<='} {self.bound:g}"


@dataclass
class Outcome:
    """One recipe's numbers: measurement -> one value a seed, in the order of `seeds`."""

    name: str
    effect: str
    seeds: list[int]
    measures: dict[str, list[float]] = field(default_factory=dict)
    gates: list[Gate] = field(default_factory=list)
    note: str = ""
    cpu_seconds: float = 0.0

    def add(self, **values: float) -> None:
        """Appends one seed's measurements; `_` in a name stands for a space."""
        self.put({name.replace("_", " "): value for name, value in values.items()})

    def put(self, values: dict[str, float]) -> None:
        """Appends one seed's measurements."""
        for name, value in values.items():
            self.measures.setdefault(name, []).append(float(value))

    def met(self) -> bool:
        """Whether every gate is."""
        return all(gate.met(self.measures[gate.measure]) for gate in self.gates)

    def text(self) -> str:
        """For the terminal: mean, spread and single values of each measurement, then the gates."""
        width = max(map(len, self.measures))
        lines = [f"{self.effect}  (seeds {', '.join(map(str, self.seeds))}; {self.cpu_seconds:.0f} s CPU)"]
        for name, values in self.measures.items():
            single = "  ".join(f"{v:+.4f}" for v in values)
            lines.append(f"  {name:<{width}}  {np.mean(values):+.4f} +- {spread(values):.4f}   [{single}]")
        for gate in self.gates:
            lines.append(f"  gate  {gate}: {'met' if gate.met(self.measures[gate.measure]) else 'NOT MET'}")
        return "\n".join(lines)

    def store(self, command: str, folder: Path = RESULTS) -> Path:
        """Writes <folder>/<name>.json."""
        folder.mkdir(parents=True, exist_ok=True)
        gates = [
            {"gate": str(g), "value": float(np.mean(self.measures[g.measure])), "met": g.met(self.measures[g.measure])}
            for g in self.gates
        ]
        record = {
            "name": self.name, "effect": self.effect, "command": command, "seeds": self.seeds, "note": self.note,
            "cpu_seconds": round(self.cpu_seconds, 1), "measures": self.measures, "gates": gates,
        }  # fmt: skip
        path = folder / f"{self.name}.json"
        path.write_text(json.dumps(record, indent=1) + "\n")
        return path


def spread(values: Sequence[float]) -> float:
    """Standard deviation over seeds (unbiased); 0 for one seed."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def main(module: str, run: Callable[[list[int]], Outcome | list[Outcome]], seeds: Sequence[int]) -> int:
    """The command line of a recipe: --seeds 0 1 2, --threads, --no-store; 1 where a gate is not met."""
    parser = argparse.ArgumentParser(prog=f"python -m recipes.{module}")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(seeds))
    parser.add_argument("--threads", type=int, default=1, help="torch threads (CPU time is that of all of them)")
    parser.add_argument("--no-store", action="store_true", help=f"leave {RESULTS.relative_to(ROOT)} alone")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    start = time.process_time()
    found = run(chosen.seeds)
    outcomes = [found] if isinstance(found, Outcome) else found
    for outcome in outcomes:
        outcome.cpu_seconds = outcome.cpu_seconds or time.process_time() - start
        print(outcome.text(), flush=True)
        if not chosen.no_store:
            outcome.store(f"python -m recipes.{module}")
    return 0 if all(outcome.met() for outcome in outcomes) else 1


def progress(text: str) -> None:
    """One line on stderr."""
    print(f"[{time.process_time():6.0f} s CPU] {text}", file=sys.stderr, flush=True)


def stored() -> list[dict[str, Any]]:
    """Every stored result, by name."""
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
