"""The targets of performance.md for one GPU, judged from measured cases and from nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .gpu_contenders import FASTEST, CutCrossEntropy, PartialFCBF16
from .peers import PartialFC, PartialFCSampled
from .protocol import STEPS

Data = dict[str, Any]
LEVELS = ("must", "strong", "stretch")


@dataclass(frozen=True)
class Target:
    """name; must, strong and stretch (at most, or at least); how it is measured: (value, remark), None where results lack it."""

    name: str
    levels: tuple[float, float, float]
    measure: Callable[[Data], tuple[float, str] | None]
    at_most: bool = True
    unit: str = "ms"

    def line(self, data: Data) -> list[str]:
        """[name, must, strong, stretch, measured, the best level met]."""
        wanted = [f"{'<=' if self.at_most else '>='} {level:g} {self.unit}" for level in self.levels]
        found = self.measure(data)
        if found is None:
            return [self.name, *wanted, "-", "not measured"]
        value, remark = found
        met = [name for name, level in zip(LEVELS, self.levels, strict=True) if (value <= level if self.at_most else value >= level)]
        return [self.name, *wanted, f"{value:.3g} {self.unit}{f' ({remark})' if remark else ''}", met[-1] if met else "NOT MET"]


def case_of(data: Data, rows: int, classes: int) -> Data | None:
    """The measured case of that size."""
    return next((c for c in data["cases"] if (c["N"], c["C"], c["label"]) == (rows, classes, "")), None)


def fastest(case: Data | None) -> Data | None:
    """The faster of ours that passed its gate and was timed."""
    there = [r for r in (case or {"rows": []})["rows"] if r["name"] in FASTEST and "steps" in r]
    return min(there, key=lambda r: float(r["steps"][STEPS[2]]["s"]["median"]), default=None)


def _step(rows: int, classes: int) -> Callable[[Data], tuple[float, str] | None]:
    def measure(data: Data) -> tuple[float, str] | None:
        row = fastest(case_of(data, rows, classes))
        return None if row is None else (1e3 * row["steps"][STEPS[2]]["s"]["median"], row["name"])

    return measure


def _against(peer: str, rows: int, classes: int) -> Callable[[Data], tuple[float, str] | None]:
    def measure(data: Data) -> tuple[float, str] | None:
        row = fastest(case_of(data, rows, classes))
        ratio = None if row is None else row["against"].get(peer)
        return None if ratio is None or row is None else (ratio["median"], f"{ratio['p10']:.2f}-{ratio['p90']:.2f}, {row['name']}")

    return measure


def _memory(rows: int, classes: int, key: str, scale: float = 1.0) -> Callable[[Data], tuple[float, str] | None]:
    def measure(data: Data) -> tuple[float, str] | None:
        case = case_of(data, rows, classes)
        found = [r for r in (case or {"rows": []})["rows"] if r["name"] in FASTEST and "memory" in r]
        return (float(found[0]["memory"][key]) * scale, found[0]["name"]) if found else None

    return measure


def _flatness(data: Data) -> tuple[float, str] | None:
    rows = [fastest(case_of(data, 1024, c)) for c in (100_000, 1_000_000)]
    if rows[0] is None or rows[1] is None:
        return None
    small, large = (float(r["steps"][STEPS[2]]["s"]["median"]) for r in rows if r is not None)
    return 100 * abs(large / small / 10 - 1), f"1M takes {large / small / 10:.2f} of the time per class at 100k"


def _accuracy(data: Data) -> tuple[float, str] | None:
    rows = [r for c in data["cases"] for r in c["rows"] if r["name"] in FASTEST and "gate" in r]
    if not rows:
        return None
    worst = max(max(r["gate"]["d_embeddings"], r["gate"]["d_weight"]) for r in rows)
    same = all(r["gate"]["same_bits"] for r in rows)
    return 1e3 * worst, "bits equal between runs" if same else "BITS DIFFER between runs"


TARGETS: tuple[Target, ...] = (
    Target("full step, N=1024, C=1M", (10.5, 7.6, 6.2), _step(1024, 1_000_000)),
    Target("full step, N=512, C=10M", (75, 52, 43), _step(512, 10_000_000)),
    Target("full step, N=1024, C=10M", (105, 76, 62), _step(1024, 10_000_000)),
    Target("full step, N=4096, C=10M", (420, 300, 248), _step(4096, 10_000_000)),
    Target("peak memory with W and momentum, C=10M, N=512", (72, 52, 41), _memory(512, 10_000_000, "total_gb"), unit="GB"),
    Target("against Partial FC at bf16 GEMM speed, N=1024, C=1M", (5, 8, 10.5), _against(PartialFCBF16.name, 1024, 1_000_000), at_most=False, unit="x"),
    Target("against Partial FC as shipped (fp32), N=1024, C=1M", (10, 15, 20), _against(PartialFC.name, 1024, 1_000_000), at_most=False, unit="x"),
    Target("against Partial FC r=0.1 while exact, N=1024, C=1M", (1, 1.6, 2), _against(PartialFCSampled.name, 1024, 1_000_000), at_most=False, unit="x"),
    Target("against cut-cross-entropy (fp32 accumulation), N=1024, C=1M", (1.5, 2.5, 4), _against(CutCrossEntropy.name, 1024, 1_000_000),
           at_most=False, unit="x"),
    Target("extra memory, forward + backward, C=1M, share of W", (5, 2, 1), _memory(1024, 1_000_000, "backward_per_cd", 100 / 4), unit="%"),
    Target("extra memory, forward + backward, C=1M", (64, 64, 64), _memory(1024, 1_000_000, "backward_gb", 1e3), unit="MB"),
    Target("time per class, C=100k to 1M, N=1024, apart by", (15, 10, 5), _flatness, unit="%"),
    Target("dx and dW, relative error, worst case timed", (10, 4, 4), _accuracy, unit="1e-3"),
)  # fmt: skip


def table(data: Data) -> list[list[str]]:
    """One line a target."""
    return [target.line(data) for target in TARGETS]
