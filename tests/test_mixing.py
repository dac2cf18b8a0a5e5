"""Batches of labelled and unlabelled rows, and lists of images to keep."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from training_data import make_folder, settings

from recog_fast.data import FolderDataset, ListDataset
from recog_fast.training.data import TrainingImages, open_source, step_loader
from recog_fast.training.kept import read_kept, write_kept
from recog_fast.training.mixing import MixedBatches

LABELLED, UNLABELLED = np.arange(0, 46, 2), np.arange(1, 12, 2)  # 23 and 6 images


def batches(**changes: int) -> MixedBatches:
    return MixedBatches(LABELLED, UNLABELLED, 3, 1, **{"parts": 2, "seed": 7, **changes})


def test_every_micro_batch_has_its_share_and_an_epoch_is_one_pass() -> None:
    found = list(batches())
    assert len(found) == len(batches()) == 23 // 6
    for keys in found:
        assert [index % 2 for _, index in keys] == [0, 0, 0, 1] * 2
        assert {epoch for epoch, _ in keys} == {0}
    rows = [index for keys in found for _, index in keys]
    labelled = [index for index in rows if index % 2 == 0]
    assert len(set(labelled)) == len(labelled) == 18
    # 6 unlabelled images, 6 rows: each once.
    assert sorted(index for index in rows if index % 2) == UNLABELLED.tolist()


def test_a_small_unlabelled_set_starts_over_and_a_large_one_takes_turns() -> None:
    few = MixedBatches(LABELLED, UNLABELLED[:2], 3, 1, seed=1)
    used = [index for keys in few for _, index in keys if index % 2]
    assert sorted(used) == [1] * 4 + [3] * 3 or sorted(used) == [1] * 3 + [3] * 4
    many = MixedBatches(LABELLED, np.arange(1, 2001, 2), 3, 1, seed=1)
    seen = set()
    for epoch in range(3):
        many.set_epoch(epoch)
        seen |= {index for keys in many for _, index in keys if index % 2}
    assert len(seen) > 14  # of 21 rows out of 1000 images


def test_order_is_a_function_of_seed_and_epoch_and_resumes_in_the_middle() -> None:
    whole = [keys for _ in range(2) for keys in _epoch(batches(), _)]
    assert whole == [keys for _ in range(2) for keys in _epoch(batches(), _)]
    assert whole != [keys for _ in range(2) for keys in _epoch(batches(seed=8), _)]
    first = batches()
    head = []
    for keys in first.track(first):
        head.append(keys)
        if len(head) == 2:
            break
    second = batches()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert head + list(second) == whole[:3]
    with pytest.raises(ValueError, match="6 unlabelled images, got 5"):
        batches().load_state_dict({**first.state_dict(), "unlabelled": 5})


def _epoch(position: MixedBatches, epoch: int) -> list[list[tuple[int, int]]]:
    position.set_epoch(epoch)
    return list(position)


@pytest.mark.parametrize("buffer", [0, 100])
def test_an_epoch_is_two_arrays(buffer: int) -> None:
    """8 bytes for each row of the epoch stay, however many unlabelled images there are; no list of keys."""
    count = 100_000
    order = MixedBatches(np.arange(count), np.arange(count, 5 * count), 96, 32, buffer=buffer)
    tracemalloc.start()
    assert len(next(batches := iter(order))) == len(next(batches)) == 128
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 9 * (count + count // 3) and peak < 40 * 5 * count


def test_nothing_of_one_kind_is_refused() -> None:
    for labelled, unlabelled in ((LABELLED[:0], UNLABELLED), (LABELLED, UNLABELLED[:0])):
        with pytest.raises(ValueError, match=r"MixedBatches: expected (un)?labelled images"):
            MixedBatches(labelled, unlabelled, 3, 1)


def test_loader_gives_three_quarters_and_one(tmp_path: Path) -> None:
    faces, unknown = make_folder(tmp_path / "faces"), make_folder(tmp_path / "unknown", identities=3, seed=1)
    config = settings(
        tmp_path, faces, method="uir", unlabelled={"kind": "folder", "path": str(unknown)}, unlabelled_share=0.25
    )
    images = TrainingImages(config)
    position, loader = step_loader(images, config, pin_memory=False)
    assert position.batches_per_epoch == 70 // 12
    for batch in position.track(loader):
        assert (batch.labels < 0).sum() == 4 and len(batch.labels) == 16
        assert all(
            ("unknown" in images.path(sample)) == bool(label < 0)
            for sample, label in zip(batch.samples, batch.labels, strict=True)
        )
    wrong = settings(tmp_path, faces, unlabelled={"kind": "folder", "path": str(unknown)}, unlabelled_share=0.01)
    with pytest.raises(ValueError, match="leave rows of both kinds"):
        step_loader(images, wrong, pin_memory=False)


def test_kept_lists_go_to_both_readers(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "faces", identities=3, images=2)
    source = FolderDataset(folder)
    file = tmp_path / "lists" / "kept.jsonl"
    write_kept(file, source, np.array([1, 4]), np.array([0.25, 0.5]))
    kept = read_kept(file, source)
    assert len(kept) == 2 and kept.paths == [source.paths[1], source.paths[4]]
    np.testing.assert_array_equal(kept[1][0], source[4][0])
    listed = ListDataset(file)
    np.testing.assert_array_equal(listed[0][0], source[1][0])
    assert set(listed.labels) == {-1}
    config = settings(tmp_path, folder, data__keep=str(file))
    assert len(open_source(config.data)) == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"path": "x.png"}', "line 1"),
        ("nonsense", "line 1"),
        ('{"path": "0.png", "index": 99}', "image 99 in line 1, which is None"),
        ('{"path": "7.png", "index": 0}', "to be made from this source"),
        ("", "empty list"),
    ],
)
def test_lists_of_something_else_are_refused(tmp_path: Path, line: str, message: str) -> None:
    source = FolderDataset(make_folder(tmp_path / "faces", identities=2, images=2))
    (tmp_path / "kept.jsonl").write_text(line + "\n" if line else "")
    with pytest.raises(ValueError, match="^train: expected ") as error:
        read_kept(tmp_path / "kept.jsonl", source)
    assert message in str(error.value)
    with pytest.raises(FileNotFoundError, match="no list of kept images"):
        read_kept(tmp_path / "absent.jsonl", source)
