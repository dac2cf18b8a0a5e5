"""Plots of a run: cosines of its pairs, and curves over its training steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from recog_fast.evaluation._arrays import FloatArray
from recog_fast.evaluation.drawing import (
    HEIGHT,
    Picture,
    Theme,
    axes_of,
    bare,
    dashes,
    legend,
    percent_ticks,
    picture,
    series_colour,
    style,
)
from recog_fast.evaluation.embed import VerificationResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Metrics = Sequence[Mapping[str, Any]]  # rows of a metrics.jsonl
POINTS = 300  # drawn of a curve


def cosine_plot(results: Mapping[str, VerificationResult]) -> Picture:
    """Histograms of genuine and impostor cosines, one row a condition, with the threshold of equal error."""
    low = min(-0.2, min(float(r.scores.min()) for r in results.values()))
    edges = np.linspace(max(low, -1.0), 1.0, 61)

    def draw(figure: Figure, theme: Theme) -> None:
        rows = figure.subplots(len(results), 1, sharex=True, squeeze=False)[:, 0]
        for axes, (name, result) in zip(rows, results.items(), strict=True):
            style(axes, theme)
            for mask, colour, label in (
                (result.same, theme.genuine, "same person"),
                (~result.same, theme.impostor, "different people"),
            ):
                share = np.histogram(result.scores[mask], edges)[0] / np.count_nonzero(mask)
                axes.stairs(share, edges, color=colour, fill=True, alpha=0.22, lw=0)
                axes.stairs(share, edges, color=colour, lw=1.4, label=label)
            axes.axvline(result.threshold, color=theme.muted, lw=1.0, ls=(0, (3, 2)))
            axes.text(0.012, 0.86, name, transform=axes.transAxes, color=theme.text, va="top")
            bare(axes)
            axes.set_ylim(0, None)
        rows[-1].set_xlim(edges[0], 1.0)
        rows[-1].set_xlabel("cosine of the two embeddings")
        figure.supylabel("share of the pairs (linear)", color=theme.muted, fontsize="medium")
        legend(figure, rows[0], theme)

    return picture(draw, HEIGHT + 0.4, f"Histograms of cosines of same and different people: {', '.join(results)}.")


# name -> keys of the log with their labels, name of the y axis, what the curve shows in words
_HISTORIES: dict[str, tuple[dict[str, str], str, str]] = {
    "loss": ({"loss": "loss"}, "loss (nats)", "Training loss over steps."),
    "cosines": (
        {"target_cosine": "target class", "nearest_cosine": "nearest other class"},
        "cosine",
        "Mean cosine to the target class and to the nearest other class over steps.",
    ),
    "probability": (
        {"target_probability": "p_y, known people", "unknown_max_probability": "p_max, unknown people"},
        "mean probability",
        "Mean probability of the true class over steps, and largest one of unlabelled rows.",
    ),
    "lr": ({"lr": "learning rate"}, "learning rate", "Learning rate over steps."),
    "norm": ({"feature_norm": "feature norm"}, "mean feature norm", "Mean norm of the embeddings over steps."),
    "index": (
        {"recognizability/index": "index", "recognizability/predicted": "predicted"},
        "recognizability index",
        "Mean recognizability index and its prediction over steps.",
    ),
    "speed": ({"images_per_second": "images"}, "images per second", "Training images per second over steps."),
    "memory": ({"peak_memory_mb": "peak"}, "peak memory (MB)", "Peak memory of the training process over steps."),
}


def history_plot(metrics: Metrics, name: str) -> Picture | None:
    """A curve of the log over steps, raw pale and smoothed: loss, cosines (target and nearest negative: the gap is what the
    margin opens), probability, lr, norm, index, speed or memory; None where the log has none of its keys."""
    lines, ylabel, alt = _HISTORIES[name]
    colours = {"nearest_cosine": -1}
    return _history(metrics, {k: (label, colours.get(k, i)) for i, (k, label) in enumerate(lines.items())}, ylabel, alt)


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
    found = {key: _thin(*points) for key, points in found.items() if len(points[0])}
    if not found:
        return None

    def draw(figure: Figure, theme: Theme) -> None:
        axes = axes_of(figure, theme)
        for key, (steps, values) in found.items():
            label, index = lines[key]
            colour = theme.impostor if index < 0 else series_colour(theme, index)
            ls = dashes(abs(index))
            if verification or len(values) < 40:
                marker = "o" if verification or len(values) == 1 else None
                axes.plot(steps, values, color=colour, lw=1.8, ls=ls, marker=marker, ms=3.5, label=label)
            else:
                axes.plot(steps, values, color=colour, lw=0.8, alpha=0.35)
                axes.plot(steps, _smooth(values), color=colour, lw=1.8, ls=ls, label=label)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel(ylabel)
        axes.margins(x=0.01)
        # The last tick label of a long run would leave the picture.
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(_short))
        if verification:
            axes.yaxis.set_major_formatter(percent_ticks())
        if len(found) > 1:
            legend(figure, axes, theme)

    from matplotlib.ticker import FuncFormatter, MaxNLocator

    return picture(draw, HEIGHT, alt)


def _short(value: float, _: int = 0) -> str:
    """1500000 -> 1.5M, 20000 -> 20k."""
    for size, letter in ((1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'k' else size):g}{letter}"
    return f"{value:g}"


def _thin(steps: FloatArray, values: FloatArray) -> tuple[FloatArray, FloatArray]:
    """At most POINTS points, each the mean of neighbours: a run of millions of steps stays a small picture."""
    if len(steps) <= POINTS:
        return steps, values
    parts = np.array_split(np.arange(len(steps)), POINTS)
    return steps[[part[-1] for part in parts]], np.array([values[part].mean() for part in parts])


def _smooth(values: FloatArray) -> FloatArray:
    """Centred moving mean over a twentieth of the run; at the ends over what there is."""
    half = max(1, len(values) // 40)
    total = np.concatenate([[0.0], np.cumsum(values)])
    last = np.minimum(np.arange(len(values)) + half + 1, len(values))
    first = np.maximum(np.arange(len(values)) - half, 0)
    smoothed: FloatArray = (total[last] - total[first]) / (last - first)
    return smoothed
