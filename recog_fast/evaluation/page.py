"""The parts of a report page as HTML: sections, tiles, tables, figures, galleries. Every text is escaped here.

The page's frame and style are the package's files page.html and page.css; nothing in a page is loaded from elsewhere, and
its content security policy has the browser refuse scripts and requests, whatever a text on it tries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from recog_fast.evaluation.drawing import DARK, FONT_STACK, LIGHT, Picture, Theme
from recog_fast.evaluation.gallery import Gallery, GalleryItem, image_data_uri

Figure = tuple[str, str, Picture | None]  # title, how to read it, the plot

MOST_ITEMS = 48  # of a gallery
MOST_VALUES = 400  # rows of a table of settings
MOST_CHARACTERS = 600  # of one value


@dataclass(frozen=True)
class Tile:
    """A headline number: what it is, the number, and what stands beside it."""

    label: str
    number: str
    beside: str = ""


@dataclass(frozen=True)
class Section:
    """A part of the page: heading, one or two sentences, and HTML made by this module's functions."""

    heading: str
    intro: str
    body: str

    @property
    def anchor(self) -> str:
        """Its name in links."""
        return "-".join("".join(c if c.isalnum() else " " for c in self.heading.lower()).split())


def write_page(
    path: str | Path,
    *,
    title: str,
    sections: Sequence[Section],
    eyebrow: str = "recog_fast report",
    lead: str = "",
    top: str = "",
    footer: str = "",
) -> Path:
    """Writes a self-contained page and returns its path; sections without a body are left out. Replaced at once, never
    left half written. top: HTML above the first section; every other text is plain."""
    shown = [section for section in sections if section.body]
    page = Template(_resource("page.html")).substitute(
        title=escape(title),
        style=stylesheet(),
        eyebrow=escape(eyebrow),
        lead=f'<p class="lead">{escape(lead)}</p>' if lead else "",
        links="".join(f'<li><a href="#{s.anchor}">{escape(s.heading)}</a></li>' for s in shown),
        body=top + "".join(map(_section, shown)),
        footer=escape(footer),
    )
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".partial")
    partial.write_text(page, encoding="utf-8")
    partial.replace(target)
    return target


def stylesheet() -> str:
    """CSS with the themes' colours as custom properties: dark where the reader prefers it, light on paper."""
    night = f"@media screen and (prefers-color-scheme:dark){{:root{{{_tokens(DARK)}}}}}"
    rules = _resource("page.css").replace("FONT_STACK", FONT_STACK).strip()
    return f":root{{color-scheme:light dark;{_tokens(LIGHT)}}}\n{night}\n{rules}"


def _tokens(theme: Theme) -> str:
    return "".join(f"--{name}:{colour};" for name, colour in theme.tokens().items())


def _resource(name: str) -> str:
    return files("recog_fast.evaluation").joinpath(name).read_text(encoding="utf-8")


def _section(section: Section) -> str:
    intro = f'<p class="intro">{escape(section.intro)}</p>\n' if section.intro else ""
    return f'<section id="{section.anchor}"><h2>{escape(section.heading)}</h2>\n{intro}{section.body}</section>\n'


def tiles(shown: Sequence[Tile]) -> str:
    """Headline numbers side by side."""
    made = "".join(
        f'<div class="tile"><dt>{escape(tile.label)}</dt><dd><div class="number">{escape(tile.number)}</div>'
        f'<div class="beside">{escape(tile.beside)}</div></dd></div>\n'
        for tile in shown
    )
    return f'<dl class="tiles">\n{made}</dl>\n' if made else ""


def notice(heading: str, lines: Sequence[str]) -> str:
    """What the reader must know before the numbers."""
    if not lines:
        return ""
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f'<div class="notice" role="note"><p>{escape(heading)}</p><ul>{items}</ul></div>\n'


def note(text: str) -> str:
    """A paragraph in small type."""
    return f'<p class="note">{escape(text)}</p>\n' if text else ""


def heading(text: str) -> str:
    """A heading inside a section."""
    return f"<h3>{escape(text)}</h3>\n"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "", classes: Sequence[str] = ()) -> str:
    """A table that scrolls sideways by itself where it is too wide; the first cell of each row is its header.

    A cell's second line (after a line break) is set small.
    """
    heads = "".join(f'<th scope="col">{_cell(cell)}</th>' for cell in head)
    body = []
    for i, (first, *rest) in enumerate(rows):
        kind = f' class="{classes[i]}"' if i < len(classes) and classes[i] else ""
        cells = "".join(f"<td>{_cell(cell)}</td>" for cell in rest)
        body.append(f'<tr{kind}><th scope="row">{_cell(first)}</th>{cells}</tr>')
    named = f"<caption>{escape(caption)}</caption>" if caption else ""
    label = escape(caption or f"Table: {head[0]}")
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{label}"><table>{named}<thead><tr>{heads}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>\n"
    )


def _cell(text: str) -> str:
    first, _, rest = text.partition("\n")
    return escape(first) + (f" <small>{escape(rest)}</small>" if rest else "")


def figures(shown: Sequence[Figure]) -> str:
    """Plots in columns; those without a picture are left out."""
    drawn = "".join(
        f"<figure><figcaption><b>{escape(title)}</b>{escape(reading)}</figcaption>\n{picture.svg}\n</figure>\n"
        for title, reading, picture in shown
        if picture is not None
    )
    return f'<div class="figures">\n{drawn}</div>\n' if drawn else ""


def gallery(shown: Gallery) -> str:
    """Pictures with captions under a heading; at most MOST_ITEMS."""
    if not shown.items:
        return ""
    items = "".join(
        f'<figure class="item"><img src="{image_data_uri(item.image)}" width="{item.image.shape[1]}" '
        f'height="{item.image.shape[0]}" alt="{escape(_alternative(item))}" loading="lazy">'
        f"<figcaption>{escape(item.caption)}{_decision(item)}</figcaption></figure>\n"
        for item in shown.items[:MOST_ITEMS]
    )
    height, width = shown.items[0].image.shape[:2]
    kind = " strip" if width > 2.5 * height else " wide" if width > 1.3 * height else ""
    more = len(shown.items) - MOST_ITEMS
    rest = f" {more} more are not shown." if more > 0 else ""
    return f'{heading(shown.title)}{note(shown.note + rest)}<div class="gallery{kind}">\n{items}</div>\n'


def _alternative(item: GalleryItem) -> str:
    return ", ".join(part for part in (item.caption, item.detail, item.tone) if part)


def _decision(item: GalleryItem) -> str:
    """The second line of a caption; colour is never the only sign."""
    if not item.detail and not item.tone:
        return ""
    sign = {"right": " &#10003;&nbsp;right", "wrong": " &#10007;&nbsp;wrong", "": ""}[item.tone]
    tone = f'<b class="{item.tone}">{sign}</b>' if sign else ""
    return f'<span class="detail">{escape(item.detail)}{tone}</span>'


def columns(tables: Mapping[str, Mapping[str, Any] | None]) -> str:
    """Tables of names and values side by side, each under its heading."""
    filled = {name: flatten(values) for name, values in tables.items() if values}
    body = "".join(f"<div>{heading(name)}{pairs(values)}</div>\n" for name, values in filled.items())
    return f'<div class="columns">{body}</div>\n' if body else ""


def settings(config: Mapping[str, Any], what: str = "settings of this run") -> str:
    """Nested settings with dotted names, folded."""
    flat = flatten(config)
    return f"<details><summary>{len(flat)} {escape(what)}</summary>{pairs(flat)}</details>\n" if flat else ""


def pairs(values: Mapping[str, str]) -> str:
    """A list of names and values, cut where it would run away."""
    shown = list(values.items())[:MOST_VALUES]
    made = "".join(f"<dt>{escape(_cut(name))}</dt><dd>{escape(_cut(value))}</dd>" for name, value in shown)
    left = len(values) - len(shown)
    return f'<dl class="pairs">{made}</dl>' + (note(f"{left} more are not shown.") if left else "")


def _cut(text: str) -> str:
    return text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]}… ({len(text):,} characters)"


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested mappings as dotted names -> text."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = "none" if value is None else str(value)
    return flat
