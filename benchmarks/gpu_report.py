"""The page of a GPU suite's results: `python -m benchmarks.gpu_report results.json` prints it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from . import gpu_targets
from .gpu_targets import LEVELS
from .protocol import STEPS

Data = dict[str, Any]
_NONE = "-"


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    clean = [[str(cell).replace("|", "/").replace("\n", " ") for cell in row] for row in rows]
    return ["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *("| " + " | ".join(r) + " |" for r in clean), ""]


def _ms(spread: dict[str, float]) -> str:
    return f"{1e3 * spread['median']:.3f} ({1e3 * spread['p10']:.3f}-{1e3 * spread['p90']:.3f})"


def _e(value: float | str) -> str:
    """1.2e-03; what JSON cannot hold was written as its name."""
    return value if isinstance(value, str) else f"{value:.1e}"


def _percent(value: float | None) -> str:
    return _NONE if value is None else f"{100 * value:.0f} %"


def gate_lines(gates: list[Data]) -> list[str]:
    """A count, everything that failed, then one line a gate with its worst output."""
    failed = [g for g in gates if not g["passes"]]
    lines = [f"{len(gates) - len(failed)} of {len(gates)} pass.", ""]
    rows = []
    for gate in [*failed, *(g for g in gates if g["passes"])]:
        errors = [f"{e['output']}: {_e(e['error'])} / {_e(e['budget'])}" for e in gate["errors"]]
        result = "ok" if gate["passes"] else "FAILED"
        rows.append([result, gate["name"], gate["case"], gate["dtype"], "; ".join(errors), "yes" if gate["same_bits"] else "NO", f"{gate['first_call_s']:.2f}"])
    return [*lines, *_table(["", "what", "case", "arithmetic", "error / budget by output", "same bits", "first call, s"], rows)]


def case_lines(case: Data) -> list[str]:
    """Times and gates of one size, then shares and memory."""
    title = f"### N={case['N']}, C={case['C']}, D={case['D']}, {case['regime']}{', ' + case['label'] if case['label'] else ''}"
    for key in ("skipped", "fatal"):
        if key in case:
            return [title, "", f"{key}: {case[key]}", ""]
    y, loss = case["yardsticks"], case["loss"]
    lines = [title, "", f"Mean loss {loss['float64']:.4f} in float64 ({'as' if loss['within'] else 'NOT as'} the regime predicts). Same run: GEMM "
             f"{y['bf16_tflops']:.1f} TFLOP/s bf16, {y['float32_tflops']:.1f} float32; copy {y['copy_tbs']:.3f} TB/s.", ""]  # fmt: skip
    ours = gpu_targets.fastest(case)
    times, shares = [], []
    for row in case["rows"]:
        name = row["name"] + (f" ({row['note']})" if row["note"] else "")
        gate = _gate(row)
        if "steps" not in row:
            times.append([name, row.get("skipped", "no time"), _NONE, _NONE, _NONE, *gate])
            continue
        steps = row["steps"]
        ratio = row["against"].get(ours["name"]) if ours else None
        slower = f"{1 / ratio['median']:.2f}" if ratio else "1" if ours and row["name"] == ours["name"] else _NONE
        times.append([name, *(_ms(steps[s]["s"]) if s in steps else _NONE for s in STEPS), slower, *gate])
        full, memory = steps[STEPS[2]], row.get("memory", {})
        shares.append([
            name, *(_percent(full.get(k)) for k in ("roofline", "of_gemm", "of_copy")), f"{1e3 * row['issued_s']:.3f}", f"{1e3 * row['wall_s']:.3f}",
            *(f"{memory[k]:.3f}" if k in memory else _NONE for k in ("backward_gb", "backward_per_cd", "step_gb", "step_per_cd", "total_gb")),
            f"{row['first_call_s']:.1f}", str(row["rounds"]),
        ])  # fmt: skip
    head = ["contender", *(f"{s}, ms (p10-p90)" for s in STEPS), "times ours", "loss error", "dx error", "dW error: all / negatives", "same bits"]
    lines += _table(head, times)
    head = ["contender", "of roofline", "of GEMM", "of copy", "host issues, ms", "wall, ms", "extra fwd+bwd, GB", "B per CD", "extra step, GB", "B per CD",
            "peak with W, v, GB", "first call, s", "rounds"]  # fmt: skip
    return [*lines, *_table(head, shares)]


def _gate(row: Data) -> list[str]:
    if "gate" not in row:
        return [_NONE] * 4
    g = row["gate"]
    return [_e(g["loss"]), _e(g["d_embeddings"]), f"{_e(g['d_weight'])} / {_e(g['d_weight_negatives'])}", "yes" if g["same_bits"] else "no"]


def launch_lines(rows: list[Data]) -> list[str]:
    """Host against device, and where the device's time goes."""
    body, tops = [], []
    for row in rows:
        size = f"{row['N']} x {row['C']}"
        if "busy_s" not in row:
            body.append([row["name"], size, str(row.get("kernels", _NONE)), row["skipped"] or _NONE, _NONE, _NONE, _NONE])
            continue
        times = [f"{1e3 * row[k]:.3f}" for k in ("issued_s", "wall_s", "busy_s")]
        body.append([row["name"], size, str(row["kernels"]), *times, "yes" if row["launch_bound"] else "no"])
        tops.append([row["name"], size, "; ".join(f"{n} {c} x, {1e3 * s:.2f} ms" for n, c, s in row["top"][:6])])
    head = ["step", "N x C", "kernels", "host issues, ms", "wall, ms", "device busy, ms", "bound by launches"]
    return [*_table(head, body), *_table(["step", "N x C", "costliest kernels"], tops)]


def tuning_lines(rows: list[Data]) -> list[str]:
    """Other plans of the chunk loop, by their kernels' own time."""
    body = []
    for row in rows:
        if "skipped" in row:
            body.append([row["variant"], row["skipped"], *[_NONE] * 5])
            continue
        parts = ", ".join(f"{name} {1e3 * seconds:.2f}" for name, seconds in row["groups"].items())
        rate = _NONE if row["tile_tflops"] is None else f"{row['tile_tflops']:.0f}"
        times = [f"{1e3 * row[k]:.3f}" for k in ("forward_s", "step_s")]
        body.append([row["variant"], *times, str(row["kernels"]), parts, rate, _e(row["difference"])])
    size = "" if not rows else f"bf16, {rows[0]['N']} x {rows[0]['C']} x {rows[0]['D']}, sums of the kernels' own durations, no launch counted."
    head = ["variant", "forward, ms", "class_step, ms", "kernels", "by group, ms", "tiles, TFLOP/s", "difference from the plan's results"]
    return [size, "", *_table(head, body)]


def markdown(data: Data) -> str:
    """The whole page."""
    lines = ["# GPU suite", "", *(f"- {key}: {value}" for key, value in data["environment"].items()), ""]
    if data["not_run"]:
        lines += ["## Not run", "", *(f"- {n['task']}: {n['why']}" for n in data["not_run"]), ""]
    lines += ["## Targets (performance.md)", ""]
    lines += _table(["target", *LEVELS, "measured", "met"], gpu_targets.table(data))
    if data["gates"]:
        lines += ["## Gates against float64 on the device", "", *gate_lines(data["gates"])]
    if data["checks"]:
        body = [[c["result"], c["check"], c["detail"]] for c in sorted(data["checks"], key=lambda c: c["result"] == "ok")]
        lines += ["## In a training loop", "", *_table(["", "check", "detail"], body)]
    if data["launches"]:
        lines += ["## Launches", "", *launch_lines(data["launches"])]
    if data["tuning"]:
        lines += ["## Other plans", "", *tuning_lines(data["tuning"])]
    if data["cases"]:
        lines += ["## Times of a full step, by device events", ""]
        for case in sorted(data["cases"], key=lambda c: (c["C"], c["N"], c["label"])):
            lines += case_lines(case)
    if data["tools"]:
        lines += ["## Tools", "", *_table(["tool", "result", "last lines"], [[t["tool"], t["result"], t["detail"]] for t in data["tools"]])]
    lines += ["## Tasks", "", *_table(["task", "seconds"], [[t["task"], f"{t['seconds']:.1f}"] for t in data["tasks"]])]
    return "\n".join(lines)


def summary(data: Data) -> str:
    """A few lines for the end of a log."""
    gates, checks = data["gates"], data["checks"]
    lines = [f"gates: {sum(g['passes'] for g in gates)} of {len(gates)} pass"]
    lines += [f"  FAILED {g['name']} {g['case']} {g['dtype']}" for g in gates if not g["passes"]]
    lines.append(f"checks: {sum(c['result'] == 'ok' for c in checks)} ok")
    lines += [f"  {c['result']} {c['check']}: {c['detail'][:160]}" for c in checks if c["result"] != "ok"]
    for case in sorted(data["cases"], key=lambda c: (c["C"], c["N"], c["label"])):
        best = gpu_targets.fastest(case)
        shown = f"{1e3 * best['steps'][STEPS[2]]['s']['median']:.3f} ms, {best['name']}" if best else case.get("skipped", case.get("fatal", "no time of ours"))
        lines.append(f"N={case['N']:5} C={case['C']:9} {case['label']}: {shown}")
    lines += [f"{line[-1]:>12}  {line[0]}: {line[4]}" for line in gpu_targets.table(data)]
    lines += [f"{t['tool']}: {t['result']}: {t['detail'][:200]}" for t in data["tools"]]
    lines += [f"not run: {n['task']}: {n['why'][:120]}" for n in data["not_run"]]
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown(json.loads(Path(sys.argv[1]).read_text())))
