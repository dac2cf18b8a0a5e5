"""Random problems of every shape and option for the fuzz test; each is made from a handful of drawn numbers and a seed.

What has a jump keeps clear of it: a float32 cosine is worth 1e-7, so a row that a rounding could put on either side of a
rule's threshold, of a clamp or of a sub-center's win is drawn again or gets a threshold in a gap of its cosines.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from recog_fast import ops, reference
from recog_fast.ops.memory_write import memory_write

CLEAR = 2e-6  # distance from a jump: 20 roundings of a float32 cosine
WORK, WEIGHTS = 4e6, 4e5  # at most N C K D and C K D of one drawn problem; the edges N = 130, C = 5000, D = 640 each occur

# above and below (a2 a1 a0 b1 b0) of math.md 1.2 as the margins' rules give them, with t = 0.3 and m = 0.25
RULES: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "curricular": ((1.0, 0.3, 0.0, 2.0, 0.3), (0.0, 1.0, 0.0, 0.0, 1.0)),
    "mv": ((0.0, 1.3, 0.3, 0.0, 1.3), (0.0, 1.0, 0.0, 0.0, 1.0)),
    "circle": ((1.0, 0.0, -0.0625, 1.0, 0.25), (0.0, 0.0, 0.0, 0.0, 0.0)),
    "filter": ((0.0, 0.0, 0.0, 0.0, 0.0), (0.0, 1.0, 0.0, 0.0, 1.0)),
    "plain": ((0.0, 1.0, 0.0, 0.0, 1.0), (0.0, 1.0, 0.0, 0.0, 1.0)),
}


def examples(count: int) -> settings:
    """`count` derandomized examples; RECOG_FAST_FUZZ=1000 asks for that many random ones instead."""
    wanted = os.environ.get("RECOG_FAST_FUZZ", "")
    if wanted:
        return settings(max_examples=int(wanted), deadline=None, database=None, print_blob=True)
    return settings(max_examples=count, deadline=None, derandomize=True, database=None)


@dataclass(frozen=True)
class Shape:
    """Sizes and options of one problem."""

    n: int
    c: int
    d: int
    k: int
    scale: float
    rule: str  # of RULES, or "none": no rules at all
    clamp: bool
    memory: str  # "none", "float32" or "bfloat16"
    renormalize: bool
    unit: bool
    threads: int
    seed: int


def _sizes(edges: list[int], most: int) -> st.SearchStrategy[int]:
    return st.one_of(st.sampled_from(edges), st.integers(min(edges), most))


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    """N 0..130 (edges: nothing, a lane, a panel of 16 or 32), C 1..5000 (the tile of 48, the block of 960), D 1..640 (panels, the
    k-slice of 256, odd), K 1..100 (below, at and above a tile); C gives way where the product is large."""
    n = draw(_sizes([0, 1, 15, 16, 17, 31, 32, 33, 130], 130))
    d = draw(_sizes([1, 2, 15, 16, 17, 31, 32, 33, 255, 256, 257, 511, 512, 640], 640))
    k = draw(st.sampled_from([1, 1, 1, 2, 3, 7, 48, 49, 100]))
    c = draw(_sizes([1, 2, 47, 48, 49, 959, 960, 961, 5000], 5000))
    c = max(1, min(c, int(WORK / (max(n, 1) * d * k)), int(WEIGHTS / (d * k))))
    return Shape(
        n, c, d, k,
        scale=draw(st.sampled_from([1.0, 16.0, 64.0])),
        rule=draw(st.sampled_from(["none", *RULES])),
        clamp=draw(st.booleans()),
        memory=draw(st.sampled_from(["none", "float32", "bfloat16"])),
        renormalize=draw(st.booleans()),
        # one dimension: all sub-centers tie, which only the chain through the normalisation forgives
        unit=draw(st.booleans()) and d > 1,
        threads=draw(st.integers(1, 3)),
        seed=draw(st.integers(0, 2**31)),
    )  # fmt: skip


@dataclass(frozen=True)
class Problem:
    """Tensors of one problem; memory = (rows, strength, slot) or three Nones."""

    shape: Shape
    unit_embeddings: Tensor  # (N, D)
    weight: Tensor  # (C, D) or (C, K, D)
    labels: Tensor  # (N,) int64
    targets: Tensor  # (N,) rows of W, negative: none
    rules: Tensor | None  # (12, N)
    memory: tuple[Tensor | None, Tensor | None, Tensor | None]
    cosine: Tensor  # (N, C) float64


def _weight(s: Shape, g: torch.Generator) -> Tensor:
    """Class centres of very different lengths, one of them zero; unit rows with `unit`."""
    w = torch.randn(s.c, s.k, s.d, generator=g)
    w = w + 0.3 * w.sign()  # 1/|W| multiplies a gradient's rounding: one dimension must not come near 0
    if s.unit:
        w = torch.nn.functional.normalize(w, dim=2)
    elif s.d > 1:
        w = w * 10 ** (2 * torch.rand(s.c, s.k, 1, generator=g) - 1)
        w[s.c // 2, 0] = 0
    return w if s.k > 1 else w.squeeze(1)


def _memory(s: Shape, weight: Tensor, g: torch.Generator) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """A ring written by `memory_write` in three batches: some classes own a slot, strengths may be 0, one row cancels its W^."""
    if s.memory == "none" or s.unit:
        return None, None, None
    size = max(1, s.c // 2)
    rows = torch.full((size, s.d), float("nan"), dtype=getattr(torch, s.memory))  # what was never written is never read
    strength, slot = torch.zeros(size), torch.full((s.c,), -1, dtype=torch.int32)
    stamp, owner = torch.full((size,), -1), torch.full((size,), -1)
    cursor = torch.tensor(0)
    for step in range(3):
        labels = torch.randint(-1, s.c, (1 + size // 3,), generator=g)
        keys = torch.nn.functional.normalize(torch.randn(labels.numel(), s.d, generator=g), dim=1)
        lam = torch.rand(labels.numel(), generator=g).mul(3).sub(0.5).clamp_min(0)
        memory_write(rows, strength, stamp, owner, slot, cursor, keys, labels, lam, step)
    owned = (slot >= 0).nonzero().squeeze(1)
    assert torch.equal(owner[slot[owned].long()], owned) and int(cursor) >= owned.numel()
    if s.memory == "float32" and s.k == 1 and owned.numel() and s.d > 1:
        first = owned[0]
        rows[slot[first].long()] = -torch.nn.functional.normalize(weight[first], dim=0)
        strength[slot[first].long()] = 1.0
    return rows, strength, slot


def _unit_embeddings(s: Shape, prototypes: Tensor, g: torch.Generator) -> Tensor:
    """Unit rows, the last one zero; near a prototype or anywhere; drawn again where two sub-centers nearly tie."""

    def draw(rows: int) -> Tensor:
        near = prototypes.flatten(0, 1)[torch.randint(0, s.c * s.k, (rows,), generator=g)].float()
        mixed = torch.randn(rows, s.d, generator=g) + 3 * torch.rand(rows, 1, generator=g) * near * s.d**0.5
        return torch.nn.functional.normalize(mixed, dim=1)

    x = draw(s.n)
    for _ in range(20 if s.k > 1 and s.d > 1 else 0):
        cosines = torch.einsum("nd,ckd->nck", x.double(), prototypes).topk(2, dim=2).values
        tied = (cosines[..., 0] - cosines[..., 1] < CLEAR).any(dim=1).nonzero().squeeze(1)
        if not tied.numel():
            break
        x[tied] = draw(tied.numel())
    if s.n > 2 and s.k == 1:
        x[-1] = 0
    return x


def _gap(cosine: Tensor, quantile: float) -> Tensor:
    """(N,) a threshold near that quantile of each row's cosines, in the middle of the widest gap there."""
    ordered = cosine.sort(dim=1).values
    low = max(0, int(quantile * (ordered.shape[1] - 1)) - 20)
    window = ordered[:, low : low + 40]
    if window.shape[1] < 2:
        return ordered[:, 0] - 0.1
    gaps = window.diff(dim=1)
    at = gaps.argmax(dim=1, keepdim=True)
    return (window.gather(1, at) + gaps.gather(1, at) / 2).squeeze(1)


def _rules(s: Shape, cosine: Tensor, labels: Tensor, g: torch.Generator) -> Tensor | None:
    """(12, N): the rule with thresholds in gaps of the row's cosines; unlabelled rows plain."""
    if s.rule == "none":
        return None
    above, below = RULES[s.rule]
    threshold = _gap(cosine, float(torch.rand((), generator=g)))
    clamp = _gap(cosine.abs(), 0.9) if s.clamp else torch.full((s.n,), 4.0, dtype=torch.float64)
    packed = torch.stack([clamp.clamp_min(1e-3), threshold, *(torch.full_like(threshold, v) for v in above + below)])
    plain = torch.tensor([4.0, 4.0, *RULES["plain"][0] * 2], dtype=packed.dtype).unsqueeze(1)
    return torch.where(labels >= 0, packed, plain).float()


def make(s: Shape) -> Problem:
    """The problem of that shape; the same for the same seed."""
    g = torch.Generator().manual_seed(s.seed)
    weight = _weight(s, g)
    memory = _memory(s, weight, g)
    exact = [None if t is None else t.double() if t.is_floating_point() else t for t in memory]
    prototypes = weight.double() if s.unit else reference.effective_prototypes(weight.double(), *exact, s.renormalize)
    prototypes = prototypes.reshape(s.c, s.k, s.d)
    x = _unit_embeddings(s, prototypes, g)
    cosine = torch.einsum("nd,ckd->nck", x.double(), prototypes).amax(dim=2)
    labels = torch.randint(0, s.c, (s.n,), generator=g)
    labels = torch.where(torch.rand(s.n, generator=g) < 0.3, torch.full_like(labels, -1), labels)
    targets = torch.where(labels >= 0, labels * s.k + torch.randint(0, s.k, (s.n,), generator=g), labels)
    return Problem(s, x, weight, labels, targets, _rules(s, cosine, labels, g), memory, cosine)


def terms(p: Problem, lse: Tensor, g: torch.Generator) -> Tensor:
    """(5, N) row terms as a loss makes them: lse of the row, slopes of either sign, every kind of unlabelled row."""
    n = p.shape.n
    kind = torch.randint(0, 3, (n,), generator=g).masked_fill(p.labels >= 0, reference.MARGIN)
    finite = torch.where(torch.isinf(lse), torch.zeros_like(lse), lse).float()
    return torch.stack([finite + torch.rand(n, generator=g), torch.randn(n, generator=g), torch.randn(n, generator=g), torch.rand(n, generator=g) / 10, kind.float()])


def run(stem: str, backend: str, arguments: tuple[Any, ...], *, exact: bool = False) -> tuple[Tensor, ...]:
    """One operation's results: its outputs, or the weight and velocity that class_step left."""
    taken = [a.clone() if isinstance(a, Tensor) else a for a in arguments]
    if exact:
        taken = [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in taken]
    with ops.use_backend(backend):
        out = getattr(torch.ops.recog_fast, stem)(*taken)
    return (taken[3], taken[4]) if stem == "class_step" else out if isinstance(out, tuple) else (out,)
