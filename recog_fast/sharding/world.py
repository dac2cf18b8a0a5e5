"""The processes of a training run: one without a process group, or the ranks of one, and how they act together."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from .group import ShardGroup

T = TypeVar("T")

_PATIENCE = timedelta(days=7)  # ranks wait so long for what rank 0 does alone
_GRACE = 5.0  # seconds in which ranks that lost another say so
_START = 60.0  # seconds that starting may take at least, whatever the timeout


class RanksError(RuntimeError):
    """Ranks that hang or are gone; the message names them."""


class World:
    """Rank and size of this process, and what all ranks do together; of one process (`World()`) everything is itself.

    group: the process group of all ranks; store: a torch.distributed store they share, by which a rank that hangs is named;
    patient: a group of the same ranks that waits long, for what rank 0 does alone. timeout: seconds, for messages.
    """

    def __init__(
        self, group: dist.ProcessGroup | None = None, *, store: Any = None, patient: dist.ProcessGroup | None = None, timeout: float = 0.0
    ) -> None:
        self.shards = None if group is None or dist.get_world_size(group) == 1 else ShardGroup(group)
        self.rank, self.size = (0, 1) if self.shards is None else (self.shards.rank, self.shards.size)
        self._patient = self.shards if patient is None else ShardGroup(patient)
        self._store, self.timeout = store, timeout
        if self.shards is not None and timeout:
            self.shards.timeout = timedelta(seconds=timeout)

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The process group; None for one process."""
        return None if self.shards is None else self.shards.group

    def share(self, rows: int) -> slice:
        """This rank's of `rows` rows: contiguous, in rank order, sizes differ by one at most."""
        whole, rest = divmod(rows, self.size)
        start = self.rank * whole + min(self.rank, rest)
        return slice(start, start + whole + (self.rank < rest))

    # -- agreement -------------------------------------------------------------------------------------------------------

    def agree(self, where: str, facts: Mapping[str, object]) -> None:
        """ValueError on every rank, naming the fact and two ranks, where facts differ."""
        if self.shards is not None:
            self.shards.agree(where, lambda: None, facts)

    def together(self, where: str, act: Callable[[], T]) -> T:
        """act() on every rank; an error of one is raised there, a ValueError that names it on the others."""
        if self.shards is None:
            return act()
        done: list[T] = []
        self.shards.agree(where, lambda: done.append(act()), {})
        return done[0]

    def first(self, act: Callable[[], T]) -> T:
        """act() on rank 0 alone; every rank gets what it returns (small, of plain types), however long it takes. Its error
        is raised there, a ValueError that tells it on the others."""
        if self._patient is None:
            return act()
        result: Any = None
        failure: Exception | None = None
        if self.rank == 0:
            try:
                result = act()
            except Exception as error:
                failure = error
        told, text = self._patient.exchange((result, None if failure is None else f"{type(failure).__name__}: {failure}"))[0]
        if failure is not None:
            raise failure
        if text is not None:
            raise ValueError(f"rank 0 failed: {text}")
        return cast("T", told)

    def exchange(self, value: T) -> list[T]:
        """Every rank's value (small, of plain types), in rank order."""
        return [value] if self.shards is None else self.shards.exchange(value)

    def sum(self, values: list[int]) -> list[int]:
        """Sums over the ranks of as many whole numbers on each; in host memory, no device is waited for."""
        if self.shards is None:
            return values
        total = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(total, group=self.shards.hosts)
        summed: list[int] = total.tolist()
        return summed

    # -- tensors ---------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def average_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Mean of .grad over the ranks in one all-reduce (None counts as 0), for modules that are not wrapped."""
        if self.shards is None:
            return
        chosen = list(parameters)
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten().float() for p in chosen])
        self.shards.sum_(flat).div_(self.size)
        for p, part in zip(chosen, flat.split([p.numel() for p in chosen]), strict=True):
            p.grad = part.reshape(p.shape).to(p.dtype)

    @torch.no_grad()
    def copy_first(self, tensors: Iterable[Tensor]) -> None:
        """Overwrites tensors with rank 0's."""
        if self.shards is not None:
            for tensor in tensors:
                dist.broadcast(tensor, group=self.shards.group, group_src=0)

    # -- faults ----------------------------------------------------------------------------------------------------------

    @contextmanager
    def watch(self, where: Callable[[], str]) -> Iterator[None]:
        """What fails inside because another rank hangs or is gone becomes a RanksError that names it; `where` says what was going on."""
        try:
            yield
        except RuntimeError as error:
            if self.shards is None or isinstance(error, RanksError) or not _is_lost(error):
                raise
            raise RanksError(f"{where()}: {self._who(error)}") from error

    def _who(self, error: RuntimeError) -> str:
        reason = str(error).strip().splitlines()[0][:200]
        if self._store is None:
            return f"rank {self.rank} of {self.size} lost another rank ({reason})"
        absent = self._absent()
        if not absent:
            return f"every rank lost another: the connection between them broke ({reason})"
        names = f"rank{'s' if len(absent) > 1 else ''} {', '.join(map(str, absent))}"
        waited = f" within {self.timeout:g} s" if "imed out" in reason or "imeout" in reason else ""
        return f"{names} of {self.size} did not answer{waited} (hangs or is gone); rank {self.rank} waited for it ({reason})"

    def _absent(self) -> list[int]:
        """Ranks that have not said within a few seconds that they lost another: those that were lost."""
        left = set(range(self.size)) - {self.rank}
        end = time.monotonic() + _GRACE
        try:
            self._store.set_timeout(timedelta(seconds=_GRACE))
            self._store.set(f"lost/{self.rank}", "1")
            while left and time.monotonic() < end:
                time.sleep(0.1)
                left = {rank for rank in left if not self._store.check([f"lost/{rank}"])}
                if len(left) == 1:  # somebody must be the one
                    end = min(end, time.monotonic() + 1.0)
        except RuntimeError:
            return [0]  # which keeps the store
        return sorted(left)


def _is_lost(error: RuntimeError) -> bool:
    text = str(error)
    return isinstance(error, getattr(dist, "DistError", ())) or "gloo" in text or "NCCL" in text or "Connection" in text


# -- from the environment --------------------------------------------------------------------------------------------------


def environment() -> tuple[int, int, int]:
    """(rank, ranks, local rank) of RANK, WORLD_SIZE, LOCAL_RANK as torchrun sets them; (0, 1, 0) without WORLD_SIZE.

    Raises ValueError where they are no such numbers, or what several ranks need is missing.
    """
    values = {}
    for name, default in (("WORLD_SIZE", "1"), ("RANK", "0"), ("LOCAL_RANK", os.environ.get("RANK", "0"))):
        text = os.environ.get(name, default)
        if not (text.isascii() and text.isdigit()):
            raise ValueError(f"train: expected {name} in the environment as a whole number >= 0, got {text!r}")
        values[name] = int(text)
    size = values["WORLD_SIZE"]
    if size == 1:
        return 0, 1, 0
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if size < 1 or missing or values["RANK"] >= size:
        got = f"without {', '.join(missing)}" if missing else f"RANK={values['RANK']}"
        raise ValueError(f"train: expected WORLD_SIZE >= 1, RANK in [0, WORLD_SIZE), MASTER_ADDR and MASTER_PORT (torchrun sets them), got WORLD_SIZE={size} {got}")
    port = os.environ["MASTER_PORT"]
    if not (port.isascii() and port.isdigit() and int(port) < 1 << 16):
        raise ValueError(f"train: expected MASTER_PORT in the environment as a port below 65536, got {port!r}")
    return values["RANK"], size, values["LOCAL_RANK"]


def one_process(where: str) -> None:
    """ValueError where torchrun (or the like) started several ranks of what runs in one process."""
    size = environment()[1]
    if size > 1:
        raise ValueError(f"{where}: expected one process, got WORLD_SIZE={size}: only `train` runs over ranks")


@contextmanager
def joined(timeout: float, cuda: bool) -> Iterator[World]:
    """The ranks of the environment (torchrun, or RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT set otherwise); gloo, with `cuda` NCCL beside it.

    One process makes no group. A group that is there already is used and left. timeout: seconds a rank may be waited for.
    Raises ValueError for an environment that does not fit, on every rank where ranks were given different WORLD_SIZEs.
    """
    if dist.is_available() and dist.is_initialized():
        yield World(dist.group.WORLD, timeout=timeout)
        return
    rank, size, _ = environment()
    if size == 1:
        yield World()
        return
    store = _store(rank, timedelta(seconds=max(timeout, _START)))
    _check_sizes(store, rank, size)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    inner = dist.PrefixStore("group", store)  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=inner, rank=rank, world_size=size, timeout=timedelta(seconds=timeout))
    patient = dist.new_group(backend="gloo", timeout=_PATIENCE)
    assert isinstance(patient, dist.ProcessGroup)
    try:
        yield World(dist.group.WORLD, store=store, patient=patient, timeout=timeout)
    except Exception as error:
        if isinstance(error, (ValueError, ArithmeticError)):  # which all ranks raise; else leaving the group may wait for the others
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def _store(rank: int, timeout: timedelta) -> Any:
    """The store of MASTER_ADDR and MASTER_PORT, which may be waited for so long, with keys of this attempt alone.

    torchrun's agent keeps one store over restarts (torch 2.13), where gloo would find the addresses of the ranks that died.
    """
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    try:
        store = dist.TCPStore(host, int(port), is_master=rank == 0 and not agent, timeout=timeout, wait_for_workers=False)  # type: ignore[attr-defined]
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"train: expected a store of the ranks at MASTER_ADDR={host} MASTER_PORT={port}, got: {str(error).splitlines()[0]}") from error
    return dist.PrefixStore(f"recog_fast {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)  # type: ignore[attr-defined]


def _check_sizes(store: Any, rank: int, size: int) -> None:
    """ValueError on every rank where one has another WORLD_SIZE than rank 0, or one does not start."""
    store.set(f"size/{rank}", str(size))
    if rank == 0:
        verdict = ""
        for other in range(1, size):
            try:
                said = int(store.get(f"size/{other}"))
            except RuntimeError:
                verdict = verdict or f"rank {other} of {size} did not start"
                break
            if said != size:
                verdict = verdict or f"got WORLD_SIZE={size} on rank 0 and {said} on rank {other}"
        store.set("verdict", verdict)
    else:
        try:
            verdict = store.get("verdict").decode()
        except RuntimeError:
            verdict = "rank 0 did not start"
    if verdict:
        raise ValueError(f"train: expected the same WORLD_SIZE on every rank and all of them to start, {verdict}")
