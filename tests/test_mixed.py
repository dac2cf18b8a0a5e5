"""Several sources as one, and batches with a fixed share of each."""

from __future__ import annotations

import itertools
import tracemalloc
from typing import Any

import numpy as np
import pytest
from torch.utils.data import DataLoader

from recog_fast.data import MixedDataset, StreamBatches


class Numbers:
    """`images` are numbers; labels as given."""

    def __init__(self, first: int, labels: list[int]) -> None:
        self.first, self.labels = first, np.array(labels, np.int64)
        self.num_classes = max(labels) + 1
        self.paths = [f"{first + i}" for i in range(len(labels))]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.first + index, int(self.labels[index])


PARTS = [Numbers(0, [0, 1, 1, -1]), Numbers(100, [2, 0]), Numbers(200, [4, 4, 4])]


def test_identities_side_by_side() -> None:
    mixed = MixedDataset(PARTS, unlabelled=[1])
    assert mixed.labels.tolist() == [0, 1, 1, -1, -1, -1, 6, 6, 6] and mixed.num_classes == 7
    assert [mixed[i] for i in range(9)] == [
        *zip([0, 1, 2, 3, 100, 101, 200, 201, 202], mixed.labels.tolist(), strict=True)
    ]
    assert mixed.starts.tolist() == [0, 4, 6, 9] and mixed.paths[4:7] == ["100", "101", "200"] and mixed[-1] == (202, 6)
    with pytest.raises(IndexError):
        mixed[9]


def test_shared_classes() -> None:
    mixed = MixedDataset(PARTS, share_classes=True)
    assert mixed.labels.tolist() == [0, 1, 1, -1, 2, 0, 4, 4, 4] and mixed.num_classes == 5
    assert [mixed[i][1] for i in range(9)] == mixed.labels.tolist()


@pytest.mark.parametrize("arguments", [([], ()), (PARTS, (3,)), (PARTS, (-1,))])
def test_mixtures_that_are_none(arguments: tuple[Any, Any]) -> None:
    with pytest.raises(ValueError, match="MixedDataset: expected datasets"):
        MixedDataset(arguments[0], unlabelled=arguments[1])


def test_every_batch_has_its_share_and_every_stream_its_epochs() -> None:
    streams = StreamBatches([10, 4], [3, 2], seed=5, steps=12)
    batches = list(streams)
    assert list(streams) == batches and len(batches) == 12
    for part, (start, length, count, per_epoch) in enumerate([(0, 10, 3, 3), (10, 4, 2, 2)]):
        rows = [keys[:3] if part == 0 else keys[3:] for keys in batches]
        assert all(len(keys) == count for keys in rows)
        for epoch in range(12 // per_epoch):
            keys = [key for row in rows[epoch * per_epoch : (epoch + 1) * per_epoch] for key in row]
            assert {of for of, _ in keys} == {epoch}
            assert len({index for _, index in keys}) == len(keys)
            expected = np.random.default_rng((5 + part, epoch)).permutation(length)[: len(keys)] + start
            assert [index for _, index in keys] == expected.tolist()


@pytest.mark.parametrize("stop", range(8))
def test_streams_resume_anywhere(stop: int) -> None:
    whole = list(itertools.islice(StreamBatches([10, 4], [3, 2]), 9))
    first = StreamBatches([10, 4], [3, 2])
    before = list(itertools.islice(first.track(first), stop))
    second = StreamBatches([10, 4], [3, 2])
    second.load_state_dict(first.state_dict())
    assert before + list(itertools.islice(second, 9 - stop)) == whole


def test_ranks_have_nothing_in_common() -> None:
    ranks = [list(StreamBatches([12, 6], [2, 1], rank=rank, world_size=2, steps=3)) for rank in range(2)]
    for a, b in zip(*ranks, strict=True):
        assert len(a) == len(b) == 3 and not set(a) & set(b)


def test_streams_through_a_loader_with_workers() -> None:
    class Keys:
        def __getitem__(self, key: tuple[int, int]) -> int:
            return key[1]

    streams = StreamBatches([10, 4], [3, 2], steps=4)
    expected = [[index for _, index in keys] for keys in streams]
    assert [
        batch.tolist() for batch in streams.track(DataLoader(Keys(), batch_sampler=streams, num_workers=1))
    ] == expected
    assert streams.done == 4


def test_streams_refuse() -> None:
    for lengths, counts in (([], []), ([3], [1, 2])):
        with pytest.raises(ValueError, match="one count per length"):
            StreamBatches(lengths, counts)
    with pytest.raises(ValueError, match="length >= batch_size"):
        StreamBatches([3, 1], [1, 2])
    with pytest.raises(ValueError, match="expected a state of streams"):
        StreamBatches([5], [1]).load_state_dict(StreamBatches([5], [2]).state_dict())


@pytest.mark.parametrize("buffer", [0, 100])
def test_an_epoch_is_an_array_and_no_list_of_keys(buffer: int) -> None:
    """8 bytes an image stay, 40 at most while the order is made; a list of (epoch, index) takes 100."""
    count = 100_000
    streams = StreamBatches([count, 2 * count], [96, 32], buffer=buffer)
    tracemalloc.start()
    first = next(batches := iter(streams))
    held, peak = (size / (3 * count) for size in tracemalloc.get_traced_memory())
    tracemalloc.stop()
    assert len(first) == 128 and len(next(batches)) == 128 and held < 10 and peak < 40
