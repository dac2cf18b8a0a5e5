"""What the commands share: the parser with one-line errors and examples, errors of usage, one JSON document."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

Commands = Any  # argparse's subparsers object, which has no public name
# These carry a message for the user; whatever else arrives is named by its type.
SAID = (ValueError, TypeError, OSError, ArithmeticError, RuntimeError, ImportError)


class UsageError(ValueError):
    """Options that do not go together, or miss one they need: exit code 2, as what the parser refuses itself."""


class _Formatter(argparse.HelpFormatter):
    """Fills paragraphs, and leaves indented lines (examples to copy) as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        filled = super()._fill_text
        lines = text.split("\n")
        return "\n".join(line if line.startswith("  ") else filled(line, width, indent) for line in lines)


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line. `example`: commands for the end of the help, one each."""

    def __init__(self, *arguments: Any, example: str | tuple[str, ...] = (), **options: Any) -> None:
        self.examples = (example,) if isinstance(example, str) else example
        if self.examples:
            options["epilog"] = "\n".join(["example:" if len(self.examples) == 1 else "examples:", *(f"  {one}" for one in self.examples)])
        if options.get("description"):
            options["description"] = " ".join(options["description"].split())  # often a docstring
        super().__init__(*arguments, **{"formatter_class": _Formatter, **options})

    def error(self, message: str) -> NoReturn:
        """Exit code 2."""
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def usable_streams() -> None:
    """A name that standard output cannot encode is escaped, no error at the end of the work; a closed stream is written to nowhere."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # started with >&-: print would take the other one, or the first file that is opened
            setattr(sys, name, open(os.devnull, "w"))  # for the life of the process
        elif getattr(stream, "errors", "") == "strict" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def parsers_of(parser: argparse.ArgumentParser, path: str = "") -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """(command path, parser) of a parser, "" for it, and of all commands below it."""
    yield path, parser
    for action in actions_of(parser):
        if isinstance(action, argparse._SubParsersAction):
            for name, child in action.choices.items():
                yield from parsers_of(child, f"{path} {name}".strip())


def actions_of(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """The options and places of a parser."""
    return parser._actions  # argparse shows its actions in no other way


def one_line(error: BaseException) -> str:
    """What an error says, in one line; the type too where the text alone would say little (KeyError: 'x')."""
    text = str(error)
    if "Original Traceback" in text:
        # An error of a data worker carries its traceback as text; its last line is the message.
        text = text.strip().splitlines()[-1]
    text = " ".join(text.split())
    return text if text and isinstance(error, SAID) else f"{type(error).__name__}: {text}".removesuffix(": ")


def print_json(document: Any) -> None:
    """One line of strict JSON to standard output: NaN and infinities are null, paths and keys text, arrays lists."""
    print(json.dumps(_plain(document), allow_nan=False))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(inner) for inner in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):  # NumPy's scalars and arrays, tensors
        return _plain(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def only_json(wanted: bool) -> contextlib.AbstractContextManager[Any]:
    """Around work that prints lines of its own: with --json they go to standard error, so that the document stands alone."""
    return contextlib.redirect_stdout(sys.stderr) if wanted else contextlib.nullcontext()


def json_option(parser: argparse.ArgumentParser, what: str) -> None:
    """Adds --json: `what` the document holds."""
    parser.add_argument("--json", action="store_true", help=f"print one JSON document instead of text: {what}")


def count(text: str) -> int:
    """A whole number from 1 on, also written 29e6; ArgumentTypeError for anything else."""
    try:
        value = float(text)
        if value == int(value) >= 1:
            return int(value)
    except (ValueError, OverflowError):
        pass
    raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, such as 1000 or 29e6, got {text!r}")


def at_least(low: int) -> Callable[[str], int]:
    """The `type` of an option that takes whole numbers from `low` on; ArgumentTypeError for anything else."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}") from None
        if value < low:
            raise argparse.ArgumentTypeError(f"expected at least {low}, got {value}")
        return value

    return read


def between(low: float, high: float, above: bool = False) -> Callable[[str], float]:
    """The `type` of an option that takes finite numbers from `low` (above: beyond it) to `high`; ArgumentTypeError for anything else."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from None
        if not (low < value if above else low <= value) or not value <= high or math.isinf(value):
            wanted = f"in {'(' if above else '['}{low:g}, {high:g}]" if math.isfinite(high) else f"{'above' if above else 'from'} {low:g}"
            raise argparse.ArgumentTypeError(f"expected a number {wanted}, got {text}")
        return value

    return read


def device_name(text: str) -> str:
    """The `type` of --device: cpu, cuda or cuda:1; whether there is one is found out later. ArgumentTypeError for anything else."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"expected cpu, cuda or cuda:N, got {text!r}")
    return text
