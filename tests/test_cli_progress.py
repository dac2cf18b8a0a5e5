"""Progress: on standard error where that is a terminal (here a pseudo-terminal), plain without colours where asked, nothing elsewhere."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from test_cli import environment
from test_cli_output import COMMANDS, place, run  # noqa: F401
from training_data import make_folder

pty = pytest.importorskip("pty")
pytest.importorskip("rich")

from recog_fast.cli import main
from recog_fast.counting import Progress, counted
from recog_fast.terminal import progress as bars
from recog_fast.terminal.progress import progress, say, shows

COLOUR = re.compile(r"\x1b\[[\d;]*(?:3[0-79]|38|9[0-7]|4[0-7]|48|10[0-7])[\d;]*m")


class Terminal:
    """A pseudo-terminal as a stream, and what came out of it."""

    def __init__(self) -> None:
        self.master, slave = pty.openpty()
        self.stream = io.TextIOWrapper(io.FileIO(slave, "w"), encoding="utf-8", write_through=True)
        self.found = b""
        self.reader = threading.Thread(target=self._follow, daemon=True)  # a terminal holds a few kilobytes that nobody reads
        self.reader.start()

    def _follow(self) -> None:
        try:
            while part := os.read(self.master, 1 << 16):
                self.found += part
        except OSError:  # the other end is closed
            pass

    def read(self) -> str:
        """What was written; the terminal is closed with it."""
        self.stream.close()
        self.reader.join(10)
        os.close(self.master)
        return self.found.decode()


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Terminal]]:
    """Makes standard error (and more, by name) a terminal."""
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(bars, "_EVERY", 0.0)

    def make(*streams: str) -> Terminal:
        made = Terminal()
        for name in ("stderr", *streams):
            monkeypatch.setattr(sys, name, made.stream)
        return made

    yield make
    assert bars._open == [], "every bar was closed"


# What each command counts; those whose work is a moment (doctor, estimate, export, ...) have no bar, warmup needs a compiler.
COUNTED = {
    "train": r"step\W.*2/2", "sweep": r"points\W.*2/2", "eval": r"pairs@8: images embedded\W.*32/32", "data check": r"images checked\W.*32/32",
    "data convert": r"images written and read back\W.*64/64", "import, head": r"files read\W.*2/2", "identify": r"gallery embedded\W.*32/32",
    "bench": r"steps at 300 classes\W.*5/6", "filter-overlap": r"images\W.*32/32", "unknowns": r"images\W.*12/12", "classes add": r"images embedded\W.*32/32",
}  # fmt: skip


@pytest.mark.parametrize("name", COUNTED)
def test_long_work_is_counted_on_standard_error(
    name: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, terminal: Callable[..., Terminal], capsys: pytest.CaptureFixture[str]  # noqa: F811
) -> None:
    """Standard output is as without a terminal; the log of training is no result, so it needs both to be one."""
    both = name in ("train", "sweep")
    seen = terminal(*(["stdout"] if both else []))
    assert run(place, tmp_path, monkeypatch, name) == 0
    shown = seen.read()
    assert re.search(COUNTED[name], shown), shown[-200:]
    assert COLOUR.search(shown)
    if not both:
        out = capsys.readouterr().out
        assert out and "\x1b" not in out and "\r" not in out


@pytest.mark.parametrize("name", ["report", "train"])
def test_a_measured_report_and_json_training(
    name: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, terminal: Callable[..., Terminal], capsys: pytest.CaptureFixture[str]  # noqa: F811
) -> None:
    """--json sends the log of training to the terminal too, under its bar."""
    pytest.importorskip("matplotlib")
    seen = terminal()
    monkeypatch.chdir(place)
    more = ["--json"] if name == "train" else ["--measure"]
    assert main([*COMMANDS[name][0][:2], *(["--output", str(tmp_path / "o")] if name == "train" else []), *more]) == 0
    shown = seen.read()
    assert re.search(r"step\W.*2/2" if name == "train" else r"parts measured\W.*1/2", shown), shown[-200:]
    assert ("Global Step: 2" in shown) == (name == "train")
    assert capsys.readouterr().out.count("\n") == 1


@pytest.mark.parametrize("streams", [[], ["stdout"]], ids=["tee", "terminal"])
def test_the_report_of_training_has_a_bar_where_its_log_has(
    streams: list[str], place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, terminal: Callable[..., Terminal]  # noqa: F811
) -> None:
    """`train ... | tee log`: nothing in between the lines."""

    def report(output: Path, progress: Progress | None) -> Path:
        if progress is not None:
            progress(1, 2)
        return output / "report.html"

    monkeypatch.setattr("recog_fast.training.run_report.report_run", report)
    seen = terminal(*streams)
    assert run(place, tmp_path, monkeypatch, "train", "--report", "true") == 0
    shown = seen.read()
    assert ("report: parts measured" in shown) == bool(streams) and bool(shown) == bool(streams)


@pytest.mark.parametrize(("variable", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
@pytest.mark.parametrize("name", ["data check", "train"])
def test_no_colour_and_dumb_terminals(
    variable: str, value: str, name: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, terminal: Callable[..., Terminal]  # noqa: F811
) -> None:
    seen = terminal("stdout")
    monkeypatch.setenv(variable, value)
    assert run(place, tmp_path, monkeypatch, name) == 0
    shown = seen.read()
    assert not COLOUR.search(shown)
    assert ("32/32" in shown or "2/2" in shown) == (variable == "NO_COLOR")
    assert ("\x1b" in shown) == (variable == "NO_COLOR")


def test_without_rich_a_line_counts(monkeypatch: pytest.MonkeyPatch, terminal: Callable[..., Terminal], capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "rich.console", None)
    seen = terminal()
    with progress("points") as outer, progress("images") as inner:
        assert outer is not None and inner is not None
        outer(0, 2)
        inner(3, 12)
        say("a line")
        inner(4, 0)
    shown = seen.read()
    assert "\rpoints 0/2" in shown and "\rimages 3/12" in shown and "\rimages 4" in shown and "\x1b" not in shown
    assert shown.endswith("\r" + " " * len("images 4") + "\r"), "nothing of it stays"
    assert capsys.readouterr().out == "a line\n"


def test_bars_inside_others_share_a_display(terminal: Callable[..., Terminal]) -> None:
    seen = terminal("stdout")
    with progress("points", lines=True) as outer:
        with progress("images") as inner:
            assert outer is not None and inner is not None
            outer(1, 6)
            inner(3, 12)
            say("[bold]a line[/bold]")
        outer(2, 6)
    shown = seen.read()
    assert "1/6" in shown and "3/12" in shown and "[bold]a line[/bold]" in shown
    assert "2/6" in shown and "images" not in shown[shown.index("2/6") :], "the inner one is gone"


def test_results_stay_on_standard_output_under_a_bar(terminal: Callable[..., Terminal], capsys: pytest.CaptureFixture[str]) -> None:
    seen = terminal()
    with progress("images") as step:
        assert step is not None
        step(1, 2)
        print("a result")
    assert "a result" not in seen.read() and capsys.readouterr().out == "a result\n"


def test_an_error_closes_the_bar(terminal: Callable[..., Terminal]) -> None:
    seen = terminal()

    def fails() -> None:
        with progress("images") as step:
            assert step is not None
            step(1, 2)
            raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        fails()
    assert seen.read().rpartition("\x1b[?25")[2].startswith("h"), "the cursor is back"


def test_where_nothing_is_shown(terminal: Callable[..., Terminal], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with progress("images") as step:
        assert step is None
    assert not shows() and capsys.readouterr() == ("", "")
    seen = terminal()
    assert shows() and not shows(lines=True), "lines into a pipe would come between (`| tee log`)"
    monkeypatch.setenv("TERM", "dumb")
    assert not shows()
    seen.read()
    assert not shows(), "a closed stream is no terminal"
    monkeypatch.setattr(sys, "stderr", None)
    assert not shows()


def test_a_step_costs_little(terminal: Callable[..., Terminal], monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawn ten times a second at most, whatever is counted."""
    monkeypatch.setattr(bars, "_EVERY", 0.1)
    seen = terminal()
    began = time.perf_counter()
    with progress("images") as step:
        for done in range(20_000):
            step and step(done, 20_000)
    assert time.perf_counter() - began < 1
    assert seen.read().count("images") < 20


def test_counted_gives_the_items_and_how_many() -> None:
    told: list[Any] = []
    assert list(counted("abc", 3, lambda done, total: told.append((done, total)))) == ["a", "b", "c"]
    assert told == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert list(counted(iter([1, 2]), 2, None)) == [1, 2]


def test_a_process_at_a_terminal(tmp_path: Path) -> None:
    """The whole command: standard output into a pipe, standard error a terminal."""
    make_folder(tmp_path / "faces", identities=3, images=2)
    seen = Terminal()
    command = [sys.executable, "-m", "recog_fast", "data", "check", str(tmp_path / "faces")]
    done = subprocess.run(command, env={**environment(), "TERM": "xterm", "NO_COLOR": "1"}, stdout=subprocess.PIPE, stderr=seen.stream.fileno(), text=True, check=True)
    shown = seen.read()
    assert "images checked" in shown and not COLOUR.search(shown)
    assert done.stdout.startswith("6 images, 3 classes") and "\x1b" not in done.stdout


def test_a_killed_process_gives_the_cursor_back() -> None:
    """SIGTERM under a bar, as a scheduler sends it: exit code 143, a line, no traceback, and whoever comes next sees the cursor."""
    code = (
        "import os, signal, sys, recog_fast.commands.doctor as d\nfrom recog_fast.cli import main\nfrom recog_fast.terminal.progress import progress\n"
        "def killed():\n  with progress('x') as step:\n    step(1, 2)\n    os.kill(os.getpid(), signal.SIGTERM)\n    step(2, 2)\n"
        "d.describe = killed\nsys.exit(main(['doctor']))"
    )
    seen = Terminal()
    killed = subprocess.run([sys.executable, "-c", code], env={**environment(), "TERM": "xterm"}, stdout=subprocess.PIPE, stderr=seen.stream.fileno(), text=True)
    shown = seen.read()
    assert (killed.returncode, killed.stdout) == (143, "") and "Traceback" not in shown
    assert "1/2" in shown and shown.rpartition("\x1b[?25")[2].startswith("h") and "recog-fast: terminated" in shown
