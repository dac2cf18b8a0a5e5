"""The training loop: it learns, resumes bit for bit, accumulates rightly, survives bad images, and says what is wrong."""

from __future__ import annotations

import dataclasses
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from paths import data_dir
from torch import nn
from training_data import make_folder, settings

from recog_fast.evaluation.report import read_metrics
from recog_fast.ops import use_backend
from recog_fast.training import loop
from recog_fast.training.batches import Batch
from recog_fast.training.config import TrainConfig, read_config, to_yaml
from recog_fast.training.data import TrainingImages, step_loader
from recog_fast.training.logs import Meter
from recog_fast.training.loop import NonFiniteError, TrainResult, train
from recog_fast.training.verification import alternating, load_backbone, pairs_of_split, verify


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("images") / "faces")


def losses(result: TrainResult) -> list[float]:
    return [line["loss"] for line in read_metrics(result.output / "metrics.jsonl") if "loss" in line]


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int, action: Any) -> None:
    """Calls `action` in the middle of step number `step`."""
    original = loop.train_step

    def wrapped(run: loop.Run, batch: Batch, lr: float, head_lr: float) -> None:
        if run.step == step:
            action()
        original(run, batch, lr, head_lr)

    monkeypatch.setattr(loop, "train_step", wrapped)


def test_it_learns_and_logs(tmp_path: Path, folder: Path) -> None:
    config = settings(
        tmp_path,
        folder,
        num_epoch=8,
        data__holdout_classes=4,
        val_targets=["holdout"],
        val_sizes=[8],
        val_pairs=40,
        margin_ramp=2,
    )
    result = train(config)
    lines = read_metrics(result.output / "metrics.jsonl")
    steps = [line for line in lines if "loss" in line]
    assert result.finished
    assert result.step == 24 == len(steps)
    assert np.mean([line["loss"] for line in steps[-4:]]) < 0.7 * np.mean([line["loss"] for line in steps[:4]])
    assert steps[-1]["target_cosine"] > steps[0]["target_cosine"] + 0.2
    for name in (
        "lr",
        "nearest_cosine",
        "target_probability",
        "feature_norm",
        "images_per_second",
        "gradient_norm",
        "epoch",
    ):
        assert np.isfinite(steps[-1][name])
    # The InsightFace schedule: full rate at step 0, then linear to 0.
    np.testing.assert_allclose([line["lr"] for line in steps], [0.1 * (24 - k) / 24 for k in range(24)])
    assert {"val/holdout", "val/holdout/eer", "val/holdout@8"} <= set(lines[-1])
    assert result.metrics["val/holdout"] > 0.6
    assert read_config(result.output / "config.yaml") == config
    assert any((result.output / "tensorboard").iterdir())
    backbone, size = load_backbone(result.output, None, 0, 0)
    pairs = pairs_of_split("holdout", TrainingImages(config).held, size, 40, config.seed)
    assert verify(backbone, pairs)[0].accuracy == result.metrics["val/holdout"]


@pytest.mark.parametrize(
    ("workers", "changes"),
    [
        (0, {"gradient_acc": 2, "batch_size": 8, "margin": {"name": "AdaFace"}}),
        (2, {"gradient_acc": 2, "batch_size": 8, "margin": {"name": "AdaFace"}}),
        (0, {"optimizer": "adamw", "head_optimizer": "adamw", "lr": 0.003, "frequent": 2}),
        (2, {"memory": {"name": "QAFace", "inject_scale": 0.176}, "memory_momentum": 0.9, "weight_format": "split", "momentum_dtype": "bfloat16"}),
        (0, {"memory": {"name": "VPL", "start": 0}, "head_optimizer": "sgd"}),
    ],
    ids=["accumulated AdaFace", "accumulated AdaFace, workers", "adamw", "momentum encoder, split, workers", "memory, sgd"],
)
def test_resumed_run_is_bitwise_the_uninterrupted_one(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, workers: int, changes: dict[str, Any]
) -> None:
    changes = {**changes, "num_workers": workers}
    whole = train(settings(tmp_path, folder, output=str(tmp_path / "whole"), **changes))
    config = settings(tmp_path, folder, **changes)
    with monkeypatch.context() as patch:
        # Step 6 is in the middle of the second epoch (4 steps each).
        stop_after(patch, 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
        first = train(config)
    assert not first.finished
    assert first.step == 6
    torch.manual_seed(99)  # the saved random state must win
    second = train(dataclasses.replace(config, resume=True))
    assert second.finished
    assert losses(second) == losses(whole)
    ours, theirs = (torch.load(r.output / "model.pt", weights_only=True) for r in (second, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_crash_resumes_from_the_last_checkpoint(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train(settings(tmp_path, folder, output=str(tmp_path / "whole")))
    config = settings(tmp_path, folder, save_interval=3, keep_last=1)

    def crash() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        stop_after(patch, 5, crash)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    assert len(read_metrics(Path(config.output) / "metrics.jsonl")) == 5
    # Steps 4 and 5 were logged and lost: the resumed run drops and repeats them.
    assert losses(train(dataclasses.replace(config, resume=True))) == losses(whole)
    assert len(list((Path(config.output) / "checkpoints").iterdir())) == 1


def test_resume_refuses_another_data_order(tmp_path: Path, folder: Path) -> None:
    train(settings(tmp_path, folder, max_steps=2))
    with pytest.raises(ValueError, match="earlier run: set resume"):
        train(settings(tmp_path, folder))
    with pytest.raises(ValueError, match="seed"):
        train(settings(tmp_path, folder, seed=1, resume=True))
    with pytest.raises(ValueError, match=r"batch_size \* gradient_acc = 16"):
        train(settings(tmp_path, folder, batch_size=8, resume=True))


def test_accumulation_is_one_large_batch(tmp_path: Path, folder: Path) -> None:
    """With unlabelled rows spread unevenly, and no BatchNorm: 2 x 8 rows give the step of 1 x 16."""
    unknown = make_folder(tmp_path / "unknown", identities=3, seed=1)
    weights = []
    for size, acc in ((16, 1), (8, 2)):
        changes = {"unlabelled": {"kind": "folder", "path": str(unknown)}, "unknown_weight": 0.1}
        run = loop.setup(
            settings(tmp_path, folder, output=str(tmp_path / f"run{acc}"), batch_size=size, gradient_acc=acc, **changes)
        )
        torch.manual_seed(0)
        run.backbone = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 16))
        starts = (run.backbone[1].weight.detach().clone(), run.head.weight.detach().clone())
        run.optimizer = torch.optim.SGD(run.backbone.parameters(), lr=0.1)
        for batch, _ in zip(run.position.track(run.loader), range(3), strict=False):
            assert (batch.labels < 0).any()
            assert (batch.labels >= 0).any()
            loop.train_step(run, batch, 0.1, 0.1)
            run.step += 1
        weights.append((run.backbone[1].weight.detach(), run.head.weight.detach()))
    for one, two, start in zip(*weights, starts, strict=True):
        # Two float32 summation orders over three steps: a logit's rounding (6e-8 of s = 64) is 4e-6 of a probability and so of a step.
        assert (one - two).abs().max() <= 3 * 4e-6 * (one - start).abs().max()


@pytest.mark.parametrize("change", [{"head_optimizer": "sgd"}, {}, {"weight_format": "split", "momentum_dtype": "bfloat16"}], ids=["sgd", "headsgd", "split"])
def test_head_optimizers_agree(tmp_path: Path, folder: Path, change: dict[str, Any]) -> None:
    found = losses(train(settings(tmp_path, folder, max_steps=5, **change)))
    reference = losses(
        train(settings(tmp_path, folder, head_optimizer="sgd", max_steps=5, output=str(tmp_path / "reference")))
    )
    np.testing.assert_allclose(found, reference, rtol=1e-3)


def test_bf16_autocast_follows_float32(tmp_path: Path, folder: Path) -> None:
    found = losses(train(settings(tmp_path, folder, precision="bf16", max_steps=3)))
    exact = losses(train(settings(tmp_path, folder, max_steps=3, output=str(tmp_path / "float32"))))
    # bf16 keeps 8 bits: half a percent on a loss of sums of many rounded products.
    np.testing.assert_allclose(found, exact, rtol=2e-2)
    assert found != exact


def test_native_and_reference_runs_agree(tmp_path: Path, folder: Path) -> None:
    native = losses(train(settings(tmp_path, folder, max_steps=8)))
    with use_backend("reference"):
        reference = losses(train(settings(tmp_path, folder, max_steps=8, output=str(tmp_path / "reference"))))
    # 1e-6 relative per step (math.md), grown by eight steps of a network with BatchNorm on 16 rows.
    np.testing.assert_allclose(native, reference, rtol=1e-4)


def test_real_records_train_and_verify(tmp_path: Path) -> None:
    lfw = data_dir() / "lfw112"
    changes: dict[str, Any] = {
        "data": {"kind": "rec", "path": str(lfw / "train_sets1-4" / "train.rec"), "size": 32},
        "val_targets": [str(lfw / "lfw_fold05.bin")],
    }
    result = train(settings(tmp_path, tmp_path, max_steps=2, **changes))
    assert result.metrics.keys() >= {"val/lfw_fold05", "val/lfw_fold05/balanced", "val/lfw_fold05/eer"}
    assert TrainingImages(settings(tmp_path, tmp_path, **changes)).num_classes == 2268


class _Poisoned(nn.Module):
    """A backbone that gives NaN for one row of one call."""

    def __init__(self, inner: nn.Module, call: int, row: int) -> None:
        super().__init__()
        self.inner, self.calls, self.call, self.row = inner, 0, call, row

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        embeddings = self.inner(images).clone()
        if self.calls == self.call:
            embeddings[self.row] = float("nan")
        self.calls += 1
        return embeddings


def test_nonfinite_values_stop_the_run_and_name_the_row(tmp_path: Path, folder: Path) -> None:
    run = loop.setup(settings(tmp_path, folder))
    run.backbone = _Poisoned(run.backbone, call=1, row=5)
    batches = run.position.track(run.loader)
    loop.train_step(run, next(batches), 0.1, 0.1)
    run.step, batch = 1, next(batches)
    name = Path(run.images.path(batch.samples[5]))
    with pytest.raises(
        NonFiniteError, match=rf"step 1: non-finite embeddings in rows \[5\] of 16 .*{name.parent.name}/{name.name}"
    ):
        loop.train_step(run, batch, 0.1, 0.1)


def test_nonfinite_values_can_be_skipped(tmp_path: Path, folder: Path) -> None:
    run = loop.setup(settings(tmp_path, folder, nonfinite="skip", gradient_acc=2, batch_size=8))
    run.backbone = _Poisoned(run.backbone, call=1, row=0)
    weight = run.head.weight.detach().clone()
    before = [p.detach().clone() for p in run.backbone.parameters()]
    batches = run.position.track(run.loader)
    loop.train_step(run, next(batches), 0.1, 0.1)
    # The second micro-batch was bad: nothing moves, the first one's rows are dropped too.
    assert run.skipped == 1
    assert torch.equal(run.head.weight, weight)
    assert all(torch.equal(a, b) for a, b in zip(before, run.backbone.parameters(), strict=True))
    loop.train_step(run, next(batches), 0.1, 0.1)
    assert run.skipped == 1
    assert not torch.equal(run.head.weight, weight)


def test_corrupt_image_is_replaced_and_counted(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "faces", identities=6, images=4)
    (folder / "id03" / "2.png").write_bytes(b"\x89PNG no image")
    result = train(settings(tmp_path, folder, num_epoch=3, batch_size=12, num_workers=2))
    assert read_metrics(result.output / "metrics.jsonl")[-1]["corrupt_images"] == 1
    assert "id03" in (result.output / "quarantine.jsonl").read_text()
    with pytest.raises(RuntimeError, match="corrupt"):
        train(settings(tmp_path, folder, data__max_corrupt=0, output=str(tmp_path / "strict")))


def test_unreadable_held_out_images_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_folder(tmp_path / "faces", identities=10, images=5)
    for identity in folder.iterdir():
        (identity / "2.png").write_bytes(b"\x89PNG no image")
    train(settings(tmp_path, folder, data__holdout_classes=5, val_targets=["holdout"], val_pairs=24, num_epoch=1, batch_size=8))
    assert "holdout: 5 unreadable images are in no verification pair" in capsys.readouterr().out


def test_holdout_split_is_by_identity(tmp_path: Path, folder: Path) -> None:
    images = TrainingImages(settings(tmp_path, folder, data__holdout_classes=0.3))
    kept = {Path(p).parent.name for p in images.parts[0].dataset.paths}
    held = {Path(p).parent.name for p in images.held.paths}
    assert len(kept) == images.num_classes == 10
    assert len(held) == 4
    assert not kept & held
    assert set(images.parts[0].labels) == set(range(10))
    with pytest.raises(ValueError, match="below the number of identities 14, got 14"):
        TrainingImages(settings(tmp_path, folder, data__holdout_classes=14))
    with pytest.raises(ValueError, match="identity with 6 or more images"):
        TrainingImages(settings(tmp_path, folder, data__min_images=6))


def test_items_depend_on_seed_epoch_and_sample_only(tmp_path: Path, folder: Path) -> None:
    config = settings(tmp_path, folder)
    one, cached = (
        TrainingImages(config),
        TrainingImages(dataclasses.replace(config, data=dataclasses.replace(config.data, cache=True))),
    )
    for key in ((0, 3), (1, 3)):
        np.testing.assert_array_equal(one[key][0], cached[key][0])
    assert not np.array_equal(one[0, 3][0], one[1, 3][0])
    position, loader = step_loader(one, config, pin_memory=False)
    state = torch.get_rng_state()
    assert len(list(position.track(loader))) == 4
    assert torch.equal(state, torch.get_rng_state())


def test_margin_ramp_is_a_function_of_the_step(tmp_path: Path, folder: Path) -> None:
    for margin in ({"name": "ArcFace", "m": 0.4}, {"name": "AdaFace", "m": 0.4}):
        run = loop.setup(
            settings(tmp_path, folder, margin=margin, margin_ramp=1, output=str(tmp_path / margin["name"]))
        )
        found = []
        for step in (0, 2, 4, 9):
            run.ramp.set(step)
            found.append(run.head.margin.m)
        assert found == pytest.approx([0.0, 0.2, 0.4, 0.4])
    with pytest.raises(ValueError, match="margin_ramp = 0"):
        loop.setup(settings(tmp_path, folder, margin={"name": "Softmax"}, margin_ramp=1))


def test_pairs_are_dealt_out_alternately() -> None:
    """Ten genuine pairs, then twenty impostors, as sorted .bin files list them: every third of the new order has its share."""
    same = np.arange(30) < 10
    order = alternating(same)
    assert sorted(order) == list(range(30))
    assert [int(part.sum()) for part in np.array_split(same[order], 5)] == [2] * 5
    assert list(order[same[order]]) == list(range(10))


def test_meter_keeps_its_sums(tmp_path: Path) -> None:
    meter = Meter()
    meter.add({"a": (3.0, 2), "b": (0.0, 0)})
    meter = Meter(meter.state)
    meter.add({"a": (5.0, 2)})
    assert meter.flush() == {"a": 2.0}
    assert meter.flush() == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lrr", "3"], "unknown key 'lrr' in the command line; did you mean 'lr'"),
        (["--data.siz", "3"], "did you mean 'data.size'"),
        (["--augment.flop", "1"], "did you mean 'augment.flip'"),
        (["--lr", "fast"], "lr"),
        (["--optimizer", "lion"], "optimizer"),
        (["--batch_size", "0"], "batch_size >= 1, got 0"),
        (["--warmup_epoch", "2"], "warmup_epoch < num_epoch"),
        (["--weight_format", "split", "--head_optimizer", "sgd"], "head_optimizer 'headsgd' with weight_format = 'split'"),
        (["--scale", "0"], "scale > 0"),
        (["--val_targets", "[holdout]"], "holdout_classes > 0"),
        (["--data.path", ""], "data.path"),
    ],
)
def test_bad_settings_are_named(tmp_path: Path, folder: Path, arguments: list[str], message: str) -> None:
    settings(tmp_path, folder)
    with pytest.raises(ValueError, match="train: ") as error:
        read_config(tmp_path / "settings.yaml", arguments)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"margin": {"name": "ArcFase"}}, "did you mean 'ArcFace'"),
        ({"margin": {"name": "ArcFace", "mm": 1}}, "unknown key 'margin.mm'; did you mean 'm'"),
        ({"memory": {"name": "VPLL"}}, "did you mean 'VPL'"),
        ({"network": "resnet"}, "resnet"),
        ({"network_options": {"depth": 3}}, "depth"),
        ({"data__options": {"decod": True}}, "did you mean 'decode'"),
        ({"batch_size": 1000}, "<= the 70 training images, got 1000"),
        ({"augment": {"flip": 2}}, "flip"),
    ],
)
def test_settings_that_do_not_fit_are_named(
    tmp_path: Path, folder: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError) as error:
        train(settings(tmp_path, folder, **changes))
    assert message in str(error.value)


def test_settings_round_trip_and_missing_files(tmp_path: Path, folder: Path) -> None:
    config = settings(
        tmp_path, folder, memory={"name": "VPL"}, unlabelled={"kind": "folder", "path": "x"}, lr_epochs=[1, 2.5]
    )
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert read_config(tmp_path / "again.yaml") == config
    changed = read_config(
        tmp_path / "again.yaml", ["--data.size", "40", "--margin.m=0.4", "--lr", "1e-3", "--memory", "null"]
    )
    assert (changed.data.size, changed.margin["m"], changed.lr, changed.memory) == (40, 0.4, 1e-3, None)
    with pytest.raises(FileNotFoundError, match="no settings file"):
        read_config(tmp_path / "absent.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(ValueError, match="no valid YAML"):
        read_config(tmp_path / "bad.yaml")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        train(settings(tmp_path, tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="pair file"):
        train(settings(tmp_path, folder, val_targets=["absent.bin"]))
    assert isinstance(TrainConfig().data.size, int)
