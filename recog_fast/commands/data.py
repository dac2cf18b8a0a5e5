"""`recog-fast data check` and `recog-fast data convert`."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

Commands = Any  # argparse's subparsers object has no public name

KINDS = ("rec", "folder", "list", "zip", "tar")
TARGETS = ("rec", "tar", "folder", "list")


def add(commands: Commands, parents: list[argparse.ArgumentParser]) -> None:
    """Register `data` with its two commands."""
    data = commands.add_parser("data", help="look into image sources and convert between formats")
    inner = data.add_subparsers(dest="action", metavar="ACTION", required=True)

    check = inner.add_parser(
        "check",
        parents=parents,
        help="counts, label faults, unreadable and repeated images",
        description=_check.__doc__,
    )
    check.add_argument("path", help="folder, .rec, .csv, .jsonl, .zip, .tar, or a folder of tars")
    check.add_argument("--kind", choices=KINDS, help="format, where the path does not tell")
    check.add_argument("--sample", type=int, help="read only so many images, evenly spread; 0: labels only")
    check.add_argument("--plot", metavar="FILE", help="histogram of images per class (.svg, .png, .pdf)")
    check.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    check.add_argument("--strict", action="store_true", help="exit code 1 when there are problems")
    check.set_defaults(run=_check)

    convert = inner.add_parser(
        "convert", parents=parents, help="rewrite as .rec, tar, folder or list", description=_convert.__doc__
    )
    convert.add_argument("source", help="folder, .rec, .csv, .jsonl, .zip, .tar, or a folder of tars")
    convert.add_argument("target", help="new .rec or .tar file, or new folder")
    convert.add_argument("--kind", choices=KINDS, help="format of the source, where the path does not tell")
    convert.add_argument("--to", choices=TARGETS, help="format of the target, where the path does not tell")
    convert.add_argument("--layout", choices=("auto", "identities", "plain"), help=".rec with or without record 0")
    convert.add_argument("--images-per-shard", type=int, help="a folder of tars of so many images")
    convert.add_argument("--no-verify", action="store_true", help="do not read the target back")
    convert.set_defaults(run=_convert)


def _progress(what: str) -> Any:
    if not sys.stderr.isatty():
        return None

    def show(done: int, total: int) -> None:
        print(f"\r{what} {done}/{total}", end="", file=sys.stderr, flush=True)

    return show


def _check(options: argparse.Namespace, _: list[str]) -> int:
    """Reads a source and says what is in it: images, classes, gaps and off-by-one labels, unreadable images, images that
    occur twice, sizes, colours."""
    from recog_fast.data import check_dataset, open_dataset, plot_class_sizes

    report = check_dataset(open_dataset(options.path, options.kind), options.sample, _progress("checked"))
    print(json.dumps(report.summary()) if options.json else report.text())
    if options.plot:
        plot_class_sizes(report, options.plot)
    return 1 if options.strict and report.problems else 0


def _convert(options: argparse.Namespace, _: list[str]) -> int:
    """Copies image files into another format, byte for byte, and reads them back. The same command goes on where it was
    interrupted."""
    from recog_fast.data import convert_dataset, open_dataset

    extra = {"layout": options.layout, "images_per_shard": options.images_per_shard}
    given = {name: value for name, value in extra.items() if value is not None}
    kind = options.to or ("tar" if options.images_per_shard else None)
    if given.keys() - {"rec": {"layout"}, "tar": {"images_per_shard"}}.get(kind or _suffix(options.target), set()):
        raise ValueError("convert: --layout is of .rec, --images-per-shard of tar targets")
    source = open_dataset(options.source, options.kind, decode=False)
    done = convert_dataset(
        source, options.target, kind, verify=not options.no_verify, progress=_progress("written"), **given
    )
    resumed = f", {done.resumed} of them before an interruption" if done.resumed else ""
    print(f"{done.images} images{resumed} in {options.target} ({done.kind}{', verified' if done.verified else ''})")
    return 0


def _suffix(target: str) -> str:
    return target.rpartition(".")[2].lower()
