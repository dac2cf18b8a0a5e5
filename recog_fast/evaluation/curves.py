"""ROC and DET curves with bootstrap bands: what a pair set says, and how sure it is of that."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np

from recog_fast.evaluation._arrays import BoolArray, FloatArray
from recog_fast.evaluation.drawing import (
    HEIGHT,
    Picture,
    Theme,
    axes_of,
    dashes,
    legend,
    percent,
    percent_ticks,
    picture,
    series_colour,
)
from recog_fast.evaluation.embed import VerificationResult
from recog_fast.evaluation.verification import roc_curve

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Results = Mapping[str, VerificationResult]
_BINS = 4096  # of scores in a resample: any number of pairs costs the same
_TICKS = (1e-5, 1e-4, 1e-3, 1e-2, 0.05, 0.2, 0.4, 0.6, 0.8, 0.95)
BAND = "Band: 95 % of the bootstrap resamples of the pairs."


def tar_band(
    scores: FloatArray,  # (P,)
    same: BoolArray,  # (P,)
    fars: FloatArray,  # (F,) ascending
    level: float = 0.95,
    resamples: int = 200,
    seed: int = 0,
) -> tuple[FloatArray, FloatArray]:
    """(low, high), (F,) each: pointwise percentile-bootstrap interval of the conservative TAR at each FAR.

    Genuine and impostor pairs are drawn again with replacement, each kind apart, and the threshold is found anew, so both
    kinds' uncertainty is in it. Pairs count as independent: where they share images or people, as they usually do, the
    true interval is wider. Above 4096 distinct scores they are first put into 4096 bins of equal counts.
    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, section 13.3.
    """
    edges = np.unique(scores)
    if len(edges) > _BINS:
        edges = np.unique(np.quantile(scores, np.linspace(0, 1, _BINS), method="lower"))
    rng = np.random.default_rng(seed)
    places = np.searchsorted(edges, scores, side="right") - 1
    rates = []
    for mask in (~same, same):
        count = np.bincount(places[mask], minlength=len(edges))
        drawn = rng.multinomial(int(mask.sum()), count / count.sum(), size=resamples)[:, ::-1].cumsum(axis=1)
        rates.append(np.pad(drawn / mask.sum(), ((0, 0), (1, 0))))
    tars = np.stack(
        [t[np.searchsorted(f, fars * (1 + 1e-12), side="right") - 1] for f, t in zip(*rates, strict=True)]
    )
    low, high = np.quantile(tars, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return low, high


def tar_on(fars: FloatArray, result: VerificationResult) -> FloatArray:
    """TAR at the last operating point with FAR <= fars: a curve of millions of pairs stays a small picture."""
    far, tar, _ = roc_curve(result.scores, result.same)
    on_grid: FloatArray = tar[np.searchsorted(far, fars * (1 + 1e-12), side="right") - 1]
    return on_grid


def _grid(results: Results) -> FloatArray:
    lowest = min(0.5, *(1.0 / np.count_nonzero(~r.same) for r in results.values()))
    grid: FloatArray = np.geomspace(lowest, 1, 240)
    return grid


def roc_plot(results: Results, baseline: Results | None = None, baseline_name: str = "untrained") -> Picture:
    """True accept rate over false accept rate (log), one curve with its band a condition; baselines grey, chance dotted."""
    grid = _grid(results)
    bands = {name: tar_band(r.scores, r.same, grid) for name, r in results.items()}

    def draw(figure: Figure, theme: Theme) -> None:
        axes = axes_of(figure, theme)
        for i, (name, result) in enumerate(results.items()):
            colour = series_colour(theme, i)
            axes.fill_between(grid, *bands[name], step="post", color=colour, alpha=0.16, lw=0, zorder=2)
            axes.step(grid, tar_on(grid, result), where="post", color=colour, lw=1.8, ls=dashes(i), label=name, zorder=3)
        for i, result in enumerate((baseline or {}).values()):
            label = baseline_name if i == 0 else None
            axes.step(grid, tar_on(grid, result), where="post", color=theme.baseline, lw=1.0, label=label, zorder=2)
        axes.plot(grid[::6], grid[::6], color=theme.baseline, lw=1.0, ls=":", label="chance", zorder=1)
        axes.set_xscale("log")
        axes.set_xlim(grid[0], 1)
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("false accept rate (log)")
        axes.set_ylabel("true accept rate")
        axes.xaxis.set_major_formatter(percent_ticks())
        axes.yaxis.set_major_formatter(percent_ticks())
        legend(figure, axes, theme)

    names = ", ".join(f"{name}: EER {percent(r.eer)}" for name, r in results.items())
    return picture(draw, HEIGHT + 0.4, f"ROC curves with 95 % bands, true accept rate over false accept rate. {names}.")


def det_plot(results: Results, baseline: Results | None = None, baseline_name: str = "untrained") -> Picture:
    """Both error rates on normal-deviate axes, where Gaussian scores make straight lines (Martin et al., The DET curve, 1997)."""
    grid = _grid(results)
    bands = {name: tar_band(r.scores, r.same, grid) for name, r in results.items()}
    least = min(float(grid[0]), *(0.5 / np.count_nonzero(r.same) for r in results.values()))

    def probit(rates: FloatArray) -> FloatArray:
        inverse = NormalDist().inv_cdf
        return np.array([inverse(float(p)) for p in np.clip(rates, least, 1 - least)])

    def draw(figure: Figure, theme: Theme) -> None:
        axes = axes_of(figure, theme)
        x = probit(grid)
        for i, (name, result) in enumerate(results.items()):
            colour = series_colour(theme, i)
            low, high = (probit(1 - tar) for tar in bands[name])
            axes.fill_between(x, high, low, step="post", color=colour, alpha=0.16, lw=0, zorder=2)
            y = probit(1 - tar_on(grid, result))
            axes.step(x, y, where="post", color=colour, lw=1.8, ls=dashes(i), label=name, zorder=3)
        for i, result in enumerate((baseline or {}).values()):
            label = baseline_name if i == 0 else None
            axes.step(x, probit(1 - tar_on(grid, result)), where="post", color=theme.baseline, lw=1.0, label=label)
        axes.plot(x, x, color=theme.baseline, lw=1.0, ls=":", label="equal error", zorder=1)
        shown = np.array([tick for tick in _TICKS if tick >= least])
        for set_ticks in (axes.set_xticks, axes.set_yticks):
            set_ticks(probit(shown), [f"{100 * tick:g} %" for tick in shown])
        high_end = probit(np.array([0.97]))[0]
        axes.set_xlim(probit(grid[:1])[0], high_end)
        axes.set_ylim(probit(np.array([least]))[0], high_end)
        axes.tick_params(axis="x", labelsize=FONT_SMALL)
        axes.set_xlabel("false accept rate (normal deviate)")
        axes.set_ylabel("false reject rate")
        legend(figure, axes, theme)

    names = ", ".join(f"{name}: EER {percent(r.eer)}" for name, r in results.items())
    return picture(draw, HEIGHT + 0.4, f"DET curves with 95 % bands, false reject rate over false accept rate. {names}.")


FONT_SMALL = 8.0
