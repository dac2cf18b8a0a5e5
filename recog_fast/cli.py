"""The command line: `recog-fast COMMAND` = `python -m recog_fast COMMAND`.

Exit codes: 0 done (also when SIGTERM ended a training run after saving), 1 an error, said in one line, 2 bad usage.
Everything heavy is imported by the command that needs it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recog_fast import __version__
from recog_fast.commands import bench as bench_command
from recog_fast.commands import data as data_commands
from recog_fast.commands import identify, interchange
from recog_fast.commands import report as report_command
from recog_fast.training.commands import add_commands

_LIBRARIES = "numpy triton jsonargparse yaml rich tensorboard PIL simplejpeg scipy sklearn matplotlib safetensors onnx onnxruntime faiss"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; `arguments` default to the process's own."""
    parser = _parser()
    # Settings overrides of `train` belong to jsonargparse: they stay unparsed here.
    options, rest = parser.parse_known_args(arguments)
    if options.command is None:
        parser.print_help()
        return 2
    if rest and options.command not in ("train", "demo", "sweep"):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        code: int = options.run(options, rest)
        return code
    except KeyboardInterrupt:
        print("recog-fast: interrupted", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, ArithmeticError, RuntimeError, ImportError) as error:
        if options.debug:
            raise
        print(f"recog-fast {options.command}: error: {_one_line(error)}", file=sys.stderr)
        return 1


def _one_line(error: BaseException) -> str:
    text = str(error)
    if "Original Traceback" in text:
        # An error of a data worker carries its traceback as text; its last line is the message.
        text = text.strip().splitlines()[-1]
    return " ".join(text.split()) or type(error).__name__


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="recog-fast", description="Recognition over very many classes: train, evaluate, look inside."
    )
    parser.add_argument("--version", action="version", version=f"recog_fast {__version__}")
    debug = argparse.ArgumentParser(add_help=False)
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

    cost = commands.add_parser(
        "estimate", parents=[debug], help="memory, messages and least time of a head on a number of devices", description=_estimate.__doc__
    )
    cost.add_argument("--classes", type=_count, required=True, help="number of classes, 29e6 for example")
    cost.add_argument("--gpus", type=_count, default=1, help="devices that share the classes (1)")
    cost.add_argument("--batch", type=_count, required=True, help="rows of a step, over all devices")
    cost.add_argument("--dim", type=_count, default=512, help="embedding size (512)")
    cost.add_argument("--device", default="H100", help="A100, H100 (default), H200 or B200")
    cost.add_argument("--optimizer", default="headsgd", help="headsgd (default), sgd or adamw")
    cost.add_argument("--no-momentum", action="store_true", help="momentum 0")
    cost.add_argument("--float32", action="store_true", help="float32 sweeps instead of 16-bit ones")
    cost.add_argument("--subcenters", type=_count, default=1, help="centres per class (1)")
    cost.add_argument("--memory-steps", type=int, default=0, help="delta of a prototype memory (0: none)")
    cost.set_defaults(run=_estimate)

    doctor = commands.add_parser("doctor", parents=[debug], help="say which code path runs here and why")
    doctor.set_defaults(run=_doctor)
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


def _count(text: str) -> int:
    """A whole number, also written 29e6."""
    value = float(text)
    if value != int(value):
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text}")
    return int(value)


def _estimate(options: argparse.Namespace, _: list[str]) -> int:
    """Memory of one device by item, messages and the least time of a step: bounds from data-sheet numbers, not measurements."""
    from recog_fast.estimate import estimate, text

    report = estimate(
        options.classes, options.gpus, options.batch, dimension=options.dim, device=options.device, optimizer=options.optimizer,
        momentum=not options.no_momentum, half=not options.float32, subcenters=options.subcenters, memory_steps=options.memory_steps,
    )  # fmt: skip
    print(text(report))
    return 0


def _doctor(_: argparse.Namespace, __: list[str]) -> int:
    import torch

    import recog_fast as rf

    print(
        f"recog_fast {__version__}   python {platform.python_version()}   torch {torch.__version__}   {platform.system()} {platform.machine()}"
    )
    for name, value in rf.backends().items():
        print(f"{name:8} " + value.replace("\n", "\n" + " " * 9))
    for name in _LIBRARIES.split():
        if importlib.util.find_spec(name) is None:
            print(f"{name:8} not installed")
    d = torch.distributed
    groups = [n for n, there in (("gloo", d.is_gloo_available), ("nccl", d.is_nccl_available)) if there()] if d.is_available() else []
    print(f"ranks    {', '.join(groups) or 'no torch.distributed'}: MarginHead(group=) spreads classes over processes")
    print(f"threads  {torch.get_num_threads()}")
    print(f"package  {Path(__file__).parent}")
    return 0
