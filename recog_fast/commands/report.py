"""`recog-fast report`: the page of a run, from what the run left in its folder."""

from __future__ import annotations

import argparse

from recog_fast.terminal.console import Commands, json_option, print_json
from recog_fast.terminal.progress import progress


def add(commands: Commands, parents: list[argparse.ArgumentParser]) -> None:
    """Registers `report`."""
    report = commands.add_parser(
        "report",
        parents=parents,
        help="write report.html of a run again",
        description="Writes RUN/report.html from the run's log, settings and stored findings (findings.npz). Where nothing newer than "
        "the last checkpoint is stored, that checkpoint's network is measured first, which needs the run's data.",
        example=("recog-fast report runs/lfw", "recog-fast report runs/lfw --measure"),
    )
    report.add_argument("folder", metavar="RUN", help="output folder of `recog-fast train` or `recog-fast demo`")
    choice = report.add_mutually_exclusive_group()
    choice.add_argument("--measure", dest="measure", action="store_true", default=None, help="measure the last checkpoint again")
    choice.add_argument("--no-measure", dest="measure", action="store_false", help="show only what is stored")
    json_option(report, "path of the page")
    report.set_defaults(run=_report)


def _report(options: argparse.Namespace, _: list[str]) -> int:
    from recog_fast.training.run_report import report_run

    with progress("parts measured") as step:
        page = report_run(options.folder, options.measure, progress=step)
    if options.json:
        print_json({"report": page})
    else:
        print(page)
    return 0
