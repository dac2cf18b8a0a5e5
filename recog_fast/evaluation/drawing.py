"""What every plot shares: a colour-blind-safe palette in two appearances, axes, and pictures as SVG.

Inside a page a picture is inline SVG whose colours are the page's CSS variables: it follows the reader's light or dark
appearance. Saved to a file it has the light colours. matplotlib's object interface; no global state is left changed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# One column of the page, which is about 370 px wide on a phone and on a desktop: 9 point then reads as 11.5 px everywhere.
WIDTH, HEIGHT, FONT = 4.0, 2.75, 9.0
FONT_STACK = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.6)), (0, (2.2, 1.4)), (0, (6, 1.5, 1.2, 1.5)), (0, (1, 1.2)))


def require_plots() -> None:
    """Raises ImportError, saying what to install, where matplotlib is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("report: plots need matplotlib (pip install recog_fast[train])")


@dataclass(frozen=True)
class Theme:
    """Colours of one appearance; the page's style sheet uses the same ones."""

    text: str
    muted: str
    grid: str
    background: str
    surface: str
    series: tuple[str, ...]  # conditions in order: full size, 16x16, 8x8, ...
    genuine: str
    impostor: str
    baseline: str

    def tokens(self) -> dict[str, str]:
        """CSS variable -> colour."""
        names = ("background", "surface", "text", "muted", "grid", "genuine", "impostor", "baseline")
        return {name: getattr(self, name) for name in names} | {f"series{i}": c for i, c in enumerate(self.series)}


# Series are at least 14 CIE76 units apart for normal sight, deuteranopia, protanopia and tritanopia (Machado et al., 2009).
LIGHT = Theme(
    text="#16202c",
    muted="#566273",
    grid="#e3e8ee",
    background="#ffffff",
    surface="#f5f7fa",
    series=("#0b5fb5", "#b85a00", "#1a936f", "#8c2d6b", "#7b8794"),
    genuine="#0c5fb5",
    impostor="#b95a00",
    baseline="#8a95a3",
)
DARK = Theme(
    text="#e6ebf1",
    muted="#9fabb9",
    grid="#29323c",
    background="#0f1318",
    surface="#171d24",
    series=("#4a9dff", "#ee8434", "#5fe0a8", "#d276b4", "#b4bec8"),
    genuine="#4b9dff",
    impostor="#ef8434",
    baseline="#75818f",
)


@dataclass(frozen=True)
class Picture:
    """One plot: inline SVG for a page, what it shows in words, and `save` for a file of its own."""

    svg: str
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

    def save_adaptive(self, path: str | Path) -> Path:
        """Writes an SVG of its own that is light or dark as its viewer is, on a ground of its own: for README files."""
        target = Path(path)
        light, dark = ("".join(f"--{n}:{c};" for n, c in theme.tokens().items()) for theme in (LIGHT, DARK))
        style = (
            f"svg{{{light}font-family:{FONT_STACK}}}@media(prefers-color-scheme:dark){{svg{{{dark}}}}}"
            "*{stroke-linejoin:round;stroke-linecap:butt}"
        )
        head, body = self.svg.split(">", 1)
        ground = '<rect width="100%" height="100%" fill="var(--background)"/>'
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(f'{head} xmlns="http://www.w3.org/2000/svg">\n<style>{style}</style>\n{ground}\n{body}\n', encoding="utf-8")
        return target


def picture(draw: Callable[[Figure, Theme], None], height: float, alt: str, width: float = WIDTH) -> Picture:
    """A drawing of so many inches as a Picture."""

    def render(kind: str, dpi: float) -> bytes:
        return _file(draw, (width, height), kind, dpi)

    return Picture(inline(render("svg", 150).decode("utf-8"), alt), alt, render)


def _file(draw: Callable[[Figure, Theme], None], size: tuple[float, float], kind: str, dpi: float) -> bytes:
    """The drawing in light colours as a file; the same drawing gives the same bytes: no date, fixed element ids."""
    import matplotlib
    from matplotlib.figure import Figure

    # rc_context puts every setting back; a bare Figure never registers with pyplot, so no window system is touched.
    with matplotlib.rc_context({"font.size": FONT, "svg.fonttype": "none", "svg.hashsalt": "recog_fast"}):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure, LIGHT)
        _as_written(figure)
        out = io.BytesIO()
        metadata = {"svg": {"Date": None, "Creator": None}, "pdf": {"CreationDate": None}}.get(kind)
        figure.savefig(out, format=kind, dpi=dpi, transparent=kind == "svg", metadata=metadata)
    return out.getvalue()


def _as_written(figure: Figure) -> None:
    """Names may hold dollar signs: only numbers of an axis (powers of ten) are formulas."""
    for axes in figure.axes:
        for text in (*axes.texts, axes.title, axes.xaxis.label, axes.yaxis.label):
            text.set_parse_math(False)
    for named in (*figure.legends, *(axes.get_legend() for axes in figure.axes)):
        for text in named.get_texts() if named is not None else ():
            text.set_parse_math(False)


def inline(svg: str, alt: str) -> str:
    """A stand-alone SVG as an element of a page: no prologue, no style of its own, the theme's colours as variables, and
    only those ids that something refers to, made unique."""
    body = svg[svg.index("<svg") :].replace("xlink:href", "href")
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", body, flags=re.DOTALL)
    prefix = "p" + hashlib.sha256(body.encode()).hexdigest()[:8] + "-"
    used = set(re.findall(r"(?:url\(#|href=\"#)([^)\"]+)", body))
    body = re.sub(r' id="([^"]+)"', lambda m: f' id="{prefix}{m[1]}"' if m[1] in used else "", body)
    body = re.sub(r"(url\(#|href=\"#)", rf"\g<1>{prefix}", body)
    body = re.sub(r"font-family: [^;\"]+;?", "", body)  # the page's own
    variables = {colour: f"var(--{name})" for name, colour in LIGHT.tokens().items() if colour in body}
    body = re.sub("|".join(variables) or "$^", lambda m: variables[m[0]], body)
    body = re.sub(r'(<path d="[^"]+")', lambda m: re.sub(r"(\.\d\d)\d+", r"\1", m[0]), body)
    body = re.sub(r"\s*\n\s*", "\n", body)
    box = re.search(r'viewBox="[^"]+"', body)
    head = f'<svg class="plot" role="img" aria-label="{escape(alt)}" {box[0] if box else ""}>'
    return head + body[body.index(">") + 1 :].strip()


def series_colour(theme: Theme, i: int) -> str:
    """Colour of the i-th condition."""
    return theme.series[i % len(theme.series)]


def dashes(i: int) -> Any:
    """Line style of the i-th condition: colour is never the only sign."""
    return DASHES[i % len(DASHES)]


def percent(value: float) -> str:
    """0.123 -> "12.3 %"."""
    return f"{100 * value:.1f} %"


def percent_ticks() -> Any:
    """A tick formatter of rates."""
    from matplotlib.ticker import FuncFormatter

    return FuncFormatter(lambda value, _: f"{100 * value:g} %")


def axes_of(figure: Figure, theme: Theme) -> Axes:
    """The one panel of a figure, styled."""
    axes = figure.subplots()
    style(axes, theme)
    return axes


def style(axes: Axes, theme: Theme) -> None:
    """Grid, spines, ticks and names in the theme's colours."""
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


def bare(axes: Axes) -> None:
    """No y axis: heights are relative."""
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.grid(False)


def legend(figure: Figure, axes: Axes, theme: Theme, columns: int = 0) -> None:
    """Rows above the plot, where they can hide no curve; columns: 0 for as many as fit by the names' lengths."""
    handles, labels = axes.get_legend_handles_labels()
    if not labels:
        return
    room = 13.5 * figure.get_figwidth()  # characters of a row
    fit = len(labels)
    while fit > 1 and fit * (max(map(len, labels)) + 5) > room:
        fit -= 1
    if sum(len(label) + 5 for label in labels) <= room:
        fit = len(labels)
    figure.legend(
        handles,
        labels,
        loc="outside upper left",
        ncols=columns or fit,
        frameon=False,
        labelcolor=theme.text,
        handlelength=1.6,
        handletextpad=0.5,
        columnspacing=1.2,
        labelspacing=0.25,
        borderaxespad=0.1,
    )
