"""`recog-fast doctor`: what runs here and why the rest does not, what is set, what will get in the way, how fast memory and links are."""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

from recog_fast import __version__
from recog_fast.commands import host
from recog_fast.terminal.console import Commands, json_option, print_json

_LIBRARIES = "numpy triton jsonargparse yaml rich tensorboard PIL simplejpeg scipy sklearn matplotlib safetensors onnx onnxruntime faiss"
_PREFIXES = ("NCCL_", "TORCH_NCCL_", "GLOO_", "FI_", "UCX_")
_NAMES = (
    "OMP_NUM_THREADS MKL_NUM_THREADS CUDA_VISIBLE_DEVICES TRITON_CACHE_DIR TRITON_INTERPRET RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT"
).split()
_SHARED_FILE_SYSTEMS = ("nfs", "lustre", "gpfs", "beegfs", "ceph", "fuse", "cifs", "9p")
_SIZES = (1 << 10, 1 << 15, 1 << 20, 1 << 24)  # bytes of probed messages: a header's latency up to a large batch's embeddings


def add(commands: Commands, parents: list[argparse.ArgumentParser]) -> None:
    """Adds the command to the subparsers `commands`."""
    doctor = commands.add_parser(
        "doctor",
        parents=parents,
        help="say which code path runs here and why, and what will get in its way",
        description=_doctor.__doc__,
        example=("recog-fast doctor", "recog-fast doctor --probe --json", "torchrun --nproc-per-node 8 -m recog_fast doctor --probe"),
    )
    doctor.add_argument("--probe", action="store_true", help="also measure: memory and arithmetic here (a second); under torchrun the collectives between ranks")
    json_option(doctor, "versions, code paths, environment, devices, host, warnings")
    doctor.set_defaults(run=_doctor)


def _doctor(options: argparse.Namespace, _: list[str]) -> int:
    """Prints versions, code paths, environment, devices and limits of this host, with warnings for what slows or stops training. Under
    torchrun --probe measures the collectives of the ranks too (NCCL with CUDA, else gloo); rank 0 prints."""
    report = describe()
    if options.probe:
        report["probe"] = measure()
    report["warnings"] = warnings_of(report)
    if int(os.environ.get("RANK", "0")) == 0:
        print_json(report) if options.json else print(_text(report))
    return 0


def describe() -> dict[str, Any]:
    """Everything that can be said without measuring."""
    import torch

    import recog_fast as rf

    d = torch.distributed
    there = d.is_available()
    groups = [name for name, has in (("gloo", d.is_gloo_available), ("nccl", d.is_nccl_available)) if has()] if there else []
    return {
        "versions": versions(),
        "backends": rf.backends(),
        "isas": {"active": rf.native.load()[1], "available": list(rf.native.available_isas())},
        "not_installed": [name for name in _LIBRARIES.split() if importlib.util.find_spec(name) is None],
        "groups": groups,
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith(_PREFIXES) or k in _NAMES},
        "devices": devices(),
        "host": {
            "cpu": host.cpu_name(), "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "threads": torch.get_num_threads(), "memory": host.memory(), "shared_memory": host.shared_memory(), "open_files": host.open_files(),
            "triton_cache": triton_cache(),
        },
        "package": str(Path(__file__).parents[1]),
    }  # fmt: skip


def versions() -> dict[str, str | None]:
    """Of everything that takes part; None: not there."""
    import torch

    import recog_fast as rf

    triton = importlib.util.find_spec("triton")
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.version.cuda and torch.distributed.is_nccl_available() else None
    module, _ = rf.native.load()
    built = None if module is None else module.cuda_built()
    return {
        "recog_fast": __version__, "python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}", "torch": torch.__version__,
        "cuda of torch": torch.version.cuda, "triton": None if triton is None else _triton_version(), "nccl": nccl, "nvcc": nvcc(),
        "nvcc of the build": None if built is None else str(built[0]),
    }  # fmt: skip


def _triton_version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("triton")
    except PackageNotFoundError:
        return "unknown"


def nvcc() -> str | None:
    """The version line of the compiler on PATH."""
    said = _output("nvcc", "--version")
    return next((line.strip() for line in (said or "").splitlines() if "release" in line), None)


def _output(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None


def devices() -> dict[str, Any]:
    """CUDA devices as torch sees them, which of them reach each other's memory, and nvidia-smi's table of links."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    seen = [torch.cuda.get_device_properties(i) for i in range(count)]
    return {
        "cuda": [{"name": p.name, "memory": p.total_memory, "capability": f"{p.major}.{p.minor}", "processors": p.multi_processor_count} for p in seen],
        "peer_access": [[i == j or torch.cuda.can_device_access_peer(i, j) for j in range(count)] for i in range(count)],
        "topology": _output("nvidia-smi", "topo", "-m"),
    }


def triton_cache() -> dict[str, str | None]:
    """Triton's cache folder and the kind of file system it lies on."""
    folder = Path(os.environ.get("TRITON_CACHE_DIR") or Path(os.environ.get("TRITON_HOME", Path.home())) / ".triton" / "cache")
    return {"folder": str(folder), "file_system": file_system(folder)}


def file_system(path: Path) -> str | None:
    """Type of the file system of the mount that holds a path; None where /proc/mounts is not there."""
    try:
        mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    except OSError:
        return None
    place = path.absolute()
    holding = [(where, kind) for where, kind in mounts if place.is_relative_to(where)]
    return max(holding, key=lambda m: len(m[0]), default=("", None))[1]


def measure() -> dict[str, Any]:
    """Memory and arithmetic of this host; under torchrun the collectives of its ranks, with bytes/s on a rank's link by ring algorithms."""
    out: dict[str, Any] = {}
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1:
        from recog_fast.estimate import Message
        from recog_fast.sharding.probe import probe, torchrun_group

        with torchrun_group() as group:
            timings = probe(group, _SIZES)
        out["ranks"] = ranks
        out["collectives"] = [
            {"kind": t.kind, "bytes": t.bytes, "seconds": t.seconds, "link": Message("", t.kind, t.bytes).sent(ranks) / t.seconds}  # type: ignore[arg-type]
            for t in timings
        ]
    if int(os.environ.get("RANK", "0")) == 0:
        out |= {"memory": host.bandwidth(), "float32": host.arithmetic(), "bfloat16": host.arithmetic(half=True)}
    return out


def warnings_of(report: dict[str, Any]) -> list[str]:
    """What slows training or stops it, with the remedy."""
    there, out = report["host"], []
    if "reference" in report["backends"]["cpu"]:
        out.append(f"the slow reference runs on the CPU: {report['backends']['cpu']}")
    memory, shared, files = there["memory"], there["shared_memory"], there["open_files"]
    if memory and memory["available"] < 2e9:
        out.append(f"{memory['available'] / 1e9:.1f} GB of memory are available: `recog-fast estimate --device cpu` says what a head takes")
    if shared and shared["available"] < 512e6:
        out.append(f"/dev/shm has {shared['available'] / 1e6:.0f} MB left and data workers hand batches over through it: docker run --shm-size=8g, or num_workers: 0")
    if 0 <= files["soft"] < 4096:
        out.append(f"{files['soft']} open files are allowed, and workers, ranks and folders of images take many: ulimit -n {files['hard'] if 0 < files['hard'] else 65536}")
    local = int(report["environment"].get("LOCAL_WORLD_SIZE", "1"))
    if local > 1 and there["threads"] * local > there["cores"]:
        out.append(f"{local} ranks of {there['threads']} threads share {there['cores']} cores: OMP_NUM_THREADS={max(1, there['cores'] // local)}")
    kind = there["triton_cache"]["file_system"] or ""
    if kind.startswith(_SHARED_FILE_SYSTEMS):
        out.append(f"Triton's cache {there['triton_cache']['folder']} lies on {kind}: ranks race there; set TRITON_CACHE_DIR to a folder of the node")
    if "TRITON_INTERPRET" in report["environment"]:
        out.append("TRITON_INTERPRET is set: Triton kernels run in its slow interpreter, and on no device")
    if report["devices"]["topology"] and not report["devices"]["cuda"]:
        out.append("nvidia-smi sees devices and torch does not: torch was built without CUDA, or CUDA_VISIBLE_DEVICES hides them")
    if len(report["devices"]["cuda"]) > 1 and "nccl" not in report["groups"]:
        out.append("several CUDA devices and no NCCL in this torch: ranks would talk over gloo")
    return out


def _text(report: dict[str, Any]) -> str:
    v, there = report["versions"], report["host"]
    lines = [f"recog_fast {v['recog_fast']}   python {v['python']}   torch {v['torch']}   {v['system']}"]
    lines += [f"{name:12} " + value.replace("\n", "\n" + " " * 13) for name, value in report["backends"].items()]
    lines.append(f"{'isa':12} {report['isas']['active']} runs, of {', '.join(report['isas']['available']) or 'none'}")
    lines.append(f"{'versions':12} " + ", ".join(f"{name} {v[name] or 'none'}" for name in ("triton", "cuda of torch", "nccl", "nvcc", "nvcc of the build")))
    lines += [f"{name:12} not installed" for name in report["not_installed"]]
    lines.append(f"{'ranks':12} {', '.join(report['groups']) or 'no torch.distributed'}: MarginHead(group=) spreads classes over processes")
    lines += [f"{'device':12} {i}: {c['name']}, {c['memory'] / 1e9:.0f} GB, compute capability {c['capability']}" for i, c in enumerate(report["devices"]["cuda"])]
    if report["devices"]["topology"]:
        lines.append(f"{'links':12} " + report["devices"]["topology"].strip().replace("\n", "\n" + " " * 13))
    lines.append(f"{'environment':12} " + (" ".join(f"{k}={value}" for k, value in report["environment"].items()) or "nothing of NCCL, gloo, torchrun or threads is set"))
    memory, shared, files = there["memory"], there["shared_memory"], there["open_files"]
    lines.append(f"{'host':12} {there['cpu']}, {there['cores']} cores, {there['threads']} threads")
    if memory:
        lines.append(f"{'memory':12} {memory['available'] / 1e9:.1f} of {memory['total'] / 1e9:.1f} GB available")
    if shared:
        lines.append(f"{'/dev/shm':12} {shared['available'] / 1e9:.1f} of {shared['total'] / 1e9:.1f} GB available")
    lines.append(f"{'open files':12} {files['soft']} (at most {files['hard'] if files['hard'] >= 0 else 'unlimited'})")
    lines.append(f"{'triton cache':12} {there['triton_cache']['folder']} ({there['triton_cache']['file_system'] or 'unknown file system'})")
    lines.append(f"{'package':12} {report['package']}")
    lines += _probe_text(report.get("probe"))
    lines += [f"warning: {text}" for text in report["warnings"]]
    return "\n".join(lines)


def _probe_text(probe: dict[str, Any] | None) -> list[str]:
    from recog_fast.estimate import seconds, size

    if probe is None:
        return []
    lines = [f"{'measured':12} memory {size(probe['memory'])}/s, arithmetic {probe['float32'] / 1e9:.0f} GFLOP/s in float32, {probe['bfloat16'] / 1e9:.0f} in 16 bits"]
    if "collectives" in probe:
        lines.append(f"{'':12} {probe['ranks']} ranks: bytes handed over, time, bytes/s on a rank's link (ring)")
        lines += [f"{'':12} {c['kind']:15} {size(c['bytes']):>8} {seconds(c['seconds']):>10} {size(c['link']):>8}/s" for c in probe["collectives"]]
    return lines
