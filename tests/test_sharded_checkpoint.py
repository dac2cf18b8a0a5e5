"""Checkpoints of sharded heads: saved by any number of ranks, resumed by any other; damage, full disks and other models."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks, ranks
from sharded import D, build, close, joined
from sharded_ranks import AFTER, BEFORE, PROBLEMS, failing_save, refused_load, run
from torch import Tensor

import recog_fast as rf
from recog_fast.checkpoint import (
    CheckpointError,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
    save_checkpoint_async,
)

processes = pytest.fixture(scope="module")(ranks)


def go(processes: Ranks, world: int, *arguments: Any) -> list[dict[str, Tensor]]:
    parts = [run(None, *arguments)] if world == 1 else processes.run(world, run, *arguments)
    return [joined([part[i] for part in parts]) for i in range(len(parts[0]))]


@pytest.mark.parametrize(("name", "saved_by"), [*((name, 3) for name in PROBLEMS), ("memory", 1), ("empty shards", 1), ("empty shards", 4), ("SGD", 4)])
def test_any_number_of_ranks_goes_on(processes: Ranks, name: str, saved_by: int, tmp_path: Path) -> None:
    """Saved by 3, resumed by 1, 2 and 4 (by 1: 2 and 3, by 4: 1 and 3): the next 20 losses and the state are those of one process undisturbed."""
    problem = PROBLEMS[name]
    truth = run(None, problem, None, None, range(BEFORE + AFTER))[BEFORE:]
    path = str(tmp_path / "c")
    go(processes, saved_by, problem, None, path, range(BEFORE), saved_by == 4)
    assert os.listdir(tmp_path) == ["c"]
    for world in (1, 2, 4) if saved_by == 3 else (2, 3) if saved_by == 1 else (1, 3):
        resumed = go(processes, world, problem, path, None, range(BEFORE, BEFORE + AFTER))
        for step, (got, expected) in enumerate(zip(resumed, truth, strict=True)):
            assert set(got) == set(expected)
            for key, value in expected.items():
                assert got[key].shape == value.shape and close(got[key].double(), value.double(), 2e-5), (world, step, key)


def test_the_file_does_not_depend_on_who_reads_it(processes: Ranks, tmp_path: Path) -> None:
    """All of it in one process: W over all ranks, the entries of all parts."""
    problem = PROBLEMS["memory"]
    whole = go(processes, 3, problem, None, str(tmp_path / "c"), range(BEFORE))[-1]
    content = rf.checkpoint.read_checkpoint(tmp_path / "c")  # type: ignore[attr-defined]
    assert torch.equal(content["head"]["weight"], whole["W"])
    assert torch.equal(torch.cat([part["ids"] for part in content["head"]["memory entries"]]), whole["entries ids"])
    assert content["step"] == BEFORE


def test_async_saves_hold_the_state_of_the_call(tmp_path: Path) -> None:
    problem = PROBLEMS["memory"]
    plain = run(None, problem, None, str(tmp_path / "a"), range(BEFORE))[-1]
    run(None, problem, None, str(tmp_path / "b"), range(BEFORE), True)
    assert torch.equal(rf.checkpoint.read_checkpoint(tmp_path / "b")["head"]["weight"], plain["W"])  # type: ignore[attr-defined]
    head = build(problem, None)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        save_checkpoint_async(tmp_path / "file" / "c", head=head, step=0).result(30)
    with pytest.raises(ValueError, match="step"):
        save_checkpoint_async(tmp_path / "c", head=head, step=-1)


# -- faults ------------------------------------------------------------------------------------------------------------


def damaged(folder: Path, draw: random.Random) -> str:
    """Cuts or flips a file of the folder somewhere."""
    file = draw.choice(sorted(folder.iterdir()))
    data = bytearray(file.read_bytes())
    at = draw.randrange(len(data))
    if draw.random() < 0.3:
        file.write_bytes(data[:at])
        return f"{file.name} cut at {at} of {len(data)}"
    data[at] ^= 1 << draw.randrange(8)
    file.write_bytes(data)
    return f"{file.name} flipped at {at} of {len(data)}"


def test_damage_in_many_places_is_always_found(processes: Ranks, tmp_path: Path) -> None:
    """60 places in the files of three ranks; the newest checkpoint is left for the one before, saying so."""
    problem, draw = PROBLEMS["memory"], random.Random(5)
    for step in (1, 2):
        go(processes, 3, problem, None, str(tmp_path / f"step_{step:08d}"), range(BEFORE))
    newest = tmp_path / "step_00000002"
    shutil.copytree(newest, tmp_path / "whole")
    assert latest_checkpoint(tmp_path, verified=True) == newest
    for _ in range(60):
        what = damaged(newest, draw)
        with pytest.raises(CheckpointError, match="damaged"):
            load_checkpoint(newest, head=build(problem, None))
        with pytest.warns(UserWarning, match=r"damaged.*going back to the checkpoint before it"):
            assert latest_checkpoint(tmp_path, verified=True) == tmp_path / "step_00000001", what
        shutil.rmtree(newest)
        shutil.copytree(tmp_path / "whole", newest)
    damaged(tmp_path / "step_00000001", draw)
    damaged(newest, draw)
    with pytest.warns(UserWarning, match="damaged"), pytest.raises(CheckpointError, match="all 2 checkpoints in .* are damaged"):
        latest_checkpoint(tmp_path, verified=True)


@pytest.mark.parametrize("where", ["tensors", "publish", "pending"])
def test_a_rank_that_cannot_save_stops_all_and_loses_nothing(processes: Ranks, where: str, tmp_path: Path) -> None:
    path = str(tmp_path / "c")
    go(processes, 3, PROBLEMS["memory"], None, path, range(BEFORE))
    before = {p.name: p.read_bytes() for p in Path(path).iterdir()}
    said = processes.run(3, failing_save, path, where)
    bad = 0 if where == "publish" else 1
    for rank, text in enumerate(said):
        expected = "disk full|no queued memory writes, got 1" if rank == bad else f"of rank {bad}: .*(disk full|no queued memory writes, got 1)"
        assert re.search(expected, text), (rank, text)
    assert {p.name: p.read_bytes() for p in Path(path).iterdir()} == before
    assert processes.run(3, failing_save, path, "nowhere") == ["saved"] * 3


REFUSED = {
    "classes": r"expected weight of shape \(32, 12\)( over all ranks)?, got \(31, 12\)",
    "margin": r"does not fit this head: it lacks nothing and holds \['margin.mean', 'margin.std'\]",
    "no memory": r"does not fit this head: it lacks nothing and holds \['memory.clock'",
    "subcenters": r"expected weight of shape \(31, 2, 12\)( over all ranks)?, got \(31, 12\)",
}


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("change", list(REFUSED))
def test_a_checkpoint_of_another_model_is_refused_by_all(processes: Ranks, change: str, world: int, tmp_path: Path) -> None:
    path = str(tmp_path / "c")
    go(processes, 2, PROBLEMS["memory"], None, path, range(1))
    said = [refused_load(None, path, change)] if world == 1 else processes.run(world, refused_load, path, change)
    for text, same in said:
        assert re.search(REFUSED[change], text), text
        assert same
    shutil.rmtree(path)
    said = [refused_load(None, path, change)] if world == 1 else processes.run(world, refused_load, path, change)
    assert all("no folder" in text for text, _ in said)


def test_a_missing_key_of_the_manifest_is_damage(tmp_path: Path) -> None:
    head = rf.MarginHead(7, D)
    save_checkpoint(tmp_path / "c", head=head, step=1)
    manifest = tmp_path / "c" / "manifest.json"
    entries = json.loads(manifest.read_text())
    entries.pop("state.json")
    manifest.write_text(json.dumps(entries))
    with pytest.raises(CheckpointError, match=r"damaged: it names no state.json"):
        load_checkpoint(tmp_path / "c", head=head)
