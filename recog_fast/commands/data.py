"""`recog-fast data check` and `recog-fast data convert`."""

from __future__ import annotations

import argparse
import dataclasses

from recog_fast.data.formats import SOURCES, TARGETS
from recog_fast.terminal.console import Commands, UsageError, at_least, count, json_option, print_json
from recog_fast.terminal.progress import progress

_SOURCE = "folder, .rec, .csv, .jsonl, .zip, .tar, or a folder of tars"


def add(commands: Commands, parents: list[argparse.ArgumentParser]) -> None:
    """Register `data` with its two commands."""
    data = commands.add_parser(
        "data",
        help="look into image sources and convert between formats",
        description="Looks into image sources, and converts between their formats.",
        example=("recog-fast data check faces/", "recog-fast data convert faces/ faces.rec"),
    )
    inner = data.add_subparsers(dest="action", metavar="ACTION", required=True)

    check = inner.add_parser(
        "check",
        parents=parents,
        help="counts, label faults, unreadable and repeated images",
        description=_check.__doc__,
        example=("recog-fast data check faces/", "recog-fast data check train.rec --sample 1000 --json"),
    )
    check.add_argument("path", help=_SOURCE)
    check.add_argument("--kind", choices=tuple(SOURCES), help="format, where the path does not tell")
    check.add_argument("--sample", type=at_least(0), metavar="N", help="read only so many images, evenly spread; 0: labels only (without: all)")
    check.add_argument("--plot", metavar="FILE", help="histogram of images per class (.svg, .png, .pdf)")
    json_option(check, "counts, gaps, unreadable and repeated images, sizes, problems")
    check.add_argument("--strict", action="store_true", help="exit code 1 when there are problems")
    check.set_defaults(run=_check)

    convert = inner.add_parser(
        "convert",
        parents=parents,
        help="rewrite as .rec, tar, folder or list",
        description=_convert.__doc__,
        example=(
            "recog-fast data convert faces/ faces.rec",
            "recog-fast data convert faces.rec shards/ --images-per-shard 10000",
            "recog-fast data convert list.csv out/ --to list",
        ),
    )
    convert.add_argument("source", help=_SOURCE)
    convert.add_argument("target", help="new .rec or .tar file, or new folder (ending in / where its name has a dot)")
    convert.add_argument("--kind", choices=tuple(SOURCES), help="format of the source, where the path does not tell")
    convert.add_argument("--to", choices=TARGETS, help="format of the target, where the path does not tell; list: a folder with labels.csv")
    convert.add_argument("--layout", choices=("auto", "identities", "plain"), help=".rec with or without record 0 (without: auto)")
    convert.add_argument("--images-per-shard", type=count, metavar="N", help="a folder of tars of so many images")
    convert.add_argument("--no-verify", action="store_true", help="do not read the target back")
    json_option(convert, "target, kind, images, those an earlier call had written, whether the target was verified")
    convert.set_defaults(run=_convert)


def _check(options: argparse.Namespace, _: list[str]) -> int:
    """Reads a source and says what is in it: images, classes, gaps and off-by-one labels, unreadable images, images that
    occur twice, sizes, colours."""
    from recog_fast.data import check_dataset, open_dataset, plot_class_sizes

    dataset = open_dataset(options.path, options.kind)
    with progress("images checked") as step:
        report = check_dataset(dataset, options.sample, step)
    if options.plot:
        plot_class_sizes(report, options.plot)
    if options.json:
        print_json(report.summary())
    else:
        print(report.text())
    return 1 if options.strict and report.problems else 0


def _convert(options: argparse.Namespace, _: list[str]) -> int:
    """Copies image files into another format, byte for byte, and reads them back. The same command goes on where it was
    interrupted."""
    from recog_fast.data import convert_dataset, open_dataset
    from recog_fast.data.convert import target_kind

    extra = {"layout": options.layout, "images_per_shard": options.images_per_shard}
    given = {name: value for name, value in extra.items() if value is not None}
    try:
        kind = options.to or target_kind(options.target)
    except ValueError as error:
        raise UsageError(f"{str(error).removeprefix('convert_dataset: ')}; --to says the kind") from error
    if kind == "folder" and options.to is None and options.images_per_shard:
        kind = "tar"
    if given.keys() - {"rec": {"layout"}, "tar": {"images_per_shard"}}.get(kind, set()):
        raise UsageError(f"--layout is of .rec, --images-per-shard of tar targets, got a {kind} target")
    source = open_dataset(options.source, options.kind, decode=False)
    with progress("images written" if options.no_verify else "images written and read back") as step:
        done = convert_dataset(source, options.target, kind, verify=not options.no_verify, progress=step, **given)
    if options.json:
        print_json({"target": options.target, **dataclasses.asdict(done)})
        return 0
    resumed = f", {done.resumed} of them before an interruption" if done.resumed else ""
    print(f"{done.images} images{resumed} in {options.target} ({done.kind}{', verified' if done.verified else ''})")
    return 0
