"""The command line: `recog-fast COMMAND` = `python -m recog_fast COMMAND`.

Exit codes: 0 done (also when SIGTERM ended a training run after saving), 1 an error, said in one line, 2 bad usage.
Everything heavy is imported by the command that needs it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from recog_fast import __version__
from recog_fast.commands import bench as bench_command
from recog_fast.commands import classes, doctor, identify, interchange, scale, warmup
from recog_fast.commands import completion as completion_command
from recog_fast.commands import data as data_commands
from recog_fast.commands import report as report_command
from recog_fast.training.commands import add_commands


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        """Exit code 2."""
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; `arguments` default to the process's own."""
    parser = _parser()
    # Settings overrides of `train` belong to jsonargparse: they stay unparsed here.
    options, rest = parser.parse_known_args(arguments)
    if options.command is None:
        parser.print_help()
        return 2
    if rest and options.command not in ("train", "demo", "sweep"):
        command = f"{parser.prog} {options.command}"
        parser.exit(2, f"{command}: error: unrecognized arguments: {' '.join(rest)} (see {command} --help)\n")
    try:
        code: int = options.run(options, rest)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # `recog-fast doctor | head`: the reader has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("recog-fast: interrupted", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, ArithmeticError, RuntimeError, ImportError) as error:
        if options.debug:
            raise
        message = _one_line(error).removeprefix(f"{options.command}: ")
        print(f"recog-fast {options.command}: error: {message}", file=sys.stderr)
        return 1


def _one_line(error: BaseException) -> str:
    text = str(error)
    if "Original Traceback" in text:
        # An error of a data worker carries its traceback as text; its last line is the message.
        text = text.strip().splitlines()[-1]
    return " ".join(text.split()) or type(error).__name__


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="recog-fast", description="Recognition over very many classes: train, evaluate, look inside."
    )
    parser.add_argument("--version", action="version", version=f"recog_fast {__version__}")
    debug = Parser(add_help=False)
    debug.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")

    demo = commands.add_parser(
        "demo", parents=[debug], add_help=False, help="train and evaluate on synthetic identities in about two minutes"
    )
    demo.set_defaults(run=_demo)

    train = commands.add_parser(
        "train",
        parents=[debug],
        help="train from a settings file",
        usage="%(prog)s CONFIG.yaml [--key value ...]",
        description="Trains as CONFIG.yaml says; every setting can be given on top as --key value (nested: --data.size 56).",
        epilog="`recog-fast train --help-settings` lists all settings with their types and defaults.",
        allow_abbrev=False,
    )
    train.add_argument("config", nargs="?", help="settings file (YAML), or an arcface_torch recipe (.py; read, not run)")
    train.add_argument("--help-settings", action="store_true", help="list all settings and stop")
    train.set_defaults(run=_train)

    evaluate = commands.add_parser(
        "eval", parents=[debug], help="verify a trained backbone on pair files", description=_eval.__doc__
    )
    evaluate.add_argument(
        "model",
        help="output folder of a run, one of its checkpoints, a model folder (card.json), an .onnx file with its card, or a file of weights (.pt; then give --network)",
    )
    evaluate.add_argument(
        "--target", action="append", required=True, help=".bin file of pairs; may be given several times"
    )
    evaluate.add_argument(
        "--down", action="append", type=int, default=[], help="also with images down to this size and up again"
    )
    evaluate.add_argument("--network", help="network of a file of weights")
    evaluate.add_argument("--embedding-size", type=int, default=512, help="embedding size of a file of weights (512)")
    evaluate.add_argument("--size", type=int, default=112, help="input size of a file of weights (112)")
    evaluate.add_argument("--device", default="cpu", help="cpu (default), cuda, ...")
    evaluate.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    evaluate.set_defaults(run=_eval)

    data_commands.add(commands, [debug])
    interchange.add(commands, [debug])
    identify.add(commands, [debug])
    report_command.add(commands, [debug])
    bench_command.add(commands, [debug])

    add_commands(commands, debug)

    for module in (classes, doctor, scale, warmup):
        module.add(commands, [debug])
    completion_command.add(commands, [debug], parser)
    return parser


def _demo(_: argparse.Namespace, rest: list[str]) -> int:
    from recog_fast.training.demo import main as demo

    return int(demo(rest) or 0)


def _train(options: argparse.Namespace, rest: list[str]) -> int:
    from recog_fast.training.config import help_text, read_config

    if options.help_settings:
        print(help_text())
        return 0
    if options.config is None or options.config.startswith("-"):
        print("recog-fast train: error: expected a settings file, got none", file=sys.stderr)
        return 2
    try:
        config = read_config(options.config, rest)
    except ValueError as error:
        if options.debug:
            raise
        print(f"recog-fast train: error: {error}", file=sys.stderr)
        return 2
    if options.config.endswith(".py"):
        from recog_fast.compat.recipe import read_recipe, recipe_settings

        for note in recipe_settings(read_recipe(options.config)).notes:
            print(f"{options.config}: {note}", file=sys.stderr)
    from recog_fast.training.loop import train

    result = train(config)
    if result.rank:
        return 0
    metrics = "   ".join(f"{name.removeprefix('val/')} {value:.4f}" for name, value in result.metrics.items())
    print(f"{'Finished' if result.finished else 'Stopped'} at step {result.step}: {result.output}   {metrics}".rstrip())
    if result.finished and int(os.environ.get("RANK", "0")) == 0 and config.report:
        _write_report(result.output)
    return 0


def _write_report(output: Path) -> None:
    """The run's page; a trained network is worth its exit code 0 whatever becomes of it."""
    from recog_fast.training.run_report import report_run

    try:
        print(f"Report: {report_run(output)}")
    except Exception as error:
        print(f"recog-fast train: no report: {_one_line(error)}; `recog-fast report {output}` tries again", file=sys.stderr)


def _eval(options: argparse.Namespace, _: list[str]) -> int:
    """10-fold verification accuracy (flip sum), EER and TAR at FAR of a backbone on InsightFace .bin files."""
    from recog_fast.training.verification import load_backbone, pairs_of_bin, verify

    backbone, size = load_backbone(options.model, options.network, options.embedding_size, options.size)
    backbone.to(options.device)
    report: dict[str, Any] = {}
    for target in options.target:
        pairs = pairs_of_bin(target, size)
        for down in [0, *options.down]:
            name = pairs.name + (f"@{down}" if down else "")
            result, balanced = verify(backbone, pairs, down)
            report[name] = {**result.summary(), "balanced": balanced}
            if not options.json:
                row = report[name]
                tar = "   ".join(f"TAR@{far} {value:.4f}" for far, value in row["tar"].items())
                print(
                    f"{name}: accuracy {row['accuracy']:.4f} +- {row['std']:.4f} (balanced folds {balanced:.4f})   EER {row['eer']:.4f}   {tar}   ({row['form']})"
                )
    if options.json:
        print(json.dumps(report))
    return 0
