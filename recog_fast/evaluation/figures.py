"""The papers' figures (ERS, RI, QAFace, UIR) as pictures for a report page or a file: `Picture.save("figure.png")`.

Every function takes plain numbers and draws nothing that was not given to it; matplotlib is imported when one is drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from recog_fast.evaluation._arrays import FloatArray, floats, unit_rows
from recog_fast.evaluation.drawing import (
    HEIGHT,
    WIDTH,
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
from recog_fast.evaluation.erc import QualityComparison
from recog_fast.evaluation.gallery import Gallery, GalleryItem

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Values = ArrayLike | torch.Tensor
Image = NDArray[np.uint8]

_MANY = 400  # points beyond which a scatter becomes pixels inside the SVG


def ui_distance_plot(distances: Mapping[str, Values], threshold: float | None = None) -> Picture:
    """Histogram of the distance to the UI centre 1 - <f_UI, f> (not capped), all images and each condition (ERS: bimodal).

    distances: condition ("clean", "16x16", "8x8") -> (N,). threshold: a dashed line, e.g. gamma = 0.6.
    """
    groups = _groups("ui_distance_plot", distances)
    everything = np.concatenate(list(groups.values()))
    edges = np.linspace(min(0.0, float(everything.min())), float(everything.max()) + 1e-6, 49)

    def draw(figure: Figure, theme: Theme) -> None:
        axes = axes_of(figure, theme)
        axes.stairs(_share(everything, edges), edges, color=theme.muted, fill=True, alpha=0.18, lw=0, label="all")
        for i, (name, values) in enumerate(groups.items()):
            share = _share(values, edges) * len(values) / len(everything)
            axes.stairs(share, edges, color=series_colour(theme, i), lw=1.5, ls=dashes(i), label=name)
        _threshold(axes, theme, threshold)
        axes.set_xlabel("distance to the UI centre")
        axes.set_ylabel("share of all images")
        axes.set_xlim(edges[0], edges[-1])
        legend(figure, axes, theme)

    return picture(draw, HEIGHT, f"Histogram of the distance to the UI centre: {', '.join(groups)}.")


def quality_histograms(stages: Mapping[str, Mapping[str, Values]], xlabel: str = "recognizability") -> Picture:
    """Histograms of a quality (recognizability, feature norm) by resolution, one row a training stage, one scale for all.

    stages: stage ("epoch 1", ...) -> condition -> (N,) values; every stage the same conditions.
    """
    rows = {name: _groups("quality_histograms", groups) for name, groups in stages.items()}
    if not rows or len({tuple(groups) for groups in rows.values()}) != 1:
        raise ValueError(
            f"quality_histograms: expected stages of the same conditions, got {[list(g) for g in rows.values()]}"
        )
    everything = np.concatenate([values for groups in rows.values() for values in groups.values()])
    edges = np.linspace(float(everything.min()), float(everything.max()) + 1e-6, 49)

    def draw(figure: Figure, theme: Theme) -> None:
        panels = figure.subplots(len(rows), 1, sharex=True, squeeze=False)[:, 0]
        for axes, (stage, groups) in zip(panels, rows.items(), strict=True):
            style(axes, theme)
            for i, (name, values) in enumerate(groups.items()):
                share = _share(values, edges)
                axes.stairs(share, edges, color=series_colour(theme, i), fill=True, alpha=0.2, lw=0)
                axes.stairs(share, edges, color=series_colour(theme, i), lw=1.3, ls=dashes(i), label=name)
            bare(axes)
            axes.set_ylim(0, None)
            # Above the panel, where no hump can run through it.
            if len(rows) > 1:
                axes.set_title(stage, loc="left", parse_math=False, fontsize="medium", color=theme.text, pad=2)
        panels[-1].set_xlim(edges[0], edges[-1])
        panels[-1].set_xlabel(xlabel)
        figure.supylabel("share of the images (linear)", color=theme.muted, fontsize="medium")
        legend(figure, panels[0], theme)

    alt = f"Histograms of {xlabel} by resolution at {', '.join(rows)}."
    return picture(draw, 1.0 + 1.15 * max(len(rows), 1.4), alt)


def scatter_plot(
    groups: Mapping[str, tuple[Values, Values]],  # condition -> (x (N,), y (N,))
    xlabel: str,
    ylabel: str,
    *,
    diagonal: bool = False,
    correlation: bool = False,
) -> Picture:
    """Points of several conditions. What the next four figures share, and any other pair of numbers of an image.

    correlation: Spearman's rank correlation over all points, in the corner of the legend's row.
    """
    where = "scatter_plot"
    checked = {name: (floats(where, "x", x, 1), floats(where, "y", y, 1)) for name, (x, y) in groups.items()}
    for name, (x, y) in checked.items():
        if x.shape != y.shape or x.size == 0:
            raise ValueError(f"{where}: expected x and y of one length in {name!r}, got {x.shape} and {y.shape}")
    if not checked:
        raise ValueError(f"{where}: expected at least one group of points, got none")
    allx, ally = (np.concatenate([points[k] for points in checked.values()]) for k in (0, 1))
    rho = rank_correlation(allx, ally) if correlation and len(allx) > 2 else None

    def draw(figure: Figure, theme: Theme) -> None:
        axes = axes_of(figure, theme)
        for i, (name, (x, y)) in enumerate(checked.items()):
            axes.scatter(
                x, y, s=9 if len(allx) > _MANY else 16, color=series_colour(theme, i), alpha=0.45 if len(allx) > _MANY else 0.75,
                lw=0, label=name, rasterized=len(allx) > _MANY, zorder=3,
            )  # fmt: skip
        if diagonal:
            low, high = min(allx.min(), ally.min()), max(allx.max(), ally.max())
            axes.plot([low, high], [low, high], color=theme.baseline, lw=1.0, ls=(0, (4, 2)), zorder=2)
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        if len(checked) > 1:
            legend(figure, axes, theme)
        if rho is not None:
            # In the title's row, right: the legend keeps the left.
            axes.set_title(f"rank correlation {rho:+.2f}", loc="right", fontsize="medium", color=theme.muted)

    words = f" Rank correlation {rho:+.2f}." if rho is not None else ""
    return picture(draw, HEIGHT + 0.4, f"{ylabel} against {xlabel}: {', '.join(checked)}.{words}")


def norm_against_center_plot(groups: Mapping[str, tuple[Values, Values]]) -> Picture:
    """Feature norm against the cosine to the UI centre, condition -> (norms (N,), cosines (N,)) (ERS)."""
    turned = {name: (cosines, norms) for name, (norms, cosines) in groups.items()}
    return scatter_plot(turned, "cosine to the UI centre", "feature norm", correlation=True)


def similarity_agreement_plot(first: Values, second: Values, names: tuple[str, str]) -> Picture:
    """Cosines of the same genuine pairs under two models; points above the diagonal are more alike in the second (UIR, RI)."""
    return scatter_plot({"genuine pairs": (first, second)}, f"cosine, {names[0]}", f"cosine, {names[1]}", diagonal=True)


def probability_against_cosine_plot(groups: Mapping[str, tuple[Values, Values]]) -> Picture:
    """p_y against the target cosine, condition -> (cosines (N,), p_y (N,)): what the loss still has to learn (QAFace)."""
    return scatter_plot(groups, "cosine to the own prototype", "p_y")


def score_comparison_plot(
    first: Values, second: Values, names: tuple[str, str], groups: Sequence[str] | None = None
) -> Picture:
    """One quality score against another of the same images, with their rank correlation; groups (N,): colour by condition."""
    x, y = floats("score_comparison_plot", "first", first, 1), floats("score_comparison_plot", "second", second, 1)
    which = np.asarray(groups if groups is not None else ["images"] * len(x))
    if not len(x) == len(y) == len(which):
        raise ValueError(
            f"score_comparison_plot: expected second and groups of length {len(x)}, got {len(y)} and {len(which)}"
        )
    order = list(dict.fromkeys(which.tolist()))
    return scatter_plot({str(g): (x[which == g], y[which == g]) for g in order}, names[0], names[1], correlation=True)


def rank_correlation(first: Values, second: Values) -> float:
    """Spearman's rho: Pearson correlation of the ranks, ties at their mean rank; 0 where one is constant."""
    a, b = (floats("rank_correlation", name, v, 1) for name, v in (("first", first), ("second", second)))
    if a.shape != b.shape or a.size < 2:
        raise ValueError(
            f"rank_correlation: expected two arrays of one length of at least 2, got {a.shape} and {b.shape}"
        )
    ranks = []
    for values in (a, b):
        _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(counts) - (counts - 1) / 2)[inverse.ravel()])
    x, y = (r - r.mean() for r in ranks)
    scale = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / scale if scale > 0 else 0.0


def embedding_plot(groups: Mapping[str, Values], center: Values | None = None) -> Picture:
    """Unit embeddings in the plane of their two largest principal components, condition -> (N, D); the UI centre as a cross.

    The plane is that of the given rows (no sampling, no random start): the share of variance it holds is in the axes'
    names.
    """
    where = "embedding_plot"
    rows = {name: unit_rows(floats(where, name, x, 2)) for name, x in groups.items()}
    if not rows or len({x.shape[1] for x in rows.values()}) != 1 or sum(map(len, rows.values())) < 3:
        raise ValueError(
            f"{where}: expected three or more embeddings of one width, got {[x.shape for x in rows.values()]}"
        )
    everything = np.concatenate(list(rows.values()))
    mean = everything.mean(axis=0)
    _, singular, principal = np.linalg.svd(everything - mean, full_matrices=False)
    plane = principal[:2].T
    # A principal axis has no sign of its own: its largest entry is made positive, on every machine.
    plane = plane * np.sign(plane[np.abs(plane).argmax(axis=0), [0, 1]])
    share = singular[:2] ** 2 / (singular**2).sum()
    place = None if center is None else (unit_rows(floats(where, "center", center, 1)[None])[0] - mean) @ plane

    def draw(figure: Figure, theme: Theme) -> None:
        axes = axes_of(figure, theme)
        for i, (name, x) in enumerate(rows.items()):
            at = (x - mean) @ plane
            axes.scatter(
                at[:, 0], at[:, 1], s=9, color=series_colour(theme, i), alpha=0.5, lw=0, label=name,
                rasterized=len(everything) > _MANY, zorder=3,
            )  # fmt: skip
        if place is not None:
            axes.plot(*place, marker="x", ms=9, mew=2.2, ls="", color=theme.impostor, label="UI centre", zorder=4)
        axes.set_xlabel(f"first principal component ({100 * share[0]:.0f} % of the variance)")
        axes.set_ylabel(f"second ({100 * share[1]:.0f} %)")
        axes.set_aspect("equal", adjustable="datalim")
        legend(figure, axes, theme)

    return picture(draw, HEIGHT + 1.0, f"Embeddings in two principal components: {', '.join(rows)}.")


def erc_plot(comparison: QualityComparison) -> Picture:
    """Error-versus-reject curves of several quality measures under one protocol, which is under the axis; random dotted."""

    def draw(figure: Figure, theme: Theme) -> None:
        axes = axes_of(figure, theme)
        for i, (name, curve) in enumerate(comparison.curves.items()):
            chance = name == "random"
            axes.plot(
                comparison.reject, curve, color=theme.baseline if chance else series_colour(theme, i), lw=1.2 if chance else 1.8,
                ls=":" if chance else dashes(i), label=f"{name} {comparison.areas[name]:.3f}", zorder=2 if chance else 3,
            )  # fmt: skip
        axes.set_xlim(0, comparison.reject[-1])
        axes.set_ylim(0, None)
        axes.set_ylabel("false non-match rate")
        axes.xaxis.set_major_formatter(percent_ticks())
        axes.yaxis.set_major_formatter(percent_ticks())
        protocol, _, quality = comparison.protocol.partition(", pair quality")
        axes.set_xlabel(f"pairs rejected\n{protocol.replace(', ', ',' + chr(10), 1)},\npair quality{quality}; area by name")
        legend(figure, axes, theme)

    areas = ", ".join(f"{name} area {area:.3f}" for name, area in comparison.areas.items())
    return picture(draw, HEIGHT + 0.7, f"Error-versus-reject curves. {comparison.protocol}. {areas}.")


def template_weights_plot(templates: Sequence[tuple[Sequence[Image], Values]]) -> Picture:
    """What ERS weighting does inside templates: each image's share of the sum under its picture, the plain 1 / n dashed.

    templates: (images (H, W, 3) uint8, weights (n,)) of each template, a row each. Raises ValueError for weights that are
    negative or do not match the images.
    """
    where = "template_weights_plot"
    rows = [(list(images), floats(where, "weights", weights, 1)) for images, weights in templates]
    if not rows:
        raise ValueError(f"{where}: expected at least one template, got none")
    for images, weights in rows:
        if not images or len(images) != len(weights) or (weights < 0).any():
            raise ValueError(
                f"{where}: expected a weight >= 0 for each of the {len(images)} images, got {weights.tolist()}"
            )
    columns = max(len(images) for images, _ in rows)

    def draw(figure: Figure, theme: Theme) -> None:
        grid = figure.add_gridspec(2 * len(rows), columns, height_ratios=[1.0, 0.55] * len(rows))
        for r, (images, weights) in enumerate(rows):
            share = weights / weights.sum() if weights.sum() > 0 else np.full(len(weights), 1 / len(weights))
            for c, image in enumerate(images):
                top: Axes = figure.add_subplot(grid[2 * r, c])
                top.imshow(image)
                top.axis("off")
            below = figure.add_subplot(grid[2 * r + 1, :])
            style(below, theme)
            below.bar(range(len(images)), share, width=0.62, color=theme.genuine, alpha=0.85)
            below.axhline(1 / len(images), color=theme.muted, lw=1.0, ls=(0, (3, 2)))
            below.set_xlim(-0.5, columns - 0.5)
            below.set_ylim(0, 1.15 * max(float(share.max()), 1 / len(images)))
            bare(below)
            # Under the bars: a number on a bar meets the dashed line sooner or later.
            below.set_xticks(range(len(images)), [f"{value:.2f}" for value in share])
            below.tick_params(axis="x", length=0, colors=theme.text)
        below.set_xlabel("share of the sum: ERS (bars), plain average (dashed)")

    alt = f"Weights of the images of {len(rows)} templates by ERS against the plain average."
    return picture(draw, 0.5 + len(rows) * 1.65 * min(1.0, 5 / columns), alt, WIDTH)


def ui_cluster_gallery(images: Sequence[Image], embeddings: Values, center: Values, count: int = 12) -> Gallery:
    """Gallery of the `count` images nearest to the UI centre, nearest first, with their ERS: what nobody can recognize."""
    where = "ui_cluster_gallery"
    rows, middle = floats(where, "embeddings", embeddings, 2), floats(where, "center", center, 1)
    if len(rows) != len(images) or rows.shape[1] != len(middle):
        raise ValueError(f"{where}: expected embeddings ({len(images)}, {len(middle)}), got {rows.shape}")
    distance: FloatArray = 1.0 - unit_rows(rows) @ unit_rows(middle[None])[0]
    order = np.argsort(distance, kind="stable")[:count]
    items = [GalleryItem(images[i], f"ERS {min(distance[i], 1.0):.2f}") for i in order]
    return Gallery("UI cluster", "The images nearest to the UI centre, nearest first.", items)


def _groups(where: str, groups: Mapping[str, Values]) -> dict[str, FloatArray]:
    checked = {name: floats(where, name, values, 1) for name, values in groups.items()}
    if not checked or any(values.size == 0 for values in checked.values()):
        raise ValueError(f"{where}: expected values in every condition, got sizes {[v.size for v in checked.values()]}")
    return checked


def _share(values: FloatArray, edges: FloatArray) -> FloatArray:
    """Share of the values in each bin."""
    counts = np.histogram(values, edges)[0]
    return np.asarray(counts / len(values), dtype=np.float64)


def _threshold(axes: Axes, theme: Theme, threshold: float | None) -> None:
    if threshold is not None:
        axes.axvline(threshold, color=theme.muted, lw=1.0, ls=(0, (3, 2)), label=f"threshold {threshold:g}")
