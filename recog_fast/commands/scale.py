"""`recog-fast estimate`: what a head costs, before anybody rents machines for it."""

from __future__ import annotations

import argparse
import dataclasses
import math
from pathlib import Path
from typing import Any

from recog_fast.estimate.devices import DEVICES
from recog_fast.estimate.model import MOMENTA, STATES, WEIGHTS
from recog_fast.terminal.console import Commands, UsageError, at_least, between, count, json_option, print_json


def add(commands: Commands, parents: list[argparse.ArgumentParser]) -> None:
    """Adds the command to the subparsers `commands`."""
    cost = commands.add_parser(
        "estimate",
        parents=parents,
        help="memory, messages and least time of a head on a number of devices",
        description=_estimate.__doc__,
        example=("recog-fast estimate --classes 29e6 --gpus 8 --batch 1024", "recog-fast estimate --classes 1e6 --batch 256 --device cpu --json"),
    )
    cost.add_argument("--classes", type=count, required=True, metavar="C", help="number of classes, 29e6 for example")
    cost.add_argument("--gpus", type=count, default=1, metavar="N", help="devices that share the classes (%(default)s)")
    cost.add_argument("--batch", type=count, required=True, metavar="N", help="rows of a step, over all devices")
    cost.add_argument("--dim", type=count, default=512, metavar="D", help="embedding size (%(default)s)")
    cost.add_argument("--device", choices=(*DEVICES, "cpu"), default="H100", help="whose data sheet; cpu: this host, measured now (%(default)s)")
    cost.add_argument("--optimizer", choices=tuple(STATES), default="headsgd", help="optimizer of the head (%(default)s)")
    cost.add_argument("--weight-format", choices=WEIGHTS, default="float32", help="format of W; split: two 16-bit planes (%(default)s)")
    cost.add_argument("--momentum-dtype", choices=MOMENTA, default="float32", help="format of the momentum (%(default)s)")
    cost.add_argument("--no-momentum", action="store_true", help="momentum 0")
    cost.add_argument("--sample-rate", type=between(0, 1, above=True), default=1.0, metavar="SHARE", help="share of the classes that are a step's negatives, above 0 and up to 1 (%(default)s)")
    cost.add_argument("--float32", action="store_true", help="float32 sweeps instead of 16-bit ones")
    cost.add_argument("--subcenters", type=count, default=1, metavar="K", help="centres per class (%(default)s)")
    cost.add_argument("--memory-steps", type=at_least(0), default=0, metavar="STEPS", help="delta of a prototype memory, 0 for none (%(default)s)")
    cost.add_argument("--link", type=between(0, math.inf, above=True), metavar="GB/S", help="speed of a device's link in one direction, instead of the data sheet's")
    cost.add_argument("--results", type=Path, metavar="FOLDER", help="folder of stored measurements (default: benchmarks/results of a source checkout)")
    json_option(cost, "bytes, flops, seconds")
    cost.set_defaults(run=_estimate)


def _estimate(options: argparse.Namespace, _: list[str]) -> int:
    """Prints the memory of one device by item, messages and the least time of a step: bounds from data-sheet numbers (cpu: from what this host
    was measured at), and beside them a stored measurement of such a step where there is one."""
    from recog_fast import estimate as model
    from recog_fast.commands.host import cpu_name, host_device

    link = None if options.link is None else options.link * 1e9
    device: Any = options.device
    if device == "cpu":
        device = host_device(link)
    elif link is not None:
        device = dataclasses.replace(model.DEVICES[device], node_link=link, network=link)
    try:
        report = model.estimate(
            options.classes, options.gpus, options.batch, dimension=options.dim, device=device, optimizer=options.optimizer,
            momentum=not options.no_momentum, half=not options.float32, subcenters=options.subcenters, memory_steps=options.memory_steps,
            weight_format=options.weight_format, momentum_dtype=options.momentum_dtype, sample_rate=options.sample_rate,
        )  # fmt: skip
    except ValueError as error:  # options that do not go together
        raise UsageError(str(error)) from error
    found: model.Measured | str = f"none of {report.device.name}"
    if report.device.host:
        results = options.results or Path(__file__).parents[2] / "benchmarks" / "results"
        found = model.measured(report.head, cpu_name(), results)
    if options.json:
        stored = {"none": found} if isinstance(found, str) else dataclasses.asdict(found)
        print_json(report.plain() | {"measured": stored})
    else:
        print(model.text(report, found))
    return 0
