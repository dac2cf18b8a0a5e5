"""Charts of stored results: `python -m benchmarks.charts [full.json...]` writes SVGs, light or dark as their viewer is, beside
each JSON (without arguments: every folder of results/) and one page of all of them, runs/benchmarks/report.html; with --page
that page alone.

time_against_c: full step, CPU time of one thread; memory_against_c: extra memory; roofline: share of the micro-kernel's rate;
contenders: everyone at one size; skipping: what leaving small gradients out costs and gains.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recog_fast.evaluation import require_plots
from recog_fast.evaluation.drawing import Picture, Theme, axes_of, dashes, picture, series_colour

from . import machine, ours, peers
from .protocol import STEPS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Series = dict[str, list[tuple[float, float]]]  # name -> (C, value), by C
_FULL = STEPS[-1]
# Drawn against C, in this order: colour (of the family; -1 grey) and dashes (of the variant); the others stay in the tables.
_LOOKS: dict[str, tuple[int, int]] = {
    peers.Eager.name: (-1, 0),
    peers.PartialFC.name: (-1, 1),
    peers.PartialFCSampled.name: (-1, 2),
    peers.Compiled.name: (3, 0),
    peers.CompiledBF16.name: (3, 2),
    ours.Native.name: (2, 0),
    ours.NativeBF16Kept.name: (2, 1),
    ours.FusedStep.name: (0, 0),
    ours.FusedStepKept.name: (0, 1),
    ours.FusedStepKeptExact.name: (0, 2),
    ours.FusedStepLists.name: (0, 3),
    ours.FusedStepBF16.name: (1, 0),
    ours.FusedStepBF16Kept.name: (1, 1),
    ours.FusedStepBF16Lists.name: (1, 3),
}
_GAP = 0.058  # of the axis height between two labels
_WIDTH = 8.6  # inches
_CASE = ("R0", 64, 100_000)  # of the required numbers


def _colour(theme: Theme, name: str) -> str:
    """Of a contender: its family's."""
    if name in _LOOKS:
        family = _LOOKS[name][0]
    else:
        family = -1 if not name.startswith("ours") else 1 if "bf16" in name else 0 if "HeadSGD" in name else 2
    return theme.muted if family < 0 else series_colour(theme, family)


def _times(results: dict[str, Any], rows: int) -> Series:
    """Full step in milliseconds at N = rows, R0; sizes beyond the cases from the time per class."""
    found: dict[str, dict[float, float]] = {name: {} for name in _LOOKS}
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
        if peak["phase"] == _FULL and peak["name"] in _LOOKS:
            found.setdefault(peak["name"], []).append((peak["C"], max(peak["extra"], 0.1)))
    return {name: found[name] for name in _LOOKS if name in found}


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


def _label_ends(axes: Any, theme: Theme, series: Series, unit: str) -> None:
    """Each line's name and last value at its right end, moved apart where they would overlap, none above the axes."""
    low, high = (math.log10(v) for v in axes.get_ylim())
    last_of_all = max(points[-1][0] for points in series.values())
    # A line that ends far to the left is named where it ends: a leader would cross every other line.
    early = {name: points[-1] for name, points in series.items() if points[-1][0] < last_of_all / 5}
    for name, last in early.items():
        text = f"{name}:\n{_number(last[1])} {unit}".replace(", ", ",\n")
        axes.annotate(text, xy=last, xytext=(6, 6), textcoords="offset points", color=_colour(theme, name), fontsize=8.5)
    ends = sorted((math.log10(points[-1][1]), name) for name, points in series.items() if name not in early)
    places = _spread([(value - low) / (high - low) for value, _ in ends], _GAP)
    for (_, name), place in zip(ends, places, strict=True):
        last, colour = series[name][-1], _colour(theme, name)
        axes.annotate(
            f"{name}: {_number(last[1])} {unit} at {_classes(last[0])}", xy=last, xycoords="data", xytext=(1.03, place),
            textcoords="axes fraction", color=colour, fontsize=8.5, va="center",
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.6, "alpha": 0.6, "relpos": (0, 0.5), "shrinkB": 4},
        )  # fmt: skip


def _note(figure: Figure, theme: Theme, text: str) -> None:
    figure.text(0.01, 0.012, text, fontsize=7.5, color=theme.muted)


def _lines(series: Series, title: str, ylabel: str, unit: str, note: str) -> Picture:
    """A log-log chart against C with every line labelled at its end."""
    height = 4.9

    def draw(figure: Figure, theme: Theme) -> None:
        figure.set_layout_engine(None)
        axes = axes_of(figure, theme)
        for name, points in series.items():
            axes.plot(
                *zip(*points, strict=True), marker="o", ms=3.5, lw=1.6, color=_colour(theme, name), ls=dashes(_LOOKS[name][1])
            )
        axes.set(xscale="log", yscale="log", xlabel="C, classes (log)", ylabel=f"{ylabel} (log)")
        axes.xaxis.set_major_formatter(_ticks(_classes))
        axes.yaxis.set_major_formatter(_ticks(_number))
        axes.set_title(title, loc="left", fontsize=10.5, color=theme.text)
        axes.grid(True, which="minor", color=theme.grid, lw=0.4)
        # The longest name of this chart, at about 0.07 inches a letter.
        longest = max(len(f"{name}: {_number(points[-1][1])} {unit} at 500k") for name, points in series.items())
        figure.subplots_adjust(left=0.09, right=1 - (0.066 * longest + 0.2) / _WIDTH, top=0.92, bottom=0.16)
        _label_ends(axes, theme, series, unit)
        _note(figure, theme, note)

    ends = ", ".join(f"{name} {_number(points[-1][1])} {unit} at {_classes(points[-1][0])}" for name, points in series.items())
    return picture(draw, height, f"{title}. {ends}.", _WIDTH)


def _ticks(show: Any) -> Any:
    from matplotlib.ticker import FuncFormatter

    return FuncFormatter(lambda value, _: show(value))


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
    rows = [r for r in (case["rows"] if case else ()) if r["name"] in _LOOKS and "steps" in r and r["name"].startswith("ours")]
    kernel = any("share_of_peak" in r["steps"][_FULL] for r in rows)
    bars: list[_Bar] = []
    for row in rows:
        for step, what in ((STEPS[0], "forward"), (_FULL, "full step")):
            found = row["steps"][step]
            if "share_of_peak" in found:
                least = 100 * found["least_share_of_peak"]["median"] if step == _FULL else None
                share = {k: 100 * v for k, v in found["share_of_peak"].items()}
                bars.append(_Bar(row["name"], what, share["median"], share["p10"], share["p90"], least))
            elif not kernel and "share_of_gemm" in found:
                share_of_gemm = 100 * found["share_of_gemm"]
                bars.append(_Bar(row["name"], what, share_of_gemm, share_of_gemm, share_of_gemm, None))
    return bars, "the micro-kernel on in-cache data" if kernel else "torch.mm in the same run (no micro-kernel rate here)"


def _roofline(bars: Sequence[_Bar], yardstick: str, note: str) -> Picture:
    """Horizontal bars: own matrix operations per second over the yardstick's."""
    height = 1.5 + 0.27 * len(bars)

    def draw(figure: Figure, theme: Theme) -> None:
        figure.set_layout_engine(None)
        axes = axes_of(figure, theme)
        axes.grid(False, axis="y")
        for at, bar in enumerate(reversed(bars)):
            alpha = 0.9 if bar.what == "full step" else 0.45
            axes.barh(at, bar.median, color=_colour(theme, bar.name), alpha=alpha, height=0.7)
            axes.plot([bar.p10, bar.p90], [at, at], color=theme.text, lw=1.1)
            axes.text(max(bar.median, bar.p90) + 1.5, at, f"{bar.median:.0f} %", va="center", fontsize=8.5, color=theme.text)
            if bar.least is not None:
                axes.plot(bar.least, at, "o", ms=4.5, mfc=theme.background, mec=theme.text)
        axes.set_yticks(range(len(bars)), [f"{bar.name}: {bar.what}" for bar in reversed(bars)], fontsize=8.5)
        axes.axvline(100, color=theme.text, lw=1, ls="--")
        axes.set(xlabel=f"% of {yardstick}", xlim=(0, max(112.0, *(bar.p90 + 12 for bar in bars))))
        axes.set_title("Share of the roofline, N=64, C=100,000, D=512", loc="left", fontsize=10.5, color=theme.text)
        figure.subplots_adjust(left=0.45, right=0.97, top=1 - 0.4 / height, bottom=0.95 / height)
        _note(figure, theme, note)

    shown = ", ".join(f"{bar.name}, {bar.what}: {bar.median:.0f} %" for bar in bars)
    return picture(draw, height, f"Share of the rate of {yardstick}. {shown}.", _WIDTH)


def rows_of(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of the case of the required numbers that have times."""
    case = next((c for c in results["cases"] if (c["regime"], c["N"], c["C"]) == _CASE), None)
    return [row for row in (case["rows"] if case else ()) if "steps" in row]


def _contenders(rows: list[dict[str, Any]], note: str) -> Picture:
    """Everyone's full step with its spread, fastest first, on a log axis."""
    ordered = sorted(rows, key=lambda row: -row["steps"][_FULL]["cpu_s"]["median"])
    height = 1.4 + 0.235 * len(ordered)

    def draw(figure: Figure, theme: Theme) -> None:
        figure.set_layout_engine(None)
        axes = axes_of(figure, theme)
        for at, row in enumerate(ordered):
            time = {k: 1e3 * v for k, v in row["steps"][_FULL]["cpu_s"].items()}
            colour = _colour(theme, row["name"])
            axes.plot([time["p10"], time["p90"]], [at, at], color=colour, lw=1.4)
            axes.plot(time["median"], at, "o", ms=5, color=colour)
            axes.annotate(
                f"{_number(time['median'])} ms", (max(time["p90"], time["median"]), at), xytext=(7, 0), textcoords="offset points",
                va="center", fontsize=8.5, color=theme.text,
            )  # fmt: skip
        names = [row["name"] + (" (not exact)" if row["note"].startswith("not exact") else "") for row in ordered]
        axes.set_yticks(range(len(ordered)), names, fontsize=8.5)
        axes.set(xscale="log", xlabel="CPU time of a full step, ms (log)")
        low, high = axes.get_xlim()
        axes.set_xlim(low, high * 1.6)
        axes.xaxis.set_major_formatter(_ticks(_number))
        axes.set_title("Every contender, N=64, C=100,000, D=512, one thread", loc="left", fontsize=10.5, color=theme.text)
        figure.subplots_adjust(left=0.42, right=0.97, top=1 - 0.4 / height, bottom=0.8 / height)
        _note(figure, theme, f"Medians; line: p10 to p90. {note}")

    shown = ", ".join(f"{r['name']} {_number(1e3 * r['steps'][_FULL]['cpu_s']['median'])} ms" for r in reversed(ordered))
    return picture(draw, height, f"CPU time of a full step of every contender, fastest first: {shown}.", _WIDTH)


def _skipping(rows: list[dict[str, Any]], note: str) -> Picture | None:
    """Time against error of the fused step and its variants that leave small gradients out."""
    points = [
        (row["name"].removeprefix("ours, HeadSGD "), max(row["gate"][k] for k in ("d_embeddings", "d_weight")), 1e3 * row["steps"][_FULL]["cpu_s"]["median"])
        for row in rows if row["name"].startswith("ours, HeadSGD")
    ]  # fmt: skip
    if not any("drop" in name for name, _, _ in points):
        return None

    def draw(figure: Figure, theme: Theme) -> None:
        figure.set_layout_engine(None)
        axes = axes_of(figure, theme)
        order = sorted(points, key=lambda p: p[2])
        low, high = order[0][2] * 0.8, order[-1][2] * 1.15
        axes.set(xscale="log", xlim=(1e-7, 2e-2), ylim=(low, high))
        places = _spread([(time - low) / (high - low) for _, _, time in order], _GAP)
        for (name, error, time), place in zip(order, places, strict=True):
            colour = _colour(theme, f"ours, HeadSGD {name}")
            axes.plot(error, time, marker="D" if "drop" in name else "o", ms=6, color=colour, mfc=colour if "drop" in name else "none", ls="")
            axes.annotate(
                f"{name}: {_number(time)} ms", xy=(error, time), xytext=(1.03, place), textcoords="axes fraction", color=colour, va="center",
                fontsize=8.5, arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.6, "alpha": 0.6, "relpos": (0, 0.5), "shrinkB": 4},
            )  # fmt: skip
        axes.set(xlabel="relative error against float64, the larger of dx and dW (log)", ylabel="CPU time of a full step, ms")
        axes.set_title("What exactness costs, N=64, C=100,000, D=512", loc="left", fontsize=10.5, color=theme.text)
        longest = max(len(f"{name}: {_number(time)} ms") for name, _, time in points)
        figure.subplots_adjust(left=0.09, right=1 - (0.066 * longest + 0.2) / _WIDTH, top=0.91, bottom=0.19)
        _note(figure, theme, f"Filled: small gradients left out (drop_mass, drop_elements). {note}")

    shown = ", ".join(f"{name}: {_number(time)} ms, error {error:.0e}" for name, error, time in points)
    return picture(draw, 4.0, f"Time of a full step against its error. {shown}.", _WIDTH)


def pictures(results: dict[str, Any]) -> dict[str, Picture]:
    """File stem -> chart, of every chart whose numbers are there."""
    environment = results["environment"]
    note = f"{environment['device']}; {environment['backend'].split(' (')[0]}; torch {environment['torch']}; commit {environment['commit']}"
    made: dict[str, Picture] = {}
    for rows in (64, 256):
        times = _times(results, rows)
        if any(len(points) > 1 for points in times.values()):
            title = f"Full head step against the number of classes, N={rows}, D=512, one thread"
            made[f"time_against_c_n{rows}"] = _lines(times, title, "CPU time of a full step, ms", "ms", f"Medians. {note}")
    extra = _extra(results)
    if extra:
        title = "Memory of a full step beyond W, optimizer state and dW, N=64, D=512"
        made["memory_against_c"] = _lines(extra, title, "extra resident memory, MB", "MB", f"Peak of a process of its own. {note}")
    bars, yardstick = _shares(results)
    if bars:
        counted = "Matrix operations alone: 4NCD forward with gradient, 8NCD full step recomputing, 6NCD with kept exponentials. Line: p10 to p90. Dot: as 6NCD."
        made["roofline"] = _roofline(bars, yardstick, f"{counted}\n{note}")
    case = rows_of(results)
    if case:
        made["contenders"] = _contenders(case, note)
        skipping = _skipping(case, note)
        if skipping is not None:
            made["skipping"] = skipping
    return made


def draw(results: dict[str, Any], folder: Path) -> list[Path]:
    """Every chart whose numbers are there as an SVG; the files written."""
    return [chart.save_adaptive(folder / f"{stem}.svg") for stem, chart in pictures(results).items()]


def stored() -> list[Path]:
    """The results files of every device, those of this one first."""
    found = sorted(machine.RESULTS.glob("*/full.json"))
    return sorted(found, key=lambda path: path.parent.name != machine.slug())


def main(arguments: list[str]) -> int:
    """Exit status 1 where a file is missing or holds nothing to draw."""
    from . import page

    require_plots()
    paths = [Path(a) for a in arguments if a != "--page"] or stored()
    missing = [path for path in paths if not path.is_file()]
    if missing or not paths:
        print(f"benchmarks.charts: expected a results file, got {missing or 'none'}; make one with `python -m benchmarks`", file=sys.stderr)
        return 1
    status = 0
    for path in paths if "--page" not in arguments else ():
        written = draw(json.loads(path.read_text()), path.parent)
        print("\n".join(map(str, written)) or f"benchmarks.charts: nothing to draw in {path}")
        status = status if written else 1
    print(page.write(paths, machine.ROOT / "runs" / "benchmarks" / "report.html"))
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
