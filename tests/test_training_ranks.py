"""The training script over ranks: the losses of one process, resumed at any number, the same decisions and errors on every rank."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranks as processes
import torch
from ranks import Ranks
from training_data import make_folder, settings
from training_ranks import on_another_machine, train_run

from recog_fast.checkpoint import checkpoint_path, latest_checkpoint
from recog_fast.evaluation.report import read_metrics
from recog_fast.sharding import World
from recog_fast.training.data import TrainingImages, step_loader
from recog_fast.training.saved import load_run

ranks = pytest.fixture(scope="module")(processes.ranks)

# Summation orders differ: 1e-6 relative a step (math.md), grown by a few steps of a network with batch normalisation.
BUDGET = 1e-4
# Without dropout, whose masks differ from rank to rank, and with the batch statistics of all rows.
SAME: dict[str, Any] = {"network_options": {"widths": [4, 8, 8, 8]}, "sync_batchnorm": True, "max_steps": 5, "lr": 0.05}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("images") / "faces")


@pytest.fixture(scope="module")
def unknown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("others") / "unknown", identities=6, seed=1)


def lines(output: Path) -> list[dict[str, float]]:
    return [line for line in read_metrics(output / "metrics.jsonl") if "loss" in line]


def losses(output: Path) -> list[float]:
    return [line["loss"] for line in lines(output)]


def run_at(ranks: Ranks, size: int, file: Path, output: Path, **more: Any) -> list[tuple[int, str]]:
    """(steps, what was said) of each rank of a run with this many; one process without a group."""
    changes = {"output": str(output), **more.pop("changes", {})}
    if size == 1:
        return [train_run(None, str(file), changes, **more)]
    return ranks.run(size, train_run, str(file), changes, more.get("per_rank"), more.get("plain", False), more.get("poisoned", -1), more.get("disk", 0), more.get("signal", 0))


QAFACE = {"start": 1, "inject_scale": 0.176}
CASES: dict[str, tuple[dict[str, Any], bool]] = {
    # 7 rows: 4 and 3, or 3, 2 and 2; the last step of an epoch is short, its second micro-batch has a rank without rows
    "uneven rows, accumulated, short last step, AdaFace, adamw": (
        {"batch_size": 7, "gradient_acc": 2, "drop_last": False, "max_steps": 6, "margin": {"name": "AdaFace"}, "optimizer": "adamw", "lr": 1e-3}, True,
    ),
    # 2 rows for 3 ranks: one has none
    "ranks without rows, vpl, sgd": ({"batch_size": 2, "gradient_acc": 4, "method": "vpl", "memory": {"start": 1}, "head_optimizer": "sgd", "lr": 0.01}, True),
    "qaface, uir, ri, momentum encoder, accumulated": (
        {"method": "qaface+uir+ri", "batch_size": 8, "gradient_acc": 2, "memory": QAFACE, "memory_momentum": 0.9, "recognizability": {"ui_images": 12}}, False,
    ),
    "fsdp2, subcenters, bfloat16 momentum": ({"parallel": "fsdp2", "subcenters": 2, "momentum_dtype": "bfloat16", "async_save": True, "save_interval": 2}, False),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_any_number_of_ranks_has_the_losses_of_one_process(ranks: Ranks, tmp_path: Path, folder: Path, unknown: Path, name: str) -> None:
    changes, plain = CASES[name]
    if "uir" in changes.get("method", ""):
        changes = {**changes, "unlabelled": {"kind": "folder", "path": str(unknown)}}
    settings(tmp_path, folder, **{**SAME, **changes})
    file = tmp_path / "settings.yaml"
    for size in (1, 2, 3):
        told = run_at(ranks, size, file, tmp_path / str(size), plain=plain)
        assert {steps for steps, _ in told} == {changes.get("max_steps", 5)}, told
        assert "Global Step: 1" in told[0][1]
        assert not any(said for _, said in told[1:])  # rank 0 alone speaks
    whole = lines(tmp_path / "1")
    for size in (2, 3):
        for line, expected in zip(lines(tmp_path / str(size)), whole, strict=True):
            for entry in set(expected) - {"images_per_second", "peak_memory_mb"}:
                np.testing.assert_allclose(line[entry], expected[entry], rtol=BUDGET, atol=1e-6, err_msg=f"{entry} of {size} ranks")


def test_saved_by_three_and_resumed_by_one_two_or_four(ranks: Ranks, tmp_path: Path, folder: Path) -> None:
    """In mid-epoch, with a memory, its momentum encoder, AdaFace's and the optimizers' state."""
    changes = {**SAME, "max_steps": 6, "save_interval": 3, "margin": {"name": "AdaFace"}, "method": "qaface", "memory": QAFACE, "memory_momentum": 0.9}
    settings(tmp_path, folder, **changes)
    file, three = tmp_path / "settings.yaml", tmp_path / "3"
    run_at(ranks, 3, file, three)
    for size in (1, 2, 4):
        output = tmp_path / str(size)
        shutil.copytree(checkpoint_path(three / "checkpoints", 3), checkpoint_path(output / "checkpoints", 3))
        shutil.copy(three / "metrics.jsonl", output / "metrics.jsonl")
        told = run_at(ranks, size, file, output, changes={"resume": True})
        assert {steps for steps, _ in told} == {6}, told
        np.testing.assert_allclose(losses(output), losses(three), rtol=BUDGET)
    _, _, head = load_run(three)  # what several ranks saved, in one process
    assert head.memory is not None
    assert head.memory.stats()["live"] == lines(three)[-1]["memory/live"]
    wrong = run_at(ranks, 2, file, three, changes={"resume": True, "embedding_size": 24, "network_options.widths": [4, 8, 8, 8]})
    assert all("expected weight of shape (14, 24) over all ranks, got (14, 16)" in text for _, text in wrong), wrong


@pytest.mark.parametrize("size", [1, 2])
def test_sampled_classes_are_drawn_alike_every_time(ranks: Ranks, tmp_path: Path, folder: Path, size: int) -> None:
    """With a memory and HeadSGD; another run draws the same, the policy of the classes left out counts."""
    settings(tmp_path, folder, **{**SAME, "sample_rate": 0.3, "batch_size": 4, "method": "vpl", "memory": {"start": 1}})
    found = []
    for name, policy in (("one", "sparse"), ("two", "sparse"), ("dense", "dense")):
        run_at(ranks, size, tmp_path / "settings.yaml", tmp_path / name, changes={"unsampled": policy, "weight_decay": 0.1})
        found.append((losses(tmp_path / name), load_run(tmp_path / name)[2].weight))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])
    assert found[0][0] != found[2][0]


def test_the_rows_of_ranks_are_those_of_one_process(tmp_path: Path, folder: Path) -> None:
    config = settings(tmp_path, folder, batch_size=5, gradient_acc=2, drop_last=False)
    images = TrainingImages(config)
    whole = list(step_loader(images, config, False)[0])
    assert [len(keys) for keys in whole] == [10] * 7
    for size in (2, 3, 6):
        parts = []
        for rank in range(size):
            world = World()
            world.rank, world.size = rank, size
            parts.append(list(step_loader(images, config, False, world)[0]))
        for step, keys in enumerate(whole):
            assert sorted(key for part in parts for key in part[step]) == sorted(keys)
            assert max(len(part[step]) for part in parts) - min(len(part[step]) for part in parts) <= 2  # one a micro-batch


# --- faults ---------------------------------------------------------------------------------------------------------


def test_a_nonfinite_row_of_one_rank_is_everyones_decision(ranks: Ranks, tmp_path: Path, folder: Path) -> None:
    settings(tmp_path, folder, **{**SAME, "batch_size": 6, "gradient_acc": 2})
    file = tmp_path / "settings.yaml"
    raised = run_at(ranks, 2, file, tmp_path / "raise", plain=True, poisoned=3)
    assert all("NonFiniteError: train: step 1: non-finite embeddings in rows [2] of 3 of rank 1 (images " in text for _, text in raised), raised
    told = run_at(ranks, 2, file, tmp_path / "skip", plain=True, poisoned=3, changes={"nonfinite": "skip"})
    assert [steps for steps, _ in told] == [5, 5]
    assert "Skipped: train: step 1: non-finite embeddings in rows [2] of 3 of rank 1" in told[0][1]
    last = lines(tmp_path / "skip")[-1]
    assert (last["skipped_steps"], last["nonfinite_rows"]) == (1, 1)
    assert np.isfinite(last["loss"])


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_loses_nothing(ranks: Ranks, tmp_path: Path, folder: Path, size: int, asynchronous: bool) -> None:
    """On the last rank alone: the save of step 1 is given up, training goes on, later ones are there; at the end it is an error."""
    settings(tmp_path, folder, **{**SAME, "save_interval": 1, "async_save": asynchronous, "max_steps": 4})
    file, output = tmp_path / "settings.yaml", tmp_path / "run"
    told = run_at(ranks, size, file, output, plain=True, disk=1)
    assert {steps for steps, _ in told} == {4}, told
    assert "No space left on device" in told[0][1]
    assert "Warning" in told[0][1]
    left = sorted(p.name for p in (output / "checkpoints").iterdir())
    assert left == ["step_00000003", "step_00000004"]
    told = run_at(ranks, size, file, output, plain=True, disk=9, changes={"resume": True, "max_steps": 6})
    assert all("No space left" in text for _, text in told), told
    assert latest_checkpoint(output / "checkpoints", verified=True) == checkpoint_path(output / "checkpoints", 4)
    assert sorted(p.name for p in (output / "checkpoints").iterdir()) == left
    told = run_at(ranks, size, file, output, plain=True, changes={"resume": True, "max_steps": 6})
    assert {steps for steps, _ in told} == {6}, told


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda number: number.name)
def test_a_signal_to_one_rank_ends_all_and_the_run_resumes_exactly(ranks: Ranks, tmp_path: Path, folder: Path, number: signal.Signals) -> None:
    """In the third step of the last rank: all save that step or the next; resumed, the very losses of an undisturbed run."""
    settings(tmp_path, folder, **{**SAME, "margin": {"name": "AdaFace"}})
    file, output = tmp_path / "settings.yaml", tmp_path / "run"
    told = run_at(ranks, 3, file, output, plain=True, signal=int(number))
    (done,) = {steps for steps, _ in told}
    assert done in (3, 4), told
    assert latest_checkpoint(output / "checkpoints", verified=True) == checkpoint_path(output / "checkpoints", done)
    told = run_at(ranks, 3, file, output, plain=True, changes={"resume": True})
    assert {steps for steps, _ in told} == {5}, told
    run_at(ranks, 3, file, tmp_path / "undisturbed", plain=True)
    assert losses(output) == losses(tmp_path / "undisturbed")


def test_float16_leaves_out_what_overflows_on_one_rank(ranks: Ranks, tmp_path: Path, folder: Path) -> None:
    settings(tmp_path, folder, **{**SAME, "precision": "fp16", "head_optimizer": "sgd", "max_steps": 4})
    told = run_at(ranks, 2, tmp_path / "settings.yaml", tmp_path / "run", plain=True)
    assert [steps for steps, _ in told] == [4, 4], told
    assert np.isfinite(losses(tmp_path / "run")).all()


# --- bad input ------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_said_by_every_rank(ranks: Ranks, tmp_path: Path, folder: Path) -> None:
    fewer = make_folder(tmp_path / "fewer", identities=13)
    settings(tmp_path, folder, **{**SAME, "sync_batchnorm": False})
    file = tmp_path / "settings.yaml"
    for changes, per_rank, expected in (
        ({}, [{"lr": 0.1}, {"lr": 0.2}], "expected the same lr on every rank, got 0.1 on rank 0 and 0.2 on rank 1"),
        ({}, [{}, {"data.holdout_classes": 1}], "expected the same data on every rank"),
        ({"batch_size": 3}, None, "expected batch_size >= 4, two rows on each of 2 ranks"),
        ({"weight_format": "split"}, None, "expected weight_format 'float32' over 2 ranks"),
        ({"parallel": "fsdp2", "memory": {"name": "VPL"}, "memory_momentum": 0.9}, None, "expected parallel 'ddp' with memory_momentum > 0"),
        ({"margin": {"name": "ArcFase"}}, None, "did you mean 'ArcFace'"),
    ):
        told = run_at(ranks, 2, file, tmp_path / "run", changes=changes, per_rank=per_rank)
        assert all(expected in text for _, text in told), (expected, told)
    told = ranks.run(2, on_another_machine, str(file), [str(folder), str(fewer)])
    assert all("expected the same number of images on every rank, got 70 on rank 0 and 65 on rank 1" in text for _, text in told), told
