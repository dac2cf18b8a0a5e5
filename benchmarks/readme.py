"""The tables of measured numbers in the README (peers) and docs/benchmarks.md, from stored results:
`python -m benchmarks.readme [full.json [peers.json]]` rewrites them.

Without arguments: this machine's. A table whose results are not there stays as it is.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from . import against, machine, ours, peers
from .contenders import Contender
from .protocol import STEPS

README = machine.ROOT / "README.md"
PAGE = machine.ROOT / "docs" / "benchmarks.md"
START, END = "<!-- measured: python -m benchmarks.readme -->", "<!-- end of measured -->"
PEERS_START, PEERS_END = "<!-- peers: python -m benchmarks.readme -->", "<!-- end of peers -->"
_ROWS, _CLASSES = 64, 100_000
_LINES = (
    (peers.Eager, "eager PyTorch, float32"),
    (peers.Compiled, "torch.compile of it"),
    (peers.CompiledBF16, "torch.compile, bf16 operands"),
    (peers.PartialFCSampled, "Partial FC r=0.1 (not exact)"),
    (ours.Native, "recog_fast, dense gradient"),
    (ours.FusedStep, "recog_fast, `HeadSGD`, float32"),
    (ours.FusedStepKeptExact, "recog_fast, `HeadSGD`, float32, exponentials kept in float32"),
    (ours.FusedStepLists, "recog_fast, `HeadSGD`, float32, `drop_elements=2**-16` (not exact)"),
    (ours.FusedStepBF16, "recog_fast, `HeadSGD`, bf16"),
    (ours.FusedStepBF16Kept, "recog_fast, `HeadSGD`, bf16, exponentials kept"),
    (ours.FusedStepBF16Lists, "recog_fast, `HeadSGD`, bf16, `drop_elements=2**-16` (not exact)"),
)
# Contender (None: not run on CPUs), name, what it does and does not do.
_PEERS: tuple[tuple[type[Contender] | None, str, str], ...] = (
    (peers.Eager, "eager PyTorch", "whatever is written; stores all N x C logits several times"),
    (peers.PartialFC, "InsightFace, Partial FC, all classes (its schedule, written for the benchmark)", "ArcFace, CosFace, combined margins; classes over ranks; interclass filter; stores N x C"),
    (peers.PartialFCSampled, "the same, a tenth of the classes", "as above; **not exact**: another loss; dense gradient and SGD over all classes"),
    (peers.MetricLearning, "pytorch-metric-learning, `ArcFaceLoss`", "many losses, miners, samplers; stores N x C; one process"),
    (peers.LinearCrossEntropy, "torch, `F.linear_cross_entropy`", "chunks over rows; no margin, no normalisation of W, no statistics"),
    (None, "cut-cross-entropy", "CUDA only (a row of `python -m benchmarks.gpu_suite`); no margin, no N x C; atomics: not the same bits"),
    (ours.Native, "recog_fast, any optimizer", "every margin above and MagFace, AdaFace, CurricularFace, ...; memory, unknown people, recognizability; exact; the same bits; "
     "classes over ranks; dense dW"),
    (ours.FusedStep, "recog_fast, `HeadSGD`, float32", "the same, gradient and step of W in one sweep"),
    (ours.FusedStepKeptExact, "recog_fast, `HeadSGD`, float32, exponentials kept in float32", "the same, 4NC bytes"),
    (ours.FusedStepBF16Kept, "recog_fast, `HeadSGD`, bf16, exponentials kept", "the same, 16-bit products, 2NC bytes"),
)  # fmt: skip


def _cell(step: dict[str, Any], baseline: bool) -> str:
    time = f"{1e3 * step['cpu_s']['median']:.0f} ms"
    if step["ratio"] is None:
        return "-"
    return time if baseline else f"{time} ({step['ratio']['median']:.1f}x)"


def table(results: dict[str, Any]) -> str:
    """Markdown of the case of the required numbers; LookupError where it was not measured."""
    case = next((c for c in results["cases"] if (c["regime"], c["N"], c["C"]) == ("R0", _ROWS, _CLASSES)), None)
    if case is None:
        raise LookupError(f"no case R0, {_ROWS} x {_CLASSES} among the results")
    timed = {row["name"]: row["steps"] for row in case["rows"] if "steps" in row}
    extra = {p["name"]: p["extra"] for p in results["memory"] if p["phase"] == STEPS[-1] and p["C"] == _CLASSES}
    lines = ["| | forward + backward | full step with SGD | memory beyond W, momentum, dW |", "|---|---|---|---|"]
    for kind, shown in _LINES:
        if kind.name in timed:
            cells = [_cell(timed[kind.name][step], kind is peers.Eager) for step in STEPS[1:]]
            held = f"{extra[kind.name]:.3g} MB" if kind.name in extra else "-"
            lines.append(f"| {shown} | {cells[0]} | {cells[1]} | {held} |")
    return "\n".join(lines)


def peers_table(results: dict[str, Any]) -> str:
    """Markdown of what others offer and what a step of theirs costs, by `benchmarks.against`; LookupError where it has no such case."""
    case = results["case"]
    if (case["N"], case["C"]) != (_ROWS, _CLASSES):
        raise LookupError(f"expected peers measured at {_ROWS} x {_CLASSES}, got {case['N']} x {case['C']}")
    steps = {row["name"]: row["steps"][STEPS[-1]] for row in case["rows"] if "steps" in row}
    extra = {peak["name"]: peak["extra"] for peak in results["memory"]}
    lines = ["| | what it does | full step with SGD | memory beyond W, momentum, dW |", "|---|---|---|---|"]
    for kind, shown, features in _PEERS:
        cells = ["not measured", "-"]
        if kind is not None and kind.name in steps:
            step = steps[kind.name]
            faster = "" if step["ratio"] is None else f" ({step['ratio']['median']:.2g}x)"
            cells = [f"{1e3 * step['cpu_s']['median']:.0f} ms{faster}", f"{extra[kind.name]:.3g} MB"]
        lines.append(f"| {shown} | {features} | {cells[0]} | {cells[1]} |")
    device = results["environment"]["device"]
    rule = f"N = {_ROWS}, C = {_CLASSES:,}, D = {case['D']}; {device}; CPU time, medians of {case['rounds']} interleaved rounds, times faster than the first row in brackets."
    return "\n".join([*lines, "", f"{rule} Made by `python -m benchmarks.against`."])


def insert(text: str, made: str, start: str = START, end: str = END) -> str:
    """`text` with what stands between the two marks replaced; ValueError where a mark is missing."""
    before, found_start, rest = text.partition(start)
    _, found_end, after = rest.partition(end)
    if not found_start or not found_end:
        raise ValueError(f"benchmarks.readme: expected the marks {start!r} and {end!r} in the page")
    return f"{before}{start}\n\n{made}\n\n{end}{after}"


def main(arguments: list[str]) -> int:
    """Exit status 1 where no results are there."""
    here = machine.RESULTS / machine.slug()
    paths = [Path(one) for one in arguments] or [here / "full.json", here / against.FILE]
    tables = 0
    for path in paths:
        try:
            results = json.loads(path.read_text())
            peer = path.name == against.FILE
            made = peers_table(results) if peer else table(results)
        except (OSError, LookupError) as error:
            print(f"benchmarks.readme: {error}; make results with `python -m benchmarks` and `python -m benchmarks.against`", file=sys.stderr)
            continue
        page, marks = (README, (PEERS_START, PEERS_END)) if peer else (PAGE, (START, END))
        page.write_text(insert(page.read_text(), made, *marks))
        tables += 1
        print(made, end="\n\n")
    return 0 if tables else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
