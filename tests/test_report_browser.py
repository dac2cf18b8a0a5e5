"""The report in a real browser: headless Chromium loads it, draws it, and says what is wrong with it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import browser
import numpy as np
import pytest

pytest.importorskip("matplotlib")

from recog_fast.evaluation import Gallery, GalleryItem, compare_qualities, figures, verification_result, write_report
from recog_fast.evaluation.page import Tile

PROGRAM = browser.find()
pytestmark = pytest.mark.skipif(PROGRAM is None, reason="no Chromium on PATH (Debian: apt-get install chromium)")

# Every text with its computed colour, the ground behind it and its size; SVG text is filled, not coloured.
_TEXTS = """[...document.querySelectorAll('body *')].filter(e => [...e.childNodes].some(n => n.nodeType == 3 && n.data.trim())
 && !e.closest('style,details:not([open]) > dl,.skip')).map(e => {
  const style = getComputedStyle(e);
  let ground = 'rgba(0, 0, 0, 0)';
  for (let at = e; at && ground == 'rgba(0, 0, 0, 0)'; at = at.parentElement) ground = getComputedStyle(at).backgroundColor;
  return [e.textContent.trim().slice(0, 40), e instanceof SVGElement ? style.fill : style.color, ground, parseFloat(style.fontSize)];
})"""
_WIDE = """[...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll,nav,svg,.skip')
 && e.getBoundingClientRect().right > WIDTH + 0.5).map(e => e.tagName + '.' + e.className)"""


@pytest.fixture(scope="module")
def page() -> Iterator[browser.Browser]:
    assert PROGRAM is not None
    with browser.Browser(PROGRAM) as opened:
        yield opened


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A page with everything a page can have, and long words."""
    rng = np.random.default_rng(4)
    same = np.arange(120) % 2 == 0
    a, b = rng.normal(size=(2, 120, 8))
    results = {name: verification_result(a, b + k * same[:, None] * a, same) for name, k in (("full size", 3), ("16x16", 1), ("8x8", 0.5))}
    images = rng.integers(0, 256, (8, 12, 12, 3), dtype=np.uint8)
    metrics: list[dict[str, Any]] = [
        {"step": s, "loss": 30 / s, "lr": 0.1, "target_cosine": 0.1, "nearest_cosine": 0.3, "target_probability": 0.5, "unknown_max_probability": 0.2,
         "recognizability/index": 1.0, "recognizability/predicted": 0.9, "feature_norm": 9.0, "images_per_second": 100.0 + s, "peak_memory_mb": 400.0 + s}
        for s in range(1, 60)
    ] + [{"step": 59, "val/holdout": 0.9}]  # fmt: skip
    scores = rng.normal(size=400) + np.repeat([1, 0], 200)
    erc = compare_qualities(scores, np.repeat([True, False], 200), {"norm": rng.random(400)}, 0.1, fixed_threshold=False, reject=[0, 0.2, 0.4])
    strips = np.concatenate([images, images, images], axis=2)
    path = write_report(
        tmp_path_factory.mktemp("page") / "report.html",
        title="a_run_with_" + "a_long_name_" * 12,
        summary="What was trained.",
        results=results,
        baseline=results,
        config={"data": {"path": "/x" * 90}, "lr": 0.1},
        metrics_jsonl=metrics,
        galleries=[
            Gallery(title, "How they were chosen.", [GalleryItem(i, "class " + "x" * 60, "cosine 0.5", "wrong") for i in shown])
            for title, shown in (("Faces", images), ("Strips", strips))
        ],
        figures=[("Norm", "Two humps.", figures.quality_histograms({"end": {"full size": scores, "8x8": scores - 1}}, "feature norm")), ("Rejection", "Falling.", figures.erc_plot(erc))],
        tiles=[Tile("Training loss", "1.2", "at the end")],
        missing=["Something could not be measured."],
        costs={"Size": {"classes": "1,000"}},
        versions={"torch": "2.13"},
        backends={"cpu": "native avx2", "dispatch": "first\nsecond"},
    )  # fmt: skip
    return path.as_uri()


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_page_is_drawn_without_error_request_or_overflow(page: browser.Browser, address: str, width: int, dark: bool) -> None:
    page.show(address, width, dark=dark)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(_WIDE.replace("WIDTH", str(width))) == []
    boxes = page.evaluate("[...document.querySelectorAll('svg.plot')].map(e => { const b = e.getBoundingClientRect(); return [b.width, b.height, e.querySelectorAll('path').length] })")
    assert len(boxes) == 3 + 7 + 2 + 2  # verification, training, quality, throughput and memory
    assert all(w > 250 and h > 150 and paths > 5 for w, h, paths in boxes)
    page.evaluate("document.querySelectorAll('img').forEach(i => { i.loading = 'eager' })")
    page.evaluate("Promise.all([...document.images].map(i => i.decode()))")
    assert page.evaluate("[...document.images].every(i => i.naturalWidth > 0 && i.alt)")
    # Nothing but the page itself and what is inside it.
    asked = [e["params"]["request"]["url"] for e in page.events if e.get("method") == "Network.requestWillBeSent"]
    assert [url for url in asked if not url.startswith("data:")] == [address]
    assert [e for e in page.events if e.get("method") in ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")] == []


def test_the_checks_see_a_bad_page(page: browser.Browser, tmp_path: Path) -> None:
    bad = tmp_path / "bad.html"
    bad.write_text('<body style="width:900px;color:#999"><img src="no.png"><p>pale</p><script>console.error("no")</script></body>')
    page.show(bad.as_uri(), 390)
    assert page.evaluate(_WIDE.replace("WIDTH", "390"))
    methods = {e.get("method") for e in page.events}
    assert {"Log.entryAdded", "Runtime.consoleAPICalled"} <= methods
    asked = [e["params"]["request"]["url"] for e in page.events if e.get("method") == "Network.requestWillBeSent"]
    assert (tmp_path / "no.png").as_uri() in asked
    (pale,) = [found for found in page.evaluate(_TEXTS) if found[0] == "pale"]
    assert pale[1] == "rgb(153, 153, 153)"


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_every_text_can_be_read(page: browser.Browser, address: str, dark: bool) -> None:
    """WCAG AA: 4.5 against the ground behind it, and nothing tiny on a phone."""
    page.show(address, 390, dark=dark)
    texts = page.evaluate(_TEXTS)
    assert len(texts) > 150
    for text, colour, ground, size in texts:
        assert _contrast(colour, ground) >= 4.5, (text, colour, ground)
        assert size >= 8, (text, size)  # of a plot: in its own units, drawn 1.2 times as large
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (_luminance(ground) < 0.1) == dark
    assert page.evaluate("getComputedStyle(document.querySelector('svg.plot text')).fill") != "rgb(0, 0, 0)"


def test_keyboard_reaches_links_and_settings(page: browser.Browser, address: str) -> None:
    page.show(address, 1280)
    reached = []
    for _ in range(14):
        for kind in ("rawKeyDown", "keyUp"):
            page.call("Input.dispatchKeyEvent", type=kind, key="Tab", code="Tab", windowsVirtualKeyCode=9)
        reached.append(page.evaluate("[document.activeElement.tagName, document.activeElement.textContent.slice(0, 30)]"))
    words = [text for _, text in reached]
    assert words[0] == "Skip to the content" and "Verification" in words and "Configuration" in words
    assert {"A", "DIV", "SUMMARY"} <= {tag for tag, _ in reached}  # links, the table that scrolls, the settings


def test_paper_is_light_and_shows_the_settings(page: browser.Browser, address: str) -> None:
    page.show(address, 1280, dark=True)
    page.call("Emulation.setEmulatedMedia", media="print", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    try:
        assert _luminance(page.evaluate("getComputedStyle(document.body).backgroundColor")) > 0.9
        assert page.evaluate("getComputedStyle(document.querySelector('nav')).display") == "none"
        assert page.evaluate("document.querySelector('details dl').getBoundingClientRect().height") > 10
        assert len(page.call("Page.printToPDF")["data"]) > 10_000
    finally:
        page.call("Emulation.setEmulatedMedia", media="", features=[])


def _channels(colour: str) -> list[float]:
    return [float(part) for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]


def _luminance(colour: str) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in _channels(colour))]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(one: str, other: str) -> float:
    low, high = sorted((_luminance(one), _luminance(other)))
    return (high + 0.05) / (low + 0.05)
