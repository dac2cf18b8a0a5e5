"""The cost model of sharded heads: its messages are those that are sent, its bytes those that are held."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from paths import ROOT
from ranks import Ranks, ranks
from sharded import UNEVEN, D, Problem
from sharded_ranks import gradients_of_ddp, messages_of, part_of_head

sys.path.insert(0, str(ROOT))  # benchmarks/ is no part of the installed package
from benchmarks import cost_model
from recog_fast import cli
from recog_fast import estimate as model

processes = pytest.fixture(scope="module")(ranks)

STEPS: dict[str, Problem] = {
    "plain, even": Problem((4, 4)),
    "plain, uneven": Problem(UNEVEN[4]),
    "weights, SGD": Problem(UNEVEN[3], weighted=True, fused=False),
    "subcenters, 16-bit": Problem(UNEVEN[3], half=True, options={"subcenters": 3}),
    "unknown": Problem(UNEVEN[3], options={"unknown_weight": 0.1}),
    "unknown, memory, 16-bit": Problem(UNEVEN[4], half=True, policy="qaface", options={"unknown_weight": 0.1}),
    "single rows": Problem(UNEVEN[2], call={"reduction": "none"}),
    "empty shards": Problem(UNEVEN[4], classes=5, margin="adaface"),
    "sampled": Problem(UNEVEN[3], options={"sample_rate": 0.3}),
    "many classes": Problem(UNEVEN[3], classes=3000),
}


def head_of(problem: Problem, unlabelled: tuple[int, ...] = ()) -> model.Head:
    counted = unlabelled if "unknown_weight" in problem.options else ()
    return model.Head(
        problem.classes, D, problem.sizes, problem.options.get("subcenters", 1), counted, weights=4 * problem.weighted, half=problem.half,
        keys=4 if problem.policy else 0, per_row="reduction" in problem.call, optimizer="headsgd" if problem.fused else "sgd",
        ring=problem.classes if problem.policy else None,
    )  # fmt: skip


@pytest.mark.parametrize("name", list(STEPS))
def test_messages_are_the_models(processes: Ranks, name: str) -> None:
    """Every collective of a step, in order, with its bytes; the same on every rank, whatever its rows and classes."""
    problem = STEPS[name]
    said = processes.run(len(problem.sizes), messages_of, dataclasses.replace(problem, steps=1))
    expected = [(m.kind, m.bytes) for m in model.messages(head_of(problem, tuple(said[0][1])))]
    for rank, (seen, _) in enumerate(said):
        assert seen == expected, rank


@pytest.mark.skipif("RECOG_FAST_RANKS" not in os.environ, reason="set RECOG_FAST_RANKS=8 for that many processes")
def test_messages_of_many_ranks_are_the_models() -> None:
    """As above, with rows of every number from 0 up; dense, HeadSGD, memory, UIR, sampling, and DistributedDataParallel."""
    world = int(os.environ["RECOG_FAST_RANKS"])
    sizes = tuple(range(world))
    many = Ranks(world)
    try:
        for name, problem in STEPS.items():
            wide = dataclasses.replace(problem, sizes=sizes, steps=1)
            said = many.run(world, messages_of, wide)
            expected = [(m.kind, m.bytes) for m in model.messages(head_of(wide, tuple(said[0][1])))]
            assert all(seen == expected for seen, _ in said), name
        check_buckets(many, world)
    finally:
        many.close()


def check_buckets(processes: Ranks, world: int) -> None:
    for cap in (25.0, 0.4):
        for seen, ready in processes.run(world, gradients_of_ddp, cap):
            assert seen == [m.bytes for m in model.buckets(ready, int(cap * (1 << 20)))]
            assert sum(seen) == sum(ready) and len(seen) == (1 if cap == 25 else 2)


def test_all_reduces_of_the_backbone_are_the_models(processes: Ranks) -> None:
    check_buckets(processes, 2)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_what_a_rank_holds_is_the_models(processes: Ranks, world: int) -> None:
    problem = Problem((6,) if world == 1 else UNEVEN[world], classes=103, policy="vpl")
    held = [part_of_head(None, problem)] if world == 1 else processes.run(world, part_of_head, problem)
    items = {item.what.split(",")[0].split(":")[0]: item.bytes for item in model.memory(head_of(problem))}
    assert held[0]["W"] == items["W"]
    assert held[0]["state"] == items["optimizer state of W"]
    classes = head_of(problem).local
    assert held[0]["memory"] == items["memory"] + 2 * classes * D  # the tests' memory is float32: two bytes more for an element
    assert all(part["W"] <= held[0]["W"] for part in held)


@pytest.mark.parametrize("optimizer", ["headsgd", "sgd"])
def test_one_device_is_the_benchmarks_model(optimizer: str) -> None:
    head = model.Head(100_000, 512, (256,), optimizer=optimizer)
    cost = {"headsgd": cost_model.fused_step, "sgd": cost_model.recomputing}[optimizer](256, 100_000, 512)
    assert model.flops(head) == cost.flops(matrix_only=True)
    assert model.traffic(head) == cost.bytes()
    assert model.messages(head) == []


def test_ring_bytes() -> None:
    """Over all ranks a ring all-reduce of b bytes sends 2 (R - 1) b, an all-gather (R - 1) of what each contributes to everyone."""
    assert model.Message("", "all-reduce", 100).sent(4) * 4 == 2 * 3 * 100
    assert model.Message("", "all-gather", 100).sent(4) == 300
    assert model.Message("", "reduce-scatter", 400).sent(4) == 300


def test_what_does_not_fit_is_said_with_what_would() -> None:
    small, large = model.estimate(29_000_000, 8, 1024), model.estimate(100_000_000, 4, 1024)
    assert small.fits and not small.advice
    assert not large.fits and "8 H100 instead of 4" in large.advice
    assert model.estimate(100_000_000, 8, 1024).fits
    assert "HeadSGD instead of an optimizer that needs dW" in model.estimate(10_000_000, 1, 128, optimizer="adamw").advice
    assert "momentum 0 for the head" in model.estimate(30_000_000, 1, 128).advice
    for bad in ({"gpus": 0}, {"memory_steps": -1}, {"device": "abacus"}, {"optimizer": "lion"}):
        with pytest.raises(ValueError, match="estimate: expected"):
            model.estimate(**{"classes": 10, "gpus": 1, "batch": 1, **bad})  # type: ignore[arg-type]


def test_what_was_tried_is_computed() -> None:
    """Every option carries the bytes that an estimate of it gives; planes and sampling are said not to help."""
    tight = model.estimate(22_000_000, 1, 128)
    tried = {o.what: o for o in tight.options}
    assert not tight.fits and [o.fits for o in tight.options] == sorted((o.fits for o in tight.options), reverse=True)
    assert tried["bfloat16 momentum"].bytes == model.estimate(22_000_000, 1, 128, momentum_dtype="bfloat16").bytes
    assert tried["bfloat16 momentum"].fits and not tried["sample_rate 0.1"].fits
    assert tried["weight_format split"].bytes == tight.bytes
    rows = model.estimate(10_000, 1, 8_000_000)
    (fewer,) = (o for o in rows.options if o.what.endswith("rows a step") and o.fits)
    most = int(fewer.what.split()[0])
    assert model.estimate(10_000, 1, most).fits and not model.estimate(10_000, 1, most + 1).fits
    for bad in ({"weight_format": "split", "gpus": 2}, {"weight_format": "split", "optimizer": "sgd"}, {"sample_rate": 0.0}, {"momentum_dtype": "int8"}):
        with pytest.raises(ValueError, match="estimate: expected"):
            model.estimate(**{"classes": 10, "gpus": 1, "batch": 1, **bad})  # type: ignore[arg-type]


def test_formats_and_sampling_cost_what_they_hold_and_move() -> None:
    plain, half = model.Head(1000, 64, (8,)), model.Head(1000, 64, (8,), half_momentum=True)
    items = {i.what: i.bytes for i in model.memory(half)}
    assert items["optimizer state of W, bfloat16"] == 2 * 1000 * 64
    assert model.traffic(plain) - model.traffic(half) == 2 * 2 * 1000 * 64
    sampled = dataclasses.replace(plain, sample_rate=0.1)
    assert model.flops(sampled) == model.flops(plain) // 10
    assert model.traffic(plain) - model.traffic(sampled) == 4 * 900 * 64  # one sweep reads a tenth; momentum moves all


def test_stored_times_are_found_and_named(tmp_path: Path) -> None:
    row = {"name": "ours, HeadSGD float32", "steps": {"full step": {"wall_s": {"median": 0.5}}}}
    cases = [{"regime": "R0", "N": 64, "C": c, "D": 512, "commit": "abc", "rows": [row]} for c in (1000, 100_000)]
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "full.json").write_text(json.dumps({"environment": {"device": "Some CPU zen9, 2 cores, one thread used"}, "cases": cases}))
    head = model.Head(200_000, 512, (64,))
    found = model.measured(head, "Some CPU zen9", tmp_path)
    assert isinstance(found, model.Measured) and found.seconds == 1.0
    assert "times 2 from 100,000 classes" in found.source and "commit abc" in found.source
    assert "times" not in model.measured(dataclasses.replace(head, classes=1000), "Some CPU zen9", tmp_path).source  # type: ignore[union-attr]
    for other, cpu in ((dataclasses.replace(head, rows=(65,)), "Some CPU zen9"), (head, "Another"), (dataclasses.replace(head, optimizer="sgd"), "Some CPU zen9")):
        assert isinstance(model.measured(other, cpu, tmp_path), str)


def test_the_stored_large_heads_are_the_models() -> None:
    """Peak memory of processes that trained heads of up to 4M classes, within 5 % of the model."""
    stored = [entry for path in (ROOT / "benchmarks" / "results").glob("*/large_head.json") for entry in json.loads(path.read_text())]
    assert max(e["classes"] * e["dimension"] for e in stored if (e["weight_format"], e["momentum"]) == ("float32", "float32")) == 4_000_000 * 512
    text = (ROOT / "docs" / "scale.md").read_text()
    for e in stored:
        cpu = model.Device("cpu", e["host_memory"], 1.0, 1.0, 1.0, None, None, host=True)
        said = model.estimate(e["classes"], 1, e["batch"], dimension=e["dimension"], device=cpu, half=False, weight_format=e["weight_format"], momentum_dtype=e["momentum"])
        assert e["peak"] == pytest.approx(said.bytes, rel=0.05)
        assert f"| {e['classes']:,} | {e['peak'] / 1e9:.2f} GB | {said.bytes / 1e9:.2f} GB |" in text


def test_a_large_heads_tool_measures(tmp_path: Path) -> None:
    """200k classes of 64: 102 MB beside the interpreter's own; the process is most of it, so the tolerance here is the machine's."""
    command = [sys.executable, str(ROOT / "tools" / "large_head.py"), "--classes", "2e5", "--dim", "64", "--steps", "2", "--tolerance", "0.3", "--output", str(tmp_path)]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout
    (entry,) = json.loads(next(tmp_path.glob("*/large_head.json")).read_text())
    assert entry["loss"][1] < entry["loss"][0] and entry["peak"] > 2 * 4 * 200_000 * 64


def test_the_document_shows_the_models_numbers() -> None:
    text = (ROOT / "docs" / "scale.md").read_text()
    assert model.scale_table() in text
    assert model.format_table() in text
    for classes, batch in ((10**5, 128), (10**6, 128), (10**7, 128), (10**8, 128), (10**6, 16)):
        found = model.crossover(classes, batch)
        assert f"| {classes:,} | {batch} | {found if found else 'beyond 1024'} |" in text


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["estimate", "--classes", "29e6", "--gpus", "8", "--batch", "1024"]) == 0
    shown = capsys.readouterr().out
    assert "29,000,000 classes x 512, 8 H100" in shown and "14.9 GB  together: fits" in shown and "reduce-scatter" in shown
    assert cli.main(["estimate", "--classes", "1e9", "--gpus", "2", "--batch", "1024", "--optimizer", "sgd"]) == 0
    assert "does not fit" in capsys.readouterr().out
    assert cli.main(["estimate", "--classes", "1e5", "--batch", "64", "--float32", "--device", "cpu", "--json"]) == 0
    said: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert said["memory"]["items"]["W, float32"] == 4 * 10**5 * 512 and said["device"]["bandwidth"] > 1e8
    assert set(said["measured"]) in ({"none"}, {"seconds", "source"})
    assert cli.main(["estimate", "--classes", "1e5", "--batch", "64", "--device", "cpu", "--gpus", "2"]) == 2
    assert "speed of a link" in capsys.readouterr().err
    for bad in ("2.5", "abc", "nan", "inf", "1e999", "0", "-5"):
        with pytest.raises(SystemExit) as stop:
            cli.main(["estimate", "--classes", bad, "--batch", "1"])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.count("\n") == 1 and f"--classes: expected a whole number from 1 on, such as 1000 or 29e6, got '{bad}'" in error
