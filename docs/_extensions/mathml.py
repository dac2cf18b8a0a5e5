"""Formulas as MathML, made while the pages are built: readers need neither a script nor a font."""

from __future__ import annotations

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError
from sphinx.writers.html5 import HTML5Translator


def _render(source: str, display: str) -> str:
    try:
        made: str = convert(source, display=display)
    except Exception as error:  # the converter has no one error class
        raise ExtensionError(f"formula {source!r}: {type(error).__name__}: {error}") from error
    # What the converter does not know it leaves as text.
    if "\\" in made.replace("\\\\", ""):
        raise ExtensionError(f"formula {source!r}: a command that latex2mathml does not know")
    return made


def inline(writer: HTML5Translator, node: nodes.math) -> None:
    """A formula within a line."""
    writer.body.append(_render(node.astext(), "inline"))
    raise nodes.SkipNode


def block(writer: HTML5Translator, node: nodes.math_block) -> None:
    """A displayed formula; lines that hold & or \\\\ are aligned."""
    source = node.astext()
    if "\\\\" in source and "\\begin" not in source:
        source = rf"\begin{{aligned}}{source}\end{{aligned}}"
    writer.body.append(_render(source, "block"))
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_html_math_renderer("mathml", inline_renderers=(inline, None), block_renderers=(block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
