"""What a device can do: data-sheet numbers of accelerators; of a host what was measured on it."""

from __future__ import annotations

from dataclasses import dataclass

WORKSPACE = 64 << 20  # a chunk's exponentials, prototypes and dP: half the L2, and the library's own
HOST_WORKSPACE = 12 << 20  # of the CPU kernels: chunks of the planes and of a bfloat16 velocity (docs/math.md 1.5)
# Resident set of a process after one step of a tiny head: interpreter, NumPy, torch 2.13 with torch.optim's imports (measured).
PROCESS = 377_000_000


@dataclass(frozen=True)
class Device:
    """Bytes, bytes/s, flop/s of dense products, bytes/s of one direction of its links."""

    name: str
    memory: float
    bandwidth: float
    float32: float
    bfloat16: float
    node_link: float | None  # to the others of its node; None: not known
    network: float | None  # beyond it, per device
    node: int = 8  # devices of a node
    latency: float = 15e-6  # of one collective, seconds
    host: bool = False  # a CPU: its numbers are measured, and the process itself is in its memory

    def link(self, ranks: int) -> float | None:
        """Of a group of that many."""
        return self.node_link if ranks <= self.node else self.network

    @property
    def usable(self) -> float:
        """Bytes left for a head: without context, allocator, communication buffers (a host: the system)."""
        return 0.92 * self.memory


DEVICES = {
    d.name: d
    for d in (
        Device("A100", 80e9, 2.04e12, 19.5e12, 312e12, 300e9, 25e9),
        Device("H100", 80e9, 3.35e12, 67e12, 989e12, 450e9, 50e9),
        Device("H200", 141e9, 4.8e12, 67e12, 989e12, 450e9, 50e9),
        Device("B200", 180e9, 7.7e12, 75e12, 2250e12, 900e9, 50e9),
    )
}
