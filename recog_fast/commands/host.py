"""This host: its CPU's name, its limits, and what was measured on it in a second."""

from __future__ import annotations

import os
import platform
import re
import shutil
import time
from pathlib import Path

import torch

from recog_fast import native
from recog_fast.estimate import Device

# (family, model range) of AMD processors whose brand string hides the generation
_ZEN = (
    (23, range(0x00, 0x30), "zen1"), (23, range(0x30, 0x100), "zen2"),
    (25, range(0x10, 0x20), "zen4"), (25, range(0x60, 0x80), "zen4"), (25, range(0xA0, 0xB0), "zen4"), (25, range(0x00, 0x100), "zen3"),
    (26, range(0x00, 0x100), "zen5"),
)  # fmt: skip
_CGROUPS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def device_here(name: str) -> torch.device:
    """The device of a --device option. Raises ValueError where torch does not see it."""
    device, count = torch.device(name), torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ValueError(f"expected a CUDA device for --device {name}, got {count or 'none'} that torch sees")
    return device


def cpu_fields() -> dict[str, str]:
    """The first processor's entry in /proc/cpuinfo; empty where there is none."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    return {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in text.split("\n\n")[0].splitlines())}


def cpu_name() -> str:
    """Brand and generation, such as "AMD EPYC zen3"."""
    fields = cpu_fields()
    name = fields.get("model name") or platform.processor() or platform.machine()
    if fields.get("vendor_id") == "AuthenticAMD":
        family, model = int(fields.get("cpu family", 0)), int(fields.get("model", 0))
        name += next((f" {zen}" for f, models, zen in _ZEN if f == family and model in models), "")
    return re.sub(r"\((R|TM)\)|@.*|CPU|Processor", "", name).strip()


def memory() -> dict[str, int]:
    """Bytes of this host: total (or the control group's limit, where that is less), available now. Empty where nothing says so."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    except OSError:
        return {}
    total, free = (int(lines[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    for path in _CGROUPS:
        try:
            limit = int(Path(path).read_text())
        except (OSError, ValueError):  # not there, or "max"
            continue
        total, free = min(total, limit), min(free, limit)
    return {"total": total, "available": free}


def shared_memory() -> dict[str, int]:
    """Bytes of /dev/shm, through which data workers hand over images: total, available. Empty where there is none."""
    if not os.path.isdir("/dev/shm"):
        return {}
    use = shutil.disk_usage("/dev/shm")
    return {"total": use.total, "available": use.free}


def open_files() -> dict[str, int]:
    """Limits of open files of a process: soft, hard (-1: none)."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return {"soft": soft, "hard": -1 if hard == resource.RLIM_INFINITY else hard}


def bandwidth(size: int = 128 << 20, seconds: float = 0.3) -> float:
    """Bytes/s of copying memory with torch's threads, read and written ones counted: the best of copies over that time."""
    source = torch.ones(size, dtype=torch.uint8)
    target = torch.empty_like(source)
    target.copy_(source)  # touched
    best, until = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < until:
        began = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - began)
    return 2 * size / best


def arithmetic(half: bool = False, seconds: float = 0.2) -> float:
    """Flop/s of the kernels' inner loop on data in cache: one thread's, times torch's threads; without the extension torch.mm's."""
    module, _ = native.load()
    if module is not None:
        return float(module.micro_kernel_rate("bfloat16" if half else "float32", seconds)) * torch.get_num_threads()
    a = torch.ones(512, 512)
    best, until = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < until:
        began = time.perf_counter()
        torch.mm(a, a)
        best = min(best, time.perf_counter() - began)
    return 2.0 * 512**3 / best


def host_device(link: float | None = None) -> Device:
    """This host for `estimate`, measured now (about a second); link: bytes/s between hosts, where several share the classes."""
    total = float(memory().get("total", 0)) or 16e9
    name = f"{cpu_name()} with {torch.get_num_threads()} threads"
    return Device(name, total, bandwidth(), arithmetic(), arithmetic(half=True), link, link, latency=100e-6, host=True)
