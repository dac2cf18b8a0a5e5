"""Commands around training: sweep, filter-overlap, unknowns. The command line adds them to its own."""

from __future__ import annotations

import argparse
import json
from typing import Any

KINDS = ("rec", "folder", "list", "zip", "tar", "synthetic")


def add_commands(commands: Any, debug: argparse.ArgumentParser) -> None:
    """Adds this file's commands to the subparsers `commands`."""
    sweep = commands.add_parser(
        "sweep",
        parents=[debug],
        help="train every point of a grid, for ablation tables",
        usage="%(prog)s SWEEP.yaml --output FOLDER [--key value ...]",
        description="One run per point and seed of SWEEP.yaml (config, grid, seeds); further settings apply to every run.",
        allow_abbrev=False,
    )
    sweep.add_argument("sweep", help="file with config, grid and seeds")
    sweep.add_argument("--output", required=True, help="folder of the runs; sweep.json holds their results")
    sweep.set_defaults(run=_sweep)

    overlap = commands.add_parser(
        "filter-overlap",
        parents=[debug],
        help="list the unlabelled images whose person is probably not in the training set (UIR)",
        description="Writes the images with p_max <= threshold by a stage-1 run; give the list to a run as unlabelled.keep.",
    )
    overlap.add_argument("model", help="output folder of the stage-1 run, or one of its checkpoints")
    _add_source(overlap)
    overlap.add_argument("--threshold", type=float, default=0.9, help="largest p_max kept (%(default)s)")
    overlap.add_argument("--output", required=True, help="list to write (.jsonl)")
    overlap.add_argument("--json", action="store_true", help="print one JSON object")
    overlap.set_defaults(run=_filter_overlap)

    unknowns = commands.add_parser(
        "unknowns",
        parents=[debug],
        help="p_max over people a run has never seen, and the sparsity of its class centres (UIR)",
        description="Cumulative distribution (0.1 ... 0.9) and mean of p_max; without --path over the run's held-out identities.",
    )
    unknowns.add_argument("model", help="output folder of a run, or one of its checkpoints")
    _add_source(unknowns)
    unknowns.add_argument("--json", action="store_true", help="print one JSON object")
    unknowns.set_defaults(run=_unknowns)


def _add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--kind", choices=KINDS, default="folder", help="of the images (%(default)s)")
    parser.add_argument("--path", default="", help="where they are")
    parser.add_argument("--options", default="{}", help="further arguments of the source, a JSON object")


def _sweep(options: argparse.Namespace, rest: list[str]) -> int:
    from recog_fast.training.sweep import sweep, table

    print(table(sweep(options.sweep, options.output, rest)))
    return 0


def _filter_overlap(options: argparse.Namespace, _: list[str]) -> int:
    from recog_fast.training.unknown import data_of, describe, filter_overlap

    source = data_of(options.kind, options.path, options.options)
    report = filter_overlap(options.model, source, options.output, options.threshold)
    print(json.dumps(report) if options.json else describe(report))
    return 0


def _unknowns(options: argparse.Namespace, _: list[str]) -> int:
    from recog_fast.training.unknown import data_of, describe, statistics_of_run

    own = not options.path and options.kind != "synthetic"
    report = statistics_of_run(options.model, None if own else data_of(options.kind, options.path, options.options))
    print(json.dumps(report) if options.json else describe(report))
    return 0
