"""What is made of stored numbers: merging, verdicts, the page, the charts and the README's table."""

from __future__ import annotations

import copy
import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from . import charts, gates, ours, page, peers, readme, report, suite
from .protocol import STEPS
from .store import KEYS, Results


def _spread(value: float) -> dict[str, float]:
    return {"median": value, "p10": 0.9 * value, "p90": 1.1 * value}


def _row(name: str, seconds: float) -> dict[str, Any]:
    step = {
        "cpu_s": _spread(seconds), "wall_s": _spread(seconds), "ratio": _spread(2.0 / seconds), "least_gflops": 1.0,
        "gflops": 1.0, "gbs": 1.0, "share_of_gemm": 0.5, "share_of_copy": 0.5, "kernel_gflops": 70.0,
        "share_of_peak": _spread(0.8), "least_share_of_peak": _spread(0.6),
    }  # fmt: skip
    gate = {"loss": 1e-7, "d_embeddings": 1e-6, "d_weight": 1e-6, "d_weight_negatives": 1e-6, "same_bits": True,
            "passes": True, "dropped_mass": None}  # fmt: skip
    against = {k.name: _spread(1.0 / seconds) for k in (peers.Compiled, peers.CompiledBF16, peers.PartialFCSampled)}
    return {"name": name, "note": "", "gate": gate, "first_call_s": 1.0, "steps": dict.fromkeys(STEPS, step), "against": against}


def _case(classes: int) -> dict[str, Any]:
    kinds = (peers.Eager, peers.Compiled, ours.Native, ours.FusedStep, ours.FusedStepBF16)
    return {
        "regime": "R0", "N": 64, "C": classes, "D": 512, "rounds": 5, "gemm_gflops": _spread(60), "copy_gbs": _spread(20),
        "loss": {"float64": 46.0, "expected": 46.1, "tolerance": 1.0},
        "rows": [_row(kind.name, (k + 1) * classes / 1e6) for k, kind in enumerate(reversed(kinds))],
    }  # fmt: skip


@pytest.fixture
def stored(tmp_path: Path) -> Results:
    """Invented results of full sizes, enough for every gate and chart."""
    made = Results(tmp_path / "full.json", "full", fresh=False)
    for classes in (10_000, 100_000):
        made.add("cases", _case(classes))
    for kind in (peers.Eager, ours.FusedStep):
        for classes in (100_000, 1_000_000):
            made.add("memory", {"name": kind.name, "phase": STEPS[-1], "N": 64, "C": classes, "dW": 0.0, "growth": 9.0,
                                "extra": 9.0, "extra_per_cd": 0.1, "method": "VmHWM"})  # fmt: skip
    made.add("per_class", {"name": ours.FusedStep.name, "step": STEPS[-1], "N": 64, "classes": [100_000, 1_000_000],
                           "nanoseconds": [_spread(4000), _spread(4400)], "flatness": _spread(1.1)})  # fmt: skip
    made.add("threads", {"name": ours.FusedStep.name, "load": "quiet", "N": 64, "C": 100_000, "one_wall_s": _spread(1.0),
                         "two_wall_s": _spread(0.5), "ratio": _spread(1.6), "one_thread_cpu_over_wall": 0.99})  # fmt: skip
    made.add("accuracy", {"name": ours.FusedStep.name, "N": 64, "C": 1_000_000, "loss": 2e-7, "d_embeddings": 1e-6,
                          "d_weight": 6e-5, "d_weight_negatives": 1e-6})  # fmt: skip
    return made


def _verdicts(data: dict[str, Any]) -> dict[str, str]:
    return {line[0]: line[3] for line in gates.table(data)}


def test_a_piece_run_again_replaces_its_entry_and_leaves_the_others(stored: Results) -> None:
    again = Results(stored.path, "full", fresh=False)
    assert {s: len(again.data[s]) for s in KEYS} == {s: len(stored.data[s]) for s in KEYS}
    again.add("cases", {**_case(100_000), "rounds": 9})
    kept = json.loads(stored.path.read_text())["cases"]
    assert [(c["C"], c["rounds"]) for c in kept] == [(10_000, 5), (100_000, 9)]
    assert not Results(stored.path, "full", fresh=True).data["cases"]


def test_verdicts_follow_the_numbers(stored: Results) -> None:
    found = _verdicts(stored.data)
    assert found["extra memory with HeadSGD, C=1M"] == found["time per class 100k to 1M, float32"] == "yes"
    assert found["float32 forward with gradient, share of the micro-kernel's rate"] == "yes"
    assert found["two threads against one, quiet machine, wall"] == "NO"
    assert found["float32 dW, relative error, C=1M"] == "NO"
    assert found["UIR excess, worst row, absolute error, up to C=1M"] == "not measured"
    assert found["float32 exact full step against eager + SGD(fused)"] == "yes"  # 2.0 s / 0.2 s

    worse = copy.deepcopy(stored.data)
    for row in worse["cases"][1]["rows"]:
        row["steps"] = {s: {**v, "ratio": _spread(6.49), "share_of_peak": _spread(0.799)} for s, v in row["steps"].items()}
    worse["per_class"][0]["flatness"] = _spread(0.84)
    worse["threads"][0].update(ratio=_spread(1.7), one_thread_cpu_over_wall=0.9)
    found = _verdicts(worse)
    assert found["float32 exact full step against eager + SGD(fused)"] == "NO"
    assert found["float32 forward with gradient, share of the micro-kernel's rate"] == "NO"
    assert found["time per class 100k to 1M, float32"] == "NO"
    assert found["two threads against one, quiet machine, wall"].startswith("undecided")


@pytest.mark.parametrize("instructions", ["yes", "no"])
def test_an_emulated_peer_decides_nothing(stored: Results, instructions: str) -> None:
    stored.data["environment"]["bf16_instructions"] = instructions
    case = stored.data["cases"][1]
    case["rows"].append({"name": peers.CompiledBF16.name, "note": "", "skipped": "slow: 48 s"})
    line = next(x for x in gates.table(stored.data) if x[0].startswith("bf16 full step against torch.compile"))
    assert line[3] == ("yes" if instructions == "yes" else "undecided: no bf16 instructions on this CPU")
    assert ("torch.compile in float32" in line[2]) == (instructions == "no")


def test_page_charts_and_readme_table_are_made_of_them(stored: Results, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    text = report.markdown(stored.data)
    assert all(gate.name in text for gate in gates.GATES)
    written = charts.draw(stored.data, tmp_path)
    # Labels keep their distance and stay below the title.
    assert charts._spread([0.9, 0.95, 0.97, 1.0], 0.05) == pytest.approx([0.83, 0.88, 0.93, 0.98])
    assert charts._spread([0.1, 0.11, 0.5], 0.05) == pytest.approx([0.1, 0.15, 0.5]) and charts._spread([], 0.05) == []
    assert [p.stem for p in written] == ["time_against_c_n64", "memory_against_c", "roofline", "contenders"]
    for path in written:
        text = path.read_text()
        ElementTree.fromstring(text)
        assert "prefers-color-scheme:dark" in text and not re.search("http(?!://www.w3.org/)", text)
    both = page.write([stored.path, stored.path], tmp_path / "report.html").read_text()
    assert both.count("<svg") == 2 * len(written) and both.count("<table") == 2 * 4  # gates, two cases, memory
    assert "ours, HeadSGD bf16" in both and "<script" not in both
    table = readme.table(stored.data)
    assert "| recog_fast, `HeadSGD`, float32 | 200 ms (10.0x) | 200 ms (10.0x) | 9 MB |" in table
    text = f"before\n{readme.START}\nold\n{readme.END}\nafter"
    assert readme.insert(readme.insert(text, table), table) == f"before\n{readme.START}\n\n{table}\n\n{readme.END}\nafter"


def test_charts_find_every_device_and_draw_what_leaving_out_costs(stored: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    for name in ("one", "two"):
        (tmp_path / "results" / name).mkdir(parents=True)
        (tmp_path / "results" / name / "full.json").write_text(stored.path.read_text())
    monkeypatch.setattr(charts.machine, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(charts.machine, "slug", lambda: "two")
    assert [path.parent.name for path in charts.stored()] == ["two", "one"]
    listed = _row(ours.FusedStepLists.name, 0.01)
    listed["gate"] |= {"d_embeddings": 7e-4, "dropped_mass": 0.1}
    stored.data["cases"][1]["rows"].append(listed)
    picture = charts.pictures(stored.data)["skipping"]
    assert "float32, drop_elements 2^-16: 10 ms, error 7e-04" in picture.alt
    assert charts.main([str(tmp_path / "absent.json")]) == 1


def test_every_contender_has_one_name_and_a_known_cost() -> None:
    from . import cost_model

    names = [kind.name for kind in suite.ALL]
    assert len(set(names)) == len(names)
    assert all(not kind.cost or callable(getattr(cost_model, kind.cost)) for kind in suite.ALL)
    assert set(charts._LOOKS) <= set(names)
