"""What was measured on one machine: pieces run apart, possibly on different days, merged into one JSON and one page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from . import gates, machine, report

# section -> what tells its entries apart; a new entry replaces the one it cannot be told from
KEYS: dict[str, tuple[str, ...]] = {
    "cases": ("regime", "N", "C", "D"),
    "ops": ("stem", "N", "C", "D"),
    "memory": ("name", "phase", "N", "C"),
    "per_class": ("name", "step", "N"),
    "threads": ("name", "load", "N", "C"),
    "accuracy": ("name", "N", "C"),
    "injection": ("N", "C", "D"),
}


class Results:
    """Everything of one machine at one choice of sizes; written after each addition, so that a run cut short leaves what it had.

    path: the JSON file, its page beside it. fresh: forget what is stored there. Entries without a commit are from before
    this format and are dropped.
    """

    def __init__(self, path: Path, sizes: str, fresh: bool) -> None:
        self.path = path
        stored = json.loads(path.read_text()) if path.is_file() and not fresh else {}
        self.data: dict[str, Any] = {"sizes": sizes, "environment": machine.describe()}
        for section in KEYS:
            self.data[section] = [e for e in stored.get(section, []) if "commit" in e]
        self.data["gates"] = gates.table(self.data)

    def add(self, section: str, entry: dict[str, Any]) -> None:
        """Adds or replaces an entry and writes both files."""
        entry = {**entry, "commit": machine.commit()}
        key = [entry[k] for k in KEYS[section]]
        entries = self.data[section]
        at = next((i for i, e in enumerate(entries) if [e[k] for k in KEYS[section]] == key), len(entries))
        entries[at : at + 1] = [entry]
        self.data["gates"] = gates.table(self.data)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.data, indent=1) + "\n")
        self.path.with_suffix(".md").write_text(report.markdown(self.data))
