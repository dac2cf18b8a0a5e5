"""The cost model of sharded heads: its messages are those that are sent, its bytes those that are held."""

from __future__ import annotations

import dataclasses
import sys

import pytest
from paths import ROOT
from ranks import Ranks, ranks
from sharded import UNEVEN, D, Problem
from sharded_ranks import messages_of, part_of_head

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
    for bad in ({"gpus": 0}, {"device": "abacus"}, {"optimizer": "lion"}):
        with pytest.raises(ValueError, match="estimate: expected"):
            model.estimate(**{"classes": 10, "gpus": 1, "batch": 1, **bad})  # type: ignore[arg-type]


def test_the_document_shows_the_models_numbers() -> None:
    text = (ROOT / "docs" / "scale.md").read_text()
    assert model.scale_table() in text
    for classes, batch in ((10**5, 128), (10**6, 128), (10**7, 128), (10**8, 128), (10**6, 16)):
        found = model.crossover(classes, batch)
        assert f"| {classes:,} | {batch} | {found if found else 'beyond 1024'} |" in text


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["estimate", "--classes", "29e6", "--gpus", "8", "--batch", "1024"]) == 0
    shown = capsys.readouterr().out
    assert "29,000,000 classes x 512, 8 H100" in shown and "14.9 GB  together: fits" in shown and "reduce-scatter" in shown
    assert cli.main(["estimate", "--classes", "1e9", "--gpus", "2", "--batch", "1024", "--optimizer", "sgd"]) == 0
    assert "does not fit" in capsys.readouterr().out
    assert cli.main(["estimate", "--classes", "10", "--batch", "1", "--device", "abacus"]) == 1
    assert "expected device in A100" in capsys.readouterr().err
    for bad in ("2.5", "abc", "nan", "inf", "1e999"):
        with pytest.raises(SystemExit) as stop:
            cli.main(["estimate", "--classes", bad, "--batch", "1"])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.count("\n") == 1 and f"--classes: expected a whole number, such as 1000 or 29e6, got '{bad}'" in error
