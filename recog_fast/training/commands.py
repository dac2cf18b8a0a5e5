"""Commands around training: train, demo, sweep, filter-overlap, unknowns. The command line adds them to its own."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recog_fast.data.formats import DRAWN, SOURCES
from recog_fast.terminal.console import Commands, UsageError, between, json_option, one_line, only_json, print_json
from recog_fast.terminal.progress import progress
from recog_fast.training.demo_size import add_options

if TYPE_CHECKING:
    from recog_fast.training.config import TrainConfig


def add_train(commands: Commands, debug: argparse.ArgumentParser) -> None:
    """Adds `demo` and `train` to the subparsers `commands`."""
    demo = commands.add_parser(
        "demo",
        parents=[debug],
        help="train and evaluate on synthetic identities in about two minutes",
        description="Trains and evaluates on drawn people and writes a report: report.html and results.json in the output folder.",
        example=("recog-fast demo", "recog-fast demo --quick --output runs/quick"),
    )
    add_options(demo)
    demo.set_defaults(run=_demo)

    train = commands.add_parser(
        "train",
        parents=[debug],
        help="train from a settings file",
        usage="%(prog)s CONFIG.yaml [--json] [--key value ...]",
        description="Trains as CONFIG.yaml says; every setting can be given on top as --key value (nested: --data.size 56); "
        "--help-settings lists all with their types and defaults. SIGTERM saves and ends the run with exit code 0; --resume true goes on with it.",
        example=(
            "recog-fast train configs/lfw112.yaml --data.path train.rec --output runs/lfw",
            "recog-fast train configs/lfw112.yaml --output runs/lfw --resume true",
            "recog-fast train --help-settings",
        ),
        allow_abbrev=False,
    )
    train.add_argument("config", nargs="?", help="settings file (YAML), or an arcface_torch recipe (.py; read, not run)")
    train.add_argument("--help-settings", action="store_true", help="list all settings and stop")
    json_option(train, "step, finished, metrics of the last verification, output, report; the log goes to standard error")
    train.set_defaults(run=_train)


def add_commands(commands: Commands, debug: argparse.ArgumentParser) -> None:
    """Adds the other commands of this file to the subparsers `commands`."""
    sweep = commands.add_parser(
        "sweep",
        parents=[debug],
        help="train every point of a grid, for ablation tables",
        usage="%(prog)s SWEEP.yaml --output FOLDER [--json] [--key value ...]",
        description="Trains one run per point and seed of SWEEP.yaml (config, grid, seeds); further settings apply to every run. "
        "The same command goes on where it was interrupted.",
        example="recog-fast sweep configs/sweeps/qaface_tau.yaml --output runs/qaface_tau --data.path train.rec",
        allow_abbrev=False,
    )
    sweep.add_argument("sweep", help="file with config, grid and seeds (YAML)")
    sweep.add_argument("--output", required=True, metavar="FOLDER", help="folder of the runs; sweep.json holds their results")
    json_option(sweep, "whether all are finished, and point, changes, seed, step and metrics of every run; the log goes to standard error")
    sweep.set_defaults(run=_sweep)

    overlap = commands.add_parser(
        "filter-overlap",
        parents=[debug],
        help="list the unlabelled images whose person is probably not in the training set (UIR)",
        description="Writes the images with p_max <= threshold by a stage-1 run; give the list to a run as unlabelled.keep.",
        example="recog-fast filter-overlap runs/margin --kind rec --path unlabelled.rec --output runs/unlabelled.jsonl",
    )
    overlap.add_argument("model", help="output folder of the stage-1 run, or one of its checkpoints")
    _add_source(overlap, "where they are")
    overlap.add_argument("--threshold", type=between(0, 1), default=0.9, help="largest p_max kept, from 0 to 1 (%(default)s)")
    overlap.add_argument("--output", required=True, metavar="FILE", help="list to write (.jsonl)")
    json_option(overlap, "statistics of p_max, numbers of images kept, overlapping and unreadable")
    overlap.set_defaults(run=_filter_overlap)

    unknowns = commands.add_parser(
        "unknowns",
        parents=[debug],
        help="p_max over people a run has never seen, and the sparsity of its class centres (UIR)",
        description="Prints the cumulative distribution (0.1 ... 0.9) and mean of p_max over people that a run was not trained on.",
        example=("recog-fast unknowns runs/uir", "recog-fast unknowns runs/uir --kind rec --path unseen.rec --json"),
    )
    unknowns.add_argument("model", help="output folder of a run, or one of its checkpoints")
    _add_source(unknowns, "where they are (without: the run's held-out identities)")
    json_option(unknowns, "images, mean and cumulative distribution of p_max, sparsity of the centres")
    unknowns.set_defaults(run=_unknowns)


def _add_source(parser: argparse.ArgumentParser, where: str) -> None:
    parser.add_argument("--kind", choices=(*SOURCES, DRAWN), default="folder", help="format of the images (%(default)s)")
    parser.add_argument("--path", default="", help=where)
    parser.add_argument("--options", default="{}", metavar="JSON", help="further arguments of the source, an object (%(default)s)")


def _demo(options: argparse.Namespace, _: list[str]) -> int:
    from recog_fast.training.demo import run

    return run(options)


def _train(options: argparse.Namespace, rest: list[str]) -> int:
    from recog_fast.training.config import help_text

    if options.help_settings and options.json:
        raise UsageError("train: expected --help-settings or --json, got both")
    if options.help_settings:
        print(help_text())
        return 0
    if options.config is None or options.config.startswith("-"):
        raise UsageError("train: expected a settings file, got none")
    config = _settings(options.config, rest)
    if options.config.endswith(".py"):
        from recog_fast.compat.recipe import read_recipe, recipe_settings

        for note in recipe_settings(read_recipe(options.config)).notes:
            print(f"{options.config}: {note}", file=sys.stderr)
    from recog_fast.training.loop import train

    with only_json(options.json):
        result = train(config)
    if result.rank:
        return 0
    if not options.json:
        metrics = "   ".join(f"{name.removeprefix('val/')} {value:.4f}" for name, value in result.metrics.items())
        print(f"{'Finished' if result.finished else 'Stopped'} at step {result.step}: {result.output}   {metrics}".rstrip(), flush=True)
    page = None
    if result.finished and int(os.environ.get("RANK", "0")) == 0 and config.report:
        with only_json(options.json):  # as its log: the bar shows where both streams are terminals
            page = _write_report(result.output)
    if options.json:
        print_json({"step": result.step, "finished": result.finished, "output": result.output, "metrics": result.metrics, "report": page})
    elif page is not None:
        print(f"Report: {page}")
    return 0


def _settings(file: str, rest: list[str]) -> TrainConfig:
    """The settings of a run. Raises UsageError for what is wrong with them before any work starts."""
    from recog_fast.training.config import read_config
    from recog_fast.training.model import check_names

    try:
        config = read_config(file, rest)
        check_names(config)
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from error
    return config


def _write_report(output: Path) -> Path | None:
    """The run's page; a trained network is worth its exit code 0 whatever becomes of it."""
    from recog_fast.training.run_report import report_run

    try:
        with progress("report: parts measured", lines=True) as step:
            return report_run(output, progress=step)
    except Exception as error:
        print(f"recog-fast train: no report: {one_line(error)}; `recog-fast report {output}` tries again", file=sys.stderr)
        return None


def _sweep(options: argparse.Namespace, rest: list[str]) -> int:
    from recog_fast.training.sweep import plan_sweep, run_sweep, table

    try:
        planned = plan_sweep(options.sweep, options.output, rest)
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from error
    with only_json(options.json), progress("points", lines=True) as step:
        results = run_sweep(planned, options.output, progress=step)
    if options.json:
        print_json({"output": options.output, "finished": len(results) == len(planned), "results": results})
    else:
        print(table(results))
    return 0


def _filter_overlap(options: argparse.Namespace, _: list[str]) -> int:
    from recog_fast.training.unknown import describe, filter_overlap

    source = _source(options)
    with progress("images") as step:
        report = filter_overlap(options.model, source, options.output, options.threshold, progress=step)
    if options.json:
        print_json({**report, "output": options.output})
    else:
        print(describe(report))
    return 0


def _unknowns(options: argparse.Namespace, _: list[str]) -> int:
    from recog_fast.training.unknown import describe, statistics_of_run

    own = (options.path, options.kind, options.options) == ("", "folder", "{}")  # nothing said
    source = None if own else _source(options)
    with progress("images") as step:
        report = statistics_of_run(options.model, source, progress=step)
    if options.json:
        print_json(report)
    else:
        print(describe(report))
    return 0


def _source(options: argparse.Namespace) -> Any:
    from recog_fast.training.unknown import data_of

    try:
        return data_of(options.kind, options.path, options.options)
    except ValueError as error:
        raise UsageError(f"{options.command}: {error}") from error
