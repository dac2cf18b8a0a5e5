"""Prototype memory, its policies, the memory write and the momentum encoder: math.md section 2."""

from __future__ import annotations

import copy
import io
import json
import math
import pickle
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import golden_dir
from torch import Tensor, nn

from recog_fast.memory import VPL, MomentumEncoder, NormStatistics, PrototypeMemory, QAFace
from recog_fast.ops.memory_write import memory_write, reference_memory_write

F64 = torch.float64
ALWAYS = VPL(lam=0.5, delta=1000, start=0)


def load(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """kwargs and tensors of a golden case."""
    with np.load(golden_dir() / f"{name}.npz") as file:
        meta = json.loads(str(file["meta"]))
        return meta["kwargs"], {key: torch.from_numpy(file[key].copy()) for key in file.files if key != "meta"}


def qaface(kwargs: dict[str, Any]) -> QAFace:
    return QAFace(
        tau=kwargs["tau"],
        delta=kwargs["delta_t"],
        ema=kwargs["momentum"],
        on_reject=kwargs["on_reject"],
        literal=kwargs["literal"],
    )


def batch(labels: list[int], dim: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(labels), dim, generator=generator), torch.tensor(labels, dtype=torch.int64)


def same_state(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


# -- golden cases --------------------------------------------------------------------------------------------------------

QA_CASES = ["qa_memory__default", "qa_memory__literal_ema", "qa_memory__skip", "qa_memory__tau1"]


@pytest.mark.parametrize("name", QA_CASES)
def test_qa_memory_float64(name: str) -> None:
    kwargs, case = load(name)
    memory = PrototypeMemory(kwargs["C"], kwargs["D"], qaface(kwargs), dtype=F64)
    for k in range(kwargs["steps"]):
        norms = torch.linalg.vector_norm(case[f"in_X{k}"], dim=1)
        memory.write(case[f"in_X{k}"], case[f"in_y{k}"], case[f"in_it{k}"])
        step = int(case[f"in_it{k}"])
        close(memory.strength(step), case[f"out_lambda{k}"])
        close(memory.rows(), case[f"out_mem{k}"])
        close(torch.stack([memory.mean, memory.std]), case[f"out_stats{k}"])
        strengths, _ = memory.policy.strengths(norms, NormStatistics(memory.mean, memory.std, memory.norm_batches))
        close(strengths, case[f"out_f{k}"])
        stored = memory.entries()
        by_class = torch.zeros(kwargs["C"], dtype=F64).index_put((stored.ids,), stored.strength)
        stamps = torch.full((kwargs["C"],), -1).index_put((stored.ids,), stored.stamp)
        close(by_class, case[f"out_lamq{k}"])
        assert torch.equal(stamps, case[f"out_stamp{k}"])


@pytest.mark.parametrize("name", QA_CASES)
def test_qa_memory_default_dtype(name: str) -> None:
    kwargs, case = load(name)
    memory = PrototypeMemory(kwargs["C"], kwargs["D"], qaface(kwargs))
    for k in range(kwargs["steps"]):
        memory.write(case[f"in_X{k}"].float(), case[f"in_y{k}"], int(case[f"in_it{k}"]))
        assert memory.rows().dtype == torch.bfloat16
        # A unit row rounded to bf16: half a unit in the last of 8 bits.
        torch.testing.assert_close(memory.rows().double(), case[f"out_mem{k}"], rtol=2**-8, atol=1e-7)
        torch.testing.assert_close(
            memory.strength(int(case[f"in_it{k}"])).double(), case[f"out_lambda{k}"], rtol=1e-5, atol=0
        )


def test_vpl_lambda() -> None:
    kwargs, case = load("vpl_lambda__official")
    written = case["in_queue_iters"].tolist()
    policy = VPL(lam=kwargs["lam"], delta=kwargs["allowed_delta"], start=kwargs["start_iters"])
    memory = PrototypeMemory(len(written), 3, policy, dtype=F64)
    for label, step in enumerate(written):
        memory.write(torch.ones(1, 3, dtype=F64), torch.tensor([label]), step)
    close(torch.stack([memory.strength(step) for step in case["in_iters"].tolist()]), case["out_lam"])


def test_ema_params() -> None:
    kwargs, case = load("ema_params__gamma099")
    backbone = nn.Linear(case["in_k"].numel(), 1, bias=False, dtype=F64)
    with torch.no_grad():
        backbone.weight.copy_(case["in_k"][None])
    encoder = MomentumEncoder(backbone, gamma=kwargs["gamma"])
    with torch.no_grad():
        backbone.weight.copy_(case["in_q"][None])
    encoder.update(backbone)
    close(encoder.key.weight[0], case["out_k"])


def close(value: Tensor, truth: Tensor) -> None:
    torch.testing.assert_close(value.detach(), truth, rtol=1e-9, atol=1e-9)


# -- the write against a slow model --------------------------------------------------------------------------------------


class SlowRing:
    """The semantics of memory_write, one row at a time in Python."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.slots: list[tuple[int, int, float, float] | None] = [None] * size  # class, stamp, strength, value

    def write(self, labels: list[int], values: list[float], strengths: list[float], step: int, classes: int) -> int:
        last = {label: row for row, label in enumerate(labels) if 0 <= label < classes}
        rows = sorted(last.values())
        dropped, rows = rows[: max(0, len(rows) - self.size)], rows[max(0, len(rows) - self.size) :]
        owners = [entry[0] if entry else -1 for entry in self.slots]
        lost = sum(labels[row] not in owners for row in dropped)
        held = {owners.index(labels[row]) for row in rows if labels[row] in owners}
        for row in rows:
            if labels[row] in owners:
                at = owners.index(labels[row])
            else:
                free = [s for s in range(self.size) if s not in held]
                at = min(free, key=lambda s: (self.slots[s][1] if self.slots[s] else -1, s))  # type: ignore[index]
                lost += self.slots[at] is not None
                held.add(at)
            self.slots[at] = (labels[row], step, strengths[row], values[row])
        return lost


@settings(max_examples=150, deadline=None)
@given(data=st.data(), size=st.integers(1, 7), classes=st.integers(1, 9))
def test_write_equals_slow_model(data: st.DataObject, size: int, classes: int) -> None:
    ring = empty_ring(size, classes)
    rows, strength, stamp, owner, slot, cursor = ring
    slow, step = SlowRing(size), 0
    for _ in range(data.draw(st.integers(1, 8))):
        step += data.draw(st.integers(0, 2))  # 0: micro-batches of one step
        labels = data.draw(st.lists(st.integers(-2, classes), max_size=10))
        n = len(labels)
        values, strengths = torch.rand(n, 2, dtype=F64), torch.rand(n, dtype=F64)
        lost = reference_memory_write(*ring, values, torch.tensor(labels, dtype=torch.int64), strengths, step)
        assert int(lost) == slow.write(labels, values[:, 0].tolist(), strengths.tolist(), step, classes)
        expected = [entry or (-1, -1, 0.0, 0.0) for entry in slow.slots]
        got = list(zip(owner.tolist(), stamp.tolist(), strength.tolist(), rows[:, 0].tolist(), strict=True))
        assert got == expected
        used = [s for s, entry in enumerate(expected) if entry[0] >= 0]
        assert int(cursor) == len(used)
        assert slot.tolist() == [next((s for s in used if expected[s][0] == c), -1) for c in range(classes)]


def empty_ring(size: int, classes: int, dim: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        torch.zeros(size, dim, dtype=F64),
        torch.zeros(size, dtype=F64),
        torch.full((size,), -1),
        torch.full((size,), -1),
        torch.full((classes,), -1, dtype=torch.int32),
        torch.zeros((), dtype=torch.int64),
    )


def test_write_checks() -> None:
    ring = empty_ring(3, 5)
    x, y, s = torch.zeros(2, 2), torch.zeros(2, dtype=torch.int64), torch.ones(2)
    for bad, word in (((torch.zeros(2, 3), y, s, 0), "embeddings"), ((x, y.int(), s, 0), "labels")):
        with pytest.raises(ValueError, match=word):
            memory_write(*ring, *bad)
    for bad, word in (((x, y, torch.ones(3), 0), "strengths"), ((x, y, s, -1), "step"), ((x, y, s, 2**31), "step")):
        with pytest.raises(ValueError, match=word):
            memory_write(*ring, *bad)
    for index, word in enumerate(("rows", "row_strength", "stamp", "owner", "slot", "cursor")):
        state = list(ring)
        state[index] = torch.zeros(4, 4, dtype=torch.int16)
        with pytest.raises(ValueError, match=word):
            memory_write(*state, x, y, s, 0)
    assert int(ring[5]) == 0


@pytest.mark.parametrize("threads", [1, 2])
def test_write_is_deterministic(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    try:
        ring = empty_ring(64, 300, 8)
        generator = torch.Generator().manual_seed(1)
        for step in range(20):
            labels = torch.randint(-1, 300, (40,), generator=generator)
            memory_write(
                *ring, torch.rand(40, 8, generator=generator), labels, torch.rand(40, generator=generator), step
            )
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(before)
    # Every owner is a class whose slot points back, and the sum is that of one recorded run with any thread count.
    owner, slot = ring[3], ring[4]
    assert torch.equal(slot[owner].long(), torch.arange(64))
    reference = RECORDED.setdefault("rows", ring[0].clone())
    assert torch.equal(ring[0], reference)


RECORDED: dict[str, Tensor] = {}


# -- policies ------------------------------------------------------------------------------------------------------------


def test_qaface_statistics_against_torch() -> None:
    policy = QAFace(ema=0.9)
    none = NormStatistics(torch.tensor(0.0, dtype=F64), torch.tensor(0.0, dtype=F64), torch.tensor(0))
    norms = torch.rand(9, dtype=F64) + 5
    labelled = torch.arange(9) % 3 != 0
    first = policy.update(norms, labelled, none)
    close(first.mean, norms[labelled].mean())
    close(first.std, norms[labelled].std())
    second = policy.update(norms + 1, labelled, first)
    close(second.mean, first.mean * 0.9 + 0.1 * (norms[labelled] + 1).mean())
    # A row that does not count may hold anything.
    norms[0] = math.nan
    assert torch.equal(policy.update(norms, labelled, none).mean, first.mean)


def test_qaface_one_row() -> None:
    memory = PrototypeMemory(4, 2, QAFace(), dtype=F64)
    memory.write(torch.tensor([[3.0, 4.0]], dtype=F64), torch.tensor([1]), 0)
    assert (float(memory.mean), float(memory.std)) == (5.0, 1.0)
    assert memory.strength(0).tolist() == [0.0, 1.0, 0.0, 0.0]
    memory.write(torch.tensor([[6.0, 8.0]], dtype=F64), torch.tensor([2]), 1)
    close(memory.mean, torch.tensor(5.05, dtype=F64))
    assert float(memory.std) == 1.0
    close(memory.strength(1)[2], torch.exp(torch.tensor(-4.95, dtype=F64)))


def test_qaface_equal_norms_give_strength_one() -> None:
    memory = PrototypeMemory(3, 2, QAFace())
    memory.write(torch.tensor([[1.0, 0.1], [0.1, 1.0], [-1.0, 0.1]]), torch.tensor([0, 1, 2]), 0)
    torch.testing.assert_close(memory.strength(0), torch.ones(3), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("on_reject", "strength"), [("overwrite", 0.0), ("skip", 1.0)])
def test_rejected_sample(on_reject: str, strength: float) -> None:
    memory = PrototypeMemory(2, 2, QAFace(tau=0.5, ema=1.0, on_reject=on_reject), dtype=F64)
    good, poor = torch.tensor([[10.0, 0.0]], dtype=F64), torch.tensor([[0.0, 2.0]], dtype=F64)
    memory.write(good, torch.tensor([1]), 0)  # mu = 10, sigma = 1
    memory.write(poor, torch.tensor([1]), 3)  # n^ = -8
    assert float(memory.strength(3)[1]) == strength
    assert memory.rows()[1].tolist() == ([0.0, 1.0] if on_reject == "overwrite" else [1.0, 0.0])
    assert memory.stats()["rejected"] == 1
    # In one batch, skip keeps the last row that was not rejected.
    memory.write(torch.cat([-good, poor]), torch.tensor([1, 1]), 4)
    assert memory.rows()[1].tolist() == ([0.0, 1.0] if on_reject == "overwrite" else [-1.0, 0.0])


def test_inject_scale() -> None:
    x, y = batch([0, 1, 2])
    literal, preset = (PrototypeMemory(3, 4, QAFace(inject_scale=scale), dtype=F64) for scale in (1.0, 0.176))
    for memory in (literal, preset):
        memory.write(x, y, 0)
    close(preset.strength(0), literal.strength(0) * 0.176)


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
        assert not memory.strength(5).any()


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: VPL(lam=-0.1), "lam"),
        (lambda: VPL(delta=-1), "delta"),
        (lambda: VPL(start=-1), "start"),
        (lambda: QAFace(delta=-5), "delta"),
        (lambda: QAFace(ema=1.5), "ema"),
        (lambda: QAFace(tau=math.nan), "tau"),
        (lambda: QAFace(inject_scale=-1.0), "inject_scale"),
        (lambda: QAFace(on_reject="drop"), "on_reject"),
    ],
)
def test_policy_errors(make: Any, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        make()
    with pytest.raises(TypeError, match="delta"):
        VPL(delta=2.5)  # type: ignore[arg-type]


# -- the memory ----------------------------------------------------------------------------------------------------------


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
    with pytest.warns(UserWarning, match="evicts"):
        memory.write(*batch([5]), 2)
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


# -- state ---------------------------------------------------------------------------------------------------------------


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


def test_shards_together_equal_one_memory() -> None:
    whole, shards = filled(), [PrototypeMemory(9, 4, QAFace()) for _ in range(4)]
    for shard, start in zip(shards, (0, 3, 6, 9), strict=True):  # the last shard is empty
        shard.shard(start, min(start + 3, 9))
        shard.write(*batch([1, 5, 7, -1, 5], seed=1), 4)
        shard.write(*batch([1, 8], seed=2), 6)
    assert torch.equal(sum(shard.strength(6) for shard in shards), whole.strength(6))
    assert torch.equal(sum(shard.rows() for shard in shards), whole.rows())
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


# -- bad input -----------------------------------------------------------------------------------------------------------


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


# -- momentum encoder ----------------------------------------------------------------------------------------------------


def backbone() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 5))


def test_momentum_encoder_moves_parameters_and_copies_buffers() -> None:
    net = backbone()
    encoder = MomentumEncoder(net, gamma=0.9)
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    old = [parameter.clone() for parameter in encoder.key.parameters()]
    images = torch.randn(6, 3, 8, 8)
    net(images).sum().backward()  # moves the running statistics
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(1.0)
    encoder.update(net)
    for key, before, query in zip(encoder.key.parameters(), old, net.parameters(), strict=True):
        torch.testing.assert_close(key, 0.9 * before + 0.1 * query.detach())
    for key, query in zip(encoder.key.buffers(), net.buffers(), strict=True):
        assert torch.equal(key, query)
    keys = encoder(images)
    assert keys.shape == (6, 5) and not keys.requires_grad
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_momentum_encoder_mode_state_and_wrappers() -> None:
    net = backbone().eval()
    encoder = MomentumEncoder(net)
    assert not encoder.training and not encoder.key.training
    assert encoder.train().key.training
    other = MomentumEncoder(backbone())
    with torch.no_grad():
        other.key[3].weight.zero_()
    other.load_state_dict(encoder.state_dict())
    assert same_state(encoder, other)
    wrapped = MomentumEncoder(nn.DataParallel(net), gamma=0.5)
    wrapped.update(nn.DataParallel(net))
    wrapped.update(net)
    assert same_state(wrapped.key, net)
    assert same_state(copy.deepcopy(encoder), encoder)


def test_momentum_encoder_errors() -> None:
    net = backbone()
    with pytest.raises(ValueError, match="gamma"):
        MomentumEncoder(net, gamma=1.1)
    with pytest.raises(TypeError, match="backbone"):
        MomentumEncoder(lambda images: images)  # type: ignore[arg-type]
    encoder = MomentumEncoder(net)
    before = copy.deepcopy(encoder)
    with pytest.raises(ValueError, match="parameter '0.weight' of shape"):
        encoder.update(nn.Sequential(nn.Conv2d(3, 2, 3), *list(net)[1:]))
    with pytest.raises(ValueError, match="'3.bias' missing in the backbone"):
        encoder.update(nn.Sequential(*list(net)[:3], nn.Linear(4 * 36, 5, bias=False)))
    with pytest.raises(ValueError, match="'4.weight' missing in the key"):
        encoder.update(nn.Sequential(*net, nn.Linear(5, 5)))
    assert same_state(before, encoder)
