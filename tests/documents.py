"""Reads the project's Markdown: code blocks in order, with the reason where one is not run, headings and links."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt
from paths import ROOT

# Shown, not run: what a command prints, settings, trees, directives of the site.
SHOWN = {"text", "yaml", "json", "html", "cpp", "{toctree}", "{literalinclude}", "{include}"}
NOT_RUN = re.compile(r"<!--\s*not run:\s*(.+?)\s*-->", re.DOTALL)


@dataclass(frozen=True)
class Block:
    """One code block of a page. language: "python", "sh", one of SHOWN, "" (indented). reason: why it is not run, "" if it is."""

    language: str
    text: str
    line: int
    reason: str = ""


def pages() -> list[Path]:
    """Every page of the documents, and the files a visitor reads first."""
    written = sorted(path for path in (ROOT / "docs").rglob("*.md"))
    return [*written, *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "examples/README.md", "benchmarks/NOTES.md"))]


def _tokens(path: Path) -> list[Any]:
    return MarkdownIt("commonmark").enable("table").parse(path.read_text(encoding="utf-8"))


def blocks(path: Path) -> list[Block]:
    """The code blocks of a page; `<!-- not run: reason -->` right above one gives its reason."""
    found: list[Block] = []
    reason = ""
    for token in _tokens(path):
        if token.type == "html_block":
            said = NOT_RUN.search(token.content)
            reason = said[1] if said else reason
            continue
        if token.type in ("fence", "code_block"):
            info = token.info.split()
            found.append(Block(info[0] if info else "", token.content, token.map[0] + 1, reason))
        reason = ""
    return found


def slug(heading: str) -> str:
    """The anchor of a heading, as code forges and the site make it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def anchors(path: Path) -> set[str]:
    """What `#...` may name in a page."""
    found = {""}
    tokens = _tokens(path)
    for at, token in enumerate(tokens):
        if token.type == "heading_open":
            name = slug("".join(child.content for child in tokens[at + 1].children or [] if child.type in ("text", "code_inline")))
            same = sum(1 for one in found if re.fullmatch(rf"{re.escape(name)}(-\d+)?", one))
            found.add(f"{name}-{same}" if same else name)
    return found | set(re.findall(r"""\bid=["']([^"']+)["']""", path.read_text(encoding="utf-8")))


def links(path: Path) -> list[str]:
    """Targets of links and pictures, in order."""
    found = []
    for token in _tokens(path):
        for child in token.children or []:
            target = child.attrs.get("href" if child.type == "link_open" else "src", "")
            if target:
                found.append(str(target))
    return found


def commands(text: str) -> list[str]:
    """The commands of a shell block: joined where a line ends in a backslash, a here-document kept whole, comments left out."""
    made: list[str] = []
    lines = iter(text.splitlines())
    for line in lines:
        command = line
        while command.endswith("\\"):
            command = command[:-1] + next(lines)
        here = re.search(r"<<\s*'?(\w+)'?", command)
        while here and command.splitlines()[-1] != here[1]:
            command += "\n" + next(lines)
        if command.strip() and not command.lstrip().startswith("#"):
            made.append(command)
    return made


class Session:
    """A reader who types a page from top to bottom in the folder `home`: one Python session, one shell."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.scope: dict[str, Any] = {"__name__": "__main__"}

    def run(self, block: Block, where: str) -> str:
        """Runs a block and returns what it printed; AssertionError where a command fails."""
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            if block.language == "python":
                # The line numbers of a traceback are those of the page.
                exec(compile("\n" * block.line + block.text, where, "exec"), self.scope)
            else:
                for command in commands(block.text):
                    self._command(command, f"{where}:{block.line}")
        return printed.getvalue()

    def _command(self, command: str, where: str) -> None:
        words = shlex.split(command, comments=True) if "<<" not in command else []
        if words[:1] == ["recog-fast"] and not {"|", ">", "&&", ";"} & set(words):
            # In this process: a new one would import torch again.
            from recog_fast.cli import main

            assert main(words[1:]) == 0, f"{where}: {command}"
            return
        environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(["sh", "-e", "-c", command], cwd=self.home, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, f"{where}: {command}\n{done.stdout}{done.stderr}"
        print(done.stdout)
