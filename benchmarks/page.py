"""The stored results of every device as one page for a browser; `python -m benchmarks.charts` writes it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recog_fast.evaluation import page

from . import charts
from .protocol import STEPS

_TITLES = {
    "time_against_c_n64": "Time against C, 64 rows",
    "time_against_c_n256": "Time against C, 256 rows",
    "memory_against_c": "Memory against C",
    "roofline": "Share of the roofline",
    "contenders": "Every contender",
    "skipping": "What leaving small gradients out costs and gains",
}
_READING = {
    "time_against_c_n64": "A straight line of slope one is time proportional to C; the lower, the faster.",
    "time_against_c_n256": "The same at 256 rows, where matrix products weigh more.",
    "memory_against_c": "A flat line needs the same memory at any number of classes.",
    "roofline": "100 % is the rate of the kernel's inner loop on data in the cache: nothing can be faster.",
    "contenders": "Everyone on the same problem, interleaved, gated against float64 first.",
    "skipping": "Down is faster, left is more exact.",
}


def write(paths: Sequence[Path], target: Path) -> Path:
    """Writes the page of these results files, in this order; returns its path."""
    sections = [_device(json.loads(path.read_text())) for path in paths]
    return page.write_page(
        target,
        title="Margin softmax head: measured",
        eyebrow="recog_fast benchmarks",
        lead="Full training step of the classification head: forward, backward and SGD of the class weight. CPU time of one thread, medians "
        "with the 10th and 90th percentile; contenders interleaved in random order; every row passed its gate against float64.",
        top=page.tiles(_headlines(json.loads(paths[0].read_text()))) if paths else "",
        sections=sections,
        footer="Made from benchmarks/results/*/full.json by `make bench-charts`; how to measure: benchmarks/NOTES.md.",
    )


def _headlines(results: dict[str, Any]) -> list[page.Tile]:
    """Best of ours in the case of the required numbers, and memory at the most classes, of the first device."""
    device = results["environment"]["device"].split(",")[0]
    rows = [row for row in charts.rows_of(results) if row["name"].startswith("ours") and row["steps"][STEPS[-1]]["ratio"]]
    made = []
    for label, limit in (("Exact to float32", 1e-5), ("16-bit products", 5e-4), ("Small gradients left out", 1e-2)):
        fit = [row for row in rows if max(row["gate"][k] for k in ("d_embeddings", "d_weight")) <= limit]
        if fit:
            best = max(fit, key=lambda row: row["steps"][STEPS[-1]]["ratio"]["median"])
            beside = f"eager PyTorch's speed, {best['name'].removeprefix('ours, ')}, {device}"
            made.append(page.Tile(label, f"{best['steps'][STEPS[-1]]['ratio']['median']:.1f}\N{MULTIPLICATION SIGN}", beside))
    peaks = [p for p in results["memory"] if p["phase"] == STEPS[-1] and p["name"].startswith("ours, HeadSGD")]
    if peaks:
        largest = max(p["C"] for p in peaks)
        least = min((p for p in peaks if p["C"] == largest), key=lambda p: float(p["extra"]))
        made.append(page.Tile("Extra memory", f"{least['extra']:.1f} MB", f"at {largest:,} classes, {least['name'].removeprefix('ours, ')}"))
    return made


def _device(results: dict[str, Any]) -> page.Section:
    environment = results["environment"]
    drawn = "".join(
        page.heading(_TITLES[stem])
        + page.note(_READING[stem])
        + f'<div class="scroll" role="region" tabindex="0" aria-label="{stem}"><div class="chart">{chart.svg}</div></div>\n'
        for stem, chart in charts.pictures(results).items()
    )
    tables = "".join(_case(case) for case in sorted(results["cases"], key=lambda c: (c["regime"], c["N"], c["C"])))
    gates = results.get("gates") or []
    required = page.heading("Required numbers") + page.table(["gate", "required", "measured", "passes"], gates) if gates else ""
    facts = page.settings({k: v for k, v in environment.items()}, "facts about this machine")
    return page.Section(environment["device"].split(",")[0], environment["device"], facts + drawn + required + tables + _memory(results))


def _ms(spread: dict[str, float]) -> str:
    return f"{1e3 * spread['median']:.4g} ms\n{1e3 * spread['p10']:.3g}\N{EN DASH}{1e3 * spread['p90']:.3g}"


def _case(case: dict[str, Any]) -> str:
    head = ["contender", "forward + backward", "full step", "times faster than eager", "error of dx", "error of dW", "share of the micro-kernel"]
    rows = []
    for row in case["rows"]:
        name = row["name"] + (f"\n{row['note']}" if row["note"] else "")
        if "steps" not in row:
            rows.append([name, f"not run\n{row['skipped']}", *["\N{EN DASH}"] * 5])
            continue
        full = row["steps"][STEPS[-1]]
        ratio = "\N{EN DASH}" if full["ratio"] is None else f"{full['ratio']['median']:.2f}"
        share = f"{100 * full['share_of_peak']['median']:.0f} %" if "share_of_peak" in full else "\N{EN DASH}"
        errors = [f"{row['gate'][k]:.0e}" for k in ("d_embeddings", "d_weight")] if "gate" in row else ["\N{EN DASH}"] * 2
        rows.append([name, _ms(row["steps"][STEPS[1]]["cpu_s"]), _ms(full["cpu_s"]), ratio, *errors, share])
    title = f"{case['regime']}: N={case['N']}, C={case['C']:,}, D={case['D']}"
    return page.heading(title) + page.table(head, rows)


def _memory(results: dict[str, Any]) -> str:
    peaks = [p for p in results["memory"] if p["phase"] == STEPS[-1]]
    sizes = sorted({p["C"] for p in peaks})
    found = {(p["name"], p["C"]): f"{p['extra']:,.1f} MB" for p in peaks}
    names = dict.fromkeys(p["name"] for p in peaks)
    rows = [[name, *(found.get((name, c), "\N{EN DASH}") for c in sizes)] for name in names]
    head = ["contender", *(f"C={c:,}" for c in sizes)]
    return page.heading("Memory beyond W, optimizer state and dW") + page.table(head, rows) if rows else ""
