"""`recog-fast warmup`: Triton's cache filled before the ranks start."""

from __future__ import annotations

import argparse
import itertools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from recog_fast.counting import Progress
from recog_fast.terminal.console import Commands, UsageError, count, json_option, print_json
from recog_fast.terminal.progress import progress

_MOST = 1 << 17  # classes of the trial head: several slabs and several chunks of any device


def add(commands: Commands, parents: list[argparse.ArgumentParser]) -> None:
    """Adds the command to the subparsers `commands`."""
    warm = commands.add_parser(
        "warmup",
        parents=parents,
        help="compile a configuration's Triton kernels into Triton's cache",
        description=_warmup.__doc__,
        example=("recog-fast warmup configs/insightface_r50.yaml --arch sm_90 --cache triton_cache", "recog-fast warmup --batch 1024 --dim 512 --arch sm_80"),
    )
    warm.add_argument("config", nargs="?", help="settings file (YAML) of `recog-fast train`; without: a plain head of --batch, --dim, --classes")
    warm.add_argument("--batch", type=count, metavar="N", help="rows of a step of all ranks (with CONFIG: instead of its batch_size)")
    warm.add_argument("--dim", type=count, metavar="D", help="embedding size (with CONFIG: instead of its embedding_size)")
    warm.add_argument("--classes", type=count, metavar="C", help="classes of a rank; without: as many variants as their number could ask for")
    warm.add_argument("--arch", action="append", metavar="sm_90", help="compile for sm_80, sm_89, sm_90 or sm_100 without such a GPU (can be repeated)")
    warm.add_argument("--float32", action="store_true", help="float32 sweeps instead of 16-bit ones (with CONFIG: as its precision says)")
    warm.add_argument("--cache", type=Path, metavar="FOLDER", help="folder of the cache (default: TRITON_CACHE_DIR, or Triton's own)")
    json_option(warm, "cache folder, and per target kernels compiled and found, seconds")
    warm.set_defaults(run=_warmup)


def _warmup(options: argparse.Namespace, _: list[str]) -> int:
    """Makes a few training steps of the configuration's head on made-up rows: on a GPU they run; with --arch they are only compiled, on any
    machine, into the entries that launches on such a GPU look up (same versions of triton and recog_fast, same environment variables
    of Triton). Copy the cache folder to the nodes, or set TRITON_CACHE_DIR to one of each node and run this there. Backbones are not in it."""
    import torch

    from recog_fast.ops.ahead import compiling_for
    from recog_fast.triton_kernels.ahead import cache_folder, listening

    if options.cache is not None:
        os.environ["TRITON_CACHE_DIR"] = str(options.cache)
    archs: list[int | None] = [_architecture(text) for text in options.arch or []]
    if not archs and not torch.cuda.is_available():
        raise ValueError("warmup: expected --arch sm_80, sm_89, sm_90 or sm_100 where torch sees no CUDA device, got none")
    results: list[dict[str, Any]] = []
    for arch in archs or [None]:
        began = time.perf_counter()
        with progress("kernels") as step, listening(_telling(step)) if arch is None else compiling_for(arch, _telling(step)) as found:
            _steps(options, "cuda" if arch is None else "cpu")
        made = sum(not kernel.cached for kernel in found.values())
        name = torch.cuda.get_device_name() if arch is None else f"sm_{arch}"
        results.append({"target": name, "compiled": made, "found": len(found) - made, "seconds": time.perf_counter() - began, "kernels": sorted({k.name for k in found.values()})})
    folder = cache_folder()
    if options.json:
        print_json({"cache": folder, "targets": results})
        return 0
    for r in results:
        print(f"{r['target']}: {r['compiled']} kernels compiled, {r['found']} were there, {r['seconds']:.1f} s: {', '.join(r['kernels'])}")
    print(f"cache: {folder}")
    return 0


def _telling(step: Progress | None) -> Callable[[Any], None] | None:
    """Counts kernels; nobody knows how many there will be."""
    if step is None:
        return None
    done = itertools.count(1)
    return lambda kernel: step(next(done), 0)


def _architecture(text: str) -> int:
    number = text.removeprefix("sm_").rstrip("a")
    if number not in ("80", "89", "90", "100"):
        raise UsageError(f"warmup: expected --arch sm_80, sm_89, sm_90 or sm_100, got {text}")
    return int(number)


def _steps(options: argparse.Namespace, device: str) -> None:
    """Training steps of small heads that ask for every kernel of the configuration's."""
    import torch

    torch.manual_seed(0)
    config = _settings(options)
    half = not options.float32 if options.config is None else config.precision != "float32"
    classes = [min(options.classes, _MOST + options.classes % 16)] if options.classes else [_MOST, _MOST + 1]
    for number in classes:
        head, optimizer = _head(config, number, half, device)
        share = config.unlabelled_share or 0.0
        for unlabelled in sorted({round(share * config.batch_size), round(share * config.batch_size) + (share > 0)}):
            for _ in range(config.gradient_acc):
                x = torch.randn(config.batch_size, config.embedding_size, device=device, requires_grad=True)
                labels = torch.arange(config.batch_size, device=device) % number
                labels[:unlabelled] = -1
                head(x, labels, keys=x.detach() if head.memory is not None else None).backward()
            optimizer.step()
            optimizer.zero_grad()
    if device == "cuda":
        torch.cuda.synchronize()


def _settings(options: argparse.Namespace) -> Any:
    """The settings file with the command's sizes on top."""
    import dataclasses

    from recog_fast.training.config import TrainConfig, read_config
    from recog_fast.training.methods import apply_method

    try:
        config = TrainConfig(data=_no_data()) if options.config is None else apply_method(read_config(options.config))
    except ValueError as error:
        raise UsageError(str(error)) from error
    sizes = {"batch_size": options.batch, "embedding_size": options.dim}
    if options.config is None and options.batch is None:
        raise UsageError("warmup: expected a settings file or --batch, got neither")
    return dataclasses.replace(config, **{name: value for name, value in sizes.items() if value is not None})


def _no_data() -> Any:
    from recog_fast.training.config import DataConfig

    return DataConfig(kind="synthetic")


def _head(config: Any, classes: int, half: bool, device: str) -> tuple[Any, Any]:
    """The configuration's head and its optimizer."""
    import torch

    from recog_fast.training.model import build_head, build_optimizers

    head = build_head(config, classes).to(device)
    head.compute_dtype = torch.bfloat16 if half else torch.float32
    head.keep, head.drop_mass, head.drop_elements = None, 0.0, 0.0  # of the CPU kernels alone
    return head, build_optimizers(config, torch.nn.Linear(1, 1), head)[1]
