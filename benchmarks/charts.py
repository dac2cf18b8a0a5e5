"""Charts of this machine's stored results: `python -m benchmarks.charts [full.json]` writes PNGs beside the JSON.

time_against_c: full step, CPU time of one thread; memory_against_c: extra memory; roofline: share of the micro-kernel's rate.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import machine, ours, peers
from .protocol import STEPS

Series = dict[str, list[tuple[float, float]]]  # name -> (C, value), by C
_FULL = STEPS[-1]
# drawn, in this order, each in its colour in every chart; the others stay in the tables
_COLOURS = {
    peers.Eager.name: "#555555",
    peers.PartialFC.name: "#a6761d",
    peers.PartialFCSampled.name: "#e6ab02",
    peers.Compiled.name: "#7570b3",
    peers.CompiledBF16.name: "#984ea3",
    ours.Native.name: "#66c2a5",
    ours.NativeBF16Kept.name: "#fc8d62",
    ours.FusedStep.name: "#1b9e77",
    ours.FusedStepKept.name: "#3f7fbf",
    ours.FusedStepKeptExact.name: "#1f4e9c",
    ours.FusedStepBF16.name: "#e7298a",
    ours.FusedStepBF16Kept.name: "#d95f02",
}
_GAP = 0.055  # of the axis height between two labels


def _times(results: dict[str, Any], rows: int) -> Series:
    """Full step in milliseconds at N = rows, R0; sizes beyond the cases from the time per class."""
    found: dict[str, dict[float, float]] = {name: {} for name in _COLOURS}
    for scaling in results["per_class"]:
        if scaling["step"] == _FULL and scaling["N"] == rows and scaling["name"] in found:
            for classes, cost in zip(scaling["classes"], scaling["nanoseconds"], strict=True):
                found[scaling["name"]][classes] = classes * cost["median"] / 1e6
    for case in results["cases"]:
        if (case["regime"], case["N"]) == ("R0", rows):
            for row in case["rows"]:
                if "steps" in row and row["name"] in found:
                    found[row["name"]][case["C"]] = 1e3 * row["steps"][_FULL]["cpu_s"]["median"]
    return {name: sorted(points.items()) for name, points in found.items() if points}


def _extra(results: dict[str, Any]) -> Series:
    """Extra megabytes of the full step."""
    found: Series = {}
    for peak in sorted(results["memory"], key=lambda p: p["C"]):
        if peak["phase"] == _FULL and peak["name"] in _COLOURS:
            found.setdefault(peak["name"], []).append((peak["C"], max(peak["extra"], 0.1)))
    return {name: found[name] for name in _COLOURS if name in found}


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _classes(count: float) -> str:
    return f"{count / 1e6:g}M" if count >= 1e6 else f"{count / 1e3:g}k"


def _spread(wanted: Sequence[float], gap: float, top: float = 0.98) -> list[float]:
    """Places in the order of `wanted` (ascending), `gap` apart or more, as near as may be and none above `top`."""
    places: list[float] = []
    for at in wanted:
        places.append(max(at, places[-1] + gap) if places else at)
    limit = top
    for i in reversed(range(len(places))):
        places[i] = min(places[i], limit)
        limit = places[i] - gap
    return places


def _label_ends(axes: Any, series: Series, unit: str) -> None:
    """Each line's name and last value at its right end, moved apart where they would overlap, none above the axes."""
    low, high = (math.log10(v) for v in axes.get_ylim())
    last_of_all = max(points[-1][0] for points in series.values())
    # A line that ends far to the left is named where it ends: a leader would cross every other line.
    early = {name: points[-1] for name, points in series.items() if points[-1][0] < last_of_all / 5}
    for name, last in early.items():
        text = f"{name}:\n{_number(last[1])} {unit}".replace(", ", ",\n")
        axes.annotate(text, xy=last, xytext=(6, 6), textcoords="offset points", color=_COLOURS[name], fontsize=8.5)
    ends = sorted((math.log10(points[-1][1]), name) for name, points in series.items() if name not in early)
    places = _spread([(value - low) / (high - low) for value, _ in ends], _GAP)
    for (_, name), place in zip(ends, places, strict=True):
        last = series[name][-1]
        axes.annotate(
            f"{name}: {_number(last[1])} {unit} at {_classes(last[0])}", xy=last, xycoords="data", xytext=(1.02, place),
            textcoords="axes fraction", color=_COLOURS[name], fontsize=8.5, va="center",
            arrowprops={"arrowstyle": "-", "color": _COLOURS[name], "lw": 0.6, "alpha": 0.6, "relpos": (0, 0.5), "shrinkB": 4},
        )  # fmt: skip


def _lines(series: Series, title: str, ylabel: str, unit: str, note: str, path: Path) -> None:
    """A log-log chart against C with every line labelled at its end."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(10.5, 5.6))
    for name, points in series.items():
        axes.plot(*zip(*points, strict=True), marker="o", ms=4, lw=1.6, color=_COLOURS[name])
    axes.set(xscale="log", yscale="log", xlabel="C, classes", ylabel=ylabel)
    axes.set_title(title, loc="left", fontsize=11)
    axes.grid(True, which="major", alpha=0.35)
    axes.grid(True, which="minor", alpha=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    _label_ends(axes, series, unit)
    figure.text(0.01, 0.01, note, fontsize=7.5, color="#555555")
    figure.subplots_adjust(left=0.075, right=0.62, top=0.92, bottom=0.14)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)


@dataclass(frozen=True)
class _Bar:
    """Percent of the yardstick; least: counted as 6NCD, None where that says nothing."""

    name: str
    what: str
    median: float
    p10: float
    p90: float
    least: float | None


def _shares(results: dict[str, Any]) -> tuple[list[_Bar], str]:
    """Forward and full step of ours in the case of the required numbers; and what the yardstick is."""
    case = next((c for c in results["cases"] if (c["regime"], c["N"], c["C"]) == ("R0", 64, 100_000)), None)
    rows = [r for r in (case["rows"] if case else ()) if r["name"] in _COLOURS and "steps" in r and r["name"].startswith("ours")]
    kernel = any("share_of_peak" in r["steps"][_FULL] for r in rows)
    bars: list[_Bar] = []
    for row in rows:
        for step, what in ((STEPS[0], "forward with gradient"), (_FULL, "full step")):
            found = row["steps"][step]
            if "share_of_peak" in found:
                least = 100 * found["least_share_of_peak"]["median"] if step == _FULL else None
                share = {k: 100 * v for k, v in found["share_of_peak"].items()}
                bars.append(_Bar(row["name"], what, share["median"], share["p10"], share["p90"], least))
            elif not kernel and "share_of_gemm" in found:
                share_of_gemm = 100 * found["share_of_gemm"]
                bars.append(_Bar(row["name"], what, share_of_gemm, share_of_gemm, share_of_gemm, None))
    return bars, "the micro-kernel on in-cache data" if kernel else "torch.mm in the same run (no micro-kernel rate here)"


def _roofline(bars: Sequence[_Bar], yardstick: str, note: str, path: Path) -> None:
    """Horizontal bars: own matrix operations per second over the yardstick's."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    height = 1.8 + 0.36 * len(bars)
    figure, axes = plt.subplots(figsize=(10.5, height))
    for at, bar in enumerate(reversed(bars)):
        axes.barh(at, bar.median, color=_COLOURS[bar.name], alpha=1.0 if bar.what == "full step" else 0.55, height=0.72)
        axes.plot([bar.p10, bar.p90], [at, at], color="#222222", lw=1.2)
        axes.text(max(bar.median, bar.p90) + 1, at, f"{bar.median:.0f} %", va="center", fontsize=8.5)
        if bar.least is not None:
            axes.plot(bar.least, at, "o", ms=5, mfc="white", mec="#222222")
    axes.set_yticks(range(len(bars)), [f"{bar.name}: {bar.what}" for bar in reversed(bars)], fontsize=8.5)
    axes.axvline(100, color="#222222", lw=1, ls="--")
    axes.set(xlabel=f"% of {yardstick}", xlim=(0, max(112.0, *(bar.p90 + 12 for bar in bars))))
    axes.set_title("Share of the roofline, N=64, C=100,000, D=512, one thread", loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    figure.text(0.01, 0.08 / height, note, fontsize=7.5, color="#555555")
    figure.subplots_adjust(left=0.40, right=0.97, top=1 - 0.5 / height, bottom=1.05 / height)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)


def draw(results: dict[str, Any], folder: Path) -> list[Path]:
    """Every chart whose numbers are there; the files written."""
    environment = results["environment"]
    note = f"{environment['device']}; {environment['backend'].split(' (')[0]}; torch {environment['torch']}; commit {environment['commit']}"
    written = []
    for rows in (64, 256):
        times = _times(results, rows)
        if any(len(points) > 1 for points in times.values()):
            written.append(folder / f"time_against_c_n{rows}.png")
            title = f"Full head step against the number of classes, N={rows}, D=512, one thread"
            _lines(times, title, "CPU time of a full step, ms", "ms", f"Medians. {note}", written[-1])
    extra = _extra(results)
    if extra:
        written.append(folder / "memory_against_c.png")
        title = "Memory of a full step beyond W, optimizer state and dW, N=64, D=512"
        _lines(extra, title, "extra resident memory, MB", "MB", f"Peak of a process of its own. {note}", written[-1])
    bars, yardstick = _shares(results)
    if bars:
        written.append(folder / "roofline.png")
        counted = "Matrix operations alone: 4NCD forward, 8NCD full step recomputing, 6NCD with kept exponentials. Line: p10 to p90. Dot: as 6NCD."
        _roofline(bars, yardstick, f"{counted}\n{note}", written[-1])
    return written


def main(arguments: list[str]) -> int:
    """Exit status 1 where the file is missing or holds nothing to draw."""
    path = Path(arguments[0]) if arguments else machine.RESULTS / machine.slug() / "full.json"
    if not path.is_file():
        print(f"benchmarks.charts: expected a results file, got {path}; make one with `python -m benchmarks`", file=sys.stderr)
        return 1
    written = draw(json.loads(path.read_text()), path.parent)
    print("\n".join(map(str, written)) or f"benchmarks.charts: nothing to draw in {path}")
    return 0 if written else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
