"""configs/insightface_r50.yaml on tiny data against arcface_torch's training written out: margin, schedule, decay, clipping, W."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from paths import ROOT
from torch import Tensor
from training_data import make_folder

import recog_fast as rf
from recog_fast.cli import main
from recog_fast.compat.insightface import margin_from_list
from recog_fast.compat.recipe import read_recipe, recipe_settings
from recog_fast.training import loop
from recog_fast.training.config import TrainConfig, read_config
from recog_fast.training.model import learning_rate

PRESET = ROOT / "configs" / "insightface_r50.yaml"


def reduced(tmp_path: Path, *more: str) -> list[str]:
    """The overrides that make the recipe small."""
    folder = tmp_path / "faces"
    if not folder.exists():
        make_folder(folder)
    return [
        "--data.kind", "folder", "--data.path", str(folder), "--data.size", "32", "--network", "tiny", "--network_options", '{"widths": [4, 8, 8, 8]}',
        "--embedding_size", "16", "--batch_size", "16", "--num_epoch", "2", "--num_workers", "0", "--num_threads", "1", "--val_targets", "[]",
        "--precision", "float32", "--frequent", "1", "--device", "cpu", "--output", str(tmp_path / "run"), *more,
    ]  # fmt: skip


def theirs_rate(step: int, lr: float, warmup: int, total: int) -> float:
    """Their scheduler's closed form: the rate of optimizer step `step`, whose first is never warmed up."""
    if step == 0:
        return lr
    return lr * step / warmup if step <= warmup else lr * (1 - (step - warmup) / (total - warmup))


def theirs_loss(x: Tensor, w: Tensor, y: Tensor, straight_through: bool) -> Tensor:
    """Margin (1, 0.5, 0), s = 64: acos, + m, cos of all logits outside autograd, so their derivative is 1."""
    logits = (torch.nn.functional.normalize(x) @ torch.nn.functional.normalize(w).t()).clamp(-1, 1)
    rows = torch.arange(len(y))
    angles = logits.detach().acos() if straight_through else logits.acos()
    angles = angles.index_put((rows, y), angles[rows, y] + 0.5)
    turned = angles.cos()
    return torch.nn.functional.cross_entropy(64 * (logits + (turned - logits.detach()) if straight_through else turned), y)


def theirs(
    backbone: torch.nn.Module, w: Tensor, seen: list[tuple[Tensor, Tensor]], config: TrainConfig, warmup: int, total: int, **changes: Any
) -> tuple[list[float], Tensor]:
    """(losses, last W) of their loop over the same images: one SGD over every weight, the backbone clipped to 5."""
    told = {"straight_through": True, "decay": config.weight_decay, "clip": 5.0, **changes}
    w = w.clone().requires_grad_()
    optimizer = torch.optim.SGD([{"params": backbone.parameters()}, {"params": [w]}], lr=config.lr, momentum=0.9, weight_decay=told["decay"])
    losses = []
    for step, (images, labels) in enumerate(seen):
        for group in optimizer.param_groups:
            group["lr"] = theirs_rate(step, config.lr, warmup, total)
        loss = theirs_loss(backbone(images), w, labels, told["straight_through"])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(backbone.parameters(), told["clip"])
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, w.detach()


@pytest.mark.parametrize("warmup_epoch", [0, 1])
def test_the_preset_trains_as_arcface_torch(tmp_path: Path, warmup_epoch: int) -> None:
    """Losses of six steps and W after them; what is changed in their loop is seen. BatchNorm multiplies rounding at lr 0.1."""
    assert read_config(PRESET).weight_decay == 5e-4
    # a decay that shows within six steps
    config = read_config(PRESET, reduced(tmp_path, "--warmup_epoch", str(warmup_epoch), "--weight_decay", "0.05"))
    run = loop.setup(config)
    assert run.steps_per_epoch == 70 // 16 and run.total == 8, "the last, smaller batch is dropped"
    rate = learning_rate(config, run.steps_per_epoch, run.total)
    start, w = copy.deepcopy(run.backbone), run.head.weight.detach().clone()
    assert w.std().item() == pytest.approx(0.01, rel=0.2) and abs(w.mean().item()) < 0.002
    seen, losses = [], []
    for batch in loop._steps(run):
        if len(seen) == 6:
            break
        seen.append((run.prepare(batch.images), batch.labels))
        loop.train_step(run, batch, config.lr * rate(run.step), config.lr * rate(run.step))
        losses.append(run.meter.flush()["loss"])
        run.step += 1
    warmup = warmup_epoch * run.steps_per_epoch
    backbone = copy.deepcopy(start)
    expected, last = theirs(backbone, w, seen, config, warmup, run.total)
    assert losses == pytest.approx(expected, rel=2e-4)
    moved = [(run.head.weight, last, w), *zip(run.backbone.parameters(), backbone.parameters(), start.parameters(), strict=True)]
    for ours, other, first in moved:
        assert (ours - other).norm() <= 1e-3 * (other - first).norm() + 1e-6, tuple(first.shape)
    for change in ({"straight_through": False}, {"decay": 0.0}, {"clip": 1.0}):
        other, _ = theirs(copy.deepcopy(start), w, seen, config, warmup, run.total, **change)
        assert other != pytest.approx(expected, rel=2e-4), change
    unwarmed, _ = theirs(copy.deepcopy(start), w, seen, config, 0 if warmup else 2, run.total)
    assert unwarmed != pytest.approx(expected, rel=2e-4)


@pytest.mark.parametrize(("warmup_epoch", "acc"), [(0, 1), (2, 1), (1, 2)])
def test_schedule(warmup_epoch: int, acc: int) -> None:
    config = read_config(PRESET, ["--warmup_epoch", str(warmup_epoch), "--gradient_acc", str(acc)])
    rate = learning_rate(config, 7, 140)
    assert [config.lr * rate(k) for k in range(140)] == pytest.approx([theirs_rate(k, 0.1, warmup_epoch * 7, 140) for k in range(140)])


def test_margin_without_fallback() -> None:
    """Past pi - m cos(theta + m) rises again; the slope is 1 everywhere."""
    cosine = torch.tensor([-0.99, -0.5, 0.2, 0.999], dtype=torch.float64, requires_grad=True)
    value = margin_from_list((1.0, 0.5, 0.0))(cosine, torch.ones(4))
    torch.testing.assert_close(value, (cosine.acos() + 0.5).cos())
    (slope,) = torch.autograd.grad(value.sum(), cosine)
    assert slope.tolist() == [1.0] * 4
    assert (rf.ArcFace(0.5)(cosine, torch.ones(4)) - value)[0].abs() > 0.01


RECIPE = """from easydict import EasyDict as edict
config = edict()
config.margin_list = (1.0, 0.0, 0.4)
config.network = "r18"
config.sample_rate = 0.5
config.rec = "faces"
config.num_classes = 300 * 10000
config.num_epoch = 4
config.warmup_epoch = config.num_epoch // 2 - 1
config.momentum = 0.9
config.lr = 0.1 * 2
"""


def test_a_recipe_with_arithmetic_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Straight from the .py file, read and not run; half of the classes sampled."""
    (tmp_path / "r.py").write_text(RECIPE)
    assert read_recipe(tmp_path / "r.py")["num_classes"] == 3_000_000
    assert main(["train", str(tmp_path / "r.py"), *reduced(tmp_path), "--max_steps", "3"]) == 0
    assert "num_classes = 3000000 is counted from the data" in capsys.readouterr().err
    config = read_config(tmp_path / "run" / "config.yaml")
    assert (config.warmup_epoch, config.sample_rate, config.lr, config.margin) == (1, 0.5, 0.2, {"name": "CosFace", "m": 0.4})
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]
    assert len(losses) == 3
    _, _, head = loop_head(tmp_path / "run")
    assert head.sample_rate == 0.5
    assert recipe_settings({"warmup_epoch": -1}).settings["warmup_epoch"] == 0


def loop_head(run: Path) -> Any:
    """(settings, backbone, head) of a run."""
    from recog_fast.training.saved import load_run

    return load_run(run)


@pytest.mark.parametrize("line", ["config.x = config.later // 2", "config.x = [1] * 9", "config.x = 'a' + 'b'", "config.x = 1 // 0", "config.x = 2 ** 99"])
def test_other_arithmetic_is_refused(tmp_path: Path, line: str) -> None:
    (tmp_path / "r.py").write_text(f"config = edict()\n{line}\n")
    with pytest.raises(ValueError, match=r"got line 2: config.x = "):
        read_recipe(tmp_path / "r.py")
