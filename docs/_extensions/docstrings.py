"""Docstrings are plain text with `names`; autodoc wants reStructuredText. Indented text stays as it is, of an `Args:` list each
entry becomes an item, and no character of a formula is taken for markup."""

from __future__ import annotations

import re
from collections.abc import Iterator

from sphinx.application import Sphinx

_LISTS = ("Args:", "Arguments:", "Returns:", "Attributes:", "Fields:")


def _escape(text: str) -> str:
    """One paragraph as reStructuredText that shows the same characters."""
    parts = text.split("`")
    if len(parts) % 2 == 0:  # an odd backtick: not a pair, not a name
        parts = [text.replace("`", "'")]
    shown = []
    for at, part in enumerate(parts):
        if at % 2 == 0:
            shown.append(re.sub(r"([\\*_|])", r"\\\1", part))
            continue
        # Markup must stand apart from letters: `name`s.
        before = "\\ " if parts[at - 1][-1:].isalnum() else ""
        after = "\\ " if parts[at + 1][:1].isalnum() else ""
        shown.append(f"{before}``{part.strip()}``{after}")
    joined = "".join(shown)
    joined = joined.replace("::", ":\\:")
    return re.sub(r"^([-+.>:=~#]|\(?\w{1,4}[.)])(?=\s|$|[-+.>:=~#])", lambda found: "\\" + found[0], joined)


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _items(lines: list[str]) -> Iterator[str]:
    """Lines of the least indentation begin an item, deeper ones go on with it."""
    least = min(_indent(line) for line in lines)
    item: list[str] = []
    for line in lines:
        if _indent(line) == least and item:
            yield " ".join(item)
            item = []
        item.append(line.strip())
    yield " ".join(item)


def _paragraph(lines: list[str]) -> list[str]:
    """A run of lines without a blank one."""
    if all(_indent(line) for line in lines):
        return ["::", "", *("    " + line for line in lines), ""]
    at = next((k for k, line in enumerate(lines) if _indent(line)), len(lines))
    head, rest = lines[:at], lines[at:]
    if head[0].startswith("- "):
        made: list[str] = []
        for line in lines:
            if line.startswith("- ") or not made:
                made.append(line.removeprefix("- "))
            else:
                made[-1] += " " + line.strip()
        return [*(f"- {_escape(item)}" for item in made), ""]
    if not rest:
        return [_escape(" ".join(head)), ""]
    if head[-1].rstrip() in _LISTS:
        # A line that leaves the list's indentation ends it.
        end = next((k for k, line in enumerate(rest) if not _indent(line)), len(rest))
        after = _paragraph(rest[end:]) if rest[end:] else []
        return [_escape(" ".join(head)), "", *(f"- {_escape(item)}" for item in _items(rest[:end])), "", *after]
    end = next((k for k, line in enumerate(rest) if not _indent(line)), len(rest))
    after = _paragraph(rest[end:]) if rest[end:] else []
    return [_escape(" ".join(head)), "", "::", "", *("    " + line for line in rest[:end]), "", *after]


def restructured(lines: list[str]) -> list[str]:
    """A docstring, its common indentation taken away, as reStructuredText."""
    made: list[str] = []
    run: list[str] = []
    for line in [*lines, ""]:
        if line.strip():
            run.append(line.rstrip())
        elif run:
            made += _paragraph(run)
            run = []
    return made


def _process(app: Sphinx, what: str, name: str, thing: object, options: object, lines: list[str]) -> None:
    lines[:] = restructured(lines)


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", _process)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
