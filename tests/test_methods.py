"""The papers' methods in the training script: settings, step-by-step parity, resuming, logs, bad input."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from test_training import losses, stop_after
from torch import Tensor, nn
from training_data import make_folder, settings

from recog_fast.evaluation.report import read_metrics
from recog_fast.models.backbone import Backbone
from recog_fast.ops import use_backend
from recog_fast.training import loop
from recog_fast.training.config import RecognizabilityConfig, read_config, to_yaml
from recog_fast.training.logs import Log
from recog_fast.training.loop import train
from recog_fast.training.methods import METHODS, apply_method
from recog_fast.training.reports import log_norms
from recog_fast.training.saved import load_quality_model, load_run
from recog_fast.training.unrecognizable import corrupt, embed_clean, norms_by_resolution

MEMORY = {"start_epoch": 1, "inject_scale": 0.176}
RI = {"ui_images": 24}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("images") / "faces")


@pytest.fixture(scope="module")
def unknown(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {
        "kind": "folder",
        "path": str(make_folder(tmp_path_factory.mktemp("others") / "unknown", identities=6, seed=1)),
    }


def method(name: str, unknown: dict[str, str], **changes: Any) -> dict[str, Any]:
    """Settings of a method at toy size."""
    made: dict[str, Any] = {"method": name}
    if "vpl" in name:
        made["memory"] = {"start": 2}
    if "qaface" in name:
        made["memory"] = MEMORY
        made["memory_momentum"] = 0.9
    if "uir" in name:
        made["unlabelled"] = unknown
    if "ri" in name.split("+"):
        made["recognizability"] = RI
    return {**made, **changes}


def test_memory_is_as_large_as_what_can_be_valid(tmp_path: Path, folder: Path) -> None:
    config = settings(tmp_path, folder, memory={"name": "VPL", "delta": 2}, gradient_acc=2, batch_size=8)
    head = loop.build_head(config, 100)
    assert head.memory is not None and head.memory.capacity == 2 * 8 * 2
    with pytest.raises(ValueError, match="start_epoch >= 0 without memory.start"):
        loop.build_head(dataclasses.replace(config, memory={"name": "VPL", "start": 1, "start_epoch": 1}), 9)


# --- parity ---------------------------------------------------------------------------------------------------------


class _Plain(Backbone):
    """Two layers without BatchNorm, which multiplies any difference; with a feature map."""

    def __init__(self) -> None:
        super().__init__(embedding_dim=16, input_size=32, feature_channels=16)
        self.conv = nn.Conv2d(3, 16, 16, stride=16)
        self.fc = nn.Linear(64, 16)

    def forward_features(self, images: Tensor) -> Tensor:
        return torch.tanh(self.conv(images))

    def embed(self, features: Tensor) -> Tensor:
        return 10 * self.fc(torch.flatten(features, 1))


@pytest.mark.parametrize("name", [*METHODS, "qaface+uir+ri"])
def test_native_and_reference_agree_step_by_step(
    tmp_path: Path, folder: Path, unknown: dict[str, str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """20 steps: the loss of every step, and all weights at the end, native float32 against reference float32."""
    monkeypatch.setattr(loop, "build_backbone", lambda config: _Plain())
    changes = method(name, unknown, max_steps=20, num_epoch=20, lr=0.02)
    found, weights, cosines = [], [], []
    for backend in ("native", "reference"):
        config = settings(tmp_path, folder, output=str(tmp_path / backend), **changes)
        run = loop.setup(apply_method(config))
        with use_backend("reference") if backend == "reference" else contextlib.nullcontext():
            said = _steps(run)
        found.append([one["loss"] for one in said])
        cosines.append([one["target_cosine"] for one in said])
        weights.append([run.head.weight.detach(), *(p.detach() for p in run.backbone.parameters())])
        if "vpl" in name or "qaface" in name:
            assert run.head.memory.stats()["live"] > 10 and bool(run.head.memory.strength(20).any())
    # 1e-6 a step (math.md).
    np.testing.assert_allclose(found[0], found[1], rtol=2e-5)
    for ours, theirs in zip(*weights, strict=True):
        assert float((ours - theirs).norm()) <= 2e-5 * float(theirs.norm())
    assert cosines[0][-1] > cosines[0][0] + 0.1


def _steps(run: loop.Run) -> list[dict[str, float]]:
    said = []
    for batch in loop._steps(run):
        loop.train_step(run, batch, 0.02, 0.02)
        run.step += 1
        said.append(run.meter.flush())
    return said


# --- whole runs -----------------------------------------------------------------------------------------------------


def test_all_methods_together_learn_log_and_resume(
    tmp_path: Path, folder: Path, unknown: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, with the UI centre, index statistics, memory and momentum encoder of the checkpoint."""
    changes = method("qaface+uir+ri", unknown, num_epoch=3, recognizability={**RI, "statistics": "images"})
    whole = train(settings(tmp_path, folder, output=str(tmp_path / "whole"), **changes))
    config = settings(tmp_path, folder, **changes)
    with monkeypatch.context() as patch:
        stop_after(
            patch, 6, lambda: os.kill(os.getpid(), signal.SIGTERM)
        )  # in the middle of the second epoch of 5 steps
        assert train(config).step == 7
    second = train(dataclasses.replace(config, resume=True))
    assert losses(second) == losses(whole)
    for name in ("model.pt", "recognizability.pt"):
        ours, theirs = (torch.load(r.output / name, weights_only=True) for r in (second, whole))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)

    lines = read_metrics(whole.output / "metrics.jsonl")
    steps = [line for line in lines if "loss" in line]
    # Single steps of the index's regression go up and down with its target; the epochs' mean target cosine rises for any seed.
    assert np.mean([step["target_cosine"] for step in steps[-5:]]) > np.mean([step["target_cosine"] for step in steps[:5]])
    assert all(step["recognizability/gradient_norm"] > 0 for step in steps)
    for name in ("memory/live", "memory/rejected", "memory/stale", "memory/evicted", "unknown_max_probability"):
        assert np.isfinite(steps[-1][name])
    assert steps[-1]["memory/live"] > 10
    for name in ("regression", "diversion", "attention", "index", "predicted", "gradient_norm"):
        assert np.isfinite(steps[-1][f"recognizability/{name}"])
    assert len([line for line in lines if "norm/correlation" in line]) == 3

    model, size = load_quality_model(whole.output)
    images = torch.randint(0, 256, (3, size, size, 3), dtype=torch.uint8)
    embeddings, quality = model(model.backbone.preprocessing(images))
    assert embeddings.shape == (3, 16) and quality.shape == (3,)
    _, backbone, head = load_run(whole.output)
    assert torch.equal(backbone(model.backbone.preprocessing(images)), embeddings)
    assert head.memory is not None and head.memory.stats()["live"] == steps[-1]["memory/live"]


def test_center_is_refreshed_every_epoch(tmp_path: Path, folder: Path) -> None:
    run = loop.setup(settings(tmp_path, folder, method="ri", recognizability=RI, num_epoch=3))
    centers = []
    for batch in loop._steps(run):
        loop.train_step(run, batch, 0.1, 0.1)
        assert run.branches is not None
        centers.append(run.branches.center.clone())
        run.step += 1
    assert run.steps_per_epoch == 4
    for step in range(1, 12):
        assert torch.equal(centers[step], centers[step - 1]) == (step % 4 != 0)


def test_switching_terms_off_leaves_them_out(tmp_path: Path, folder: Path) -> None:
    """All three off is margin softmax to the last bit; one off is another run."""
    off = {**RI, "regression": 0.0, "diversion": 0.0, "attention": 0.0}
    made = [
        losses(train(settings(tmp_path, folder, output=str(tmp_path / str(k)), max_steps=3, **changes)))
        for k, changes in enumerate(
            (
                {},
                {"method": "ri", "recognizability": off},
                {"method": "ri", "recognizability": {**off, "attention": 1.0}},
            )
        )
    ]
    assert made[0] == made[1] != made[2]


def test_modules_are_clipped_apart_from_the_backbone(tmp_path: Path, folder: Path) -> None:
    """A huge gradient of the modules leaves the backbone's step alone: its norm after clipping is its own limit."""
    changes = {"recognizability": {**RI, "attention": 1e4, "clip_grad_norm": 0.5}, "clip_grad_norm": 0.25}
    run = loop.setup(settings(tmp_path, folder, method="ri", **changes))
    loop.train_step(run, next(iter(run.position.track(run.loader))), 0.0, 0.0)
    assert run.branches is not None

    def norm(module: nn.Module) -> float:
        return float(torch.stack([p.grad.norm() for p in module.parameters() if p.grad is not None]).norm())

    assert norm(run.backbone) == pytest.approx(0.25, rel=1e-4)
    assert norm(run.branches) == pytest.approx(0.5, rel=1e-4)


def test_accumulated_index_is_one_large_batch(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "build_backbone", lambda config: _Plain())
    weights = []
    for size, acc in ((16, 1), (8, 2)):
        run = loop.setup(
            settings(
                tmp_path,
                folder,
                method="ri",
                recognizability=RI,
                batch_size=size,
                gradient_acc=acc,
                output=str(tmp_path / str(acc)),
            )
        )
        for batch, _ in zip(run.position.track(run.loader), range(3), strict=False):
            loop.train_step(run, batch, 0.01, 0.01)
            run.step += 1
        assert run.branches is not None
        weights.append([*run.backbone.parameters(), *run.branches.parameters()])
    for one, two in zip(*weights, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_pretrained_runs_go_on_from_their_weights(tmp_path: Path, folder: Path, unknown: dict[str, str]) -> None:
    """Two stages: supervised first, then jointly from its backbone and centres."""
    first = train(settings(tmp_path, folder, output=str(tmp_path / "first")))
    changes = method("uir", unknown, pretrained=str(first.output), pretrained_head=True)
    run = loop.setup(settings(tmp_path, folder, **changes))
    _, backbone, head = load_run(first.output)
    assert torch.equal(run.head.weight, head.weight)
    assert all(
        torch.equal(a, b)
        for a, b in zip(run.backbone.state_dict().values(), backbone.state_dict().values(), strict=True)
    )
    plain = settings(tmp_path, folder, output=str(tmp_path / "third"), pretrained=str(first.output / "model.pt"))
    again = loop.setup(plain)
    assert torch.equal(again.backbone.fc.weight, backbone.fc.weight) and not torch.equal(again.head.weight, head.weight)
    for wrong, message in (
        ({"pretrained_head": True}, "expected a run or checkpoint with pretrained_head"),
        ({"pretrained": str(tmp_path / "absent")}, "no run, checkpoint or weights file"),
        (
            {
                "pretrained": str(first.output),
                "pretrained_head": True,
                "data": dataclasses.replace(plain.data, holdout_classes=3),
            },
            "the same identities",
        ),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            loop.setup(dataclasses.replace(plain, output=str(tmp_path / "wrong"), **wrong))


def test_unknown_rows_count_from_their_epoch_on(tmp_path: Path, folder: Path, unknown: dict[str, str]) -> None:
    made = []
    for k, changes in enumerate(({"unknown_start": 1.0}, {"unknown_weight": 0.0}, {"unknown_weight": 1.0})):
        config = settings(
            tmp_path,
            folder,
            output=str(tmp_path / str(k)),
            **method("uir", unknown, **{"unknown_weight": 1.0, **changes}),
        )
        made.append(losses(train(config)))
    assert len(made[0]) == 10
    assert made[0][:5] == made[1][:5] and made[0][5] > made[1][5] and made[0][0] < made[2][0]


# --- norms and quality ----------------------------------------------------------------------------------------------


class _Brightest(nn.Module):
    """A network whose feature norm grows (or falls) with the contrast of its image."""

    def __init__(self, sign: float) -> None:
        super().__init__()
        self.sign = sign

    def forward(self, images: Tensor) -> Tensor:
        return (images.flatten(1).std(dim=1) ** self.sign).unsqueeze(1) * torch.ones(16)


@pytest.mark.parametrize(("sign", "warned"), [(1.0, False), (-1.0, True)])
def test_norms_that_say_the_opposite_of_quality_are_reported(
    tmp_path: Path, folder: Path, sign: float, warned: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    run = loop.setup(settings(tmp_path, folder, method="qaface", memory=MEMORY))
    run.encoder.key = _Brightest(sign)
    found = norms_by_resolution(run)
    assert list(found) == ["32", "16", "8", "correlation"]
    assert (found["8"] > found["32"]) == warned == (found["correlation"] < -0.15)
    with Log(tmp_path / "log", 0, 1) as log:
        log_norms(run, log)
    assert ("anti-correlate" in capsys.readouterr().out) == warned


def test_corrupted_faces_look_alike() -> None:
    """Whatever is drawn, what is left has little of the face: images of different people come closer together."""
    rng = np.random.default_rng(0)
    faces = [rng.integers(0, 256, (4, 4, 3)).repeat(8, 0).repeat(8, 1).astype(np.uint8) for _ in range(8)]
    bad = [corrupt(face, rng) for face in faces]
    assert all(b.shape == f.shape and b.dtype == np.uint8 for b, f in zip(bad, faces, strict=True))
    assert np.mean([b.std() for b in bad]) < 0.6 * np.mean([f.std() for f in faces])


def test_embedding_leaves_the_run_as_it_was(tmp_path: Path, folder: Path) -> None:
    run = loop.setup(settings(tmp_path, folder, method="ri", recognizability=RI))
    run.backbone.train()
    before, state = {k: v.clone() for k, v in run.backbone.state_dict().items()}, torch.get_rng_state()
    embed_clean(run.backbone, run.prepare, run.ui, run.device, 8, True)
    assert all(torch.equal(v, before[k]) for k, v in run.backbone.state_dict().items())
    assert run.backbone.training and torch.equal(state, torch.get_rng_state())


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{"method": "uir"}, {"unknown_weight": 0.1}, {"unlabelled_share": 0.5}])
def test_unknown_rejection_without_unlabelled_images(tmp_path: Path, folder: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected images of unknown people .*got none with method"):
        train(settings(tmp_path, folder, **changes))


def test_ui_images_come_from_their_folder_or_are_missed(tmp_path: Path, folder: Path) -> None:
    ui = make_folder(tmp_path / "ui", identities=2, images=3, seed=5)
    (ui / "id00" / "0.png").write_bytes(b"no image")
    source = {"kind": "folder", "path": str(ui)}
    run = loop.setup(settings(tmp_path, folder, method="ri", recognizability={"ui": source}))
    assert len(run.ui) == 5
    pictures = [np.asarray(PIL.Image.open(p)) for p in sorted(ui.rglob("*.png")) if p.stat().st_size > 10]
    assert all(any(np.array_equal(a, b) for b in pictures) for a in run.ui)
    for file in ui.rglob("*.png"):
        file.write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"readable images in recognizability.ui .*got 0 of 6"):
        train(settings(tmp_path, folder, method="ri", recognizability={"ui": source}))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="expected images .* got none"):
        train(
            settings(
                tmp_path,
                folder,
                method="ri",
                recognizability={"ui": {"kind": "folder", "path": str(tmp_path / "empty")}},
            )
        )
    with pytest.raises(FileNotFoundError, match="recognizability.ui.path .*nowhere does not exist"):
        train(settings(tmp_path, folder, method="ri", recognizability={"ui": {"kind": "folder", "path": "nowhere"}}))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--unlabelled_share", "1"], "unlabelled_share in [0, 1)"),
        (["--memory_momentum", "1.5"], "memory_momentum in [0, 1)"),
        (["--recognizability.regresion", "1"], "did you mean 'recognizability.regression'"),
        (["--recognizability.tau", "-1"], "recognizability.tau >= 0"),
        (["--recognizability.ui_images", "1"], "recognizability.ui_images >= 2"),
        (["--recognizability.ui.pth", "x"], "did you mean 'recognizability.ui.path'"),
    ],
)
def test_bad_settings_are_named(tmp_path: Path, folder: Path, arguments: list[str], message: str) -> None:
    settings(tmp_path, folder)
    with pytest.raises(ValueError, match="train: ") as error:
        read_config(tmp_path / "settings.yaml", arguments)
    assert message in str(error.value)


def test_settings_of_a_method_round_trip(tmp_path: Path, folder: Path, unknown: dict[str, str]) -> None:
    ui = {"kind": "folder", "path": "x"}
    config = apply_method(
        settings(tmp_path, folder, **method("qaface+uir+ri", unknown, recognizability={"ui": ui, "tau": 1.5}))
    )
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    again = read_config(tmp_path / "again.yaml")
    assert again == config and isinstance(again.recognizability, RecognizabilityConfig)


def test_a_batch_that_is_rejected_whole_still_trains(tmp_path: Path, folder: Path) -> None:
    """QAFace with tau 0 and statistics far above every norm: all rows are rejected, the prototypes are W^ alone."""
    run = loop.setup(
        settings(tmp_path, folder, method="qaface", memory={"tau": 0.0, "inject_scale": 1.0}, memory_momentum=0.9)
    )
    memory = run.head.memory
    memory.write(torch.full((4, 16), 1e4) + torch.randn(4, 16), torch.tensor([0, 1, 2, 3]), 0)
    memory.flush()
    for batch, _ in zip(run.position.track(run.loader), range(2), strict=False):
        loop.train_step(run, batch, 0.1, 0.1)
        run.step += 1
    assert memory.stats()["rejected"] >= 32
    written = memory.stamp == 1
    assert bool(written.any()) and not bool(memory.ring_strength[written].any())
    assert np.isfinite(run.meter.flush()["loss"])
