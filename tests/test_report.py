"""Plots, galleries and the report page: complete, self-contained, escaped, the same bytes twice."""

from __future__ import annotations

import base64
import dataclasses
import json
import re
import xml.etree.ElementTree as ElementTree
import zlib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recog_fast.evaluation import VerificationResult, curves, drawing, plots, tar_at_far, verification_result
from recog_fast.evaluation.gallery import Gallery, GalleryItem, pair_galleries, png_data_uri, strip
from recog_fast.evaluation.report import flatten, read_metrics, write_report

pytest.importorskip("matplotlib")

rng = np.random.default_rng(1)
PAIRS = 60


def result(strength: float) -> VerificationResult:
    same = np.arange(PAIRS) % 2 == 0
    a, b = rng.normal(size=(2, PAIRS, 8))
    return verification_result(a, b + strength * same[:, None] * a, same, form="flip summed, feature norm removed")


RESULTS = {"full size": result(3.0), "16x16": result(1.5), "8x8": result(0.5)}
BASELINE = {name: result(0.1) for name in RESULTS}
IMAGES = rng.integers(0, 256, (2 * PAIRS, 12, 12, 3), dtype=np.uint8)
METRICS: list[dict[str, Any]] = [
    {"step": s, "loss": 30 / s, "target_cosine": 0.1 * s**0.2, "nearest_cosine": 0.3, "target_probability": s / 200}
    for s in range(1, 101)
] + [{"step": 50, "val/holdout": 0.7, "val/holdout@16": 0.6, "val/holdout/eer": 0.2}, {"step": 100, "val/holdout": 0.8}]


class Page(HTMLParser):
    """Collects what the tests ask about and checks that tags are balanced."""

    VOID = frozenset(("meta", "img", "source", "br", "link", "input", "hr"))

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.alts: list[str] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        values = dict(attrs)
        self.links += [str(values[k]) for k in ("src", "href", "srcset", "data", "action", "poster") if k in values]
        if tag == "img":
            self.alts.append(values.get("alt") or "")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def write(path: Path, **changes: Any) -> tuple[str, Page]:
    arguments: dict[str, Any] = {
        "title": "A run",
        "results": RESULTS,
        "baseline": BASELINE,
        "config": {"network": "tiny", "data": {"size": 56, "path": None}},
        "metrics_jsonl": METRICS,
        "galleries": pair_galleries(list(IMAGES), RESULTS["full size"]),
        "versions": {"torch": "2.13"},
        "backends": {"cpu": "native, AVX2", "cuda": "not built"},
    }
    text = write_report(path / "sub" / "report.html", **(arguments | changes)).read_text(encoding="utf-8")
    return text, Page(text)


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Page]:
    """One page with everything; drawing it is the slow part."""
    folder = tmp_path_factory.mktemp("report")
    written = write(folder)
    assert [p.name for p in (folder / "sub").iterdir()] == ["report.html"]
    return written


def test_report_holds_every_plot_table_and_gallery(full: tuple[str, Page]) -> None:
    text, page = full
    svgs = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(svgs) == 7  # ROC, DET, cosines, loss, two cosines, p_y, accuracy
    for svg in svgs:
        ElementTree.fromstring(svg)
    for name in RESULTS:
        assert name in page.text
    first = RESULTS["full size"]
    for value in (first.accuracy, first.eer, *first.tar, BASELINE["8x8"].accuracy):
        assert f"{100 * value:.1f}\N{NO-BREAK SPACE}%" in page.text
    for word in (
        "30 genuine and 30 impostor",
        "native, AVX2",
        "not built",
        "data.size",
        "56",
        "torch",
        "2.13",
        "TAR at FAR 0.1",
    ):
        assert word in page.text
    assert len(re.findall("data:image/(webp|jpeg);base64,", text)) == 18
    assert all(page.alts)
    # 30 impostors: fewer than ten false accepts at FAR 10 %, and the page says so.
    assert "fewer than 10 false accepts" in page.text


def test_report_is_self_contained_and_adapts(full: tuple[str, Page]) -> None:
    text, page = full
    assert "default-src 'none'" in text
    assert page.links
    assert all(link.startswith(("data:", "#")) for link in page.links)
    assert not {"script", "iframe", "object"} & set(page.tags)
    assert not re.search(r"https?://|//[a-z]|@import|url\((?!#)|\bon[a-z]+=", re.sub(r"data:[^\"]+", "", text))
    assert "prefers-color-scheme:dark" in text
    assert "@media print" in text
    assert 'name="viewport"' in text
    assert "max-width:640px" in text
    anchors = {link for link in page.links if link.startswith("#")} - {"#content"}
    assert all(f'id="{anchor[1:]}"' in text for anchor in anchors)
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))


def test_plots_take_every_colour_from_the_page() -> None:
    picture = plots.history_plot(METRICS, "loss")
    assert picture is not None
    assert not re.search("#[0-9a-f]{6}", picture.svg)
    assert {"var(--series0)", "var(--grid)", "var(--muted)"} <= set(re.findall(r"var\(--[a-z0-9]+\)", picture.svg))
    # One name each: colours that are equal in one theme are equal in the other.
    for theme in (drawing.LIGHT, drawing.DARK):
        assert len(set(theme.tokens().values())) == len(theme.tokens())


# Machado, Oliveira and Fernandes, 2009: linear RGB as deuteranopes, protanopes and tritanopes see it.
_SIGHT = {
    "normal": np.eye(3),
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
_XYZ = np.array([[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]])


def linear(colour: str) -> Any:
    c = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def lab(rgb: Any) -> Any:
    x = _XYZ @ np.clip(rgb, 0, 1) / [0.95047, 1, 1.08883]
    f = np.where(x > 0.008856, np.cbrt(x), 7.787 * x + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def contrast(one: str, other: str) -> float:
    low, high = sorted(float(_XYZ[1] @ linear(c)) for c in (one, other))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [drawing.LIGHT, drawing.DARK], ids=["light", "dark"])
def test_colours_can_be_told_apart_and_read(theme: drawing.Theme) -> None:
    for name, matrix in _SIGHT.items():
        seen = [lab(np.array(matrix) @ linear(c)) for c in theme.series]
        gaps = [np.linalg.norm(a - b) for i, a in enumerate(seen) for b in seen[:i]]
        assert min(gaps) > 14, name  # CIE76; 2 is just noticeable
    for ground in (theme.background, theme.surface):
        assert min(contrast(c, ground) for c in (theme.text, theme.muted, theme.genuine)) >= 4.5  # WCAG AA, text
        assert contrast(theme.impostor, ground) >= 4.3
        assert min(contrast(c, ground) for c in theme.series) >= 3.0  # WCAG 1.4.11, lines


def test_accuracy_legend_names_sets_only_where_there_are_several() -> None:
    def legend(*keys: str) -> str:
        picture = plots.accuracy_plot([{"step": 1, **dict.fromkeys(keys, 0.5)}])
        assert picture is not None
        return picture.svg

    one = legend("val/lfw", "val/lfw@16", "val/lfw/eer")
    assert ">full size<" in one
    assert ">16x16<" in one
    assert "lfw" not in one
    several = legend("val/lfw", "val/cfp@8")
    assert ">lfw, full size<" in several
    assert ">cfp, 8x8<" in several
    assert plots.accuracy_plot([{"step": 1, "loss": 1.0}]) is None


def test_plotted_roc_is_the_conservative_tar() -> None:
    grid = np.geomspace(1 / 30, 1, 50)
    for one in RESULTS.values():
        np.testing.assert_array_equal(curves.tar_on(grid, one), tar_at_far(one.scores, one.same, grid))


def test_roc_of_many_pairs_is_a_small_picture() -> None:
    same = np.arange(200_000) % 2 == 0
    scores = rng.normal(size=200_000) + same
    many = dataclasses.replace(RESULTS["8x8"], scores=scores, same=same)
    assert len(curves.roc_plot({"many": many}).svg) < 60_000
    assert len(curves.det_plot({"many": many}).svg) < 60_000


def test_everything_is_escaped(tmp_path: Path) -> None:
    evil = "<script>alert('1')</script>&\"quoted\""
    gallery = Gallery(evil, evil, [GalleryItem(IMAGES[0], evil, evil, "wrong")])
    text, page = write(
        tmp_path,
        title=evil,
        summary=evil,
        results={evil: RESULTS["8x8"]},
        baseline={evil: RESULTS["8x8"]},
        baseline_name=evil,
        config={evil: {evil: evil}},
        versions={evil: evil},
        backends={evil: evil},
        galleries=[gallery],
        metrics_jsonl=None,
    )
    assert "script" not in page.tags
    assert "<script" not in text
    assert page.text.count(evil) >= 12
    assert any(evil in alt for alt in page.alts)


def test_same_input_gives_the_same_bytes_and_leaves_no_setting_changed(tmp_path: Path) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    pages = [
        write(tmp_path / name, results={"a": RESULTS["8x8"]}, baseline=None, metrics_jsonl=None)[0] for name in "ab"
    ]
    assert pages[0] == pages[1]
    assert dict(matplotlib.rcParams) == before


def test_figures_have_their_section(tmp_path: Path) -> None:
    from recog_fast.evaluation import figures

    drawn = figures.ui_distance_plot({"clean": rng.random(20)})
    text, page = write(tmp_path, figures=[("UI <centre>", "Two humps & more.", drawn)], baseline=None, metrics_jsonl=None)
    assert drawn.svg in text and "Quality" in page.text and "UI <centre>" in page.text


def test_report_without_optional_parts(tmp_path: Path) -> None:
    path = write_report(tmp_path / "r.html", title="t", results={"full": RESULTS["8x8"]})
    page = Page(path.read_text(encoding="utf-8"))
    for absent in ("Training", "Configuration", "Faces", "Not in this report"):
        assert absent not in page.text
    assert "over folds" in page.text


def test_report_without_a_target_says_so(tmp_path: Path) -> None:
    text, page = write(tmp_path, results=None, baseline=None, missing=["No images: <b>lost</b>."])
    assert "No evaluation target" in page.text and "No images: <b>lost</b>." in page.text and "<b>lost" not in text
    assert 'id="verification"' not in text


def test_many_conditions_settings_and_items_stay_a_small_page(tmp_path: Path) -> None:
    results = {f"set {k}": RESULTS["8x8"] for k in range(60)}
    items = [GalleryItem(IMAGES[k % 100], f"person {k}") for k in range(500)]
    config = {f"key{k}": "x" * 5000 for k in range(900)}
    metrics = [{"step": s, "loss": 30 / s} for s in range(1, 20_000)]
    text, page = write(
        tmp_path, results=results, baseline=None, config=config, metrics_jsonl=metrics, galleries=[Gallery("Many", "", items)]
    )
    assert len(text) < 1_000_000
    for word in ("55 more are in the table", "20 more conditions are not shown", "500 more are not shown", "452 more are not shown", "(5,000 characters)"):
        assert word in page.text


def test_band_holds_the_curve_and_narrows_with_pairs() -> None:
    grid = np.array([0.01, 0.1, 0.5])
    widths = []
    for count in (200, 20_000):  # below and above the number of bins
        same = np.arange(count) % 2 == 0
        scores = np.random.default_rng(3).normal(size=count) + 1.5 * same
        low, high = curves.tar_band(scores, same, grid)
        tar = tar_at_far(scores, same, grid)
        assert (low <= tar + 1e-3).all() and (tar <= high + 1e-3).all()
        widths.append(high - low)
    assert (widths[1] < 0.35 * widths[0]).all()


def test_band_covers_the_true_rate_as_often_as_it_says() -> None:
    """TAR at FAR 0.2 of N(1.5, 1) against N(0, 1) is 0.7449: in 40 samples of 600 pairs, the 95 % band holds it in 34 or more."""
    inside = 0
    for seed in range(40):
        draw = np.random.default_rng(seed)
        same = np.arange(600) % 2 == 0
        low, high = curves.tar_band(draw.normal(size=600) + 1.5 * same, same, np.array([0.2]))
        inside += bool(low[0] <= 0.7449 <= high[0])
    assert 34 <= inside <= 40


def test_metrics_from_a_file_and_from_a_killed_run(tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    log.write_text('{"step": 1, "loss": 2.0}\n\n{"step": 2, "loss": null}\n{"step": 3, "lo')
    assert read_metrics(log) == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": None}]
    text, _ = write(tmp_path, metrics_jsonl=log, results={"a": RESULTS["8x8"]}, baseline=None)
    assert text.count("<svg") == 3 + 1
    log.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(ValueError, match="JSON object in line 2"):
        read_metrics(log)
    log.write_text("[1]\n")
    with pytest.raises(ValueError, match="JSON object in line 1"):
        read_metrics(log)


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"baseline of \['full size', '16x16', '8x8'\]"):
        write(tmp_path, baseline={"full size": RESULTS["8x8"]})
    other = dataclasses.replace(RESULTS["8x8"], fars=(0.5, 0.1, 0.01))
    with pytest.raises(ValueError, match="same fars"):
        write(tmp_path, results={"a": other}, baseline={"a": RESULTS["8x8"]})
    with pytest.raises(FileNotFoundError):
        write(tmp_path, metrics_jsonl=tmp_path / "absent.jsonl")
    with pytest.raises(ValueError, match="expected image uint8"):
        png_data_uri(np.zeros((4, 4), np.uint8))
    with pytest.raises(ValueError, match="at least one image"):
        strip([])
    with pytest.raises(ValueError, match="expected 120 images, got 3"):
        pair_galleries(list(IMAGES[:3]), RESULTS["8x8"])


@pytest.mark.parametrize("shape", [(1, 1, 3), (5, 7, 3), (56, 112, 3)])  # smallest, odd, a pair
def test_png_is_lossless(shape: tuple[int, ...]) -> None:
    image = rng.integers(0, 256, shape, dtype=np.uint8)
    data = base64.b64decode(png_data_uri(image).removeprefix("data:image/png;base64,"))
    start = data.index(b"IDAT")
    size = int.from_bytes(data[start - 4 : start], "big")
    rows = np.frombuffer(zlib.decompress(data[start + 4 : start + 4 + size]), np.uint8).reshape(shape[0], -1)
    assert (rows[:, 0] == 1).all()
    np.testing.assert_array_equal(np.cumsum(rows[:, 1:].reshape(shape), axis=1, dtype=np.uint8), image)
    pillow = pytest.importorskip("PIL.Image")
    import io

    np.testing.assert_array_equal(np.asarray(pillow.open(io.BytesIO(data))), image)


def test_pair_galleries_order() -> None:
    one = RESULTS["16x16"]
    least, most, surest = pair_galleries(list(IMAGES), one, count=4)
    genuine, impostor = np.sort(one.scores[one.same]), np.sort(one.scores[~one.same])
    assert least.items[0].detail == f"cosine {genuine[0]:.2f}".replace("-", "\N{MINUS SIGN}")
    assert most.items[0].detail == f"cosine {impostor[-1]:.2f}".replace("-", "\N{MINUS SIGN}")
    assert [i.caption for i in surest.items] == ["same person"] * 2 + ["different people"] * 2
    assert {i.tone for g in (least, most, surest) for i in g.items} <= {"right", "wrong"}
    assert all(i.tone == "right" for i in surest.items)
    assert least.items[0].image.shape == (12, 24, 3)


def test_flatten() -> None:
    assert flatten({"a": {"b": 1, "c": {}}, "d": None}) == {"a.b": "1", "a.c": "{}", "d": "none"}
    json.dumps(RESULTS["8x8"].summary())
