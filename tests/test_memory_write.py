"""The memory write against a slow Python model: math.md section 2."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from recog_fast.ops.memory_write import memory_write, reference_memory_write

F64 = torch.float64
RECORDED: dict[str, Tensor] = {}


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


def empty_ring(size: int, classes: int, dim: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        torch.zeros(size, dim, dtype=F64),
        torch.zeros(size, dtype=F64),
        torch.full((size,), -1),
        torch.full((size,), -1),
        torch.full((classes,), -1, dtype=torch.int32),
        torch.zeros((), dtype=torch.int64),
    )


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
        a, b, c, d, e, f = (torch.zeros(4, 4, dtype=torch.int16) if i == index else t for i, t in enumerate(ring))
        with pytest.raises(ValueError, match=word):
            memory_write(a, b, c, d, e, f, x, y, s, 0)
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
