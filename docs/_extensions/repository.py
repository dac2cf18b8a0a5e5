"""Links of the pages into the repository: files become downloads; folders, which a site cannot show, become their names.

The entry `others` in the contents of index.md stands for the pages that it does not name.
"""

from __future__ import annotations

import re
from pathlib import Path

from sphinx.application import Sphinx

_LINK = re.compile(r"\[([^\]]+)\]\((\.\./[^)#\s]+)\)")


def _source(app: Sphinx, name: str, text: list[str]) -> None:
    if name.startswith("api/"):
        return
    if name == "index":
        listed = set(re.findall(r"^[\w-]+$", text[0], re.MULTILINE))
        more = sorted(path.stem for path in Path(app.srcdir).glob("*.md") if path.stem not in listed | {"index"})
        text[0] = re.sub(r"^others\n", "".join(f"{stem}\n" for stem in more), text[0], flags=re.MULTILINE)
    here = Path(app.srcdir) / Path(name).parent

    def mended(found: re.Match[str]) -> str:
        target = here / found[2]
        if target.is_dir():
            return f"{found[1]} (`{found[2].removeprefix('../')}`)"
        return f"{{download}}`{found[1]} <{found[2]}>`" if target.suffix == ".md" else found[0]

    text[0] = _LINK.sub(mended, text[0])


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("source-read", _source)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
