"""The recipes: the seconds-long ones meet their gates, the page shows what is stored, and they use public names only."""

from __future__ import annotations

import ast
import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
from paths import ROOT, data_dir

sys.path.insert(0, str(ROOT))  # recipes/ is no part of the installed package

common: Any = importlib.import_module("recipes.common")
page: Any = importlib.import_module("recipes.__main__")


@pytest.fixture
def real_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECOG_FAST_DATA", str(data_dir()))


@pytest.mark.parametrize("name", ["ers_rejection", "ers_templates"])
def test_rows_without_training_meet_their_gates(name: str, real_data: None) -> None:
    found = importlib.import_module(f"recipes.{name}").run([11])
    for outcome in found if isinstance(found, list) else [found]:
        assert outcome.gates and outcome.met(), outcome.text()


def test_page_is_that_of_the_stored_results() -> None:
    """`python -m recipes` wrote it, and nobody since."""
    text = page.PAGE.read_text()
    assert page.insert(text, page.made()) == text
    assert len(common.stored()) >= 6
    for record in common.stored():
        assert record["effect"] in text and record["command"] in text
        lengths = {len(values) for values in record["measures"].values()}
        assert lengths == {len(record["seeds"])}, record["name"]
    with pytest.raises(ValueError, match="expected the marks"):
        page.insert("no marks", "")


def test_recipes_use_public_names_only() -> None:
    wrong = []
    for path in sorted((ROOT / "recipes").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("recog_fast"):
                names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
                wrong += [f"{path.name}: {name}" for name in names if name.startswith("_")]
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ("rf", "ri"):
                wrong += [f"{path.name}: {node.attr}"] if node.attr.startswith("_") else []
    assert not wrong


def test_gates_and_files(tmp_path: Path) -> None:
    outcome = common.Outcome(
        "name", "effect", [0, 1], gates=[common.Gate("gain", 0.1), common.Gate("loss", 1.0, False)]
    )
    outcome.put({"gain": 0.05, "loss": 0.5})
    outcome.add(gain=0.25, loss=1.0)
    assert outcome.met() and "met" in outcome.text() and common.spread([1.0]) == 0.0
    path = outcome.store("python -m recipes.name", tmp_path)
    assert '"value": 0.15' in path.read_text() and "gain >= 0.1" in path.read_text()
    outcome.put({"gain": -0.2, "loss": 9.0})
    assert not outcome.met() and "NOT MET" in outcome.text()


def test_data_that_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RECOG_FAST_DATA", str(tmp_path / "absent"))
    with pytest.raises(FileNotFoundError, match="set RECOG_FAST_DATA"):
        common.data_dir()
