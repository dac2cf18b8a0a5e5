"""Reports for people, and the tables of docs/scale.md."""

from __future__ import annotations

from .model import flops, traffic
from .report import Report, estimate
from .stored import Measured


def size(count: float) -> str:
    """Bytes for people: decimal units."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count:.0f} B"


def seconds(value: float) -> str:
    """Seconds for people."""
    return f"{value * 1e3:.3g} ms" if value >= 1e-3 else f"{value * 1e6:.3g} us"


def text(report: Report, measured: Measured | str | None = None) -> str:
    """The report as `recog-fast estimate` prints it; measured: a stored time of that step, or why there is none."""
    head, device, t = report.head, report.device, report.times
    formats = [head.optimizer, *["W in two planes"] * head.split, *["bfloat16 momentum"] * head.half_momentum, *[f"{head.sample_rate:g} of the classes sampled"] * (head.sample_rate < 1)]
    lines = [
        f"{head.classes:,} classes x {head.dimension}, {head.ranks} {device.name}, {head.total} rows a step ({max(head.rows)} a device), "
        f"{'16-bit' if head.half else 'float32'} sweeps, {', '.join(formats)}",
        f"\nMemory of one device (of {size(device.memory)}; without the backbone)",
    ]
    lines += [f"  {size(item.bytes):>10}  {item.what}" for item in report.items]
    lines.append(f"  {size(report.bytes):>10}  together: {'fits' if report.fits else f'does not fit into {size(device.usable)}'}")
    lines += [f"  {'to make it fit' if o.fits else 'not enough'}: {o.what} ({size(o.bytes)})" for o in report.options]
    lines.append("\nMessages of one step (handed over by a device; sent over its link)")
    lines += [f"  {size(m.bytes):>10} {size(m.sent(head.ranks)):>10}  {m.kind:15} {m.what}" for m in report.messages] or ["  none"]
    lines += [
        f"\nTime of one step by the roofline ({'this host as measured' if device.host else 'data sheet'}): no implementation is faster",
        f"  {seconds(t.arithmetic):>10}  arithmetic: {flops(head):.3g} flops",
        f"  {seconds(t.memory):>10}  memory: {size(traffic(head))}",
        f"  {seconds(t.messages):>10}  messages",
        f"  {seconds(t.total):>10}  together ({t.first} first)",
    ]
    if isinstance(measured, str):
        lines.append(f"No stored measurement: {measured}")
    elif measured is not None:
        lines.append(f"  {seconds(measured.seconds):>10}  measured: {measured.source}")
    return "\n".join(lines)


def scale_table(device: str = "H100", batch_per_gpu: int = 128) -> str:
    """The table of docs/scale.md: memory of a device, sweeps and messages of a step, from 1 to 1024 devices and 1M to 1B classes.

    Raises ValueError as `estimate`.
    """
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


def format_table(device: str = "H100", batch: int = 128) -> str:
    """The table of docs/scale.md: one device, 10M classes, by optimizer, momentum and sampling.

    Raises ValueError as `estimate`.
    """
    lines = ["| head of 10M classes | memory | most classes that fit | sweeps of a step |", "|---|---|---|---|"]
    for what, options in (
        ("AdamW", {"optimizer": "adamw"}),
        ("SGD", {"optimizer": "sgd"}),
        ("HeadSGD", {}),
        ("HeadSGD, bfloat16 momentum", {"momentum_dtype": "bfloat16"}),
        ("HeadSGD, momentum 0", {"momentum": False}),
        ("HeadSGD, 0.1 of the classes sampled", {"sample_rate": 0.1}),
    ):
        r = estimate(10**7, 1, batch, device=device, **options)
        low, high = 1, 10**9
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if estimate(middle, 1, batch, device=device, **options).fits else (low, middle)
        lines.append(f"| {what} | {size(r.bytes)} | {low / 1e6:.1f}M | {seconds(r.times.sweeps)} |")
    return "\n".join(lines)
