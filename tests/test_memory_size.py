"""What a prototype memory costs at millions of classes, and what it does with input it cannot use."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

import recog_fast as rf
from recog_fast.memory import VPL, PrototypeMemory, QAFace


def allocated(memory: PrototypeMemory) -> int:
    """Bytes of everything the memory holds."""
    return sum(b.numel() * b.element_size() for b in memory.buffers())


def predicted(classes: int, dimension: int, capacity: int) -> int:
    """bf16 row, float32 strength, int64 stamp and owner of each slot; int32 slot of each class; ten 0-dim values."""
    return capacity * (2 * dimension + 4 + 8 + 8) + 4 * classes + 12 * 8


@pytest.mark.parametrize(("classes", "dimension", "capacity"), [(50, 8, 20), (1000, 512, 1), (3, 2, 3)])
def test_bytes_are_what_the_arithmetic_says(classes: int, dimension: int, capacity: int) -> None:
    memory = PrototypeMemory(classes, dimension, QAFace(), capacity=capacity)
    assert abs(allocated(memory) - predicted(classes, dimension, capacity)) <= 64


def test_ten_million_classes_fit_in_1200_megabytes() -> None:
    """Delta_t * batch = 1M valid rows at D = 512; a memory of C x D rows in bf16 alone would be 10.2 GB."""
    assert 1.05e9 < predicted(10_000_000, 512, 1_000_000) < 1.2e9


def test_a_million_classes_for_real() -> None:
    """C = 1M, D = 512, a ring of 8,192 rows: 20 batches of 512 rows; the newest 16 stay, each class injected at its own place."""
    classes, capacity, rows = 1_000_000, 8_192, 512
    memory = PrototypeMemory(classes, 512, VPL(lam=0.5, delta=1000, start=0), capacity=capacity)
    assert allocated(memory) < 12.6e6 < classes * 512 * 2 / 80
    generator = torch.Generator().manual_seed(0)
    ids = torch.randperm(classes, generator=generator)[: 20 * rows].reshape(20, rows)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the ring is smaller than what could be valid: it says so
        for step, labels in enumerate(ids):
            memory.write(_unit(labels), labels, step)
            memory.flush()
    stats = memory.stats(20)
    assert stats == {"live": capacity, "rejected": 0, "stale": 0, "evicted": 4 * rows}
    stored, strength = memory.gather(ids[4:].reshape(-1), 20)
    torch.testing.assert_close(stored.float(), _unit(ids[4:].reshape(-1)), rtol=2**-8, atol=0)
    assert bool((strength == 0.5).all())
    assert not bool(memory.gather(ids[:4].reshape(-1), 20)[1].any())
    assert int((memory.strength(20) > 0).sum()) == capacity


def _unit(labels: Tensor) -> Tensor:
    """(N, 512): a direction that only this class has."""
    x = torch.zeros(len(labels), 512)
    at = torch.arange(len(labels))
    x[at, labels % 512] += 0.6
    x[at, (labels // 512 + 1 + labels % 512) % 512] += 0.8
    return torch.nn.functional.normalize(x, dim=1)


def test_normalised_embeddings_have_no_quality_and_are_noticed_once() -> None:
    memory = PrototypeMemory(4, 8, QAFace())
    unit = torch.nn.functional.normalize(torch.randn(4, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    with pytest.warns(
        UserWarning, match="QAFace weighs samples by the norm of raw embeddings, and all of these have norm 1"
    ):
        memory.write(unit, torch.tensor([0, 1, 2, 3]), 0)
    # Equal norms but for float32: n^ = 0 (sigma counts as 1e-6 mu), every sample enters with strength 1.
    assert memory.strength(1).tolist() == pytest.approx([1.0] * 4, abs=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        memory.write(unit, torch.tensor([0, 1, 2, 3]), 1)
        for policy, rows in ((QAFace(), 7 * unit), (VPL(), unit)):
            PrototypeMemory(4, 8, policy).write(rows, torch.tensor([0, 1, 2, 3]), 0)
        one = PrototypeMemory(4, 8, QAFace())
        one.write(unit, torch.tensor([0, -1, -1, -1]), 0)  # one row says nothing


@pytest.mark.parametrize("on_reject", ["overwrite", "skip"])
def test_a_batch_rejected_whole(on_reject: str) -> None:
    """Overwrite: its classes lose their entries' strength; skip: nothing changes but the statistics and the count. The head's
    prototypes are then W^ (overwrite), its loss finite."""
    generator = torch.Generator().manual_seed(0)
    memory = PrototypeMemory(6, 8, QAFace(tau=1.0, ema=0.999, on_reject=on_reject))
    head = rf.MarginHead(6, 8, memory=memory)
    first = 10 * torch.randn(6, 8, generator=generator)
    labels = torch.arange(6)
    optimizer = rf.HeadSGD(head, lr=0.0)
    head(first, labels, keys=first).backward()
    optimizer.step()
    before = memory.strength(1)
    accepted = memory.stats()["rejected"]
    loss = head(first, labels, keys=first / 100)
    loss.backward()
    optimizer.step()
    assert bool(torch.isfinite(loss)) and memory.stats()["rejected"] == accepted + 6
    after = memory.strength(2)
    if on_reject == "skip":
        assert torch.equal(after, before) and bool(after.any())
    else:
        assert not bool(after.any())
        torch.testing.assert_close(head.prototypes(), torch.nn.functional.normalize(head.weight.detach(), dim=1))
