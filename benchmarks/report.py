"""The tables of a results file: `python -m benchmarks.report [results.json]` prints them and writes them beside it as .md."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from . import machine
from .protocol import STEPS

_MISSING = "-"


def _milliseconds(step: dict[str, Any]) -> str:
    cpu = step["cpu_s"]
    return f"{1e3 * cpu['median']:.4g} ({1e3 * cpu['p10']:.4g}-{1e3 * cpu['p90']:.4g})"


def _ratio(step: dict[str, Any]) -> str:
    ratio = step["ratio"]
    return _MISSING if ratio is None else f"{ratio['median']:.2f} ({ratio['p10']:.2f}-{ratio['p90']:.2f})"


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *("| " + " | ".join(r) + " |" for r in rows)]


def _gate(row: dict[str, Any]) -> list[str]:
    if "gate" not in row:
        return [_MISSING] * 5
    gate = row["gate"]
    errors = [f"{gate[k]:.1e}" for k in ("loss", "d_embeddings")]
    dropped = _MISSING if gate["dropped_mass"] is None else f"{gate['dropped_mass']:.1g}"
    return [
        *errors,
        f"{gate['d_weight']:.1e} / {gate['d_weight_negatives']:.1e}",
        "yes" if gate["same_bits"] else "no",
        dropped,
    ]


def _rates(full: dict[str, Any]) -> list[str]:
    own = [_MISSING] * 4
    if "gflops" in full:
        shares = [f"{100 * full[k]:.0f} %" for k in ("share_of_gemm", "share_of_copy")]
        own = [f"{full['gflops']:.1f}", shares[0], f"{full['gbs']:.1f}", shares[1]]
    return [f"{full['least_gflops']:.1f}", *own, f"{1e3 * full['wall_s']['median']:.4g}"]


def case_lines(case: dict[str, Any]) -> list[str]:
    """Times with their gate, then rates, of one case."""
    loss = case["loss"]
    lines = [
        f"### {case['regime']}: N={case['N']}, C={case['C']}, D={case['D']}, {case['rounds']} rounds",
        "",
        f"Mean loss {loss['float64']:.4f} in float64 (by construction {loss['expected']:.2f} +- {loss['tolerance']:.2f}). "
        f"Same run, one thread: torch.mm {case['gemm_gflops']['median']:.1f} GFLOP/s, copy {case['copy_gbs']['median']:.1f} GB/s.",
        "",
    ]
    head = ["contender", *(f"{s}, CPU ms (p10-p90)" for s in STEPS), *(f"{s} / eager" for s in STEPS[1:])]
    body, rates = [], []
    for row in case["rows"]:
        name = row["name"] + (f" ({row['note']})" if row["note"] else "")
        if "steps" not in row:
            body.append([name, row["skipped"], *[_MISSING] * 4, *_gate(row)])
            continue
        steps = row["steps"]
        body.append(
            [name, *(_milliseconds(steps[s]) for s in STEPS), *(_ratio(steps[s]) for s in STEPS[1:]), *_gate(row)]
        )
        rates.append([name, *_rates(steps[STEPS[2]]), f"{row['first_call_s']:.1f}"])
    lines += _table([*head, "loss error", "dx error", "dW error: all / negatives", "same bits", "dropped mass"], body)
    lines += [
        "",
        "Rates of the full step by the cost model: 6NCD (the least flops with stored logits), the own flops and the own bytes.",
        "",
    ]
    rate_head = [
        "contender",
        "6NCD GFLOP/s",
        "own GFLOP/s",
        "of torch.mm",
        "own GB/s",
        "of copy",
        "full step, wall ms",
        "first call, s",
    ]
    return [*lines, *_table(rate_head, rates), ""]


def _memory_lines(peaks: list[dict[str, Any]]) -> list[str]:
    rows = [
        [
            p["name"],
            p["phase"],
            f"{p['N']} x {p['C']}",
            f"{p['growth']:.1f}",
            f"{p['dW']:.1f}",
            f"{p['extra']:.1f}",
            f"{p['extra_per_cd']:.3f}",
        ]
        for p in peaks
    ]
    head = ["contender", "phase", "N x C", "growth, MB", "of it dW, MB", "extra, MB", "extra, bytes per CD element"]
    return [
        f"### Peak resident memory beyond W and momentum ({peaks[0]['method']}, first call in a process of its own)",
        "",
        *_table(head, rows),
        "",
    ]


def _scaling_lines(scalings: list[dict[str, Any]]) -> list[str]:
    sizes = scalings[0]["classes"]
    rows = [
        [s["name"], s["step"], *(f"{n['median']:.0f}" for n in s["nanoseconds"]),
         f"{s['flatness']['median']:.2f} ({s['flatness']['p10']:.2f}-{s['flatness']['p90']:.2f})"]
        for s in scalings
    ]  # fmt: skip
    head = ["contender", "step", *(f"C={c}, ns" for c in sizes), "last / first from 100k up (else smallest)"]
    return [f"### CPU time per class, N={scalings[0]['N']}", "", *_table(head, rows), ""]


def markdown(results: dict[str, Any]) -> str:
    """The whole page."""
    lines = [f"# Margin softmax head, {results['sizes']} sizes", ""]
    lines += [f"- {k}: {v}" for k, v in results["environment"].items()]
    lines += [
        "",
        "CPU time of one thread; contenders interleaved in random order; medians with the 10th and 90th percentile. Ratios are paired "
        "within a round (times faster than eager float32). Errors are relative to float64: mean loss, all of dx, dW on all targets, the "
        "top negatives and random other classes.",
        "",
    ]
    for case in results.get("cases", []):
        lines += case_lines(case)
    if results.get("memory"):
        lines += _memory_lines(results["memory"])
    if results.get("per_class"):
        lines += _scaling_lines(results["per_class"])
    if results.get("gates"):
        lines += ["### Gates", "", *_table(["gate", "wanted", "measured", "passes"], results["gates"]), ""]
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    """Exit status 1 where the file is missing."""
    path = Path(arguments[0]) if arguments else machine.RESULTS / machine.slug() / "full.json"
    if not path.is_file():
        print(
            f"benchmarks.report: expected a results file, got {path}; make one with `pytest benchmarks --sizes full`",
            file=sys.stderr,
        )
        return 1
    page = markdown(json.loads(path.read_text()))
    path.with_suffix(".md").write_text(page)
    print(page)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
