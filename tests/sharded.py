"""One training problem run by one process or by ranks: what both must agree on."""

from __future__ import annotations

import contextlib
import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from budgets import relative
from torch import Tensor

import recog_fast as rf
from recog_fast import reference, sharding
from recog_fast.sampling import class_priorities

D = 12
UNEVEN = {2: (5, 2), 3: (3, 0, 4), 4: (1, 3, 0, 2)}

MARGINS: dict[str, Any] = {
    "softmax": lambda: rf.Softmax(),
    "sphereface": lambda: rf.SphereFace(),
    "cosface": lambda: rf.CosFace(),
    "combined": lambda: rf.CombinedMargin(0.9, 0.4, 0.15),
    "arcface": lambda: rf.ArcFace(),
    "straight": lambda: rf.ArcFace(fallback="none", gradient="straight_through"),
    "magface": lambda: rf.MagFace(la=1, ua=5),
    "adaface": lambda: rf.AdaFace(t_alpha=0.5),
    "curricular": lambda: rf.CurricularFace(momentum=0.5),
    "mv": lambda: rf.MVSoftmax("am"),
    "circle": lambda: rf.CircleMargin(),
    "filter": lambda: rf.InterclassFilter(rf.CosFace(), 0.2),
    "learnable": lambda: Learnable(),
}
POLICIES: dict[str, Any] = {
    "vpl": lambda: rf.VPL(lam=0.4, delta=2, start=0),
    "qaface": lambda: rf.QAFace(delta=3, inject_scale=0.2, ema=0.5),
    "skip": lambda: rf.QAFace(tau=0.5, delta=3, inject_scale=0.2, on_reject="skip"),
}


class Learnable(torch.nn.Module):
    """A margin with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.m = torch.nn.Parameter(torch.tensor(0.3))

    def forward(self, cosine: Tensor, norms: Tensor) -> Tensor:
        return cosine - self.m * torch.tanh(norms)


@dataclass(frozen=True)
class Problem:
    """Rows of every rank (`sizes`) and a head.

    labels: "all" classes, "first" (one shard's alone), "unlabelled" (all rows), "mixed" (every third row unlabelled).
    """

    sizes: tuple[int, ...]
    classes: int = 30
    margin: str = "arcface"
    policy: str | None = None
    fused: bool = True
    half: bool = False
    double: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    call: dict[str, Any] = field(default_factory=dict)
    weighted: bool = False
    labels: str = "all"
    micro: int = 1
    steps: int = 2
    scale: float = 16.0
    unsampled: str = "dense"


def rows_of(problem: Problem, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """x (N, D), labels (N,), weights (N,) of all ranks at a step."""
    g = torch.Generator().manual_seed(100 + step)
    n = sum(problem.sizes)
    last = {"all": problem.classes, "first": 3, "unlabelled": 0, "mixed": problem.classes}[problem.labels]
    labels = torch.randint(-1, last, (n,), generator=g)
    if problem.labels == "mixed":
        labels[step % 3 :: 3] = -1
    x = torch.randn(n, D, generator=g) * (0.5 + torch.rand(n, 1, generator=g))
    return x.double() if problem.double else x, labels, torch.rand(n, generator=g)


def build(problem: Problem, group: Any) -> rf.MarginHead:
    torch.manual_seed(3)
    memory = None
    if problem.policy is not None:
        dtype = torch.float64 if problem.double else torch.float32
        memory = rf.PrototypeMemory(problem.classes, D, POLICIES[problem.policy](), dtype=dtype)
    head = rf.MarginHead(
        problem.classes, D, margin=MARGINS[problem.margin](), scale=problem.scale, memory=memory, group=group,
        **{"compute_dtype": torch.bfloat16 if problem.half else torch.float32, "ddp_average": False, **problem.options},
    )  # fmt: skip
    return head.double() if problem.double else head


def optimizer_of(problem: Problem, head: rf.MarginHead) -> Any:
    if problem.fused:
        return rf.HeadSGD(head, lr=0.5, momentum=0.9, weight_decay=1e-2, unsampled=problem.unsampled)  # type: ignore[arg-type]
    return torch.optim.SGD([head.weight], lr=0.5, momentum=0.9, weight_decay=1e-2)


def one_step(problem: Problem, head: rf.MarginHead, optimizer: Any, step: int, own: slice) -> dict[str, Tensor]:
    """Forward and backward of the rows `own` in micro-batches, and a step."""
    out: dict[str, Tensor] = {}
    optimizer.zero_grad()
    for micro in range(problem.micro):
        x, labels, weights = (t[own] for t in rows_of(problem, 10 * step + micro))
        x = x.clone().requires_grad_()
        keys = x.detach() * 1.5 if head.memory is not None and micro == 0 else None
        loss, stats = head(
            x, labels, sample_weight=weights if problem.weighted else None, keys=keys, return_stats=True,
            step=None if problem.fused else step, **problem.call,
        )  # fmt: skip
        upstream = torch.linspace(-1, 1, sum(problem.sizes), dtype=loss.dtype)[own] if loss.dim() else torch.tensor(1.5, dtype=loss.dtype)
        (loss * upstream).sum().backward()
        assert x.grad is not None
        if head.last_sampled is not None:
            out[f"entries sampled {micro}"] = head.last_sampled
        out |= {f"loss {micro}": loss.detach(), f"dx {micro}": x.grad}
        out |= {f"{name} {micro}": value for name, value in stats._asdict().items()}
    if not problem.fused:
        assert head.weight.grad is not None
        out["dW"] = head.weight.grad.clone()
    for name, parameter in head.named_parameters():
        if name != "weight":
            assert parameter.grad is not None
            out[f"d {name}"] = parameter.grad.clone()
            parameter.grad = None
    optimizer.step()
    return out


def train(group: Any, problem: Problem) -> list[dict[str, Tensor]]:
    """What every step said, and the state at the end; of this rank, or with group None of all rows."""
    head = build(problem, group)
    optimizer = optimizer_of(problem, head)
    if group is None and head.sample_rate < 1:
        head._draw = lambda labels, step: samples(problem, head, labels, step)  # type: ignore[method-assign]
    rank = 0 if group is None else head.shards.rank  # type: ignore[union-attr]
    first = sum(problem.sizes[:rank])
    own = slice(0, sum(problem.sizes)) if group is None else slice(first, first + problem.sizes[rank])
    route = rf.ops.use_backend("reference") if problem.double else contextlib.nullcontext()
    with route:
        out = [one_step(problem, head, optimizer, step, own) for step in range(problem.steps)]
        out.append(state_of(head, optimizer))
        x, labels, weights = (t[own] for t in rows_of(problem, 99))
        out.append(use_of(head, x, labels.clamp_min(0), weights))
    return out


# Rows of each rank at each step, of twelve: uneven, with ranks that have none, even.
SPLITS: dict[int, tuple[tuple[int, ...], ...]] = {
    1: ((12,),) * 3,
    2: ((7, 5), (12, 0), (6, 6)),
    3: ((5, 1, 6), (7, 0, 5), (4, 4, 4)),
    4: ((1, 5, 2, 4), (0, 8, 0, 4), (3, 3, 3, 3)),
}


def split_steps(group: Any, world: int, problems: list[Problem]) -> list[list[dict[str, Tensor]]]:
    """Of each problem what each step said, with the rows cut as SPLITS says, and the state at the end."""
    found = []
    for problem in problems:
        head = build(problem, group)
        optimizer = optimizer_of(problem, head)
        rank = 0 if world == 1 else head.shards.rank  # type: ignore[union-attr]
        with rf.ops.use_backend("reference") if problem.double else contextlib.nullcontext():
            out = []
            for step, sizes in enumerate(SPLITS[world]):
                first = sum(sizes[:rank])
                out.append(one_step(dataclasses.replace(problem, sizes=sizes), head, optimizer, step, slice(first, first + sizes[rank])))
            out.append(state_of(head, optimizer))
        found.append(out)
    return found


def samples(problem: Problem, head: rf.MarginHead, labels: Tensor, step: int) -> Tensor:
    """The classes that the shards of the problem's ranks draw, together: positives of theirs first, by (seed, step, shard)."""
    drawn = []
    for rank, (first, last) in enumerate(shard_bounds(problem.classes, len(problem.sizes))):
        if first == last:
            continue
        here = labels[(labels >= first) & (labels < last)] - first
        priorities = class_priorities(last - first, int(head.sample_seed), step, rank)
        drawn.append(reference.sample_classes(here, priorities, max(1, int(head.sample_rate * (last - first)))) + first)
    return torch.cat(drawn)


def state_of(head: rf.MarginHead, optimizer: Any) -> dict[str, Tensor]:
    state = {"W": head.weight.detach().clone(), "prototypes": head.prototypes().clone()}
    state["momentum"] = optimizer.state[head.weight].get("momentum_buffer", torch.zeros_like(head.weight)).clone()
    for name, value in head.state_dict().items():
        if name.startswith("margin.") or name in ("memory.norm_mean", "memory.norm_std", "memory.rejected", "memory.clock"):
            state[name] = value.clone()
    if head.memory is not None:
        state |= {f"entries {k}": v.clone() for k, v in head.memory.entries()._asdict().items()}
    return state


def use_of(head: rf.MarginHead, x: Tensor, ids: Tensor, upstream: Tensor) -> dict[str, Tensor]:
    """topk, logits and attached cosines of own rows, with gradients."""
    cosine, classes = head.topk(x, 5)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    logits, attached = head.logits(a), head.cosine(b, ids)
    (logits * logits.detach().cos()).sum().backward()
    head.eval()
    (head.cosine(b, ids) * upstream).sum().backward()
    with torch.no_grad():
        loss, stats = head(x, ids - 1, return_stats=True)  # evaluation: no gradient, no state moves
    head.train()
    assert a.grad is not None and b.grad is not None and head.weight.grad is not None
    d_weight, head.weight.grad = head.weight.grad, None
    evaluated = {"evaluated": loss, "lse": stats.lse, "nearest_index": stats.nearest_index}
    return evaluated | {"topk": cosine, "ids": classes, "logits": logits.detach(), "d logits": a.grad, "cosine": attached.detach(), "d cosine": b.grad, "dW cosine": d_weight}


ROWS = ("dx", "lse", "target_", "nearest_", "subcenter", "max_", "dropped", "topk", "ids", "logits", "d logits", "cosine", "d cosine")
CLASSES = ("W", "dW", "prototypes", "momentum", "entries")


def joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """One process's view of what the ranks said: rows and classes side by side, numbers that must be equal on all."""
    whole = {}
    for name in parts[0]:
        values = [part[name] for part in parts]
        if name.startswith((*ROWS, *CLASSES)) or values[0].dim():
            whole[name] = torch.cat(values)
        else:
            assert all(torch.equal(values[0], other) for other in values[1:]), name
            whole[name] = values[0]
    return whole


def shard_bounds(classes: int, world: int) -> list[tuple[int, int]]:
    return [sharding.class_range(classes, world, rank) for rank in range(world)]


def close(value: Tensor, truth: Tensor, allowed: float) -> bool:
    finite = torch.isfinite(truth)
    if not torch.equal(value[~finite], truth[~finite]):
        return False
    return relative(value[finite], truth[finite]) <= allowed or float((value - truth)[finite].abs().max()) <= allowed * 1e-3
