"""Resumable batches: every image once an epoch, ranks apart, and stop-and-go anywhere."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from torch.utils.data import DataLoader

from recog_fast.data import ResumableBatches
from recog_fast.data.sampler import shuffled


def run(batches: ResumableBatches, count: int) -> list[list[tuple[int, int]]]:
    """The next `count` batches, over epoch borders."""
    found: list[list[tuple[int, int]]] = []
    while len(found) < count:
        found += itertools.islice(batches.track(batches), count - len(found))
    return found


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("world_size", [1, 3])
def test_an_epoch_visits_everything_once(world_size: int, drop_last: bool) -> None:
    ranks = [ResumableBatches(100, 8, 5, rank, world_size, drop_last) for rank in range(world_size)]
    epochs = [list(rank) for rank in ranks]
    assert len({len(epoch) for epoch in epochs}) == 1
    assert len(epochs[0]) == len(ranks[0]) == ranks[0].batches_per_epoch == (100 // (8 * world_size) + (not drop_last))
    seen = [index for epoch in epochs for keys in epoch for _, index in keys]
    if drop_last:
        assert len(seen) == len(set(seen)) == 100 // (8 * world_size) * 8 * world_size
        assert all(len(keys) == 8 for epoch in epochs for keys in epoch)
    else:
        # 100 images over three ranks: two more to make the last step even.
        assert set(seen) == set(range(100)) and len(seen) == 100 + (-100 % world_size)


def test_order_is_numpys_permutation() -> None:
    """Written down so that other languages and versions can repeat it."""
    batches = ResumableBatches([0] * 10, 4, seed=3, drop_last=False)
    batches.set_epoch(2)
    keys = [key for batch in batches for key in batch]
    assert keys == [(2, int(i)) for i in np.random.default_rng((3, 2)).permutation(10)]
    assert all(type(part) is int for key in keys for part in key)


def test_iterating_does_not_move_the_state() -> None:
    batches = ResumableBatches(20, 4)
    assert list(batches) == list(batches) and batches.state_dict()["done"] == 0


@pytest.mark.parametrize("stop", range(13))
def test_resume_anywhere(stop: int) -> None:
    """Stopped after any batch, also across epochs, the rest is what it would have been."""
    whole = run(ResumableBatches(22, 4, seed=1), 12)
    first = ResumableBatches(22, 4, seed=1)
    before = run(first, stop)
    state = json.loads(json.dumps(first.state_dict()))
    second = ResumableBatches(22, 4, seed=1)
    second.load_state_dict(state)
    assert before + run(second, 12 - stop) == whole
    assert second.epoch == 12 // 5


def test_resume_with_a_loader_that_runs_ahead() -> None:
    """Workers fetch far beyond what was handed out; the state counts only that."""
    reference = ResumableBatches(40, 4, seed=9)
    whole = [[index for _, index in keys] for keys in run(reference, 20)]
    first = ResumableBatches(40, 4, seed=9)
    loader = DataLoader(Keys(), batch_sampler=first, num_workers=2, prefetch_factor=4, persistent_workers=True)
    before = [keys.tolist() for keys in itertools.islice(first.track(loader), 3)]
    assert first.state_dict() == {"seed": 9, "length": 40, "epoch": 0, "done": 12}
    # The same loader goes on where its sampler says, and so does a fresh one.
    second = ResumableBatches(40, 4, seed=9)
    second.load_state_dict(first.state_dict())
    fresh = DataLoader(Keys(), batch_sampler=second)
    for batches, rest in ((first, loader), (second, fresh)):
        after = [keys.tolist() for _ in range(2) for keys in batches.track(rest)]
        assert before + after == whole[:20]


class Keys:
    """Gives back the index of the key."""

    def __getitem__(self, key: tuple[int, int]) -> int:
        return key[1]


def test_resume_with_other_ranks_and_batches() -> None:
    """24 of 100 images done by one rank: two ranks with another batch size do the other 76, none twice."""
    first = ResumableBatches(100, 8, seed=4)
    seen = [index for keys in run(first, 3) for _, index in keys]
    for rank in range(2):
        second = ResumableBatches(100, 5, seed=4, rank=rank, world_size=2, drop_last=False)
        second.load_state_dict(first.state_dict())
        seen += [index for keys in second for _, index in keys]
    assert sorted(seen) == list(range(100))


def test_a_rest_too_small_for_the_new_batch_ends_the_epoch() -> None:
    batches = ResumableBatches(20, 8)
    batches.load_state_dict({"seed": 0, "length": 20, "epoch": 3, "done": 16})
    assert (batches.epoch, batches.done, len(batches)) == (4, 0, 2)


def test_what_is_refused() -> None:
    for keywords, message in [
        ({"length": 0, "batch_size": 1}, "length >= 1, got 0"),
        ({"length": 5, "batch_size": 0}, "batch_size >= 1, got 0"),
        ({"length": 5, "batch_size": 1, "seed": -1}, "seed >= 0, got -1"),
        ({"length": 5, "batch_size": 1, "world_size": 0}, "world_size >= 1"),
        ({"length": 5, "batch_size": 1, "rank": 2, "world_size": 2}, r"rank in \[0, world_size\) = \[0, 2\), got 2"),
        (
            {"length": 5, "batch_size": 3, "world_size": 2},
            "length >= batch_size . world_size with drop_last, got 5 < 6",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            ResumableBatches(**keywords)
    batches = ResumableBatches(20, 4)
    state = batches.state_dict()
    for change in ({"seed": 1}, {"length": 19}, {"epoch": -1}, {"done": 21}):
        with pytest.raises(ValueError, match="expected"):
            batches.load_state_dict({**state, **change})
    with pytest.raises(ValueError, match="epoch >= 0"):
        batches.set_epoch(-1)
    with pytest.raises(ValueError, match="ended 4 batches early"):
        list(batches.track([[(0, 0)]]))


@pytest.mark.parametrize(("length", "buffer"), [(1000, 64), (1000, 100), (7, 3), (5, 5), (5, 9), (3, 1)])
def test_a_shuffle_buffer_is_one_permutation_read_nearly_in_sequence(length: int, buffer: int) -> None:
    """Every place once; blocks of `buffer` neighbours in random order, each place less than `buffer` places from where its block has it."""
    order = shuffled(length, (3, 1), buffer)
    assert sorted(order.tolist()) == list(range(length))
    assert np.array_equal(order, shuffled(length, (3, 1), buffer))
    assert length < 6 or not np.array_equal(order, shuffled(length, (3, 2), buffer))
    assert np.array_equal(shuffled(length, (3, 1)), np.random.default_rng((3, 1)).permutation(length))
    if buffer < length:
        blocks = order // buffer
        places = np.arange(length)
        # A block's images lie within its own stretch of `buffer` places, widened by less than `buffer` at both ends.
        assert all(np.ptp(places[blocks == block]) < 3 * buffer for block in np.unique(blocks))
    if length == 1000:
        starts = [int(np.median(places[blocks == block])) for block in range(10)]
        assert starts != sorted(starts) and np.any(np.diff(order) < 0)


def test_a_buffer_resumes_and_belongs_to_the_state() -> None:
    whole = list(ResumableBatches(100, 8, seed=2, buffer=16))
    first = ResumableBatches(100, 8, seed=2, buffer=16)
    head = list(itertools.islice(first.track(first), 5))
    second = ResumableBatches(100, 8, seed=2, buffer=16)
    second.load_state_dict(first.state_dict())
    assert head + list(second) == whole
    with pytest.raises(ValueError, match="a state of buffer 0, got 16"):
        ResumableBatches(100, 8, seed=2).load_state_dict(first.state_dict())
    with pytest.raises(ValueError, match="expected buffer >= 0, got -1"):
        ResumableBatches(100, 8, buffer=-1)
