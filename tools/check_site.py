"""Looks at every link of a built site, offline: exit code 0 if all lead somewhere and no page loads anything from elsewhere.

    python tools/check_site.py build/docs

Links within the site must name a file and an anchor that are there. Links to other sites are not followed: their spelling is
checked, and that they lead to no package index. Scripts, styles, fonts and pictures must come with the site.
"""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

# Names of package indexes, as a label of their hosts: a page that sends its readers there sends them past the pins.
INDEXES = {"pypi", "pythonhosted", "anaconda", "npmjs", "crates", "rubygems"}
_LOADED = {"script": "src", "img": "src", "source": "src", "iframe": "src", "audio": "src", "video": "src", "link": "href", "use": "href", "image": "href"}
_HOST = re.compile(r"^(?=.{4,253}$)([a-z0-9]([a-z0-9-]*[a-z0-9])?\.)+[a-z]{2,}$", re.IGNORECASE)


class Page(HTMLParser):
    """The anchors of a page, what it links to and what it loads."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.anchors: set[str] = {"", "top"}
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Called by the parser for every tag."""
        given = {name: value or "" for name, value in attrs}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        where = _LOADED.get(tag)
        if where and given.get(where) and not given[where].startswith(("data:", "#")):
            self.loaded.append(given[where])
        if tag == "a" and "href" in given:
            self.links.append(given["href"])


def outside_complaint(link: str) -> str | None:
    """What is wrong with the spelling of a link to another site."""
    parts = urlsplit(link)
    if parts.scheme == "mailto":
        return None
    if parts.scheme not in ("http", "https") or not _HOST.match(parts.hostname or ""):
        return f"no valid address: {link}"
    return f"a package index: {link}" if INDEXES & set((parts.hostname or "").lower().split(".")) else None


def _is_outside(link: str) -> bool:
    return link.startswith("//") or bool(urlsplit(link).scheme)


def complaints(root: Path) -> list[str]:
    """What is wrong with the site in the folder `root`, a line each."""
    pages = {path.resolve(): Page(path.read_text(encoding="utf-8")) for path in sorted(root.rglob("*.html"))}
    found = [] if pages else [f"{root}: no page"]
    for path, page in pages.items():
        here = path.relative_to(root.resolve())
        for link in page.loaded:
            if _is_outside(link):
                found.append(f"{here}: loads from elsewhere: {link}")
            elif not (path.parent / unquote(urlsplit(link).path)).exists():
                found.append(f"{here}: loads what is not there: {link}")
        for link in page.links:
            if _is_outside(link):
                wrong = outside_complaint(link)
                found += [f"{here}: {wrong}"] if wrong else []
                continue
            parts = urlsplit(link)
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.is_file():
                found.append(f"{here}: leads nowhere: {link}")
            elif target in pages and unquote(parts.fragment) not in pages[target].anchors:
                found.append(f"{here}: no such anchor: {link}")
    for style in sorted(root.rglob("*.css")):
        text = style.read_text(encoding="utf-8")
        found += [f"{style.relative_to(root)}: loads from elsewhere: {at}" for at in re.findall(r"""(?:url\(|@import)\s*['"]?((?:https?:)?//[^'")]+)""", text)]
    return found


def main(arguments: list[str]) -> int:
    root = Path(arguments[0] if arguments else "build/docs")
    found = complaints(root)
    print(*found, sep="\n", end="\n" if found else "", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
