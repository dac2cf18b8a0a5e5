"""What a step's time is made of, kernel by kernel, as planned and with other chunks, slabs and tiles: the guesses of `gpu_model` measured.

Unlike the rest of the suite this looks inside the package (`ops.chunks.plan_for`): variants of its plan for one process, each held to the
results of the plan itself. A variant is timed by the sum of its kernels' own durations: launches do not count.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from recog_fast.ops import chunks

from .gpu_device import Device, Profile, first_line, is_fatal
from .gpu_problems import make_device_problem
from .problems import SCALE

Change = Callable[[Any], Any]
# words in a kernel's name -> its group; the first that holds
GROUPS = (
    ("tiles", ("forward_tile", "slope_tile")), ("prototypes", ("prototype_rows",)), ("epilogue", ("class_epilogue",)),
    ("merges", ("add_partials", "merge_tiles")), ("GEMM", ("gemm", "nvjet", "cutlass", "cublas", "splitk", "xmma")),
)  # fmt: skip


def _chunks(share: float) -> Change:
    return lambda plan: dataclasses.replace(plan, classes=max(int(plan.classes * share) // 128 * 128, 128))


def _slabs(share: float) -> Change:
    return lambda plan: dataclasses.replace(plan, slab=max(int(plan.slab * share) // 128 * 128, 128))


def _tiles(**sizes: int) -> Change:
    return lambda plan: dataclasses.replace(plan, tile=dataclasses.replace(plan.tile, **sizes))


VARIANTS: dict[str, Change] = {
    "as planned": lambda plan: plan, "chunks of 1/2": _chunks(0.5), "chunks of 4/3": _chunks(4 / 3), "chunks of 2": _chunks(2.0),
    "chunks of 4": _chunks(4.0), "slabs of 1/2": _slabs(0.5), "slabs of 2": _slabs(2.0), "tiles 128x256": _tiles(rows=128, classes=256),
    "tiles 128x128, 4 stages": _tiles(rows=128, classes=128, stages=4), "tiles 64x256": _tiles(rows=64, classes=256),
}  # fmt: skip


@contextlib.contextmanager
def _planned(change: Change) -> Iterator[None]:
    """Within it the chunk loop plans with `change`."""
    before = chunks.plan_for

    def plan_for(*arguments: Any, **options: Any) -> Any:
        return change(before(*arguments, **options))

    chunks.plan_for = plan_for
    try:
        yield
    finally:
        chunks.plan_for = before


def groups(profile: Profile) -> dict[str, float]:
    """Seconds by group; "other" is what has no name here."""
    found = {name: 0.0 for name, _ in GROUPS} | {"other": 0.0}
    for kernel, (_, seconds) in profile.by_name.items():
        found[next((name for name, words in GROUPS if any(word in kernel.lower() for word in words)), "other")] += seconds
    return found


def _relative(value: Tensor, truth: Tensor) -> float:
    return float((value.double() - truth.double()).norm() / truth.double().norm())


def tuning(device: Device, small: bool) -> list[dict[str, Any]]:
    """One line a variant: seconds of the device for forward and step, by group; rates of the tiles; difference from the plan's results."""
    n, c, d = (6, 90, 32) if small else (1024, 200_000, 512)
    problem = make_device_problem("R0", n, c, d, device.where)
    unit = torch.nn.functional.normalize(problem.embeddings)
    nothing = None, None, None
    ops = torch.ops.recog_fast
    lse, _, _, pull = ops.negative_logsumexp(unit, problem.weight, problem.labels, SCALE, None, *nothing, False, True, True)
    terms = torch.zeros(5, n, device=device.where)
    terms[0], terms[1], terms[2] = lse.float(), SCALE / n, -SCALE / n

    def forward() -> tuple[Tensor, ...]:
        return ops.negative_logsumexp(unit, problem.weight, problem.labels, SCALE, None, *nothing, False, True, True)  # type: ignore[no-any-return]

    def step() -> None:
        ops.class_step(unit, problem.labels, terms, problem.weight, problem.velocity, SCALE, None, *nothing, True, 0.1, 0.9, 5e-4, False, True)

    step()
    velocity = problem.velocity.clone()
    rows = []
    for name, change in list(VARIANTS.items())[: 2 if small else None]:
        row: dict[str, Any] = {"variant": name, "N": n, "C": c, "D": d}
        problem.refill()
        try:
            with _planned(change):
                again = forward()  # compiles
                step()
                row["difference"] = max(_relative(again[3], pull), _relative(problem.velocity, velocity))
                problem.refill()
                first, second = device.profile(forward), device.profile(step)
        except Exception as error:  # a variant that does not fit the device is a line
            if is_fatal(error):
                raise
            rows.append({**row, "skipped": first_line(error)})
            continue
        row.update(kernels=first.kernels + second.kernels, forward_s=first.busy, step_s=second.busy)
        row["groups"] = {key: value + groups(second)[key] for key, value in groups(first).items()}
        tiles = row["groups"]["tiles"]
        row["tile_tflops"] = 4.0 * n * c * d / tiles / 1e12 if tiles else None
        rows.append(row)
    return rows
