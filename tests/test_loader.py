"""The training loader: killed without warning and resumed, corrupt images replaced and written down."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from paths import ROOT
from training_data import make_folder, settings

from recog_fast.data import Augmentation, FolderDataset, SkipCorrupt, convert_dataset
from recog_fast.evaluation.report import read_metrics
from recog_fast.training.data import TrainingImages, step_loader
from recog_fast.training.loop import train


def losses_of(output: Path) -> dict[int, float]:
    """The loss of every step."""
    return {row["step"]: row["loss"] for row in read_metrics(output / "metrics.jsonl") if "loss" in row}


def source_of(kind: str, folder: Path, others: Path, tmp_path: Path) -> dict[str, Any]:
    """The images of `folder` as a source of `kind`; streams: tars of known and of unknown people, 12 and 4 of each batch, read in order."""
    made = {"folder": folder, "rec": tmp_path / "faces.rec", "streams": tmp_path / "faces.tar"}[kind]
    if kind == "folder":
        return {"kind": kind, "path": str(made)}
    convert_dataset(FolderDataset(folder), made)
    if kind == "rec":
        return {"kind": kind, "path": str(made)}
    convert_dataset(FolderDataset(others), tmp_path / "others.tar")
    tars = [{"kind": "tar", "path": str(path)} for path in (made, tmp_path / "others.tar")]
    return {"kind": "mixed", "shuffle_buffer": 20, "options": {"sources": tars, "unlabelled": [1], "rows": [12, 4]}}


@pytest.mark.parametrize("kind", ["folder", "rec", "streams"])
def test_killed_and_resumed_with_workers(tmp_path: Path, kind: str) -> None:
    """SIGKILL at a random step, two workers: the resumed run has the losses of the uninterrupted one, step by step, and so
    its sample order."""
    folder, others = make_folder(tmp_path / "faces"), make_folder(tmp_path / "others", identities=3, seed=1)
    (folder / "id03" / "2.png").write_bytes(b"no image")
    changes: dict[str, Any] = {"num_epoch": 3, "num_workers": 2, "save_interval": 2}
    source = {**source_of(kind, folder, others, tmp_path), "size": 32}
    changes |= {"data": source, **({"unknown_weight": 0.1} if kind == "streams" else {})}
    whole = train(settings(tmp_path, folder, output=str(tmp_path / "whole"), **changes))
    config = settings(tmp_path, folder, **changes)
    stop = int(np.random.default_rng(os.getpid()).integers(3, 10))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "recog_fast", "train", str(tmp_path / "settings.yaml")]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if f"Global Step: {stop} " in line:
                break
        process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, f"stopped at step {stop}"
    resumed = train(dataclasses.replace(config, resume=True))
    losses = [losses_of(result.output) for result in (whole, resumed)]
    assert losses[0] == losses[1] and len(losses[0]) == (15 if kind == "streams" else 12), f"stopped at step {stop}"
    rows = [json.loads(line) for line in (resumed.output / "quarantine.jsonl").read_text().splitlines()]
    assert len(rows) == 1 and ("2.png" in rows[0]["source"]) == (kind != "rec")


def test_streams_have_their_rows_and_their_own_epochs(tmp_path: Path) -> None:
    """Rows of each source in every micro-batch, the labelled ones once an epoch; rows that do not add up are refused."""
    folder, others = make_folder(tmp_path / "faces"), make_folder(tmp_path / "others", identities=3, seed=1)
    data = {**source_of("streams", folder, others, tmp_path), "size": 32}
    config = settings(tmp_path, folder, data=data, gradient_acc=2, unknown_weight=0.1, num_workers=2)
    position, loader = step_loader(TrainingImages(config), config, pin_memory=False)
    assert position.batches_per_epoch == len(position) == 70 // 12 // 2
    batches = list(position.track(loader))
    for batch in batches:
        assert [int((part.labels < 0).sum()) for part in batch.split(16)] == [4, 4] and len(batch.labels) == 32
    known = [sample for batch in batches for sample in batch.samples if sample < 70]
    assert len(known) == len(set(known)) == 48
    unknown = [sample for batch in batches for sample in batch.samples if sample >= 70]
    assert len(unknown) == 16 and len(set(unknown[:12])) == 12  # 3 micro-batches are an epoch of their 15
    assert position.state_dict()["done"] == 4 and len(position) == 2
    options = config.data.options
    for wrong, message in (([12, 5], "add up to batch_size 16"), ([16], "as 2 numbers"), ([16, 0], ">= 1"), (3, "got 3")):
        broken = dataclasses.replace(config.data, options={**options, "rows": wrong})
        with pytest.raises(ValueError, match=message):
            step_loader(TrainingImages(config), dataclasses.replace(config, data=broken), pin_memory=False)


def test_the_order_is_one_permutation_whatever_the_workers(tmp_path: Path) -> None:
    config = settings(tmp_path, make_folder(tmp_path / "faces", identities=6, images=4), batch_size=4)
    orders = []
    for workers in (0, 2):
        chosen = dataclasses.replace(config, num_workers=workers, augment=Augmentation(flip=0.5, crop=0.5))
        position, loader = step_loader(TrainingImages(chosen), chosen, pin_memory=False)
        batches = [batch for _ in range(2) for batch in position.track(loader)]
        orders.append(([batch.samples for batch in batches], torch.cat([batch.images for batch in batches])))
    assert orders[0][0] == orders[1][0] and torch.equal(orders[0][1], orders[1][1])
    expected = [np.random.default_rng((config.seed, epoch)).permutation(24).tolist() for epoch in (0, 1)]
    assert [sample for samples in orders[0][0] for sample in samples] == expected[0] + expected[1]


def test_a_corrupt_image_is_looked_up_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Later epochs meet it again without reading the list: its length is no cost of every epoch."""
    folder = make_folder(tmp_path / "faces", identities=2, images=2)
    (folder / "id00" / "0.png").write_bytes(b"")
    dataset = SkipCorrupt(FolderDataset(folder), tmp_path / "quarantine.jsonl", budget=1)
    first = dataset[0]
    monkeypatch.setattr(SkipCorrupt, "corrupt", lambda self: pytest.fail("read again"))
    assert (
        np.array_equal(dataset[0][0], first[0]) and len((tmp_path / "quarantine.jsonl").read_text().splitlines()) == 1
    )


def test_several_sources_in_one_run(tmp_path: Path) -> None:
    """Two folders of people and one of unknown ones: classes side by side, the unknown labelled -1, and it trains."""
    made = [
        make_folder(tmp_path / name, identities, 3, seed)
        for seed, (name, identities) in enumerate([("a", 4), ("b", 3), ("c", 2)])
    ]
    sources = [{"kind": "folder", "path": str(folder)} for folder in made]
    options = {"sources": sources, "unlabelled": [2]}
    config = settings(
        tmp_path, made[0], data__kind="mixed", data__path="", data__options=options, unknown_weight=0.1, max_steps=2
    )
    images = TrainingImages(config)
    assert (images.num_classes, len(images), sum(images[0, i][1] == -1 for i in range(27))) == (7, 27, 6)
    assert Path(images.path(26)).parent.parent.name == "c"
    assert train(config).finished
    for wrong, message in (
        ({}, "data.options.sources as a list"),
        ({**options, "sharing": 1}, "unknown key 'data.options.sharing'"),
        ({"sources": [{"kind": "lmdb", "path": "x"}]}, "kind of a source in rec, folder"),
        ({"sources": [{"kind": "folder", "path": str(tmp_path / "none")}]}, "does not exist"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            TrainingImages(dataclasses.replace(config, data=dataclasses.replace(config.data, options=wrong)))


def test_no_augmentation_draws_nothing(tmp_path: Path) -> None:
    config = settings(tmp_path, make_folder(tmp_path / "faces", identities=2, images=2))
    plain = TrainingImages(dataclasses.replace(config, augment=Augmentation(flip=0.0)))
    assert np.array_equal(plain[0, 1][0], plain[5, 1][0])
    mirrored = TrainingImages(dataclasses.replace(config, augment=Augmentation(flip=1.0)))
    assert np.array_equal(mirrored[0, 1][0], plain[0, 1][0][:, ::-1])
