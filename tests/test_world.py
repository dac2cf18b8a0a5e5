"""The environment of ranks: what it must say, and that all of them are told when it does not fit."""

from __future__ import annotations

import threading
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from recog_fast.sharding import World, environment, load_optimizer, one_process
from recog_fast.sharding.world import _check_sizes
from recog_fast.training.sweep import sweep


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "two"}, "expected WORLD_SIZE in the environment as a whole number >= 0, got 'two'"),
        ({"WORLD_SIZE": "2", "RANK": "-1"}, "expected RANK in the environment as a whole number"),
        ({"WORLD_SIZE": "2"}, "got WORLD_SIZE=2 without RANK, MASTER_ADDR, MASTER_PORT"),
        ({"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}, r"RANK in \[0, WORLD_SIZE\).*got WORLD_SIZE=2 RANK=2"),
        ({"WORLD_SIZE": "0"}, "expected WORLD_SIZE >= 1"),
        ({"WORLD_SIZE": "\u00b2"}, "expected WORLD_SIZE in the environment as a whole number"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "99999"}, "expected MASTER_PORT .* below 65536, got '99999'"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "one"}, "expected MASTER_PORT .* below 65536, got 'one'"),
    ],
)
def test_an_environment_that_does_not_fit_is_named(variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert environment() == (0, 1, 0)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for refused in (environment, lambda: one_process("sweep")):
        with pytest.raises(ValueError, match=message):
            refused()


def test_what_runs_in_one_process_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="sweep: expected one process, got WORLD_SIZE=2"):
        sweep(tmp_path / "sweep.yaml", tmp_path)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ([2, 2], ""),
        ([2, 3], "got WORLD_SIZE=2 on rank 0 and 3 on rank 1"),
        ([3, 3], "rank 2 of 3 did not start"),
    ],
)
def test_ranks_of_different_world_sizes_all_refuse(sizes: list[int], message: str) -> None:
    store = dist.HashStore()  # type: ignore[attr-defined]
    store.set_timeout(timedelta(seconds=1 if message.startswith("rank 2") else 30))
    told: dict[int, str] = {}

    def join(rank: int) -> None:
        try:
            _check_sizes(store, rank, sizes[rank])
            told[rank] = ""
        except ValueError as error:
            told[rank] = str(error)

    threads = [threading.Thread(target=join, args=(rank,)) for rank in range(len(sizes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert told[0].endswith(message)
    assert bool(told[0]) == bool(told[1]) == bool(message)


def test_shares_cover_the_rows_in_order() -> None:
    for size in (1, 3, 4):
        for rows in (0, 2, 7, 12):
            found: list[int] = []
            for rank in range(size):
                world = World()
                world.rank, world.size = rank, size
                found += range(rows)[world.share(rows)]
            assert found == list(range(rows))


def test_a_state_of_more_parameters_is_refused_as_torch_refuses_it() -> None:
    def optimizer(count: int) -> torch.optim.Optimizer:
        made = torch.optim.SGD([torch.nn.Parameter(torch.ones(2)) for _ in range(count)], lr=0.1, momentum=0.9)
        for parameter in made.param_groups[0]["params"]:
            parameter.grad = torch.ones(2)
        made.step()
        return made

    with pytest.raises(ValueError, match="size of optimizer's group"):
        load_optimizer(optimizer(1), optimizer(2).state_dict())
