"""`recog-fast bench`: a full step of the head on this machine at given sizes, against eager PyTorch."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recog_fast.terminal.console import Commands, count, device_name, json_option, print_json
from recog_fast.terminal.progress import progress

if TYPE_CHECKING:
    from recog_fast.commands.head_bench import Measured


def add(commands: Commands, parents: list[argparse.ArgumentParser]) -> None:
    """Registers `bench`."""
    bench = commands.add_parser(
        "bench",
        parents=parents,
        help="time and memory of a full head step on this machine",
        description="Forward, backward and SGD of the class weight, against eager PyTorch on the same numbers: wall time, medians of "
        "interleaved rounds; extra memory. Works from an installed package. The full suite (every peer, float64 gates, accuracy) "
        "needs the repository: `python -m benchmarks` in a checkout.",
        example=("recog-fast bench --classes 1e4,1e5", "recog-fast bench --classes 1e6 --device cuda --output runs/bench"),
    )
    bench.add_argument("--classes", type=_sizes, default=[10_000, 100_000], metavar="C,C,...", help="numbers of classes (10000,100000)")
    bench.add_argument("--rows", type=count, default=64, metavar="N", help="rows of a step (%(default)s)")
    bench.add_argument("--dim", type=count, default=512, metavar="D", help="embedding size (%(default)s)")
    bench.add_argument("--rounds", type=count, default=5, metavar="N", help="measured steps of each contender (%(default)s)")
    bench.add_argument("--threads", type=count, default=1, metavar="N", help="of torch on the CPU (%(default)s)")
    bench.add_argument("--device", type=device_name, default="cpu", help="cpu, cuda or cuda:1 (%(default)s)")
    bench.add_argument("--output", type=Path, metavar="FOLDER", help="folder for bench.json and report.html (the page needs matplotlib)")
    json_option(bench, "machine, rounds, and per contender and size seconds, extra memory, loss")
    bench.set_defaults(run=_bench)


def _sizes(text: str) -> list[int]:
    return [count(part) for part in text.split(",")]


def _bench(options: argparse.Namespace, _: list[str]) -> int:
    import torch

    import recog_fast as rf
    from recog_fast.commands.head_bench import bench
    from recog_fast.commands.host import cpu_name, device_here

    device = device_here(options.device)
    if options.output is not None:
        from recog_fast.evaluation import require_plots

        require_plots()
    threads = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        found = []
        for classes in options.classes:
            with progress(f"steps at {classes:,} classes") as step:
                found += bench(options.rows, classes, options.dim, options.rounds, device, progress=step)
        machine = {
            "recog_fast": rf.__version__,
            "torch": str(torch.__version__),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
            "threads": options.threads,
            "path": rf.backends()["cuda" if device.type == "cuda" else "cpu"],
        }
    finally:
        torch.set_num_threads(threads)
    report = {"machine": machine, "rounds": options.rounds, "results": [one.as_json() for one in found]}
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "bench.json").write_text(json.dumps(report, indent=1) + "\n")
        page = _page(options.output / "report.html", found, machine, options.rounds)
    if options.json:
        print_json(report)
        return 0
    head, rows = _table(found)
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    for row in [head, *rows]:
        print("  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))).rstrip())
    print("   ".join(f"{name} {value}" for name, value in machine.items()))
    if options.output is not None:
        print(f"Report: {page}")
    return 0


def _table(found: Sequence[Measured]) -> tuple[list[str], list[list[str]]]:
    head = ["contender", "N", "C", "D", "ms", "fastest-slowest", "times faster", "extra MB", "of torch.mm"]
    rows = []
    for one in found:
        size = [f"{one.rows}", f"{one.classes:,}", f"{one.dimension}"]
        if one.skipped:
            rows.append([f"{one.name}: {one.skipped}", *size, *["-"] * 5])
            continue
        eager = next(other.median for other in found if other.name.startswith("eager") and other.classes == one.classes)
        faster = "-" if math.isnan(eager) else f"{eager / one.median:.2f}"
        extra = "-" if math.isnan(one.extra_mb) else f"{one.extra_mb:,.1f}"
        spread = f"{1e3 * one.low:.4g}-{1e3 * one.high:.4g}"
        rows.append([one.name, *size, f"{1e3 * one.median:.4g}", spread, faster, extra, f"{100 * one.share_of_gemm:.0f} %"])
    return head, rows


def _page(path: Path, found: Sequence[Measured], machine: dict[str, Any], rounds: int) -> Path:
    from recog_fast.evaluation import page

    head, rows = _table(found)
    largest = [one for one in found if one.classes == max(o.classes for o in found) and not one.skipped]
    tiles = [page.Tile(one.name, f"{1e3 * one.median:.4g} ms", f"{one.rows} x {one.classes:,}") for one in largest]
    figures: list[page.Figure] = [
        ("Time against C", "The lower, the faster; a slope of one is time proportional to C.", _chart(found, "median", 1e3, "full step (ms, log)")),
        ("Memory against C", "Beyond W and momentum, dW included; flat means no tensor grows with C.", _chart(found, "extra_mb", 1.0, "extra memory (MB, log)")),
    ]  # fmt: skip
    intro = f"Wall time, medians of {rounds} interleaved rounds; share of torch.mm: 8NCD flops per second, which a dense recomputing step needs."
    sections = [
        page.Section("Full step", intro, page.table(head, rows, "By contender and size") + page.figures(figures)),
        page.Section("Machine", "", page.columns({"What ran": machine})),
    ]
    lead = "Forward, backward and SGD with momentum of the class weight (ArcFace), by the same numbers for everyone."
    return page.write_page(
        path, title="Head benchmark of this machine", eyebrow="recog_fast bench", lead=lead, top=page.tiles(tiles), sections=sections
    )


def _chart(found: Sequence[Measured], field: str, factor: float, ylabel: str) -> Any:
    from recog_fast.evaluation import drawing

    series: dict[str, list[tuple[int, float]]] = {}
    for one in sorted(found, key=lambda m: m.classes):
        value = factor * getattr(one, field)
        if not math.isnan(value):
            series.setdefault(one.name, []).append((one.classes, max(value, 0.1)))
    if not series:
        return None

    def draw(figure: Any, theme: drawing.Theme) -> None:
        axes = drawing.axes_of(figure, theme)
        for i, (name, points) in enumerate(series.items()):
            axes.plot(
                *zip(*points, strict=True), marker="o", ms=4, lw=1.8, color=drawing.series_colour(theme, i), ls=drawing.dashes(i), label=name
            )
        axes.set(xscale="log", yscale="log", xlabel="C, classes (log)", ylabel=ylabel)
        drawing.legend(figure, axes, theme)

    ends = ", ".join(f"{name} {points[-1][1]:.4g} at {points[-1][0]:,}" for name, points in series.items())
    return drawing.picture(draw, drawing.HEIGHT + 0.4, f"{ylabel} against the number of classes: {ends}.")
