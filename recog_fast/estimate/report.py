"""estimate(): one head on a number of devices, whether it fits, and what would make it fit."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from .devices import DEVICES, Device
from .model import MOMENTA, STATES, WEIGHTS, Head, Item, Message, Times, flops, memory, messages, times, traffic

_MOST = 1 << 20  # devices that are tried


@dataclass(frozen=True)
class Option:
    """A change that was tried where something does not fit: bytes of a device with it."""

    what: str
    bytes: int
    fits: bool


@dataclass(frozen=True)
class Report:
    """Items, messages, times; whether it fits, and what was tried to make it fit."""

    head: Head
    device: Device
    items: list[Item]
    messages: list[Message]
    times: Times
    fits: bool
    options: list[Option] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        """Of all items."""
        return sum(item.bytes for item in self.items)

    @property
    def advice(self) -> list[str]:
        """The changes that make it fit."""
        return [option.what for option in self.options if option.fits]

    def plain(self) -> dict[str, Any]:
        """For JSON: bytes, bytes/s, flops, seconds."""
        t = self.times
        return {
            "head": dataclasses.asdict(self.head) | {"rows": list(self.head.rows)},
            "device": dataclasses.asdict(self.device),
            "memory": {"items": {i.what: i.bytes for i in self.items}, "bytes": self.bytes, "usable": self.device.usable, "fits": self.fits},
            "options": [dataclasses.asdict(option) for option in self.options],
            "messages": [dataclasses.asdict(m) | {"sent": m.sent(self.head.ranks)} for m in self.messages],
            "flops": flops(self.head),
            "traffic": traffic(self.head),
            "seconds": dataclasses.asdict(t) | {"total": t.total, "first": t.first},
        }


def even(total: int, ranks: int) -> tuple[int, ...]:
    """`total` rows over the ranks, the first ones with one more."""
    return tuple(total // ranks + (r < total % ranks) for r in range(ranks))


def estimate(
    classes: int, gpus: int, batch: int, *, dimension: int = 512, device: str | Device = "H100", optimizer: str = "headsgd", momentum: bool = True,
    half: bool = True, subcenters: int = 1, memory_steps: int = 0, weight_format: str = "float32", momentum_dtype: str = "float32",
    sample_rate: float = 1.0,
) -> Report:  # fmt: skip
    """Cost of a head of `classes` on `gpus` devices with `batch` rows of all of them a step; memory_steps: a prototype memory's delta.

    device: a name of DEVICES, or a Device. Raises ValueError for sizes below 1, memory_steps below 0, unknown names, and what
    `MarginHead` and `HeadSGD` refuse: formats without HeadSGD, planes on several devices, a sample_rate outside (0, 1].
    """
    for name, value in (("classes", classes), ("gpus", gpus), ("batch", batch), ("dimension", dimension), ("subcenters", subcenters)):
        if value < 1:
            raise ValueError(f"estimate: expected {name} >= 1, got {value}")
    if memory_steps < 0:
        raise ValueError(f"estimate: expected memory_steps >= 0, got {memory_steps}")
    _check_choices(optimizer, weight_format, momentum_dtype)
    if not 0 < sample_rate <= 1:
        raise ValueError(f"estimate: expected sample_rate in (0, 1], got {sample_rate}")
    if optimizer != "headsgd" and (weight_format, momentum_dtype) != ("float32", "float32"):
        raise ValueError(f"estimate: expected optimizer headsgd with weight_format {weight_format} and momentum_dtype {momentum_dtype}, got {optimizer}")
    if weight_format == "split" and gpus > 1:
        raise ValueError(f"estimate: expected weight_format float32 on several devices, got split on {gpus}")
    if isinstance(device, str):
        if device not in DEVICES:
            raise ValueError(f"estimate: expected device in {', '.join(DEVICES)}, got {device!r}")
        device = DEVICES[device]
    element = 2 if half else 4
    head = Head(
        classes, dimension, even(batch, gpus), subcenters, element=element, half=half, keys=element if memory_steps else 0,
        optimizer=optimizer, momentum=momentum, ring=min(classes, memory_steps * batch) if memory_steps else None,
        split=weight_format == "split", half_momentum=momentum_dtype == "bfloat16", sample_rate=sample_rate,
    )  # fmt: skip
    fits = _bytes(head, device) <= device.usable
    options = [] if fits else sorted(_options(head, device, memory_steps), key=lambda option: not option.fits)
    return Report(head, device, memory(head, device), messages(head), times(head, device), fits, options)


def _check_choices(optimizer: str, weight_format: str, momentum_dtype: str) -> None:
    for name, value, known in (
        ("optimizer", optimizer, tuple(STATES)),
        ("weight_format", weight_format, WEIGHTS),
        ("momentum_dtype", momentum_dtype, MOMENTA),
    ):
        if value not in known:
            raise ValueError(f"estimate: expected {name} in {', '.join(known)}, got {value!r}")


def _bytes(head: Head, device: Device) -> int:
    return sum(item.bytes for item in memory(head, device))


def _options(head: Head, device: Device, memory_steps: int) -> Iterator[Option]:
    """Every change that is known, with the bytes it leaves: of other arithmetic, of more or larger devices, of fewer rows."""

    def tried(what: str, **changes: Any) -> Option:
        size = _bytes(dataclasses.replace(head, **changes), device)
        return Option(what, size, size <= device.usable)

    if head.optimizer != "headsgd":
        own = {"optimizer": "headsgd"}
        yield tried("HeadSGD instead of an optimizer that needs dW", **own)
        yield tried("HeadSGD with bfloat16 momentum", **own, half_momentum=True)
    elif head.momentum and not head.half_momentum:
        yield tried("bfloat16 momentum", half_momentum=True)
    if head.momentum:
        adamw = head.optimizer == "adamw"
        what = "HeadSGD with momentum 0" if adamw else "momentum 0 for the head"
        yield tried(what, optimizer="headsgd" if adamw else head.optimizer, momentum=False, half_momentum=False)
    if head.optimizer == "headsgd" and not head.split and head.ranks == 1:
        yield tried("weight_format split", split=True)
    if head.sample_rate == 1:
        yield tried("sample_rate 0.1", sample_rate=0.1)
    if head.subcenters > 1:
        yield tried("one center per class", subcenters=1)
    more = (1 << k for k in range(1, int(math.log2(_MOST)) + 1) if 1 << k > head.ranks)
    wider = (tried(f"{count} {device.name} instead of {head.ranks}", rows=even(head.total, count), split=False) for count in more)
    last = None
    for last in wider:
        if last.fits:
            break
    if last is not None:
        yield last
    yield _fewer_rows(head, device, memory_steps)
    for other in DEVICES.values():
        if other.memory > device.memory and not device.host:
            size = _bytes(head, other)
            yield Option(f"{head.ranks} {other.name}", size, size <= other.usable)
            if size <= other.usable:
                break


def _fewer_rows(head: Head, device: Device, memory_steps: int) -> Option:
    """The most rows of a step that fit; where none do, what one row of each rank takes."""

    def of(rows: int) -> Head:
        return dataclasses.replace(head, rows=even(rows, head.ranks), ring=min(head.classes, memory_steps * rows) if memory_steps else None)

    low, high = 0, head.total
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _bytes(of(middle), device) <= device.usable else (low, middle)
    size = _bytes(of(max(low, 1)), device)
    return Option(f"{low} rows a step" if low else "fewer rows a step", size, low > 0)


def crossover(classes: int, batch_per_gpu: int, *, device: str = "H100", dimension: int = 512, most: int = 1024) -> int | None:
    """The first power of two of ranks on which messages take longer than the sweeps; None up to `most`.

    Raises ValueError as `estimate`.
    """
    for k in range(1, int(math.log2(most)) + 1):
        ranks = 1 << k
        report = estimate(classes, ranks, batch_per_gpu * ranks, device=device, dimension=dimension)
        if report.times.messages > report.times.sweeps:
            return ranks
    return None
