"""The papers' figures: drawn, saved, the same bytes twice; texts never overlap; bad input refused."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recog_fast.evaluation import compare_qualities, figures
from recog_fast.evaluation.drawing import Picture

pytest.importorskip("matplotlib")

rng = np.random.default_rng(2)
N = 60
LEVELS = {"clean": 1.0, "16x16": 0.65, "8x8": 0.2}
DISTANCES = {name: middle + 0.08 * rng.normal(size=N) for name, middle in LEVELS.items()}
NORMS = {name: 10 * middle + 8 + rng.normal(size=N) for name, middle in LEVELS.items()}
ROWS = {name: middle * rng.normal(size=(N, 8)) + (1 - middle) * 4 for name, middle in LEVELS.items()}
CENTER = np.ones(8)
SAME = np.arange(400) % 2 == 0
SCORES = rng.normal(size=400) + SAME
IMAGES = list(rng.integers(0, 256, (5, 12, 12, 3), dtype=np.uint8))

DRAWN: dict[str, Callable[[], Picture]] = {
    "ui_distance": lambda: figures.ui_distance_plot(DISTANCES, 0.6),
    "quality": lambda: figures.quality_histograms(
        {"epoch 1": NORMS, "epoch 2": NORMS, "epoch 4": NORMS}, "feature norm"
    ),
    "norm_center": lambda: figures.norm_against_center_plot({k: (NORMS[k], 1 - DISTANCES[k]) for k in LEVELS}),
    "agreement": lambda: figures.similarity_agreement_plot(SCORES[SAME], SCORES[SAME] + 0.1, ("without", "with")),
    "probability": lambda: figures.probability_against_cosine_plot({"full size": (np.linspace(-1, 1, 50), np.linspace(0, 1, 50))}),
    "embedding": lambda: figures.embedding_plot(ROWS, CENTER),
    "comparison": lambda: figures.score_comparison_plot(
        np.concatenate([*DISTANCES.values()]), np.concatenate([*NORMS.values()]), ("ERS", "RI"), np.repeat([*LEVELS], N)
    ),
    "erc": lambda: figures.erc_plot(
        compare_qualities(SCORES, SAME, {"ERS": rng.random(400), "norm": SCORES}, 0.1, fixed_threshold=False)
    ),
    "templates": lambda: figures.template_weights_plot([(IMAGES, [0.1, 0.5, 1.0, 0.9, 0.2]), (IMAGES[:3], [0, 0, 0])]),
}


@pytest.mark.parametrize("name", DRAWN)
def test_no_text_lies_on_another(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every visible text's box against every other's, and inside the page; and both themes are whole SVGs."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    keep = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (keep(self, *a, **k), drawn.append(self))[0])
    picture = DRAWN[name]()
    ElementTree.fromstring(picture.svg)
    assert picture.alt
    figure = drawn[0]
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    boxes = [(t.get_text(), t.get_window_extent(renderer)) for t in _drawn_texts(figure)]
    assert len(boxes) >= 4
    for i, (text, box) in enumerate(boxes):
        assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= figure.bbox.width + 1 and box.y1 <= figure.bbox.height + 1, (
            text
        )
        for other, another in boxes[:i]:
            apart = box.x1 <= another.x0 or another.x1 <= box.x0 or box.y1 <= another.y0 or another.y1 <= box.y0
            assert apart, (text, other)


def _drawn_texts(figure: Any) -> list[Any]:
    """Legend, titles, axis names, annotations and the tick labels in view (others are made and not drawn)."""
    texts = [text for legend in figure.legends for text in legend.get_texts()]
    for axes in figure.axes:
        if axes.axison:
            texts += [axes.title, axes._left_title, axes._right_title, axes.xaxis.label, axes.yaxis.label, *axes.texts]
            texts += [tick.label1 for axis in (axes.xaxis, axes.yaxis) for tick in axis._update_ticks()]
    return [text for text in texts if text.get_visible() and text.get_text().strip()]


@pytest.mark.parametrize("suffix", [".png", ".pdf", ".svg"])
def test_files(suffix: str, tmp_path: Path) -> None:
    picture = DRAWN["ui_distance"]()
    path = picture.save(tmp_path / "sub" / f"figure{suffix}")
    assert path.read_bytes().startswith({".png": b"\x89PNG", ".pdf": b"%PDF", ".svg": b"<?xml"}[suffix])
    assert path.read_bytes() == picture.save(tmp_path / f"again{suffix}").read_bytes()
    with pytest.raises(ValueError, match="ending in .png, .pdf or .svg"):
        picture.save(tmp_path / "figure.bmp")


def test_same_numbers_give_the_same_picture() -> None:
    assert DRAWN["embedding"]() == DRAWN["embedding"]()
    assert "var(--series0)" in DRAWN["ui_distance"]().svg


def test_many_points_stay_a_small_picture() -> None:
    x = rng.normal(size=(2, 50_000))
    assert len(figures.scatter_plot({"many": (x[0], x[1])}, "x", "y").svg) < 400_000


def test_rank_correlation_is_spearmans() -> None:
    from scipy.stats import spearmanr

    a, b = rng.integers(0, 9, 80), rng.integers(0, 9, 80)
    assert figures.rank_correlation(a, b) == pytest.approx(spearmanr(a, b).statistic, abs=1e-12)
    assert figures.rank_correlation(a, -a) == pytest.approx(-1) and figures.rank_correlation(a, np.zeros(80)) == 0


def test_cluster_gallery_is_nearest_first() -> None:
    embeddings = np.array([[1.0, 0], [0.7, 0.7], [0, 3], [2, 0.2], [-1, 0]])
    gallery = figures.ui_cluster_gallery(IMAGES, embeddings, np.array([5.0, 0]), count=3)
    assert [item.caption for item in gallery.items] == ["ERS 0.00", "ERS 0.00", "ERS 0.29"]
    assert [any(item.image is image for item in gallery.items) for image in IMAGES] == [True, True, False, True, False]
    last = figures.ui_cluster_gallery(IMAGES, embeddings, np.array([5.0, 0]), count=5).items[-1]
    assert last.caption == "ERS 1.00"  # capped: its distance is 2


def test_embedding_plot_names_the_variance() -> None:
    line = np.array([[1.0, 0, 0], [0, 1, 0], [1, 1, 0], [3, 1, 0]])
    svg = figures.embedding_plot({"line": line}).svg
    shares = re.findall(r"(\d+) %", svg)
    assert sum(map(int, shares)) in (99, 100, 101)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: figures.ui_distance_plot({}), "values in every condition"),
        (lambda: figures.ui_distance_plot({"a": []}), "values in every condition"),
        (lambda: figures.ui_distance_plot({"a": [np.nan]}), "finite a"),
        (lambda: figures.quality_histograms({"1": NORMS, "2": {"clean": [1.0]}}), "stages of the same conditions"),
        (lambda: figures.scatter_plot({}, "x", "y"), "at least one group"),
        (lambda: figures.scatter_plot({"a": ([1.0], [1.0, 2.0])}, "x", "y"), "one length in 'a'"),
        (lambda: figures.score_comparison_plot([1.0, 2], [1.0, 2], ("a", "b"), ["x"]), "groups of length 2"),
        (lambda: figures.rank_correlation([1.0], [1.0]), "at least 2"),
        (lambda: figures.embedding_plot({"a": np.eye(2)}), "three or more embeddings"),
        (lambda: figures.template_weights_plot([]), "at least one template"),
        (lambda: figures.template_weights_plot([(IMAGES, [1.0])]), "a weight >= 0 for each of the 5 images"),
        (lambda: figures.ui_cluster_gallery(IMAGES, np.eye(4), np.ones(4)), r"embeddings \(5, 4\)"),
    ],
)
def test_bad_input_is_a_clear_error(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_names_are_shown_as_they_are_written() -> None:
    for name in ("a$b$c", r"un$\frac$", "<script>"):
        for drawn in (figures.ui_distance_plot({name: NORMS["clean"]}), figures.quality_histograms({name: NORMS, "other": NORMS}, name)):
            texts = [text.text for text in ElementTree.fromstring(drawn.svg).iter() if text.tag.endswith("text")]
            assert name in texts
