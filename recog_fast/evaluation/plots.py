"""Plots as SVG data URIs, each in a light and a dark version (matplotlib's object interface; no global state is left
changed)."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from recog_fast.evaluation._arrays import FloatArray
from recog_fast.evaluation.embed import VerificationResult
from recog_fast.evaluation.verification import roc_curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Metrics = Sequence[Mapping[str, Any]]  # rows of a metrics.jsonl

# Width is one column of the report; 9 point then reads as about 13 px on a desktop and 9 px on a phone.
WIDTH, HEIGHT, FONT = 4.6, 3.0, 9.0
FONT_STACK = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"


@dataclass(frozen=True)
class Theme:
    """Colours of one appearance; the report's style sheet uses the same ones."""

    text: str
    muted: str
    grid: str
    background: str
    surface: str
    series: tuple[str, ...]  # conditions in order: full size, 16x16, 8x8, ...
    genuine: str
    impostor: str
    baseline: str


LIGHT = Theme(
    text="#1b2430",
    muted="#5a6675",
    grid="#e2e7ed",
    background="#ffffff",
    surface="#f6f8fa",
    series=("#1f5fbf", "#0f8a80", "#c2780c", "#8a4fb0", "#5a6675"),
    genuine="#1f5fbf",
    impostor="#c4532b",
    baseline="#98a2ae",
)
DARK = Theme(
    text="#e7ebf0",
    muted="#9ba7b4",
    grid="#2c353f",
    background="#11151a",
    surface="#191f26",
    series=("#74abff", "#43c6b8", "#ecb24c", "#c79be6", "#9ba7b4"),
    genuine="#74abff",
    impostor="#f28f63",
    baseline="#6d7884",
)


@dataclass(frozen=True)
class Picture:
    """One plot: data URIs for a light and a dark page, what it shows in words, and `save` for a file of its own."""

    light: str
    dark: str
    alt: str
    render: Callable[[str, float], bytes] | None = field(
        default=None, repr=False, compare=False
    )  # (format, dpi) -> file

    def save(self, path: str | Path, dpi: float = 150) -> Path:
        """Writes the light version; the suffix is the format: .png, .pdf or .svg. Raises ValueError for another one."""
        target = Path(path)
        kind = target.suffix.lstrip(".").lower()
        if kind not in ("png", "pdf", "svg") or self.render is None:
            raise ValueError(f"Picture.save: expected a path ending in .png, .pdf or .svg, got {target}")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(self.render(kind, dpi))
        return target


def roc_plot(
    results: Mapping[str, VerificationResult],
    baseline: Mapping[str, VerificationResult] | None = None,
    baseline_name: str = "untrained",
) -> Picture:
    """True accept rate over false accept rate (log), one curve a condition; baselines dashed, chance dotted."""
    lowest = min(0.5, *(1.0 / np.count_nonzero(~r.same) for r in results.values()))
    grid = np.geomspace(lowest, 1, 600)

    def draw(figure: Figure, theme: Theme) -> None:
        axes = _axes(figure, theme)
        for i, (name, result) in enumerate(results.items()):
            axes.step(grid, _tar_on(grid, result), where="post", color=_series(theme, i), lw=1.8, label=name, zorder=3)
        for i, (_, result) in enumerate((baseline or {}).items()):
            label = baseline_name if i == 0 else None
            axes.step(
                grid,
                _tar_on(grid, result),
                where="post",
                color=theme.baseline,
                lw=1.0,
                ls=(0, (4, 2)),
                label=label,
                zorder=2,
            )
        axes.plot(grid[::6], grid[::6], color=theme.baseline, lw=1.0, ls=":", label="chance", zorder=1)
        axes.set_xscale("log")
        axes.set_xlim(lowest, 1)
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("false accept rate")
        axes.set_ylabel("true accept rate")
        axes.xaxis.set_major_formatter(_percent_ticks())
        axes.yaxis.set_major_formatter(_percent_ticks())
        _legend(figure, axes, theme)

    names = ", ".join(f"{name}: EER {_percent(r.eer)}" for name, r in results.items())
    return _picture(draw, HEIGHT + 0.4, f"ROC curves, true accept rate over false accept rate. {names}.")


def _tar_on(grid: FloatArray, result: VerificationResult) -> FloatArray:
    """TAR at the last operating point with FAR <= grid: a curve of millions of pairs stays a small picture."""
    far, tar, _ = roc_curve(result.scores, result.same)
    on_grid: FloatArray = tar[np.searchsorted(far, grid * (1 + 1e-12), side="right") - 1]
    return on_grid


def cosine_plot(results: Mapping[str, VerificationResult]) -> Picture:
    """Histograms of genuine and impostor cosines, one row a condition, with the threshold of equal error."""
    low = min(-0.2, min(float(r.scores.min()) for r in results.values()))
    edges = np.linspace(max(low, -1.0), 1.0, 61)

    def draw(figure: Figure, theme: Theme) -> None:
        rows = figure.subplots(len(results), 1, sharex=True, squeeze=False)[:, 0]
        for axes, (name, result) in zip(rows, results.items(), strict=True):
            _style(axes, theme)
            for mask, colour, label in (
                (result.same, theme.genuine, "same person"),
                (~result.same, theme.impostor, "different people"),
            ):
                share = np.histogram(result.scores[mask], edges)[0] / np.count_nonzero(mask)
                axes.stairs(share, edges, color=colour, fill=True, alpha=0.22, lw=0)
                axes.stairs(share, edges, color=colour, lw=1.4, label=label)
            axes.axvline(result.threshold, color=theme.muted, lw=1.0, ls=(0, (3, 2)))
            axes.text(0.012, 0.86, name, transform=axes.transAxes, color=theme.text, va="top")
            axes.set_yticks([])
            axes.spines["left"].set_visible(False)
            axes.set_ylim(0, None)
            axes.grid(False)
        rows[-1].set_xlim(edges[0], 1.0)
        rows[-1].set_xlabel("cosine of the two embeddings  (dashed: threshold of equal error)")
        _legend(figure, rows[0], theme)

    return _picture(draw, HEIGHT + 0.4, f"Histograms of cosines of same and different people: {', '.join(results)}.")


def loss_plot(metrics: Metrics) -> Picture | None:
    """Training loss over steps, raw and smoothed; None where the log has no loss."""
    return _history(metrics, {"loss": ("loss", 0)}, "loss", "Training loss over steps.")


def cosines_plot(metrics: Metrics) -> Picture | None:
    """Mean target and nearest-negative cosine over steps: the gap between them is what the margin opens."""
    lines = {"target_cosine": ("target class", 0), "nearest_cosine": ("nearest other class", -1)}
    return _history(
        metrics, lines, "cosine", "Mean cosine to the target class and to the nearest other class over steps."
    )


def probability_plot(metrics: Metrics) -> Picture | None:
    """Mean p_y over steps: the probability the margin softmax gives the true class."""
    return _history(
        metrics, {"target_probability": ("p_y", 0)}, "mean p_y", "Mean probability of the true class over steps."
    )


def accuracy_plot(metrics: Metrics) -> Picture | None:
    """Verification accuracy during training, one line for every logged `val/<name>`; None where there is none."""
    keys = list(dict.fromkeys(key for row in metrics for key in row if key.startswith("val/") and key.count("/") == 1))
    one_set = len({key.partition("@")[0] for key in keys}) == 1
    lines = {key: (_condition(key.removeprefix("val/"), one_set), i) for i, key in enumerate(keys)}
    return _history(metrics, lines, "accuracy", "Verification accuracy during training.", verification=True)


def _condition(name: str, one_set: bool) -> str:
    """What val/holdout@16 is called: the pair set holdout taken down to 16x16; a lone set needs no name."""
    base, _, side = name.partition("@")
    size = f"{side}x{side}" if side else "full size"
    return size if one_set else f"{base}, {size}"


def series_of(metrics: Metrics, key: str) -> tuple[FloatArray, FloatArray]:
    """(steps, values) of the rows that have a finite number under `key`."""
    rows = [
        (float(row.get("step", i)), float(row[key]))
        for i, row in enumerate(metrics)
        if isinstance(row.get(key), (int, float)) and np.isfinite(row[key])
    ]
    pairs = np.array(rows, dtype=np.float64).reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1]


def _history(
    metrics: Metrics,
    lines: Mapping[str, tuple[str, int]],  # key -> (label, index of its colour; -1 the impostor colour)
    ylabel: str,
    alt: str,
    verification: bool = False,  # few points, in percent
) -> Picture | None:
    found = {key: series_of(metrics, key) for key in lines}
    if not any(len(steps) for steps, _ in found.values()):
        return None

    def draw(figure: Figure, theme: Theme) -> None:
        axes = _axes(figure, theme)
        for key, (steps, values) in found.items():
            label, index = lines[key]
            colour = theme.impostor if index < 0 else _series(theme, index)
            if verification or len(values) < 40:
                axes.plot(
                    steps, values, color=colour, lw=1.8, marker="o" if verification else None, ms=3.5, label=label
                )
            else:
                axes.plot(steps, values, color=colour, lw=0.8, alpha=0.3)
                axes.plot(steps, _smooth(values), color=colour, lw=1.8, label=label)
        axes.set_xlabel("step")
        axes.set_ylabel(ylabel)
        axes.margins(x=0.01)
        if verification:
            axes.yaxis.set_major_formatter(_percent_ticks())
        if len(lines) > 1:
            _legend(figure, axes, theme)

    return _picture(draw, HEIGHT - 0.4, alt)


def _smooth(values: FloatArray) -> FloatArray:
    """Centred moving mean over a twentieth of the run; at the ends over what there is."""
    half = max(1, len(values) // 40)
    total = np.concatenate([[0.0], np.cumsum(values)])
    last = np.minimum(np.arange(len(values)) + half + 1, len(values))
    first = np.maximum(np.arange(len(values)) - half, 0)
    smoothed: FloatArray = (total[last] - total[first]) / (last - first)
    return smoothed


def _series(theme: Theme, i: int) -> str:
    return theme.series[i % len(theme.series)]


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _percent_ticks() -> Any:
    from matplotlib.ticker import FuncFormatter

    return FuncFormatter(lambda value, _: f"{100 * value:g} %")


def _axes(figure: Figure, theme: Theme) -> Axes:
    axes = figure.subplots()
    _style(axes, theme)
    return axes


def _style(axes: Axes, theme: Theme) -> None:
    axes.set_facecolor("none")
    axes.grid(True, color=theme.grid, lw=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(theme.baseline)
        axes.spines[side].set_linewidth(0.8)
    axes.tick_params(which="both", colors=theme.muted, width=0.8, length=3)
    axes.tick_params(which="minor", length=0)
    axes.xaxis.label.set_color(theme.muted)
    axes.yaxis.label.set_color(theme.muted)


def _legend(figure: Figure, axes: Axes, theme: Theme) -> None:
    """One row above the plot, where it can hide no curve."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside upper left",
        ncols=len(labels),
        frameon=False,
        labelcolor=theme.text,
        handlelength=1.4,
        handletextpad=0.5,
        columnspacing=1.3,
        borderaxespad=0.1,
    )


def _picture(draw: Callable[[Figure, Theme], None], height: float, alt: str, width: float = WIDTH) -> Picture:
    """Drawn once: layout is most of the time, and the dark version differs in colours only."""
    light = _svg(draw, height, width)

    def render(kind: str, dpi: float) -> bytes:
        return _file(draw, (width, height), kind, dpi)

    return Picture(_data_uri(light), _data_uri(_darkened(light)), alt, render)


def _file(draw: Callable[[Figure, Theme], None], size: tuple[float, float], kind: str, dpi: float) -> bytes:
    """The drawing in light colours as a file; the same drawing gives the same bytes: no date, fixed element ids."""
    import matplotlib
    from matplotlib.figure import Figure

    # rc_context puts every setting back; a bare Figure never registers with pyplot, so no window system is touched.
    with matplotlib.rc_context({"font.size": FONT, "svg.fonttype": "none", "svg.hashsalt": "recog_fast"}):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure, LIGHT)
        out = io.BytesIO()
        metadata = {"svg": {"Date": None, "Creator": None}, "pdf": {"CreationDate": None}}.get(kind)
        figure.savefig(out, format=kind, dpi=dpi, transparent=kind == "svg", metadata=metadata)
    return out.getvalue()


def _svg(draw: Callable[[Figure, Theme], None], height: float, width: float = WIDTH) -> str:
    # Text stays text and takes the reader's own interface font instead of matplotlib's.
    text = _file(draw, (width, height), "svg", 150).decode("utf-8")
    return re.sub(r"font-family: [^;\"]+", "font-family: " + FONT_STACK, text)


def _darkened(svg: str) -> str:
    """Every colour of the light theme becomes its partner of the dark one."""
    names = ("text", "muted", "grid", "genuine", "impostor", "baseline")
    partners = {getattr(LIGHT, name): getattr(DARK, name) for name in names}
    partners.update(zip(LIGHT.series, DARK.series, strict=True))
    return re.sub("|".join(partners), lambda found: partners[found.group()], svg)


def _data_uri(svg: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()
