"""The chunk loop of the GPU sweeps (docs/math.md 1, 3): a tile kernel makes a chunk's exponentials or slopes, a library GEMM
consumes them while they are in cache, partial results are added in float64 in a fixed order.

Nothing here depends on the device: on CPU tensors the kernels run in Triton's interpreter (tests). No host synchronisation but one
after a forward loop, where it cannot be excluded beforehand that a row's sum left float32's range.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from ..rules import RULE_ROWS
from . import _checks
from ._cuda_native import run_prototype_rows
from ._products import float32_product, ieee_float32, slab_products

LOG2E, LN2 = math.log2(math.e), math.log(2.0)
HEADROOM = 64.0  # nats: the largest exponential is e^64, a sum of 5e10 of them is finite
SMALLEST_SUM = 1e-20  # a row whose sum comes out below it is redone with an offset that follows its maximum
NEVER_BELOW = 72.0  # scales up to this keep e^(64 - 2 s) normal: no row of unit vectors can vanish
ALWAYS_BELOW = 144.0  # scales above it (Circle) lose most rows: their offset follows the maximum at once
_L2, _PROCESSORS = 32 << 20, 1  # of a device that does not say

Injection = tuple[Tensor, Tensor, Tensor]  # memory (S, D), strength (S,), slot (C K,) int32


@dataclass(frozen=True)
class Plan:
    """Classes of a chunk, columns of a slab of the pull's GEMM, and the tile (`triton_kernels.configs.Tile`)."""

    classes: int
    slab: int
    tile: Any

    def columns(self, classes: Classes) -> int:
        """Row length of E and slopes: whole tiles of classes."""
        width: int = self.tile.classes
        return -(-min(self.classes, classes.count) // width) * width * classes.subcenters


def plan_for(kernel: str, x: Tensor, subcenters: int, rules: bool = False) -> Plan:
    """Chunks whose E or slopes, prototypes and dP stay in half the L2; slabs that fill the processors."""
    from ..triton_kernels import configs

    n, d = x.shape
    l2, processors = _L2, _PROCESSORS
    if x.device.type == "cuda":
        device = torch.cuda.get_device_properties(x.device)
        l2, processors = device.L2_cache_size, device.multi_processor_count
    per_class = subcenters * (x.element_size() * (n + d) + 4 * d)
    classes = max(l2 // 2 // per_class // 128 * 128, 128)
    slabs = max(processors // (-(-max(n, 1) // 128) * -(-d // 128)), 1)
    slab = max(-(-classes * subcenters // slabs // 128) * 128, 256)
    return Plan(classes, slab, configs.choose(kernel, x, rules or subcenters > 1))


@dataclass
class Classes:
    """The prototypes of a sweep, a chunk at a time: W normalised, injected and cast, or unit rows as they are."""

    weight: Tensor  # (C, D) or (C, K, D)
    memory_rows: Tensor | None
    strength: Tensor | None
    slot: Tensor | None
    unit: bool
    renormalize: bool
    dtype: torch.dtype = torch.float32
    rows: Tensor = field(init=False)  # (C, K, D) float32, contiguous
    injection: Injection | None = field(init=False)
    _buffer: Tensor | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        weight = self.weight.detach()
        _checks.expect(weight.dim() in (2, 3), "recog_fast", "weight of shape (C, D) or (C, K, D)", tuple(weight.shape))
        self.rows = (weight.unsqueeze(1) if weight.dim() == 2 else weight).to(torch.float32).contiguous()
        _checks.expect(self.rows.shape[0] * self.rows.shape[1] < 2**31, "recog_fast", "C K < 2^31", tuple(weight.shape))
        self.injection = None
        if self.memory_rows is not None and self.strength is not None and not self.unit:
            memory = self.memory_rows.detach().contiguous()
            memory = memory if memory.dtype == torch.bfloat16 else memory.float()
            slot = torch.arange(self.count, device=weight.device) if self.slot is None else self.slot
            slot = slot.to(torch.int32).repeat_interleave(self.subcenters)
            self.injection = memory, self.strength.detach().float().contiguous(), slot

    @property
    def count(self) -> int:
        return self.rows.shape[0]

    @property
    def subcenters(self) -> int:
        return self.rows.shape[1]

    def injection_of(self, start: int, stop: int) -> Injection | None:
        """The memory of these classes."""
        if self.injection is None:
            return None
        return *self.injection[:2], self.injection[2][start * self.subcenters : stop * self.subcenters]

    def chunk(self, start: int, stop: int) -> Tensor:
        """P (c, K, D) in the sweep's dtype; lies in a buffer that the next chunk overwrites."""
        rows = self.rows[start:stop]
        if self.unit and self.dtype == torch.float32:
            return rows
        if self._buffer is None or self._buffer.shape[0] < stop - start:
            self._buffer = torch.empty(stop - start, *self.rows.shape[1:], dtype=self.dtype, device=rows.device)
        chunk = self._buffer[: stop - start]
        if self.unit:
            return chunk.copy_(rows)
        run_prototype_rows(rows.flatten(0, 1), self.injection_of(start, stop), chunk.flatten(0, 1), renormalize=self.renormalize)
        return chunk

    def longest(self) -> Tensor | float:
        """A bound of |P_j|."""
        if self.bounded:
            return 1.0
        if self.unit:
            longest: Tensor = torch.linalg.vector_norm(self.rows, dim=2).amax()
            return longest
        assert self.injection is not None
        memory, strength, _ = self.injection
        pushes: Tensor = strength.abs() * torch.linalg.vector_norm(memory, dim=1, dtype=torch.float32)
        return 1.0 + (pushes.amax() if pushes.numel() else 0.0)

    @property
    def bounded(self) -> bool:
        """Whether |P_j| <= 1 is known beforehand."""
        return not self.unit and (self.injection is None or self.renormalize)


@dataclass
class _Rows:
    """A batch as the tile kernels read it: x^ in the sweep's dtype, vectors padded to a multiple of every tile."""

    x: Tensor  # (N, D)
    rules: Tensor | None  # (12, ld)
    ld: int

    @classmethod
    def of(cls, unit_embeddings: Tensor, rules: Tensor | None, dtype: torch.dtype) -> _Rows:
        from ..triton_kernels import configs

        n = unit_embeddings.shape[0]
        ld = max(-(-n // configs.ROW_PADDING), 1) * configs.ROW_PADDING
        rows = cls(unit_embeddings.detach().to(dtype).contiguous(), None, ld)
        if rules is not None:
            _checks.expect(tuple(rules.shape) == (RULE_ROWS, n), "recog_fast", f"rules (12, N) = (12, {n})", tuple(rules.shape))
            rows.rules = rows.padded(rules.detach().float(), 0.0)
        return rows

    def padded(self, values: Tensor, fill: float) -> Tensor:
        """values (..., N) -> (..., ld)."""
        out = values.new_full((*values.shape[:-1], self.ld), fill)
        out[..., : values.shape[-1]] = values
        return out


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

    rows: _Rows
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
        from ..triton_kernels.merge import run_add_partials, run_merge_nearest
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
            run_merge_nearest(*self.partials[1:], self.nearest, self.index, written, start)
            run_add_partials(self.partials[0], self.total, written)
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`reference.negative_logsumexp` in the dtype of `classes`."""
    n, d = unit_embeddings.shape
    device = unit_embeddings.device
    rows = _Rows.of(unit_embeddings, rules, classes.dtype)
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
    with ieee_float32():
        loop = _Forward(rows, classes, padded, scale * LOG2E, plan, want_pull)
        results = loop.results(loop.run(offsets))
    if follow or (rules is None and classes.bounded and scale <= NEVER_BELOW):
        return results
    total = loop.total[:n]
    lost = ((total < SMALLEST_SUM) & (results[2] >= 0)) | torch.isinf(total)
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
    from ..triton_kernels.merge import run_add_partials
    from ..triton_kernels.unknown_rejection import run_unknown_tile

    n, d = unit_embeddings.shape
    device = unit_embeddings.device
    pull = torch.zeros(n, d, dtype=torch.float64, device=device)
    rows = _Rows.of(unit_embeddings, None, classes.dtype)
    total = torch.zeros(3, rows.ld, dtype=torch.float64, device=device)
    if n == 0:
        return total[0, :0], total[1, :0], total[2, :0], pull.float()
    plan = plan or plan_for("unknown_rejection", rows.x, classes.subcenters)
    exact = rows.padded(lse.detach().double() * LOG2E, 0.0)
    split = exact.float(), (exact - exact.float().double()).float()
    others, means = rows.padded(nearest.to(torch.int32), -2), rows.padded(first_mean.detach().float(), 0.0)
    slopes = torch.empty(rows.ld, plan.columns(classes), dtype=rows.x.dtype, device=device)
    sums = torch.empty(3, -(-plan.classes // plan.tile.classes), rows.ld, dtype=torch.float32, device=device)
    with ieee_float32():
        for start in range(0, classes.count, plan.classes):
            p = classes.chunk(start, min(start + plan.classes, classes.count))
            written = run_unknown_tile(
                rows.x, p, others, split, means, slopes, sums, first=start, k2=scale * LOG2E, tile=plan.tile
            )
            for kind in range(3):
                run_add_partials(sums[kind], total[kind], written)
            for part in slab_products(slopes[:n, : p.shape[0] * p.shape[1]], p.flatten(0, 1), plan.slab):
                run_add_partials(part, pull, part.shape[0])
    mass, remainder, mean = (t[:n].clone() for t in total)
    return mass, remainder, mean, pull.float()


def d_prototypes(
    unit_embeddings: Tensor,  # (N, D)
    classes: Classes,
    targets: Tensor,  # (N,) class * K + sub-center, negative: none
    terms: Tensor,  # (5, N)
    scale: float,
    rules: Tensor | None,  # (12, N)
    seen: Tensor | None = None,  # (C,) bool: which classes margin rows see; None: all
    plan: Plan | None = None,
    count: int | None = None,  # number of all classes, where `classes` are some
) -> Iterator[tuple[int, int, Tensor]]:
    """(first class, last + 1, dP (c K, D) float32) of each chunk; the consumer may write the chunk's weight."""
    from ..triton_kernels.class_gradient import run_slope_tile

    n, d = unit_embeddings.shape
    rows = _Rows.of(unit_embeddings, rules, classes.dtype)
    plan = plan or plan_for("class_gradient", rows.x, classes.subcenters, rules is not None)
    exact = terms.detach().double()
    packed = rows.padded(torch.cat([exact[:1] * LOG2E, exact[1:]]).float(), 0.0)
    at = rows.padded(targets.to(torch.int32), -2)
    slopes = torch.empty(rows.ld, plan.columns(classes), dtype=rows.x.dtype, device=rows.x.device)
    marks = None if seen is None else seen.to(torch.int8)
    for start in range(0, classes.count, plan.classes):
        stop = min(start + plan.classes, classes.count)
        width = (stop - start) * classes.subcenters
        if n == 0:
            yield start, stop, torch.zeros(width, d, dtype=torch.float32, device=rows.x.device)
            continue
        with ieee_float32():
            run_slope_tile(
                rows.x, classes.chunk(start, stop), at, packed, rows.rules, None if marks is None else marks[start:stop], slopes,
                first=start, k2=scale * LOG2E, count=count or classes.count, tile=plan.tile,
            )  # fmt: skip
            product = float32_product(slopes[:n, :width].t(), rows.x)
        yield start, stop, product
