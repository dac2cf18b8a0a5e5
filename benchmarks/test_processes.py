"""Two processes against one: the gate at a toy size; `python -m benchmarks.processes` measures."""

from __future__ import annotations

from . import processes


def test_two_processes_train_as_one_does() -> None:
    found = processes.measured(2, (9, 301, 16), "float32", 3)
    assert found["loss_error"] <= 1e-6 and found["weight_error"] <= 1e-5
    assert found["ratio"]["median"] > 0
