"""The command line: `recog-fast COMMAND` = `python -m recog_fast COMMAND`.

Exit codes: 0 done (also when SIGTERM ended a training run after saving), 1 an error, said in one line, 2 bad usage, 130 interrupted,
143 ended by SIGTERM.
Results go to standard output; errors, warnings and progress to standard error. Everything heavy is imported by the command that needs it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from types import FrameType

from recog_fast import __version__
from recog_fast.commands import (
    bench,
    classes,
    completion,
    data,
    doctor,
    evaluate,
    identify,
    interchange,
    report,
    scale,
    warmup,
)
from recog_fast.terminal.console import SAID, Parser, UsageError, one_line, parsers_of, usable_streams
from recog_fast.training.commands import add_commands, add_train

_OWN_REST = ("train", "sweep")  # their settings belong to jsonargparse: they stay unparsed here


class _Terminated(KeyboardInterrupt):
    """SIGTERM: everything on the way tidies up as after Ctrl-C."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; `arguments` default to the process's own."""
    usable_streams()
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if options.command is None:
        if rest:
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        parser.print_help()
        return 2
    if rest and options.command not in _OWN_REST:
        options.parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        with _sigterm():
            code: int = options.run(options, rest)
            sys.stdout.flush()
        return code
    except _Terminated:
        print("recog-fast: terminated", file=sys.stderr)
        return 143
    except KeyboardInterrupt:
        print("recog-fast: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _reader_is_gone():  # `recog-fast doctor | head`: it has enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        if options.debug:
            raise
        if isinstance(error, UsageError):
            print(f"{options.parser.prog}: error: {_message(error, options)} (see {options.parser.prog} --help)", file=sys.stderr)
            return 2
        print(f"{options.parser.prog}: error: {_message(error, options)}", file=sys.stderr)
        return 1


@contextlib.contextmanager
def _sigterm() -> Iterator[None]:
    """SIGTERM as an exception, so that a bar gives the cursor back; training has handlers of its own. Ranks of torchrun keep the default: an
    exception would wait for the collective they are in."""
    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if not ours or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        yield
        return
    process = os.getpid()

    def stop(number: int, _: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        if os.getpid() != process:  # a forked child: ends as ever
            os.kill(os.getpid(), number)
        raise _Terminated

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _message(error: Exception, options: argparse.Namespace) -> str:
    text = one_line(error).removeprefix(f"{options.parser.prog.partition(' ')[2]}: ").removeprefix(f"{options.command}: ")
    return text if isinstance(error, SAID) else f"{text} (--debug shows where)"


def _reader_is_gone() -> bool:
    """Whether nobody reads standard output any more; a pipe elsewhere may have broken instead, which is an error."""
    if not hasattr(select, "poll"):
        return True
    poll = select.poll()
    poll.register(sys.stdout.fileno(), select.POLLOUT)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _parser() -> Parser:
    """The parser of all commands; each command's options know theirs as `parser` and what runs it as `run`."""
    parser = Parser(
        prog="recog-fast",
        description="Recognition over very many classes: train, evaluate, look inside.",
        example=("recog-fast demo --quick", "recog-fast train configs/synthetic.yaml --num_epoch 1", "recog-fast eval --help"),
    )
    parser.add_argument("--version", action="version", version=f"recog_fast {__version__}", help="print the version and stop")
    debug = Parser(add_help=False)
    debug.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    add_train(commands, debug)
    for module in (evaluate, data, interchange, identify, report, bench):
        module.add(commands, [debug])
    add_commands(commands, debug)
    for other in (classes, doctor, scale, warmup):
        other.add(commands, [debug])
    completion.add(commands, [debug], parser)
    for _, below in parsers_of(parser):
        below.set_defaults(parser=below)
    return parser

