"""Every command says what it does and shows an example that works; every option says what it is, with its default."""

from __future__ import annotations

import argparse
import itertools
import math
import shlex
from typing import Any

import pytest
from paths import ROOT

from recog_fast.cli import _parser, main
from recog_fast.terminal.console import Parser, at_least, between, count, device_name, parsers_of

PARSERS = dict(parsers_of(_parser()))
OPTIONS = [(path, action) for path, parser in PARSERS.items() for action in parser._actions]
EXAMPLES = [example for parser in PARSERS.values() if isinstance(parser, Parser) for example in parser.examples]


def leaf(path: str) -> bool:
    return not any(other.startswith(f"{path} ") for other in PARSERS) and path != ""


def test_all_commands_are_here() -> None:
    assert {path for path in PARSERS if leaf(path)} == {
        "demo", "train", "eval", "data check", "data convert", "import", "export", "identify", "report", "bench", "sweep", "filter-overlap",
        "unknowns", "classes add", "classes merge", "doctor", "estimate", "warmup", "completion",
    }  # fmt: skip


@pytest.mark.parametrize("path", PARSERS)
def test_a_command_says_what_it_does_and_shows_it(path: str) -> None:
    parser = PARSERS[path]
    assert isinstance(parser, Parser)
    assert parser.description and len(parser.description) > 20 and parser.description.endswith(".")
    assert parser.examples and all(example.startswith(("recog-fast ", "torchrun ")) for example in parser.examples)
    shown = parser.format_help().splitlines()
    assert all(f"  {example}" in shown for example in parser.examples), "an example stays in one line"


@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_are_accepted(example: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the parser itself; settings of training by their own."""
    pytest.importorskip("jsonargparse")
    from recog_fast.training.config import read_config

    words = list(itertools.takewhile(lambda word: word not in (">", ">>"), shlex.split(example)))
    words = words[words.index("recog_fast") + 1 :] if words[0] == "torchrun" else words[1:]
    monkeypatch.chdir(ROOT)
    if "--help" in words:
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == 0
        return
    options, rest = _parser().parse_known_args(words)
    assert options.parser.prog == " ".join(["recog-fast", options.command, *([options.action] if hasattr(options, "action") else [])])
    if options.command == "train" and options.config:
        read_config(options.config, rest)
    elif options.command == "sweep":
        from recog_fast.training.sweep import point_config, read_sweep

        settings, points = read_sweep(options.sweep)
        point_config(settings, points[0], rest, ROOT / "nowhere")
    else:
        assert not rest


@pytest.mark.parametrize(("path", "action"), OPTIONS, ids=lambda x: x if isinstance(x, str) else x.dest)
def test_an_option_says_what_it_is(path: str, action: argparse.Action) -> None:
    if isinstance(action, argparse._SubParsersAction):
        assert all(choice.help for choice in action._choices_actions)
        return
    assert action.help and len(action.help) > 8
    default: Any = action.default
    if default is None or isinstance(default, bool) or default in (argparse.SUPPRESS, "", []):
        return
    text = ",".join(map(str, default)) if isinstance(default, list) else str(default)
    said = PARSERS[path]._get_formatter()._expand_help(action)
    assert said.endswith(f"({text})"), f"expected the default {text} at the end of: {said}"


def test_every_command_with_a_result_has_json() -> None:
    without = {path for path, parser in PARSERS.items() if leaf(path) and "--json" not in parser._option_string_actions}
    assert without == {"completion"}


def test_numbers_of_options() -> None:
    assert (count("29e6"), at_least(0)("0"), at_least(20)("20")) == (29_000_000, 0, 20)
    for read, text, said in ((count, "0", "from 1 on"), (at_least(20), "3", "expected at least 20, got 3"), (at_least(0), "x", "whole number, got 'x'")):
        with pytest.raises(argparse.ArgumentTypeError, match=said):
            read(text)
    assert (between(0, 1)("0"), between(0, 1, above=True)("1"), between(0, math.inf, above=True)("2.5")) == (0.0, 1.0, 2.5)
    for low, high, above, text in ((0, 1, False, "1.1"), (0, 1, True, "0"), (0, math.inf, True, "inf"), (0, 1, False, "nan"), (0, 1, False, "x")):
        with pytest.raises(argparse.ArgumentTypeError, match=f"expected a number.*got '?{text}"):
            between(low, high, above)(text)
    assert [device_name(name) for name in ("cpu", "cuda", "cuda:1")] == ["cpu", "cuda", "cuda:1"]
    for text in ("meta", "cpu:0", "cuda:", "cuda:x"):
        with pytest.raises(argparse.ArgumentTypeError, match="expected cpu, cuda or cuda:N"):
            device_name(text)
