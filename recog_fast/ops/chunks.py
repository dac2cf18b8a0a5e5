"""The chunk loop of the GPU sweeps (docs/math.md 1, 3): a tile kernel makes a chunk's exponentials or slopes, a library GEMM
consumes them while they are in cache, partial results are added in float64 in a fixed order. On CUDA a loop that comes back runs as
one CUDA graph (`_graphs.py`).

Nothing here depends on the device: on CPU tensors the kernels run in Triton's interpreter (tests). No host synchronisation but one
after a forward loop, where it cannot be excluded beforehand that a row's sum left float32's range.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from ._graphs import Inputs, run_loop
from ._operands import Classes, Plan, Rows, plan_for
from ._products import float32_product, ieee_float32, slab_products

LOG2E, LN2 = math.log2(math.e), math.log(2.0)
HEADROOM = 64.0  # nats: the largest exponential is e^64, a sum of 5e10 of them is finite
SMALLEST_SUM = 1e-20  # a row whose sum comes out below it is redone with an offset that follows its maximum
NEVER_BELOW = 72.0  # scales up to this keep e^(64 - 2 s) normal: no row of unit vectors can vanish
ALWAYS_BELOW = 144.0  # scales above it (Circle) lose most rows: their offset follows the maximum at once


def _largest_exponent(bound: Tensor, rules: Tensor | None) -> Tensor:
    """max f(c) over |c| <= bound (N,): both branches of the rule, at the ends and at the vertex of the parabola."""
    if rules is None:
        return bound
    r = rules.detach().float()
    u = torch.minimum(bound, r[0])
    largest = torch.full_like(bound, -math.inf)
    for at in (2, 7):
        a2, a1, a0 = r[at], r[at + 1], r[at + 2]
        vertex = torch.where(a2 < 0, (-a1 / (2 * a2)).nan_to_num(0.0), u)
        for c in (u, -u, torch.minimum(torch.maximum(vertex, -u), u)):
            largest = torch.maximum(largest, (a2 * c + a1) * c + a0)
    return largest


@dataclass
class _Forward:
    """One forward loop: running results of its rows."""

    rows: Rows
    classes: Classes
    labels: Tensor  # (ld,) int32
    k2: float
    plan: Plan
    want_pull: bool

    def __post_init__(self) -> None:
        n, d = self.rows.x.shape
        device, tiles = self.rows.x.device, -(-self.plan.classes // self.plan.tile.classes)
        self.total = torch.zeros(self.rows.ld, dtype=torch.float64, device=device)
        self.nearest = torch.full((self.rows.ld,), -math.inf, dtype=torch.float32, device=device)
        self.index = torch.full((self.rows.ld,), -1, dtype=torch.int64, device=device)
        sums, cosines = torch.empty(2, tiles, self.rows.ld, dtype=torch.float32, device=device)
        self.partials = sums, cosines, torch.empty(tiles, self.rows.ld, dtype=torch.int32, device=device)
        self.pull = torch.zeros(n, d, dtype=torch.float64, device=device) if self.want_pull else None
        shape = self.rows.ld, self.plan.columns(self.classes)
        self.exponentials = torch.empty(shape, dtype=self.rows.x.dtype, device=device) if self.want_pull else None

    def run(self, offsets: Tensor | None) -> Tensor:
        """The loop; offsets (ld,) base 2, None: they follow the running maximum. Returns the last ones."""
        from ..triton_kernels.merge import run_add_partials, run_merge_tiles
        from ..triton_kernels.negative_logsumexp import run_forward_tile

        peaks = None if offsets is not None else torch.full_like(self.nearest, -math.inf)
        for start in range(0, self.classes.count, self.plan.classes):
            p = self.classes.chunk(start, min(start + self.plan.classes, self.classes.count))
            shift = offsets
            if shift is None:
                assert peaks is not None
                written = self._launch(run_forward_tile, p, peaks, None, start, peaks=True)
                peaks, shift = self._follow(peaks, self.partials[0][:written].amax(0))
            written = self._launch(run_forward_tile, p, shift, self.exponentials, start)
            run_merge_tiles(self.partials, self.total, self.nearest, self.index, written, start)
            if self.pull is not None and self.exponentials is not None:
                for part in slab_products(self.exponentials[: self.rows.x.shape[0], : p.shape[0] * p.shape[1]], p.flatten(0, 1), self.plan.slab):
                    run_add_partials(part, self.pull, part.shape[0])
            last = shift
        return last

    def _launch(self, kernel: Any, p: Tensor, offsets: Tensor, exponentials: Tensor | None, first: int, peaks: bool = False) -> int:
        return cast(int, kernel(
            self.rows.x, p, self.labels, offsets, self.nearest, self.rows.rules, exponentials, self.partials,
            first=first, k2=self.k2, peaks=peaks, tile=self.plan.tile,
        ))  # fmt: skip

    def _follow(self, before: Tensor, chunk: Tensor) -> tuple[Tensor, Tensor]:
        """The running maximum and the offset with it; what was added so far is scaled down to it."""
        peaks = torch.maximum(before, chunk)
        down = torch.exp2((before - peaks).double()).nan_to_num(0.0)  # -inf - -inf: nothing was added yet
        self.total *= down
        if self.pull is not None:
            self.pull *= down[: self.pull.shape[0], None]
        return peaks, torch.where(torch.isinf(peaks), torch.zeros_like(peaks), peaks)

    def results(self, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """lse, nearest cosine and index, pull."""
        n, d = self.rows.x.shape
        total, index = self.total[:n], self.index[:n]
        lse = torch.log(total) + offsets[:n].double() * LN2
        nearest = torch.where(index >= 0, self.nearest[:n], torch.full_like(self.nearest[:n], -2.0))
        if self.pull is None:
            return lse, nearest, index.clone(), self.nearest.new_empty(0, d)
        share = torch.where(total == 0, torch.zeros_like(total), 1 / total)
        return lse, nearest, index.clone(), (self.pull * share.unsqueeze(1)).float()


def negative_logsumexp(
    unit_embeddings: Tensor,  # (N, D)
    classes: Classes,
    labels: Tensor,  # (N,)
    scale: float,
    rules: Tensor | None,  # (12, N)
    want_pull: bool = True,
    plan: Plan | None = None,
    follow: bool = False,  # whether offsets follow the maximum from the start
    bounded: bool = False,  # the caller knows that no row of unit prototypes can lose its sum
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`reference.negative_logsumexp` in the dtype of `classes`."""
    n, d = unit_embeddings.shape
    device = unit_embeddings.device
    rows = Rows.of(unit_embeddings, rules, classes.dtype)
    if n == 0:
        empty = torch.empty(0, dtype=torch.float64, device=device)
        return empty, empty.float(), empty.long(), torch.empty(0, d, dtype=torch.float32, device=device)
    plan = plan or plan_for("negative_logsumexp", rows.x, classes.subcenters, rules is not None)
    padded = rows.padded(labels.to(torch.int32), -2)
    follow = follow or scale > ALWAYS_BELOW
    offsets = None
    if not follow:
        bound = torch.linalg.vector_norm(unit_embeddings.detach().float(), dim=1) * classes.longest()
        offsets = rows.padded((_largest_exponent(bound, rules) * scale - HEADROOM) * LOG2E, 0.0)
    inputs = {"x": rows.x, "rules": rows.rules, "labels": padded, "offsets": offsets, "strengths": classes.strengths}

    def loop(own: Inputs) -> tuple[Tensor, ...]:
        batch = Rows(cast(Tensor, own["x"]), own["rules"], rows.ld)
        with ieee_float32():
            sweep = _Forward(batch, classes.with_strengths(own["strengths"]), cast(Tensor, own["labels"]), scale * LOG2E, plan, want_pull)
            return *sweep.results(sweep.run(own["offsets"])), sweep.total[:n]

    *found, total = run_loop(("negative_logsumexp", classes.key(), scale, plan, want_pull), inputs, loop, rows.x)
    results = cast("tuple[Tensor, Tensor, Tensor, Tensor]", tuple(found))
    if follow or (classes.bounded and (bounded or (rules is None and scale <= NEVER_BELOW))):
        return results
    lost = ((total < SMALLEST_SUM) & (results[2] >= 0)) | torch.isinf(total)
    if rows.x.is_cuda and torch.cuda.is_current_stream_capturing():
        results[0].masked_fill_(lost, math.nan)  # nobody can look and compute such a row again
        return results
    if bool(lost.any()):
        its = None if rules is None else rules[:, lost]
        redone = negative_logsumexp(unit_embeddings[lost], classes, labels[lost], scale, its, want_pull, plan, True)
        for old, new in zip(results, redone, strict=True):
            if old.shape[0]:
                old[lost] = new
    return results


def unknown_rejection(
    unit_embeddings: Tensor,  # (N, D)
    classes: Classes,
    nearest: Tensor,  # (N,)
    lse: Tensor,  # (N,) float64
    first_mean: Tensor,  # (N,)
    scale: float,
    plan: Plan | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`reference.unknown_rejection` in the dtype of `classes`."""
    n, d = unit_embeddings.shape
    rows = Rows.of(unit_embeddings, None, classes.dtype)
    if n == 0:
        empty = torch.empty(0, dtype=torch.float64, device=rows.x.device)
        return empty, empty.clone(), empty.clone(), torch.empty(0, d, dtype=torch.float32, device=rows.x.device)
    plan = plan or plan_for("unknown_rejection", rows.x, classes.subcenters)
    exact = rows.padded(lse.detach().double() * LOG2E, 0.0)
    split = exact.float(), (exact - exact.float().double()).float()
    others, means = rows.padded(nearest.to(torch.int32), -2), rows.padded(first_mean.detach().float(), 0.0)
    inputs = {"x": rows.x, "others": others, "high": split[0], "low": split[1], "means": means, "strengths": classes.strengths}

    def loop(own: Inputs) -> tuple[Tensor, ...]:
        return _unknown_loop(cast("dict[str, Tensor]", own), classes.with_strengths(own["strengths"]), scale, plan)

    total, pull = run_loop(("unknown_rejection", classes.key(), scale, plan), inputs, loop, rows.x)
    mass, remainder, mean = (t[:n].clone() for t in total)
    return mass, remainder, mean, pull.float()


def _unknown_loop(own: dict[str, Tensor], classes: Classes, scale: float, plan: Plan) -> tuple[Tensor, Tensor]:
    """Sums (3, ld) and pull (N, D), both float64."""
    from ..triton_kernels.merge import run_add_partials
    from ..triton_kernels.unknown_rejection import run_unknown_tile

    x, ld = own["x"], own["others"].shape[0]
    n, d = x.shape
    pull = torch.zeros(n, d, dtype=torch.float64, device=x.device)
    total = torch.zeros(3, ld, dtype=torch.float64, device=x.device)
    slopes = torch.empty(ld, plan.columns(classes), dtype=x.dtype, device=x.device)
    sums = torch.empty(-(-plan.classes // plan.tile.classes), 3, ld, dtype=torch.float32, device=x.device)
    with ieee_float32():
        for start in range(0, classes.count, plan.classes):
            p = classes.chunk(start, min(start + plan.classes, classes.count))
            written = run_unknown_tile(
                x, p, own["others"], (own["high"], own["low"]), own["means"], slopes, sums, first=start, k2=scale * LOG2E, tile=plan.tile
            )
            run_add_partials(sums, total, written)
            for part in slab_products(slopes[:n, : p.shape[0] * p.shape[1]], p.flatten(0, 1), plan.slab):
                run_add_partials(part, pull, part.shape[0])
    return total, pull


@dataclass(frozen=True)
class ClassSweep:
    """A class sweep's rows as the tile kernel reads them; `chunks` is its loop."""

    rows: Rows
    targets: Tensor  # (ld,) int32
    terms: Tensor  # (5, ld)
    marks: Tensor | None  # (C,) int8
    k2: float
    count: int
    plan: Plan

    @classmethod
    def of(
        cls,
        unit_embeddings: Tensor,  # (N, D)
        classes: Classes,
        targets: Tensor,  # (N,) class * K + sub-center, negative: none
        terms: Tensor,  # (5, N)
        scale: float,
        rules: Tensor | None,  # (12, N)
        seen: Tensor | None = None,  # (C,) bool: which classes margin rows see; None: all
        plan: Plan | None = None,
        count: int | None = None,  # number of all classes, where `classes` are some
    ) -> ClassSweep:
        """Casts, pads, packs."""
        rows = Rows.of(unit_embeddings, rules, classes.dtype)
        exact = terms.detach().double()
        packed = rows.padded(torch.cat([exact[:1] * LOG2E, exact[1:]]).float(), 0.0)
        return cls(
            rows, rows.padded(targets.to(torch.int32), -2), packed, None if seen is None else seen.to(torch.int8), scale * LOG2E,
            count or classes.count, plan or plan_for("class_gradient", rows.x, classes.subcenters, rules is not None),
        )  # fmt: skip

    def inputs(self) -> Inputs:
        """What changes from step to step."""
        return {"x": self.rows.x, "rules": self.rows.rules, "targets": self.targets, "terms": self.terms, "marks": self.marks}

    def reading(self, own: Inputs) -> ClassSweep:
        """The same sweep over the rows `own`."""
        rows = Rows(cast(Tensor, own["x"]), own["rules"], self.rows.ld)
        targets, terms = cast(Tensor, own["targets"]), cast(Tensor, own["terms"])
        return dataclasses.replace(self, rows=rows, targets=targets, terms=terms, marks=own["marks"])

    def key(self) -> tuple[Any, ...]:
        """What a captured loop depends on beside the inputs' values and the classes."""
        return self.k2, self.count, self.plan

    def chunks(self, classes: Classes) -> Iterator[tuple[int, int, Tensor]]:
        """(first class, last + 1, dP (c K, D) float32) of each chunk; the consumer may write the chunk's weight."""
        from ..triton_kernels.class_gradient import run_slope_tile

        rows, plan, marks = self.rows, self.plan, self.marks
        n, d = rows.x.shape
        slopes = torch.empty(rows.ld, plan.columns(classes), dtype=rows.x.dtype, device=rows.x.device)
        for start in range(0, classes.count, plan.classes):
            stop = min(start + plan.classes, classes.count)
            width = (stop - start) * classes.subcenters
            if n == 0:
                yield start, stop, torch.zeros(width, d, dtype=torch.float32, device=rows.x.device)
                continue
            with ieee_float32():
                run_slope_tile(
                    rows.x, classes.chunk(start, stop), self.targets, self.terms, rows.rules, None if marks is None else marks[start:stop],
                    slopes, first=start, k2=self.k2, count=self.count, tile=plan.tile,
                )  # fmt: skip
                product = float32_product(slopes[:n, :width].t(), rows.x)
            yield start, stop, product
