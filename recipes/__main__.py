"""`python -m recipes` writes the stored results (recipes/results/) into docs/reproduction.md."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from recipes.common import ROOT, spread, stored

PAGE = ROOT / "docs" / "reproduction.md"
START, END = "<!-- stored results: python -m recipes -->", "<!-- end of stored results -->"
# The order of the page; others follow by name.
ORDER = (
    "ers_decision", "ers_curve", "ers_center", "ers_templates", "low_resolution", "margin_gain", "margins", "memory",
    "memory_characters", "unknown_identities", "recognizability_index",
)  # fmt: skip


def number(value: float, digits: int) -> str:
    """Fixed digits, no negative zero."""
    return f"{value:.{digits}f}".replace("-0." + "0" * digits, "0." + "0" * digits) if digits else f"{value:.0f}"


def cell(name: str, values: list[float]) -> str:
    """mean +- spread over seeds."""
    digits = 1 if "points" in name else 3 if abs(float(np.mean(values))) >= 0.02 or not any(values) else 4
    return f"{number(float(np.mean(values)), digits)} ± {number(spread(values), digits)}"


def summary(records: list[dict[str, Any]]) -> list[str]:
    """One row a recipe: gates with the means they are held against."""
    lines = ["| effect | command | seeds | gates: mean ± spread over seeds | CPU |", "|---|---|---|---|---|"]
    for record in records:
        gates = "<br>".join(
            f"{'met' if gate['met'] else '**not met**'}: {gate['gate']} "
            f"({cell(gate['gate'], record['measures'][gate['gate'].rsplit(' ', 2)[0]])})"
            for gate in record["gates"]
        )
        seeds = ", ".join(map(str, record["seeds"]))
        lines.append(
            f"| {record['effect']} | `{record['command']}` | {seeds} | {gates} | {record['cpu_seconds']:.0f} s |"
        )
    return lines


def details(record: dict[str, Any]) -> list[str]:
    """Every measurement of a recipe."""
    lines = [f"### {record['effect']}", "", f"{record['note'][:1].upper()}{record['note'][1:]}.", ""]
    lines += ["| measurement | mean ± spread | single seeds |", "|---|---|---|"]
    for name, values in record["measures"].items():
        digits = 1 if "points" in name else 3
        lines.append(f"| {name} | {cell(name, values)} | {', '.join(number(v, digits) for v in values)} |")
    return lines


def made() -> str:
    """What stands between the marks."""
    records = sorted(stored(), key=lambda r: (ORDER.index(r["name"]) if r["name"] in ORDER else len(ORDER), r["name"]))
    lines = summary(records)
    for record in records:
        lines += ["", *details(record)]
    return "\n".join(lines)


def insert(text: str, block: str) -> str:
    """`text` with what stands between the marks replaced; ValueError where one is missing."""
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise ValueError(f"recipes: expected the marks {START!r} and {END!r} in {PAGE.name}")
    return f"{before}{START}\n\n{block}\n\n{END}{after}"


def main() -> int:
    """Writes the page; 1 where a stored gate is not met."""
    PAGE.write_text(insert(PAGE.read_text(), made()))
    unmet = [f"{r['name']}: {g['gate']}" for r in stored() for g in r["gates"] if not g["met"]]
    print("\n".join([f"wrote {PAGE.relative_to(ROOT)}", *(f"not met: {line}" for line in unmet)]))
    return 1 if unmet else 0


if __name__ == "__main__":
    sys.exit(main())
