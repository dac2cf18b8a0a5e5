"""The README's table of measured numbers, from this machine's stored results: `python -m benchmarks.readme [full.json]` rewrites it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from . import machine, ours, peers
from .protocol import STEPS

README = machine.ROOT / "README.md"
START, END = "<!-- measured: python -m benchmarks.readme -->", "<!-- end of measured -->"
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


def insert(text: str, made: str) -> str:
    """`text` with what stands between the two marks replaced; ValueError where a mark is missing."""
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise ValueError(f"benchmarks.readme: expected the marks {START!r} and {END!r} in the README")
    return f"{before}{START}\n\n{made}\n\n{END}{after}"


def main(arguments: list[str]) -> int:
    """Exit status 1 where the results are missing."""
    path = Path(arguments[0]) if arguments else machine.RESULTS / machine.slug() / "full.json"
    try:
        made = table(json.loads(path.read_text()))
    except (OSError, LookupError) as error:
        print(f"benchmarks.readme: {error}; make results with `python -m benchmarks`", file=sys.stderr)
        return 1
    README.write_text(insert(README.read_text(), made))
    print(made)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
