"""The tables of a results file: `python -m benchmarks.report [results.json]` prints them and writes them beside it as .md."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from . import machine
from .protocol import STEPS

_MISSING = "-"
_RATE_HEAD = [
    "contender", "6NCD GFLOP/s", "own GFLOP/s", "of torch.mm", "own GB/s", "of copy", "micro-kernel GFLOP/s", "forward, of it",
    "full step, of it", "full step as 6NCD, of it", "full step, wall ms", "first call, s",
]  # fmt: skip


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


def _percent(value: dict[str, float] | None) -> str:
    return _MISSING if value is None else f"{100 * value['median']:.0f} %"


def _rates(row: dict[str, Any]) -> list[str]:
    forward, full = row["steps"][STEPS[0]], row["steps"][STEPS[2]]
    own = [_MISSING] * 4
    if "gflops" in full:
        shares = [f"{100 * full[k]:.0f} %" for k in ("share_of_gemm", "share_of_copy")]
        own = [f"{full['gflops']:.1f}", shares[0], f"{full['gbs']:.1f}", shares[1]]
    kernel = f"{full['kernel_gflops']:.1f}" if "kernel_gflops" in full else _MISSING
    read = ((forward, "share_of_peak"), (full, "share_of_peak"), (full, "least_share_of_peak"))
    peaks = [kernel, *(_percent(step.get(key)) for step, key in read)]
    wall = f"{1e3 * full['wall_s']['median']:.4g}"
    return [f"{full['least_gflops']:.1f}", *own, *peaks, wall, f"{row['first_call_s']:.1f}"]


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
        rates.append([name, *_rates(row)])
    lines += _table([*head, "loss error", "dx error", "dW error: all / negatives", "same bits", "largest dropped q of a row"], body)
    lines += [
        "",
        "Rates of the full step by the cost model: 6NCD (the least flops with stored logits), the own flops and the own bytes. Shares of the "
        "micro-kernel's in-cache rate, measured just before each run: matrix products alone, forward with gradient (4NCD), the full step "
        "with its own count (8NCD recomputing, 6NCD with kept exponentials) and as 6NCD.",
        "",
    ]
    return [*lines, *_table(_RATE_HEAD, rates), ""]


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
        for p in sorted(peaks, key=lambda p: p["C"])
    ]
    head = ["contender", "phase", "N x C", "growth, MB", "of it dW, MB", "extra, MB", "extra, bytes per CD element"]
    return [
        f"### Peak resident memory beyond W and the optimizer's state ({peaks[0]['method']}, in a process of its own)",
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
    head = ["contender", "step", *(f"C={c}, ns" for c in sizes), "last / first"]
    return [f"### CPU time per class, N={scalings[0]['N']}", "", *_table(head, rows), ""]


def _op_lines(ops: list[dict[str, Any]]) -> list[str]:
    rows = [
        [o["stem"], f"{o['N']} x {o['C']}", r["name"], f"{1e3 * r['cpu_s']['median']:.4g} ({1e3 * r['cpu_s']['p10']:.4g}-"
         f"{1e3 * r['cpu_s']['p90']:.4g})", _ratio(r), *(f"{r[k]:.1f}" if r[k] else _MISSING for k in ("gflops", "gbs")), _percent(r.get("share_of_peak")),
         f"{r['error']:.1e}", "yes" if r["same_bits"] else "no", f"{1e3 * r['wall_s']['median']:.4g}"]
        for o in sorted(ops, key=lambda o: (o["stem"], o["N"], o["C"])) for r in o["rows"]
    ]  # fmt: skip
    head = ["operation", "N x C", "contender", "CPU ms (p10-p90)", "times faster than the first", "GFLOP/s", "GB/s",
            "of the micro-kernel", "error", "same bits", "wall ms"]  # fmt: skip
    return ["### Operations alone", "", *_table(head, rows), ""]


def _thread_lines(threads: list[dict[str, Any]]) -> list[str]:
    rows = [
        [t["name"], t["load"], f"{t['N']} x {t['C']}", f"{1e3 * t['one_wall_s']['median']:.4g}",
         f"{1e3 * t['two_wall_s']['median']:.4g}", _ratio(t), f"{100 * t['one_thread_cpu_over_wall']:.0f} %"]
        for t in threads
    ]  # fmt: skip
    head = ["contender", "machine", "N x C", "one thread, wall ms", "two threads, wall ms", "two are faster by", "of a core for one"]
    return ["### Two threads, full step, wall time", "", *_table(head, rows), ""]


_EXCESS_ERRORS = {
    "absolute": "largest absolute error of a row, ours",
    "absolute_of_mean": "of the mean over rows, ours",
    "rounded_rows": "largest, from rounding x/|x| to float32 alone",
    "plain_float32": "largest, the formula in plain PyTorch float32",
}


def _accuracy_lines(entries: list[dict[str, Any]]) -> list[str]:
    fields = ("loss", "d_embeddings", "d_weight", "d_weight_negatives")
    head = [[e["name"], f"{e['N']} x {e['C']}", *(f"{e[f]:.1e}" for f in fields)] for e in entries if "loss" in e]
    excess = [
        [f"{e['N']} x {e['C']}", f"{e['largest_excess']:.3g}", *(f"{e[k]:.1e}" if k in e else _MISSING for k in _EXCESS_ERRORS)]
        for e in entries if "absolute" in e
    ]  # fmt: skip
    lines = ["### Accuracy against float64 as C grows", ""]
    lines += _table(["contender", "N x C", "loss", "dx", "dW on the sample", "of it negatives"], head)
    excess_head = ["N x C", "largest UIR excess", *_EXCESS_ERRORS.values()]
    return [*lines, "", *_table(excess_head, excess), ""]


def _injection_lines(entries: list[dict[str, Any]]) -> list[str]:
    def percent(value: dict[str, float]) -> str:
        return f"{100 * value['median']:.1f} % [{100 * value['p10']:.1f}, {100 * value['p90']:.1f}]"

    rows = [
        [f"{e['N']} x {e['C']}", f"{e['entries']:,}", f"{1e3 * e['plain_s']['median']:.4g}", percent(e["injection_share"]), f"{e['written']:,}", percent(e["write_share"])]
        for e in entries
    ]  # fmt: skip
    head = ["N x C", "live entries", "step without memory, ms", "injection adds", "rows written", "the write takes, of a step"]
    return ["### Prototype memory in a HeadSGD step", "", *_table(head, rows), ""]


_SECTIONS = {
    "ops": _op_lines, "memory": _memory_lines, "per_class": _scaling_lines, "threads": _thread_lines, "accuracy": _accuracy_lines,
    "injection": _injection_lines,
}  # fmt: skip


def _summary_lines(cases: list[dict[str, Any]]) -> list[str]:
    """Full steps of all cases on one page: times faster than eager."""
    sizes = [f"{c['regime']}, {c['N']} x {c['C']}" for c in cases]
    rows: dict[str, list[str]] = {}
    for at, case in enumerate(cases):
        for row in case["rows"]:
            cells = rows.setdefault(row["name"], [_MISSING] * len(cases))
            if "steps" in row:
                full = row["steps"][STEPS[2]]
                faster = "" if full["ratio"] is None else f" ({full['ratio']['median']:.2f}x)"
                cells[at] = f"{1e3 * full['cpu_s']['median']:.4g} ms{faster}"
    body = [[name, *cells] for name, cells in rows.items() if any(c != _MISSING for c in cells)]
    return ["### Full step of all cases, CPU time and times faster than eager float32", "", *_table(["contender", *sizes], body), ""]


def markdown(results: dict[str, Any]) -> str:
    """The whole page."""
    lines = [f"# Margin softmax head, {results['sizes']} sizes", ""]
    lines += [f"- {k}: {v}" for k, v in results["environment"].items()]
    commits = sorted({e["commit"] for section in ("cases", *_SECTIONS) for e in results.get(section, []) if "commit" in e})
    lines += [
        *([f"- parts of this page were measured at {', '.join(commits)}"] if len(commits) > 1 else []),
        "",
        "CPU time of one thread; contenders interleaved in random order; medians with the 10th and 90th percentile. Ratios are paired "
        "within a round (times faster than eager float32). Errors are relative to float64: mean loss, all of dx, dW on all targets, the "
        "top negatives and random other classes.",
        "",
    ]
    if results.get("gates"):
        lines += ["### Required numbers", "", *_table(["gate", "required", "measured", "passes"], results["gates"]), ""]
    cases = sorted(results.get("cases", []), key=lambda c: (c["regime"], c["N"], c["C"]))
    if len(cases) > 1:
        lines += _summary_lines(cases)
    for case in cases:
        lines += case_lines(case)
    for section, made in _SECTIONS.items():
        if results.get(section):
            lines += made(results[section])
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
