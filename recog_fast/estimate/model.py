"""What a head costs on R ranks, from one model: messages of a step, memory of a rank by item, time by the roofline.

N rows of all ranks, n the most of one rank, C classes, K sub-centers, D embedding size, R ranks. Messages are those that
`sharding` makes, in their order (a test counts them); link bytes are those of ring algorithms: an all-gather of b bytes a rank
sends (R - 1) b, a reduce-scatter of b bytes in all (R - 1)/R b, an all-reduce twice that. Times are bounds, not measurements.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from .devices import HOST_WORKSPACE, PROCESS, WORKSPACE, Device

HEADER = 24  # bytes: rows, digest of what must agree, flags
Kind = Literal["all-gather", "all-reduce", "reduce-scatter"]
STATES = {"headsgd": 1, "sgd": 1, "adamw": 2}  # tensors like W that an optimizer keeps
WEIGHTS = ("float32", "split")  # formats of W
MOMENTA = ("float32", "bfloat16")  # of HeadSGD's velocity


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
    split: bool = False  # weight_format "split": the same bytes as float32
    half_momentum: bool = False  # momentum_dtype bfloat16
    sample_rate: float = 1.0

    @property
    def ranks(self) -> int:
        """R."""
        return len(self.rows)

    @property
    def total(self) -> int:
        """N, the rows of all ranks."""
        return sum(self.rows)

    @property
    def local(self) -> int:
        """Classes of rank 0, which has the most."""
        return -(-self.classes // self.ranks)

    @property
    def swept(self) -> int:
        """Classes of rank 0 that are a step's negatives."""
        return self.local if self.sample_rate == 1 else max(1, int(self.sample_rate * self.local))

    @property
    def state(self) -> int:
        """Bytes that the optimizer keeps for an element of W."""
        if not self.momentum and self.optimizer != "adamw":
            return 0
        return STATES[self.optimizer] * (2 if self.half_momentum else 4)


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


def buckets(parameters: Sequence[int], cap: int = 25 << 20, first: int = 1 << 20) -> list[Message]:
    """All-reduces of DistributedDataParallel from its second step on; parameters: bytes of each gradient, in the order they are ready.

    A bucket closes with the gradient that fills it (its first one at `first` bytes), so none is ever cut in two. Buffers that a
    forward broadcasts (BatchNorm's) are not in it.
    """
    out, held, limit = [], 0, min(first, cap)
    for size in parameters:
        held += size
        if held >= limit:
            out.append(held)
            held, limit = 0, cap
    return [Message("gradients of the backbone", "all-reduce", size) for size in [*out, *([held] if held else [])]]


def memory(head: Head, device: Device | None = None) -> list[Item]:
    """Bytes of the rank with the most classes, by item; without the backbone, its optimizer and its activations."""
    rows, d, n, every = head.local * head.subcenters, head.dimension, max(head.rows), head.total
    host = device is not None and device.host
    items = [Item("W, bfloat16 and int16 planes" if head.split else "W, float32", 4 * rows * d)]
    if head.state:
        items.append(Item(f"optimizer state of W{', bfloat16' if head.half_momentum else ''}", head.state * rows * d))
    if head.optimizer != "headsgd":
        items.append(Item("dW", 4 * rows * d))
    if head.ring is not None:
        ring = min(head.ring, head.local)
        items.append(Item("memory: rows in bfloat16, strength, stamp, owner, slot of a class", ring * (2 * d + 4 + 8 + 8) + 4 * head.local))
    if head.sample_rate < 1:
        # drawn on the host: random words, priorities and class ids at once (4 + 8 + 8 bytes a class)
        items.append(Item("sampled classes", 20 * head.local if host else 8 * head.swept))
    scattered = 0 if head.ranks == 1 else 4 * d * (2 * every + 2 * head.ranks * n * (n * head.ranks != every) + 2 * n)
    items += [
        Item("rows of all ranks: x, x^ in float64 and float32", every * d * (head.element * (head.ranks > 1) + 12)),
        Item("pull and target prototypes", every * d * 8 + scattered),
        Item("workspace of the sweeps", HOST_WORKSPACE if host else WORKSPACE),
    ]
    return [*items, Item("the process: interpreter, libraries", PROCESS)] if host else items


def flops(head: Head) -> int:
    """Matrix flops of a rank's two sweeps: 8 N C K D / R, C the classes that are swept."""
    return 8 * head.total * head.swept * head.subcenters * head.dimension


def traffic(head: Head) -> int:
    """Bytes to and from memory that grow with the classes: W read by both sweeps; HeadSGD: state read, W and state written.

    Sampled: the forward sweep reads the sampled classes alone; momentum and decay move all of them (unsampled="dense").
    """
    width = head.subcenters * head.dimension
    every, swept = head.local * width, head.swept * width
    moved = (4 + 2 * head.state) * every  # W written, state read and written
    if head.optimizer == "headsgd":
        return 4 * swept + 4 * every + moved
    return 2 * 4 * swept + 3 * 4 * every + moved  # dW written, read; W read again


@dataclass(frozen=True)
class Times:
    """Seconds of one step by the roofline: arithmetic and memory overlap, messages do not."""

    arithmetic: float
    memory: float
    messages: float

    @property
    def sweeps(self) -> float:
        """Of both sweeps: what is slower, arithmetic or memory."""
        return max(self.arithmetic, self.memory)

    @property
    def total(self) -> float:
        """Of the step: sweeps, then messages."""
        return self.sweeps + self.messages

    @property
    def first(self) -> str:
        """What takes longest."""
        return "messages" if self.messages > self.sweeps else "arithmetic" if self.arithmetic > self.memory else "memory"


def times(head: Head, device: Device) -> Times:
    """Of one step at the device's peaks: what no implementation can beat.

    Raises ValueError for several ranks over a link of unknown speed.
    """
    peak = device.bfloat16 if head.half else device.float32
    link = device.link(head.ranks)
    if head.ranks > 1 and link is None:
        raise ValueError(f"estimate: expected the speed of a link between several of device {device.name!r}, got none")
    sent = sum(m.sent(head.ranks) / (link or 1.0) + device.latency for m in messages(head))
    return Times(flops(head) / peak, traffic(head) / device.bandwidth, sent)
