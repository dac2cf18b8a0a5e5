"""Checkpoints: everything comes back bit for bit, saves are atomic, damage and foreign objects are refused."""

from __future__ import annotations

import http
import json
import os
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import recog_fast
from recog_fast import checkpoint
from recog_fast.checkpoint import (
    CheckpointError,
    checkpoint_path,
    latest_checkpoint,
    load_checkpoint,
    prune_checkpoints,
    read_checkpoint,
    save_checkpoint,
)


def _linear(seed: int) -> tuple[torch.nn.Linear, torch.optim.SGD]:
    torch.manual_seed(seed)
    head = torch.nn.Linear(3, 5)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9)
    head(torch.randn(4, 3)).square().sum().backward()
    optimizer.step()
    return head, optimizer


def test_everything_comes_back(tmp_path: Path) -> None:
    head, optimizer = _linear(0)
    more: dict[str, Any] = {
        "nested": {"a": [1, 2.5, None, True, "text", b"\x00\xff"], "t": (1, (2, 3)), 7: "an int key"},
        "python": random.getstate(),
        "numpy": np.random.default_rng(3).bit_generator.state,
        "legacy": np.random.RandomState(1).get_state(),
        "torch": torch.get_rng_state(),
        "bf16": torch.randn(3, 2).bfloat16(),
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "empty": torch.zeros(0, 4),
        "empty_array": np.zeros((0, 2), dtype=np.uint16),
        "big": 2**100,
        "nan": float("inf"),
    }
    save_checkpoint(tmp_path / "c", head=head, optimizer=optimizer, step=12, **more)
    other, other_optimizer = _linear(1)
    back = load_checkpoint(tmp_path / "c", head=other, optimizer=other_optimizer)
    assert back.pop("step") == 12
    assert set(back) == set(more)
    assert torch.equal(other.weight, head.weight)
    assert torch.equal(
        other_optimizer.state[other.weight]["momentum_buffer"], optimizer.state[head.weight]["momentum_buffer"]
    )
    assert back["nested"] == more["nested"]
    assert back["python"] == more["python"]
    assert back["numpy"] == more["numpy"]
    assert back["big"] == 2**100
    assert back["nan"] == float("inf")
    np.testing.assert_array_equal(back["legacy"][1], more["legacy"][1])
    assert back["legacy"][1].dtype == np.uint32
    assert back["empty_array"].shape == (0, 2)
    for name in ("torch", "bf16", "scalar", "empty"):
        assert back[name].dtype == more[name].dtype
        assert torch.equal(back[name], more[name])
    assert set(read_checkpoint(tmp_path / "c", keys=("step", "bf16"))) == {"step", "bf16"}


def test_save_replaces_and_leaves_no_temporary_folder(tmp_path: Path) -> None:
    head, _ = _linear(0)
    save_checkpoint(tmp_path / "c", head=head, step=1)
    save_checkpoint(tmp_path / "c", head=head, step=2)
    assert read_checkpoint(tmp_path / "c", keys=("step",)) == {"step": 2}
    assert os.listdir(tmp_path) == ["c"]


def test_failed_save_keeps_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head, _ = _linear(0)
    save_checkpoint(tmp_path / "c", head=head, step=1)

    def refuse(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("recog_fast.checkpoint.files._fsync", refuse)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(tmp_path / "c", head=head, step=2)
    assert read_checkpoint(tmp_path / "c", keys=("step",)) == {"step": 1}


def test_keep_last(tmp_path: Path) -> None:
    head, _ = _linear(0)
    assert latest_checkpoint(tmp_path) is None
    for step in (3, 20, 100):
        save_checkpoint(checkpoint_path(tmp_path, step), head=head, step=step)
    (tmp_path / ".step_00000120.tmp").mkdir()
    (tmp_path / "step_00000999").mkdir()  # incomplete: no manifest
    prune_checkpoints(tmp_path, keep=2)
    assert sorted(os.listdir(tmp_path)) == ["step_00000020", "step_00000100", "step_00000999"]
    assert latest_checkpoint(tmp_path) == tmp_path / "step_00000100"


@pytest.mark.parametrize("name", ["state.json", ".metadata", "__0_0.distcp", "manifest.json"])
@pytest.mark.parametrize("damage", ["cut", "flip", "delete"])
def test_damage_is_named(tmp_path: Path, name: str, damage: str) -> None:
    head, optimizer = _linear(0)
    save_checkpoint(tmp_path / "c", head=head, optimizer=optimizer, step=1)
    file = tmp_path / "c" / name
    data = bytearray(file.read_bytes())
    if damage == "delete":
        file.unlink()
    else:
        data[len(data) // 2] ^= 0x55
        file.write_bytes(data if damage == "flip" else data[: len(data) // 2])
    with pytest.raises(CheckpointError, match=r"damaged|no complete checkpoint"):
        load_checkpoint(tmp_path / "c", head=head, optimizer=optimizer)


def test_foreign_objects_are_not_unpickled(tmp_path: Path) -> None:
    head, _ = _linear(0)
    save_checkpoint(tmp_path / "c", head=head, step=1)

    class Attack:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "owned"),)

    file = tmp_path / "c" / ".metadata"
    file.write_bytes(pickle.dumps(Attack()))
    files = json.loads((tmp_path / "c" / "manifest.json").read_text())
    from recog_fast.checkpoint.files import _crc32

    files[".metadata"] = {"bytes": file.stat().st_size, "crc32": _crc32(file)}
    (tmp_path / "c" / "manifest.json").write_text(json.dumps(files))
    with pytest.raises(CheckpointError, match="does not belong in a checkpoint"):
        load_checkpoint(tmp_path / "c", head=head)
    assert not (tmp_path / "owned").exists()


def test_refusals(tmp_path: Path) -> None:
    head, optimizer = _linear(0)
    with pytest.raises(ValueError, match="step"):
        save_checkpoint(tmp_path / "c", head=head, step=-1)
    with pytest.raises(TypeError, match="object at 'thing'"):
        save_checkpoint(tmp_path / "c", head=head, step=0, thing=object())
    with pytest.raises(CheckpointError, match="no folder"):
        load_checkpoint(tmp_path / "absent", head=head)
    save_checkpoint(tmp_path / "c", head=head, step=0)
    with pytest.raises(CheckpointError, match="without one"):
        load_checkpoint(tmp_path / "c", head=head, optimizer=optimizer)
    with pytest.raises(CheckpointError, match="does not fit this head"):
        load_checkpoint(tmp_path / "c", head=torch.nn.Linear(3, 6))


def test_waiting_rows_and_writes_are_refused(tmp_path: Path) -> None:
    memory = recog_fast.PrototypeMemory(7, 4, recog_fast.VPL(start=0))
    head = recog_fast.MarginHead(7, 4, memory=memory)
    optimizer = recog_fast.HeadSGD(head, lr=0.1)
    embeddings, labels = torch.randn(3, 4, requires_grad=True), torch.tensor([0, 3, -1])
    head(embeddings, labels).backward()
    with pytest.raises(ValueError, match="no pending rows on the head, got"):
        save_checkpoint(tmp_path / "c", head=head, optimizer=optimizer, step=0)
    optimizer.zero_grad()
    memory.write(embeddings.detach(), labels, 0)
    with pytest.raises(ValueError, match="no queued memory writes, got 1"):
        save_checkpoint(tmp_path / "c", head=head, optimizer=optimizer, step=0)
    head(embeddings, labels).backward()
    optimizer.step()
    save_checkpoint(tmp_path / "c", head=head, optimizer=optimizer, step=1)

    other = recog_fast.MarginHead(7, 4, memory=recog_fast.PrototypeMemory(7, 4, recog_fast.VPL(start=0)))
    other_optimizer = recog_fast.HeadSGD(other, lr=0.1)
    load_checkpoint(tmp_path / "c", head=other, optimizer=other_optimizer)
    for one, two in ((head, optimizer), (other, other_optimizer)):
        loss = one(embeddings, labels)
        loss.backward()
        two.step()
    assert torch.equal(head.weight, other.weight)
    assert torch.equal(head.prototypes(), other.prototypes())


def test_metadata_may_name_enum_members_only() -> None:
    """Python 3.11.0 to 3.11.3 pickle an Enum's member as getattr(cls, name); nothing else may come in that way."""
    assert checkpoint.metadata._enum_member(http.HTTPStatus, "OK") is http.HTTPStatus.OK
    for kind, name in ((os, "system"), (http.HTTPStatus, "__class__"), (str, "format")):
        with pytest.raises(pickle.UnpicklingError, match="does not belong"):
            checkpoint.metadata._enum_member(kind, name)
