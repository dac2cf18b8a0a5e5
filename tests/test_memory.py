"""Prototype memory: queue, reads, eviction, state, shards, bad input (math.md section 2, "State and time")."""

from __future__ import annotations

import copy
import io
import math
import pickle
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from recog_fast.memory import VPL, Entries, PrototypeMemory, QAFace

F64 = torch.float64
ALWAYS = VPL(lam=0.5, delta=1000, start=0)


def batch(labels: list[int], dim: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(labels), dim, generator=generator), torch.tensor(labels, dtype=torch.int64)


def same_state(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def test_start_delta_and_staleness() -> None:
    x, y = batch([1])
    for policy, first in ((VPL(lam=0.5, delta=3, start=4), 5), (QAFace(delta=3, start=4), 4)):
        memory = PrototypeMemory(2, 4, policy, dtype=F64)
        memory.write(x, y, 3)
        assert [bool(memory.strength(step)[1] > 0) for step in range(3, 9)] == [
            first <= step <= 6 for step in range(3, 9)
        ]
        assert memory.stats() == {"live": 1, "rejected": 0, "stale": 0, "evicted": 0}
        assert memory.stats(7) == {"live": 0, "rejected": 0, "stale": 1, "evicted": 0}
    for off in (VPL(delta=0, start=0), QAFace(delta=0)):
        memory = PrototypeMemory(2, 4, off)
        memory.write(x, y, 5)
        assert not memory.strength(5).any() and memory.stats()["live"] == 0


def test_defaults_store_unit_bf16_rows() -> None:
    x, y = batch([2, 0], dim=16)
    memory = PrototypeMemory(5, 16, ALWAYS)
    memory.write(10 * x, y, 1)
    rows, strength = memory.gather(torch.tensor([0, 1, 2]), 1)
    assert rows.dtype == torch.bfloat16 and strength.dtype == torch.float32
    assert strength.tolist() == [0.5, 0.0, 0.5]
    unit = torch.nn.functional.normalize(x, dim=1)
    torch.testing.assert_close(rows[[2, 0]].float(), unit, rtol=2**-8, atol=0)
    assert not rows[1].any()


def test_duplicates_last_row_wins_and_unlabelled_are_ignored() -> None:
    x, y = batch([3, -1, 3, 1, 3, -1])
    memory = PrototypeMemory(4, 4, ALWAYS, dtype=F64)
    memory.write(x, y, 0)
    unit = torch.nn.functional.normalize(x.double(), dim=1)
    torch.testing.assert_close(memory.rows()[[3, 1]], unit[[4, 3]])
    assert memory.stats()["live"] == 2


def test_all_unlabelled_and_empty_batches_change_no_entry() -> None:
    memory = PrototypeMemory(4, 4, QAFace(), dtype=F64)
    memory.write(*batch([0, 1]), 0)
    before = memory.state_dict()
    before = {key: value.clone() for key, value in before.items()}
    memory.write(*batch([-1, -1]), 7)
    memory.write(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), 8)
    after = memory.state_dict()
    assert [key for key in before if not torch.equal(before[key], after[key])] == ["clock"]


def test_zero_row_is_stored_as_zero_and_nan_of_an_unlabelled_row_is_ignored() -> None:
    memory = PrototypeMemory(3, 2, ALWAYS)
    memory.write(torch.tensor([[0.0, 0.0], [math.nan, 1.0], [3.0, 4.0]]), torch.tensor([0, -1, 2]), 0)
    assert torch.isfinite(memory.rows()).all() and not memory.rows()[0].any()


def test_integer_dtypes_half_inputs_and_no_autograd() -> None:
    x, y = batch([0, 1])
    memory = PrototypeMemory(2, 4, QAFace())
    memory.write(x.half().requires_grad_(), y.int(), np.int64(0))
    memory.write(x.bfloat16(), y.to(torch.uint8), torch.tensor(1))
    assert not memory.rows().requires_grad and not memory.strength(1).requires_grad
    assert list(memory.parameters()) == []


def test_queue_copies_its_input_and_keeps_order() -> None:
    x, y = batch([0])
    memory = PrototypeMemory(1, 4, ALWAYS, dtype=F64)
    memory.held = True
    second = -x
    memory.write(x, y, 0)
    memory.write(second, y, 1)
    second.zero_()
    y.fill_(-1)
    epoch = memory.epoch
    assert memory.pending == 2
    # Held: reads do not apply the queue.
    assert not memory.rows().any() and not memory.strength(1).any() and memory.stats()["live"] == 0
    assert memory.pending == 2 and memory.epoch == epoch
    memory.flush()
    assert memory.pending == 0 and memory.epoch == epoch + 1
    torch.testing.assert_close(memory.rows(), torch.nn.functional.normalize(-x.double(), dim=1))
    memory.flush()
    assert memory.epoch == epoch + 1


@pytest.mark.parametrize("read", ["gather", "strength", "rows", "stats", "injection", "mean", "state_dict"])
def test_unheld_memory_applies_its_queue_before_a_read(read: str) -> None:
    memory = PrototypeMemory(2, 4, ALWAYS)
    memory.write(*batch([0]), 1)
    assert memory.pending == 1
    arguments = {"gather": (torch.tensor([0]), 1), "strength": (1,), "injection": (1,)}.get(read, ())
    value = getattr(memory, read)
    if callable(value):
        value(*arguments)
    assert memory.pending == 0 and int(memory.cursor) == 1


def test_micro_batches_equal_one_write_for_vpl() -> None:
    x, y = batch([0, 1, 0, 2])
    whole, parts = (PrototypeMemory(3, 4, ALWAYS) for _ in range(2))
    whole.write(x, y, 0)
    parts.write(x[:2], y[:2], 0)
    parts.write(x[2:], y[2:], 0)
    assert torch.equal(whole.rows(), parts.rows())


def test_injection_is_the_ring() -> None:
    memory = PrototypeMemory(100, 4, VPL(lam=0.5, delta=2, start=0), capacity=3)
    memory.write(*batch([40, 7]), 1)
    memory.write(*batch([9]), 3)
    rows, strength, slot = memory.injection(4)
    assert rows.shape == (3, 4) and strength.tolist() == [0.0, 0.0, 0.5]
    assert slot.dtype == torch.int32 and slot[[40, 7, 9, 0]].tolist() == [0, 1, 2, -1]
    torch.testing.assert_close(memory.gather(torch.tensor([9]), 4)[0][0], rows[2])


def test_eviction_is_counted_and_warns_once() -> None:
    memory = PrototypeMemory(10, 4, ALWAYS, capacity=2)
    memory.write(*batch([0, 1]), 0)
    memory.write(*batch([0]), 1)  # refreshed: 1 is the oldest now
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        memory.flush()
    memory.write(*batch([5]), 2)
    with pytest.warns(UserWarning, match="evicts"):
        memory.flush()
    assert memory.entries().ids.tolist() == [0, 5]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        memory.write(*batch([6, 7, 8]), 3)  # more classes than slots: the last two stay
        assert memory.stats() == {"live": 2, "rejected": 0, "stale": 0, "evicted": 4}
    assert memory.entries().ids.tolist() == [7, 8]


def test_capacity_of_all_that_can_be_valid_equals_a_full_memory() -> None:
    delta, n, classes = 3, 4, 50
    policy = VPL(lam=0.5, delta=delta, start=0)
    # Entries of steps now - delta .. now are valid: delta + 1 batches.
    full, small = PrototypeMemory(classes, 4, policy), PrototypeMemory(classes, 4, policy, capacity=(delta + 1) * n)
    generator = torch.Generator().manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in range(1, 30):
            x = torch.randn(n, 4, generator=generator)
            y = torch.randint(0, classes, (n,), generator=generator)
            for memory in (full, small):
                memory.write(x, y, step)
            assert torch.equal(full.strength(step), small.strength(step))
            valid = full.strength(step) > 0
            assert torch.equal(full.rows()[valid], small.rows()[valid])
    assert small.stats()["evicted"] > 0


def filled(policy: Any = None, **options: Any) -> PrototypeMemory:
    memory = PrototypeMemory(9, 4, policy or QAFace(), **options)
    memory.write(*batch([1, 5, 7, -1, 5], seed=1), 4)
    memory.write(*batch([1, 8], seed=2), 6)
    return memory


def test_state_round_trip_continues_with_the_same_bits() -> None:
    memory = filled()
    buffer = io.BytesIO()
    torch.save(memory.state_dict(), buffer)
    buffer.seek(0)
    other = PrototypeMemory(9, 4, QAFace())
    other.write(*batch([0]), 0)  # queued writes of the state replaced go with it
    epoch = other.epoch
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert other.epoch > epoch and other.pending == 0
    assert same_state(memory, other) and memory.stats() == other.stats()
    for each in (memory, other):
        each.write(*batch([3, 1], seed=9), 8)
    assert same_state(memory, other)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda memory: pickle.loads(pickle.dumps(memory))])
def test_copies_carry_the_queue(copied: Any) -> None:
    memory = filled()
    memory.flush()
    memory.held = True
    memory.write(*batch([2]), 7)
    other = copied(memory)
    assert other.pending == 1 and other.held and other.policy == memory.policy
    for each in (memory, other):
        each.flush()
    assert same_state(memory, other)
    other.write(*batch([0]), 8)
    other.flush()
    assert not same_state(memory, other)


def test_held_memory_does_not_apply_its_queue_to_be_saved() -> None:
    memory = filled()
    memory.held = True
    assert memory.pending == 2
    assert int(memory.state_dict()["cursor"]) == 0 and memory.pending == 2


@pytest.mark.parametrize("move", [lambda m: m.half(), lambda m: m.to(torch.float64), lambda m: m.to("cpu")])
def test_moving_keeps_dtypes_and_moves_the_epoch(move: Any) -> None:
    memory = filled()
    before = {key: value.clone() for key, value in memory.state_dict().items()}
    epoch = memory.epoch
    move(memory)
    after = memory.state_dict()
    assert all(torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in before)
    assert memory.epoch > epoch


def test_entries_move_between_sizes() -> None:
    memory = filled()
    entries = memory.entries()
    assert entries.ids.tolist() == [1, 5, 7, 8] and entries.stamp.tolist() == [6, 4, 4, 6]
    other = PrototypeMemory(9, 4, QAFace(), capacity=3)
    other.load_entries(entries)
    assert other.entries().ids.tolist() == [1, 7, 8]  # of stamps 4, 4 the first goes
    assert torch.equal(other.rows()[[1, 7, 8]], memory.rows()[[1, 7, 8]])
    assert torch.equal(other.strength(6)[[1, 7, 8]], memory.strength(6)[[1, 7, 8]])
    assert int(other.clock) == 6 and int(other.cursor) == 3
    for bad, word in (
        (Entries(entries.ids.flip(0), *entries[1:]), "ids"),
        (entries._replace(ids=entries.ids + 1), "ids"),
        (entries._replace(rows=entries.rows[:, :2]), "rows"),
        (entries._replace(strength=entries.strength[:1]), "strength"),
        (entries._replace(stamp=-entries.stamp), "stamp"),
    ):
        with pytest.raises(ValueError, match=word):
            other.load_entries(bad)
    assert other.entries().ids.tolist() == [1, 7, 8]


def test_shards_together_equal_one_memory() -> None:
    whole, shards = filled(), [PrototypeMemory(9, 4, QAFace()) for _ in range(4)]
    for shard, start in zip(shards, (0, 3, 6, 9), strict=True):  # the last shard is empty
        shard.shard(start, min(start + 3, 9))
        shard.write(*batch([1, 5, 7, -1, 5], seed=1), 4)
        shard.write(*batch([1, 8], seed=2), 6)
    assert torch.equal(torch.stack([shard.strength(6) for shard in shards]).sum(0), whole.strength(6))
    assert torch.equal(torch.stack([shard.rows() for shard in shards]).sum(0), whole.rows())
    assert all(torch.equal(shard.mean, whole.mean) and torch.equal(shard.std, whole.std) for shard in shards)
    assert torch.cat([shard.entries().ids for shard in shards]).tolist() == [1, 5, 7, 8]
    assert [shard.injection(6).slot.numel() for shard in shards] == [3, 3, 3, 0]
    late = filled()
    late.flush()
    late.shard(3, 6)
    assert torch.equal(late.rows(), shards[1].rows())
    with pytest.raises(ValueError, match="range"):
        late.shard(0, 2)
    late.write(*batch([4]), 9)
    with pytest.raises(RuntimeError, match="queued"):
        late.shard(3, 4)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (
            (torch.ones(3, 4), torch.tensor([0, 9, 12]), 0),
            ValueError,
            r"labels in \[-1, C\) = \[-1, 9\), got 9 at row 1",
        ),
        ((torch.ones(2, 4), torch.tensor([0, -2]), 0), ValueError, "got -2 at row 1"),
        (
            (torch.ones(2, 5), torch.tensor([0, 1]), 0),
            ValueError,
            r"embeddings of shape \(N, D\) = \(N, 4\), got \(2, 5\)",
        ),
        ((torch.ones(4), torch.tensor([0]), 0), ValueError, "embeddings of shape"),
        ((torch.ones(2, 4), torch.tensor([[0], [1]]), 0), ValueError, r"labels of shape \(N,\) = \(2,\), got \(2, 1\)"),
        ((torch.ones(2, 4, dtype=torch.int64), torch.tensor([0, 1]), 0), TypeError, "embeddings as a floating"),
        ((torch.ones(2, 4), torch.tensor([0.0, 1.0]), 0), TypeError, "labels as an integer"),
        ((torch.ones(2, 4), torch.tensor([True, False]), 0), TypeError, "labels as an integer"),
        ((torch.ones(2, 4), [0, 1], 0), TypeError, "labels as an integer"),
        ((torch.ones(2, 4), torch.tensor([0, 1]), -1), ValueError, "step in"),
        ((torch.ones(2, 4), torch.tensor([0, 1]), 1.5), TypeError, "step as an int"),
        ((torch.tensor([[1.0] * 4, [math.inf] * 4]), torch.tensor([0, 1]), 0), ValueError, "non-finite row 1"),
        ((torch.ones(2, 4, device="meta"), torch.tensor([0, 1]), 0), ValueError, "embeddings on cpu"),
    ],
)
def test_refused_batch_leaves_state_untouched(arguments: Any, error: type[Exception], words: str) -> None:
    memory = filled()
    before = {key: value.clone() for key, value in memory.state_dict().items()}
    epoch = memory.epoch
    with pytest.raises(error, match=words):
        memory.write(*arguments)
    assert memory.pending == 0 and memory.epoch == epoch
    assert all(torch.equal(before[key], value) for key, value in memory.state_dict().items())


def test_other_errors() -> None:
    for bad in ({"num_classes": 0}, {"embedding_dim": 0}, {"capacity": 0}, {"num_classes": 2**31}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            PrototypeMemory(**{"num_classes": 3, "embedding_dim": 2, "policy": ALWAYS, **bad})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="dtype"):
        PrototypeMemory(3, 2, ALWAYS, dtype=torch.int64)
    for policy in (VPL, "vpl"):
        with pytest.raises(TypeError, match="policy"):
            PrototypeMemory(3, 2, policy)  # type: ignore[arg-type]
    memory = filled()
    with pytest.raises(ValueError, match=r"got 9 at row 1"):
        memory.gather(torch.tensor([0, 9]), 0)
    with pytest.raises(ValueError, match="ids of shape"):
        memory.gather(torch.tensor([[0]]), 0)
    with pytest.raises(TypeError, match="ids"):
        memory.gather(torch.tensor([0.5]), 0)
    with pytest.raises(ValueError, match="step"):
        memory.strength(-1)


def test_deferred_report_of_bad_rows() -> None:
    """What a CUDA write does instead of raising, driven on CPU tensors: ignore, count, raise later, once."""
    memory = filled()
    labels = torch.tensor([3, 99, 2, -7])
    kept = memory._defer(torch.tensor([False, True, False, True]), labels)
    assert kept.tolist() == [3, -1, 2, -1]
    with pytest.raises(ValueError, match=r"got 99 at row 1; 2 such rows were ignored"):
        memory.write(*batch([0]), 7)
    memory.write(*batch([0]), 7)
    memory._defer(torch.tensor([True]), torch.tensor([4]))
    with pytest.raises(ValueError, match="non-finite row 0"):
        memory.stats()
    assert memory.stats()["live"] == 5
