"""Formulas as MathML, made while the pages are built: readers need neither a script nor a font."""

from __future__ import annotations

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError
from sphinx.writers.html5 import HTML5Translator


def _render(source: str, display: str) -> str:
    known = source.replace("{aligned}", "{align*}")  # what code forges want inside $$ is what the converter calls otherwise
    try:
        made: str = convert(known, display=display)
    except Exception as error:  # the converter has no one error class
        raise ExtensionError(f"formula {source!r}: {type(error).__name__}: {error}") from error
    # What the converter does not know it leaves as text.
    if "\\" in made or "<mi>&</mi>" in made:
        raise ExtensionError(f"formula {source!r}: latex2mathml does not know a command, or an & stands outside a table")
    return made.replace("<mi>&#x02032;</mi>", '<mi class="prime">&#x02032;</mi>')  # tiny in fonts without mathematics


def inline(writer: HTML5Translator, node: nodes.math) -> None:
    """A formula within a line."""
    writer.body.append(_render(node.astext(), "inline"))
    raise nodes.SkipNode


def block(writer: HTML5Translator, node: nodes.math_block) -> None:
    """A displayed formula."""
    writer.body.append(_render(node.astext(), "block"))
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_html_math_renderer("mathml", inline_renderers=(inline, None), block_renderers=(block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
