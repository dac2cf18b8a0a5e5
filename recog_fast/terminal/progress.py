"""Progress of long work on standard error, where that is a terminal; elsewhere nothing is written.

    with progress("images embedded") as step:       # step: (done, total) -> None, or None where nothing is shown
        embed_dataset(network, images, size, progress=step)

Bars inside others share one display. Nothing runs in the background: a bar is drawn by the calls that move it, so it takes no time from
what is measured between them. TERM=dumb: no bar. NO_COLOR: one without colours. Without rich a line "name 12/100" stands for it.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from typing import Any, Protocol, TextIO

from recog_fast.counting import Progress

_EVERY = 0.1  # seconds between two drawings


class _Display(Protocol):
    def add(self, name: str) -> Any: ...
    def move(self, bar: Any, done: int, total: int) -> None: ...
    def remove(self, bar: Any) -> None: ...
    def say(self, text: str) -> None: ...
    def close(self) -> None: ...


_open: list[_Display] = []  # the display of the bars that are shown now: at most one


def shows(lines: bool = False) -> bool:
    """Whether bars are shown. lines: the work prints to standard output meanwhile (`say`), which then has to be a terminal too: in
    `... | tee log` lines would come in between."""
    dumb = os.environ.get("TERM", "") in ("dumb", "unknown")
    return not dumb and _terminal(sys.stderr) and (not lines or _terminal(sys.stdout))


def _terminal(stream: TextIO | None) -> bool:
    try:
        return stream is not None and stream.isatty()
    except ValueError:  # closed
        return False


@contextlib.contextmanager
def progress(name: str, lines: bool = False) -> Iterator[Progress | None]:
    """A callback (done, total) that moves the bar `name` while the block runs; None where nothing is shown (`shows`)."""
    if not shows(lines):
        yield None
        return
    outermost = not _open
    if outermost:
        _open.append(_display())
    display = _open[0]
    bar = display.add(name)
    try:
        yield lambda done, total: display.move(bar, done, total)
    finally:
        display.remove(bar)
        if outermost:
            _open.clear()
            display.close()


def say(text: str) -> None:
    """A line of text to standard output at once, above the bars that are shown."""
    if _open:
        _open[0].say(text)
    else:
        print(text, flush=True)


class _Line:
    """The innermost bar as a line that is written over: "name 12/100"."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.width = 0
        self.next = 0.0

    def add(self, name: str) -> int:
        self.names.append(name)
        self.next = 0.0
        return len(self.names) - 1

    def move(self, bar: int, done: int, total: int) -> None:
        now = time.monotonic()
        if now < self.next and (done != total or not total):
            return
        self.next = now + _EVERY
        text = f"{self.names[bar]} {done}/{total}" if total else f"{self.names[bar]} {done}"
        self._write("\r" + text.ljust(self.width))
        self.width = len(text)

    def remove(self, bar: int) -> None:
        self.names.pop()
        self._clear()

    def say(self, text: str) -> None:
        self._clear()
        print(text, flush=True)

    def close(self) -> None:
        self._clear()

    def _clear(self) -> None:
        if self.width:
            self._write("\r" + " " * self.width + "\r")
        self.width = 0

    def _write(self, text: str) -> None:
        sys.stderr.write(text)
        sys.stderr.flush()


class _Bars:
    """rich's bars, drawn when they move."""

    def __init__(self) -> None:
        from rich import progress as rich
        from rich.console import Console

        text = (rich.TextColumn("{task.description}", markup=False), rich.TextColumn("{task.fields[counted]}", markup=False))
        columns = (text[0], rich.BarColumn(), text[1], rich.TimeRemainingColumn())
        # Redirected streams would send results to standard error.
        self.shown = rich.Progress(
            *columns, console=Console(stderr=True), transient=True, auto_refresh=False, redirect_stdout=False, redirect_stderr=False
        )  # fmt: skip
        self.next = 0.0
        self.shown.start()

    def add(self, name: str) -> Any:
        self.next = 0.0
        return self.shown.add_task(name, total=None, counted="")

    def move(self, bar: Any, done: int, total: int) -> None:
        now = time.monotonic()
        if now < self.next and (done != total or not total):
            return
        self.next = now + _EVERY
        self.shown.update(bar, completed=done, total=total or None, counted=f"{done}/{total}" if total else str(done))
        self.shown.refresh()

    def remove(self, bar: Any) -> None:
        self.shown.remove_task(bar)

    def say(self, text: str) -> None:
        # Both streams are terminals here: the line appears where standard output's would, and the bar moves down.
        self.shown.console.print(text, highlight=False, markup=False, emoji=False, soft_wrap=True)

    def close(self) -> None:
        self.shown.stop()


def _display() -> _Display:
    try:
        return _Bars()
    except ImportError:
        return _Line()
