"""Each operation alone, compiled kernel against plain PyTorch reference, by pytest-benchmark in CPU time of one thread.

The gate comes first: both must match the reference run in float64. `--benchmark-only`, `--benchmark-group-by=param:stem`,
`--benchmark-json` and the rest of pytest-benchmark's options apply.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import recog_fast as rf
from recog_fast import native, reference

from .problems import SCALE, make_problem
from .protocol import one_thread
from .truth import relative

Arguments = tuple[Any, ...]
_OPTIMIZER = (0.1, 0.9, 5e-4, False)  # lr, momentum, weight decay, nesterov
_SLOTS, _LIMIT = 2048, 1e-4


def _inputs(stem: str, rows: int, classes: int, dimension: int) -> Arguments:
    """Arguments of `torch.ops.recog_fast.<stem>` in float32, built in float64 where one depends on another."""
    problem = make_problem("R0", rows, classes, dimension)
    unit, _ = reference.unit_rows(problem.embeddings)
    generator = torch.Generator().manual_seed(3)
    slot = torch.full((classes,), -1, dtype=torch.int32)
    slot[torch.randperm(classes, generator=generator)[:_SLOTS]] = torch.arange(min(_SLOTS, classes), dtype=torch.int32)
    stored, _ = reference.unit_rows(torch.randn(_SLOTS, dimension, generator=generator))
    memory = (stored, torch.full((_SLOTS,), 0.176), slot)
    if stem == "effective_prototypes":
        return (problem.weight, *memory, True)
    if stem == "memory_write":
        return _memory_arguments(stored, unit, problem.labels, slot)
    if stem == "negative_logsumexp":
        return (unit, problem.weight, problem.labels, SCALE, None, *memory, False, True)
    whole = reference.negative_logsumexp(
        unit.double(), problem.weight.double(), torch.full((rows,), -1), SCALE, None, *memory
    )
    if stem == "unknown_rejection":
        largest = torch.exp(SCALE * whole[1] - whole[0])
        return (unit, problem.weight, whole[2], whole[0], largest * torch.expm1(largest), SCALE, *memory, False, True)
    terms = torch.zeros(reference.TERM_ROWS, rows)
    terms[0], terms[1], terms[2] = whole[0], SCALE / rows, -SCALE / rows
    common = (unit, problem.labels, terms, problem.weight)
    if stem == "class_gradient":
        return (*common, SCALE, None, *memory, False, True)
    return (*common, problem.velocity, SCALE, None, *memory, True, *_OPTIMIZER)


def _memory_arguments(stored: Tensor, unit: Tensor, labels: Tensor, slot: Tensor) -> Arguments:
    owner = torch.full((_SLOTS,), -1, dtype=torch.int64)
    used = slot >= 0
    owner[slot[used].long()] = used.nonzero().squeeze(1)
    cursor, stamp = used.sum(), torch.where(owner >= 0, 5, -1)
    return stored, torch.full((_SLOTS,), 0.176), stamp, owner, slot, cursor, unit, labels, torch.ones(labels.numel()), 6


def _copies(arguments: Arguments, dtype: torch.dtype) -> Arguments:
    """Clones, floating ones in `dtype`."""
    return tuple(
        (a.to(dtype) if a.is_floating_point() else a).clone() if isinstance(a, Tensor) else a for a in arguments
    )


def _outputs(stem: str, run: Callable[..., Any], arguments: Arguments) -> list[Tensor]:
    """What the operation returns, or what it wrote."""
    returned = run(*arguments)
    if stem == "class_step":
        return [arguments[3], arguments[4]]
    if stem == "memory_write":
        return list(arguments[:6])
    return list(returned) if isinstance(returned, tuple) else [returned]


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("stem", sorted(rf.ops.SCHEMAS))
@pytest.mark.benchmark(timer=time.process_time, max_time=0.3, min_rounds=5, warmup=True, warmup_iterations=1)
def test_op(benchmark: Any, stem: str, backend: str, sizes: str) -> None:
    """Gate against float64, then time at 32 x 4000 (toy) or 64 x 20000 x 512."""
    if backend == "auto" and native.load()[0] is None:
        pytest.skip(f"compiled kernels {native.load()[1]}")
    if backend == "auto" and stem == "memory_write":
        pytest.skip("memory_write has no compiled kernel: N rows of one batch, run by its reference")
    rows, classes = (32, 4000) if sizes == "toy" else (64, 20_000)
    arguments = _inputs(stem, rows, classes, 512)
    run = getattr(torch.ops.recog_fast, stem)
    benchmark.group = stem
    with one_thread(), rf.ops.use_backend(backend), torch.no_grad():
        got = _outputs(stem, run, _copies(arguments, torch.float32))
        want = _outputs(stem, run, _copies(arguments, torch.float64))
        for value, truth in zip(got, want, strict=True):
            assert relative(value, truth.double()) < _LIMIT, stem
        benchmark(run, *_copies(arguments, torch.float32))
