"""What a head costs on R ranks, from one model: messages of a step, memory of a rank by item, time by the roofline.

N rows of all ranks, n the most of one rank, C classes, K sub-centers, D embedding size, R ranks. Messages are those that
`sharding` makes, in their order (a test counts them); link bytes are those of ring algorithms: an all-gather of b bytes a rank
sends (R - 1) b, a reduce-scatter of b bytes in all (R - 1)/R b, an all-reduce twice that. Times are bounds, not measurements.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

HEADER = 24  # bytes: rows, digest of what must agree, flags
Kind = Literal["all-gather", "all-reduce", "reduce-scatter"]
_STATE = {"headsgd": 1, "sgd": 1, "adamw": 2}  # tensors like W that an optimizer keeps
_WORKSPACE = 64 << 20  # a chunk's exponentials, prototypes and dP: half the L2, and the library's own
_USABLE = 0.92  # of a device's memory: context, allocator, communication buffers


@dataclass(frozen=True)
class Device:
    """Data-sheet numbers of one accelerator: bytes, bytes/s, dense flop/s, bytes/s of one direction of its links."""

    name: str
    memory: float
    bandwidth: float
    float32: float
    bfloat16: float
    node_link: float  # to the others of its node
    network: float  # beyond it, per device
    node: int = 8  # devices of a node
    latency: float = 15e-6  # of one collective, seconds


DEVICES = {
    d.name: d
    for d in (
        Device("A100", 80e9, 2.04e12, 19.5e12, 312e12, 300e9, 25e9),
        Device("H100", 80e9, 3.35e12, 67e12, 989e12, 450e9, 50e9),
        Device("H200", 141e9, 4.8e12, 67e12, 989e12, 450e9, 50e9),
        Device("B200", 180e9, 7.7e12, 75e12, 2250e12, 900e9, 50e9),
    )
}


@dataclass(frozen=True)
class Message:
    """One collective: bytes are what a rank hands over (reduce-scatter: all ranks' rows)."""

    what: str
    kind: Kind
    bytes: int

    def sent(self, ranks: int) -> float:
        """Bytes a rank sends over its link, by ring algorithms."""
        if self.kind == "all-gather":
            return (ranks - 1) * self.bytes
        return (2 if self.kind == "all-reduce" else 1) * (ranks - 1) / ranks * self.bytes


@dataclass(frozen=True)
class Item:
    """Memory of one rank."""

    what: str
    bytes: int


@dataclass(frozen=True)
class Head:
    """A head and its batch: rows of each rank, unlabelled ones of each, and what the options add."""

    classes: int
    dimension: int
    rows: tuple[int, ...]
    subcenters: int = 1
    unlabelled: tuple[int, ...] = ()  # rows that count in the UIR excess
    element: int = 4  # bytes of an element of the embeddings
    weights: int = 0  # bytes of a sample weight, 0 without
    half: bool = False  # 16-bit sweeps
    keys: int = 0  # bytes of an element of the memory's keys, 0 without a memory
    per_row: bool = False  # reduction "none"
    optimizer: str = "headsgd"
    momentum: bool = True
    ring: int | None = None  # rows of a rank's memory; None: no memory

    @property
    def ranks(self) -> int:
        return len(self.rows)

    @property
    def total(self) -> int:
        return sum(self.rows)

    @property
    def local(self) -> int:
        """Classes of rank 0, which has the most."""
        return -(-self.classes // self.ranks)


def messages(head: Head) -> list[Message]:
    """Collectives of one training step (one micro-batch, with d_embeddings) in their order; none on one rank."""
    if head.ranks == 1:
        return []
    n, every, d, r = max(head.rows), head.total, head.dimension, head.ranks
    out = [
        Message("header: rows, agreement, errors", "all-gather", HEADER),
        Message("rows: x, label, sample weight", "all-gather", n * (d * head.element + 8 + head.weights)),
        Message("target cosines", "all-reduce", every * 4 * (2 if head.subcenters > 1 else 1)),
        Message("sums of exponentials", "all-reduce", every * 8),
        Message("nearest class: one key", "all-reduce", every * 8),
    ]
    if head.half:
        out.append(Message("nearest cosine in float32", "all-reduce", every * 4))
    unknown = sum(head.unlabelled)
    if unknown:
        out += [Message("UIR: nearest cosine", "all-reduce", unknown * 8), Message("UIR: three sums", "all-reduce", unknown * 24)]
    out.append(Message("pull and P_y to the row's owner", "reduce-scatter", r * n * 2 * d * 4))
    if unknown:
        out.append(Message("UIR: push to the row's owner", "reduce-scatter", r * max(head.unlabelled) * d * 4))
    if head.keys:
        out += [Message("header of the keys", "all-gather", HEADER), Message("keys and labels", "all-gather", n * (d * head.keys + 8))]
    if head.per_row:
        out.append(Message("upstream gradients of single rows", "all-gather", n * 4))
    return out


def memory(head: Head) -> list[Item]:
    """Bytes of the rank with the most classes, by item; without the backbone, its optimizer and its activations."""
    rows, d, n, every = head.local * head.subcenters, head.dimension, max(head.rows), head.total
    weight = 4 * rows * d
    items = [Item("W, float32", weight)]
    states = _STATE[head.optimizer] if head.momentum or head.optimizer == "adamw" else 0
    items += [Item("optimizer state of W", states * weight)] * (states > 0)
    if head.optimizer != "headsgd":
        items.append(Item("dW", weight))
    if head.ring is not None:
        ring = min(head.ring, head.local)
        items.append(Item("memory: rows in bfloat16, strength, stamp, owner, slot of a class", ring * (2 * d + 4 + 8 + 8) + 4 * head.local))
    scattered = 0 if head.ranks == 1 else 4 * d * (2 * every + 2 * head.ranks * n * (n * head.ranks != every) + 2 * n)
    items += [
        Item("rows of all ranks: x, x^ in float64 and float32", every * d * (head.element * (head.ranks > 1) + 12)),
        Item("pull and target prototypes", every * d * 8 + scattered),
        Item("workspace of the sweeps", _WORKSPACE),
    ]
    return items


def flops(head: Head) -> int:
    """Matrix flops of a rank's two sweeps: 8 N C K D / R."""
    return 8 * head.total * head.local * head.subcenters * head.dimension


def traffic(head: Head) -> int:
    """Bytes to and from memory that grow with the classes: W read by both sweeps; HeadSGD: state read, W and state written."""
    weight = 4 * head.local * head.subcenters * head.dimension
    state = _STATE[head.optimizer] if head.momentum or head.optimizer == "adamw" else 0
    update = (1 + 2 * state) * weight
    if head.optimizer != "headsgd":
        update += 3 * weight  # dW written, read; W read again
    return 2 * weight + update


@dataclass(frozen=True)
class Times:
    """Seconds of one step by the roofline: arithmetic and memory overlap, messages do not."""

    arithmetic: float
    memory: float
    messages: float

    @property
    def sweeps(self) -> float:
        return max(self.arithmetic, self.memory)

    @property
    def total(self) -> float:
        return self.sweeps + self.messages


def times(head: Head, device: Device) -> Times:
    """Of one step at the data sheet's peak: what no implementation can beat."""
    peak = device.bfloat16 if head.half else device.float32
    link = device.node_link if head.ranks <= device.node else device.network
    sent = sum(m.sent(head.ranks) / link + device.latency for m in messages(head))
    return Times(flops(head) / peak, traffic(head) / device.bandwidth, sent)


@dataclass(frozen=True)
class Report:
    """Items, messages, times; whether it fits, and what would make it fit."""

    head: Head
    device: Device
    items: list[Item]
    messages: list[Message]
    times: Times
    fits: bool
    advice: list[str] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        return sum(item.bytes for item in self.items)


def even(total: int, ranks: int) -> tuple[int, ...]:
    """`total` rows over the ranks, the first ones with one more."""
    return tuple(total // ranks + (r < total % ranks) for r in range(ranks))


def estimate(
    classes: int, gpus: int, batch: int, *, dimension: int = 512, device: str = "H100", optimizer: str = "headsgd", momentum: bool = True,
    half: bool = True, subcenters: int = 1, memory_steps: int = 0,
) -> Report:  # fmt: skip
    """Cost of a head of `classes` on `gpus` devices with `batch` rows of all of them a step; memory_steps: a prototype memory's delta.

    Raises ValueError for sizes below 1, an unknown device or optimizer.
    """
    for name, value in (("classes", classes), ("gpus", gpus), ("batch", batch), ("dimension", dimension), ("subcenters", subcenters)):
        if value < 1:
            raise ValueError(f"estimate: expected {name} >= 1, got {value}")
    if device not in DEVICES:
        raise ValueError(f"estimate: expected device in {', '.join(DEVICES)}, got {device!r}")
    if optimizer not in _STATE:
        raise ValueError(f"estimate: expected optimizer in {', '.join(_STATE)}, got {optimizer!r}")

    def head_of(ranks: int, optimizer: str = optimizer, momentum: bool = momentum) -> Head:
        ring = min(classes, memory_steps * batch) if memory_steps else None
        element = 2 if half else 4
        return Head(
            classes, dimension, even(batch, ranks), subcenters, element=element, half=half, keys=element if memory_steps else 0,
            optimizer=optimizer, momentum=momentum, ring=ring,
        )  # fmt: skip

    chosen, room = DEVICES[device], _USABLE * DEVICES[device].memory

    def fits(head: Head) -> bool:
        return sum(item.bytes for item in memory(head)) <= room

    head = head_of(gpus)
    advice = []
    if not fits(head):
        if optimizer != "headsgd" and fits(head_of(gpus, "headsgd")):
            advice.append("HeadSGD instead of an optimizer that needs dW")
        if momentum and optimizer != "adamw" and fits(head_of(gpus, momentum=False)):
            advice.append("momentum 0 for the head")
        more: int | None = next((1 << k for k in range(21) if 1 << k > gpus and fits(head_of(1 << k))), None)
        advice.append(f"{more} {device} instead of {gpus}" if more else "fewer rows a step: what does not shrink with the ranks is too large")
        larger = [name for name, d in DEVICES.items() if d.memory > chosen.memory and sum(i.bytes for i in memory(head)) <= _USABLE * d.memory]
        advice += [f"{gpus} {name}" for name in larger[:1]]
    return Report(head, chosen, memory(head), messages(head), times(head, chosen), fits(head), advice)


def crossover(classes: int, batch_per_gpu: int, *, device: str = "H100", dimension: int = 512, most: int = 1024) -> int | None:
    """The first power of two of ranks on which messages take longer than the sweeps; None up to `most`."""
    for k in range(1, int(math.log2(most)) + 1):
        ranks = 1 << k
        report = estimate(classes, ranks, batch_per_gpu * ranks, device=device, dimension=dimension)
        if report.times.messages > report.times.sweeps:
            return ranks
    return None


# -- text ------------------------------------------------------------------------------------------------------------------


def size(count: float) -> str:
    """Bytes for people: decimal units."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count:.0f} B"


def seconds(value: float) -> str:
    """Seconds for people."""
    return f"{value * 1e3:.3g} ms" if value >= 1e-3 else f"{value * 1e6:.3g} us"


def text(report: Report) -> str:
    """The report as `recog-fast estimate` prints it."""
    head, device, t = report.head, report.device, report.times
    lines = [
        f"{head.classes:,} classes x {head.dimension}, {head.ranks} {device.name}, {head.total} rows a step ({max(head.rows)} a device), "
        f"{'16-bit' if head.half else 'float32'} sweeps, {head.optimizer}",
        f"\nMemory of one device (of {size(device.memory)}; without the backbone)",
    ]
    lines += [f"  {size(item.bytes):>10}  {item.what}" for item in report.items]
    lines.append(f"  {size(report.bytes):>10}  together: {'fits' if report.fits else 'does not fit'}")
    lines += [f"  to make it fit: {one}" for one in report.advice]
    lines.append("\nMessages of one step (handed over by a device; sent over its link)")
    lines += [f"  {size(m.bytes):>10} {size(m.sent(head.ranks)):>10}  {m.kind:15} {m.what}" for m in report.messages] or ["  none"]
    lines += [
        "\nTime of one step by the roofline: no implementation is faster",
        f"  {seconds(t.arithmetic):>10}  arithmetic: {flops(head):.3g} flops",
        f"  {seconds(t.memory):>10}  memory: {size(traffic(head))}",
        f"  {seconds(t.messages):>10}  messages",
        f"  {seconds(t.total):>10}  together ({'messages' if t.messages > t.sweeps else 'arithmetic' if t.arithmetic > t.memory else 'memory'} first)",
    ]
    return "\n".join(lines)


def scale_table(device: str = "H100", batch_per_gpu: int = 128) -> str:
    """The table of docs/scale.md: memory of a device, sweeps and messages of a step, from 1 to 1024 devices and 1M to 1B classes."""
    lines = ["| classes | devices | memory of one | flops of one | sent by one | sweeps | messages |", "|---|---|---|---|---|---|---|"]
    for classes in (10**6, 10**7, 10**8, 10**9):
        for gpus in (1, 8, 64, 256, 1024):
            r = estimate(classes, gpus, batch_per_gpu * gpus, device=device)
            sent = sum(m.sent(gpus) for m in r.messages)
            lines.append(
                f"| {classes:,} | {gpus} | {size(r.bytes)}{'' if r.fits else ' (does not fit)'} | {flops(r.head):.3g} | {size(sent)} "
                f"| {seconds(r.times.sweeps)} | {seconds(r.times.messages)} |"
            )
    return "\n".join(lines)
