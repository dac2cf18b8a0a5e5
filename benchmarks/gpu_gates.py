"""Stage 1: every operation, margin, regime and option on the device against float64 on the device; the same bits again.

An operation in float32 is held to twice PyTorch's own float32 error and 2e-6 of the result's largest value, in bf16 to 2^-7 of the
largest value of float64 sweeps whose x^ and P are rounded to bf16 too (what is left are exponentials and slopes, rounded to 2^-9 of
themselves). A step is held to it by the gradient it applied. Losses are held to the golden cases' budgets.
"""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

import recog_fast as rf
from recog_fast import reference

from .contenders import Contender
from .gpu_contenders import GpuDense, GpuDenseBF16, GpuStep, GpuStepBF16
from .gpu_device import Device
from .gpu_problems import REGIMES, DeviceArena, device_truth, make_device_problem
from .gpu_times import DeviceTimes, gate_step
from .problems import MARGIN
from .protocol import margin_key

STEMS = ("effective_prototypes", "negative_logsumexp", "unknown_rejection", "class_gradient", "class_step")
_FLOAT32_WORTH, _HALF_WORTH = 2e-6, 2.0**-7
_HALF_WORTHS = {("negative_logsumexp", 0): 5e-4, ("negative_logsumexp", 1): 2e-3}  # lse and the nearest cosine: float32 of rounded operands
_LR, _MOMENTUM, _DECAY = 0.1, 0.9, 5e-4


@dataclass(frozen=True)
class Shape:
    """N, C, D, K of a gate, and what takes part: rules, memory, sampled classes."""

    n: int
    c: int
    d: int
    k: int = 1
    rules: bool = True
    memory: bool = True
    members: bool = False

    @property
    def name(self) -> str:
        """Such as 37x1000x64-rules-memory."""
        words = [f"K{self.k}" if self.k > 1 else "", *(w for w in ("rules", "memory", "members") if getattr(self, w))]
        return "-".join([f"{self.n}x{self.c}x{self.d}", *(w for w in words if w)])


# N below, at and above a tile, small and large batches; C of one tile, ragged, and of several chunks; D of descriptors (64, 128, 512) and of
# pointers (500); first what the timed cases run
SHAPES = (
    Shape(1024, 20_000, 512, rules=False, memory=False), Shape(128, 5000, 512, rules=False, memory=False),
    Shape(256, 9000, 512), Shape(60, 3000, 128, members=True, memory=False), Shape(130, 3001, 64), Shape(37, 1000, 64, rules=False),
    Shape(128, 5000, 500), Shape(70, 901, 64, k=3), Shape(200, 2000, 128, k=2, rules=False), Shape(1, 1, 64, rules=False, memory=False),
)  # fmt: skip
DRY_SHAPES = (Shape(9, 150, 32), Shape(7, 80, 32, k=2, rules=False, memory=False), Shape(6, 90, 32, members=True, memory=False))


def operands(shape: Shape, device: Device) -> dict[str, Any]:
    """Inputs of every operation on the device, float32: labels with -1 and duplicates, all kinds of rows, scale 64."""
    g = torch.Generator().manual_seed(shape.n + shape.c)
    weight = torch.randn(shape.c, shape.k, shape.d, generator=g).squeeze(1) if shape.k == 1 else torch.randn(shape.c, shape.k, shape.d, generator=g)
    weight = weight + 0.3 * weight.sign()
    unit = normalize(torch.randn(shape.n, shape.d, generator=g), dim=1)
    labels = torch.randint(-1, shape.c, (shape.n,), generator=g)
    labels[shape.n // 2 :: 7] = labels[0]
    memory: tuple[Tensor | None, ...] = (None, None, None)
    if shape.memory and shape.k == 1:
        slot = torch.randint(-1, 5, (shape.c,), generator=g).int()
        memory = torch.randn(5, shape.d, generator=g).bfloat16(), torch.tensor([0.5, 0.0, 2.0, 0.2, 1.0]), slot
    thresholds = torch.full((shape.n,), 0.1)
    rule = rf.CurricularFace().rule(thresholds)[0] if shape.rules else None
    here: dict[str, Any] = {
        "unit": unit, "weight": weight, "labels": labels, "velocity": 1e-3 * torch.rand(weight.shape, generator=g),
        "targets": torch.where(labels >= 0, labels * shape.k + labels.clamp_min(0) % shape.k, labels),
        "rules": rf.rules.pack_rules(labels, rule, thresholds if shape.rules else None, 0.999 if shape.rules else 1.0, torch.float32),
        "members": torch.randperm(shape.c, generator=g)[: shape.c // 10 + 1].sort().values if shape.members else None,
    }  # fmt: skip
    s: dict[str, Any] = {name: None if t is None else device.to(t) for name, t in here.items()}
    s["memory"] = tuple(None if t is None else device.to(t) for t in memory)
    with rf.ops.use_backend("reference"):
        rest = 64.0, None, *s["memory"], False, True
        lse, _, nearest, _ = torch.ops.recog_fast.negative_logsumexp(s["unit"].double(), s["weight"].double(), torch.full_like(s["labels"], -1), *rest)
    kinds = torch.randint(0, 3, (shape.n,), generator=g).float()
    signs = torch.stack([torch.randn(shape.n, generator=g), torch.randn(shape.n, generator=g), torch.rand(shape.n, generator=g) / 100, kinds])
    terms = torch.cat([lse.float().unsqueeze(0), device.to(signs)])
    terms[1] = torch.where(terms[4] == reference.UNKNOWN_SINGLE, terms[1] / shape.c, terms[1])  # that kind's slopes are C times larger
    return {**s, "scale": 64.0, "lse": lse, "nearest": nearest, "terms": terms}


def calls(s: dict[str, Any]) -> dict[str, tuple[Any, ...]]:
    """Arguments of every operation, by stem."""
    rows = s["unit"], s["targets"], s["terms"]
    step = s["weight"], s["velocity"], s["scale"], s["rules"], *s["memory"], True, _LR, _MOMENTUM, _DECAY, False
    return {
        "effective_prototypes": (s["weight"], *s["memory"], True),
        "negative_logsumexp": (s["unit"], s["weight"], s["labels"], s["scale"], s["rules"], *s["memory"], False, True),
        "unknown_rejection": (s["unit"], s["weight"], s["nearest"], s["lse"], s["unit"][:, 0].abs() / 100, s["scale"], *s["memory"], False, True),
        "class_gradient": (*rows, s["weight"], s["scale"], s["rules"], *s["memory"], False, True),
        "class_step": (*rows, *step),
    }


def results(stem: str, arguments: tuple[Any, ...], convert: Callable[[Tensor], Tensor], **options: Any) -> tuple[Tensor, ...]:
    """What the operation returns for converted copies of its arguments; of a step the gradient that it applied, in float64, and how far W
    is from where that gradient and its optimizer put it."""
    taken = [convert(a) if isinstance(a, Tensor) else a for a in arguments]
    out = getattr(torch.ops.recog_fast, stem)(*taken, **options)
    if stem != "class_step":
        return out if isinstance(out, tuple) else (out,)
    weight, velocity = (t.double() for t in arguments[3:5])
    visited = taken[4].double() - _MOMENTUM * velocity - _DECAY * weight
    return visited, taken[3].double() - (weight - _LR * taken[4].double())


def _double(t: Tensor) -> Tensor:
    return t.double() if t.dtype in (torch.float32, torch.bfloat16) else t.clone()


@contextlib.contextmanager
def ideal_bfloat16() -> Iterator[None]:
    """Within it the reference's sweeps see x^ and P rounded to bf16, and in float64 nothing else is."""

    def rounded(t: Tensor) -> Tensor:
        return t.to(torch.bfloat16).to(t.dtype)

    names = ("negative_logsumexp", "unknown_rejection", "class_gradient")
    before = {name: getattr(reference, name) for name in (*names, "_prototypes")}

    def rounding(operation: Callable[..., Any]) -> Callable[..., Any]:
        return lambda unit_embeddings, *rest: operation(rounded(unit_embeddings), *rest)

    with rf.ops.use_backend("reference"):
        try:
            for name in names:
                setattr(reference, name, rounding(before[name]))
            reference._prototypes = lambda *arguments: rounded(before["_prototypes"](*arguments))
            yield
        finally:
            for name, original in before.items():
                setattr(reference, name, original)


def _largest(t: Tensor) -> float:
    return float(t.abs().max()) if t.numel() else 0.0


def compare(ours: Tensor, plain: Tensor, truth: Tensor, worth: float, floor: float = 0.0) -> tuple[float, float]:
    """(largest error, its budget): twice the plain error, `worth` of the largest value, and `floor`; inf where finiteness differs."""
    finite = torch.isfinite(truth)
    if not torch.equal(torch.isfinite(ours), finite):
        return math.inf, 0.0
    most, error, own = (_largest(t.double()[finite]) for t in (truth, ours.double() - truth, plain.double() - truth))
    return error, 2 * own + worth * most + floor


def _same_nearest(index: Tensor, truth: Tensor, s: dict[str, Any], worth: float) -> tuple[float, float]:
    """(how much farther the chosen nearest class is in float64, budget): near ties may fall either way."""
    if torch.equal(index < 0, truth < 0) and bool((index < 0).all()):
        return 0.0, worth
    if not torch.equal(index < 0, truth < 0):
        return math.inf, 0.0
    rows, strength, slot = (None if t is None else _double(t) for t in s["memory"])
    prototypes = reference.effective_prototypes(s["weight"].double(), rows, strength, slot, True)
    chosen, best = (prototypes[t.clamp_min(0)] for t in (index, truth))
    unit = s["unit"].double().unsqueeze(1)
    gaps = [(unit * p.reshape(p.shape[0], -1, p.shape[-1])).sum(2).amax(1) for p in (chosen, best)]
    return _largest(gaps[1] - gaps[0]), worth


def gate_operation(device: Device, stem: str, shape: Shape) -> list[dict[str, Any]]:
    """One operation at one shape in float32 and bf16: errors with budgets, equal bits of two calls, seconds with compilation."""
    s = operands(shape, device)
    arguments = calls(s)[stem]
    options: dict[str, Any] = {}
    if s["members"] is not None and stem in ("negative_logsumexp", "class_gradient", "class_step"):
        options["members"] = s["members"]
    rows = []
    for half in (False, True) if stem != "effective_prototypes" else (False,):
        with ideal_bfloat16() if half else rf.ops.use_backend("reference"):
            truth = results(stem, arguments, _double, **options)
            plain = truth if half else results(stem, arguments, Tensor.clone, **options)
        chosen = {**options, "half": True} if half else options
        began = time.perf_counter()
        ours = results(stem, arguments, Tensor.clone, **chosen)
        device.synchronize()
        seconds = time.perf_counter() - began
        again = results(stem, arguments, Tensor.clone, **chosen)
        errors = []
        for number, (mine, other, exact) in enumerate(zip(ours, plain, truth, strict=True)):
            worth = _HALF_WORTHS.get((stem, number), _HALF_WORTH) if half else _FLOAT32_WORTH
            # the step's gradient is read from a velocity and a weight rounded to float32
            floor = 2.0**-22 * _largest(s["weight" if number else "velocity"]) if stem == "class_step" else 0.0
            found = compare(mine, other, exact, worth, floor) if exact.dtype.is_floating_point else _same_nearest(mine, exact, s, 8e-3 if half else worth)
            errors.append({"output": number, "error": found[0], "budget": found[1]})
        same = all(map(torch.equal, ours, again))
        passes = same and all(e["error"] <= e["budget"] for e in errors)
        rows.append({"name": stem, "case": shape.name, "dtype": "bf16" if half else "float32", "errors": errors, "same_bits": same,
                     "passes": passes, "first_call_s": seconds})  # fmt: skip
    return rows


def gate_memory_write(device: Device) -> list[dict[str, Any]]:
    """Writes with duplicates, ignored rows and evictions: the ring's state must be that of the CPU, bit by bit."""
    there, here = (rf.PrototypeMemory(500, 64, rf.VPL(delta=50, start=0), capacity=120).to(d) for d in (device.where, torch.device("cpu")))
    for step in range(6):
        g = torch.Generator().manual_seed(step)
        x, labels = torch.randn(40, 64, generator=g), torch.randint(-1, 500, (40,), generator=g)
        labels[5:9] = labels[4]
        for memory, at in ((there, device.where), (here, torch.device("cpu"))):
            memory.write(x.to(at), labels.to(at), step)
            memory.flush()
    names = ("ring_strength", "stamp", "owner", "slot", "cursor", "evicted")
    same = all(torch.equal(getattr(there, n).cpu(), getattr(here, n)) for n in names)
    error = _largest(there.ring.cpu().float() - here.ring.float())  # rows are normalised where they are written
    return [{"name": "memory_write", "case": "40 rows x 6, ring of 120", "dtype": "bf16 ring", "same_bits": same, "passes": same and error <= 2**-8,
             "errors": [{"output": 0, "error": error, "budget": 2**-8}], "first_call_s": 0.0}]  # fmt: skip


# -- losses --------------------------------------------------------------------------------------------------------------

MARGINS: dict[str, Callable[[], Any]] = {
    "ArcFace": lambda: rf.ArcFace(0.5), "CosFace": lambda: rf.CosFace(0.35), "CurricularFace": lambda: rf.CurricularFace(0.5),
    "AdaFace": lambda: rf.AdaFace(), "MagFace": lambda: rf.MagFace(), "MVSoftmax arc": lambda: rf.MVSoftmax("arc"),
    "MVSoftmax am": lambda: rf.MVSoftmax("am"), "InterclassFilter": lambda: rf.InterclassFilter(rf.ArcFace(0.5), 0.1),
    "CircleMargin": lambda: rf.CircleMargin(), "SphereFace": lambda: rf.SphereFace(), "CombinedMargin": lambda: rf.CombinedMargin(1.0, 0.3, 0.2),
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    **{name: {"margin": name} for name in MARGINS},
    "sub-centers": {"margin": "ArcFace", "k": 3},
    "memory": {"margin": "ArcFace", "memory": True},
    "unknown rows": {"margin": "ArcFace", "unknown_weight": 0.1},
    "CurricularFace, memory, unknown rows": {"margin": "CurricularFace", "memory": True, "unknown_weight": 0.1},
    "D = 500": {"margin": "ArcFace", "d": 500},
    "D = 128": {"margin": "ArcFace", "d": 128},
}


def gate_loss(device: Device, name: str, small: bool) -> list[dict[str, Any]]:
    """`margin_softmax_loss`, its dx and dW, in both dtypes, against the float64 reference on the device."""
    options = {"k": 1, "memory": False, "d": 32 if small else 64, **VARIANTS[name]}
    n, c, d, k = (8, 70, min(options["d"], 64), options["k"]) if small else (100, 3000, options["d"], options["k"])
    g = torch.Generator().manual_seed(7)
    x = device.to(torch.randn(n, d, generator=g) * (1 + 20 * torch.rand(n, 1, generator=g)))
    w = device.to(torch.randn(*((c, d) if k == 1 else (c, k, d)), generator=g))
    labels = device.to(torch.randint(-1, c, (n,), generator=g))
    scale = 256.0 if options["margin"] == "CircleMargin" else 64.0
    margin = MARGINS[options["margin"]]()
    memory: dict[str, Any] = {}
    if options["memory"]:
        slot = device.to(torch.randint(-1, 6, (c,), generator=g).int())
        memory = {"memory_rows": device.to(torch.randn(6, d, generator=g)), "strength": device.to(torch.rand(6, generator=g)), "slot": slot}

    def run(dtype: torch.dtype, half: bool) -> tuple[Tensor, ...]:
        a, b = (t.to(dtype).requires_grad_() for t in (x, w))
        mine = copy.deepcopy(margin)
        mine = mine.to(device.where) if isinstance(mine, torch.nn.Module) else mine
        held = {key: v.to(dtype) if v.dtype.is_floating_point else v for key, v in memory.items()}
        loss = rf.margin_softmax_loss(a, b, labels, margin=mine, scale=scale, unknown_weight=options.get("unknown_weight", 0.0),
                                      compute_dtype=torch.bfloat16 if half else torch.float32, **held)  # fmt: skip
        return loss.detach(), *torch.autograd.grad(loss, (a, b))

    rows = []
    for half in (False, True):
        with ideal_bfloat16() if half else rf.ops.use_backend("reference"):
            truth = run(torch.float64, False)
        began = time.perf_counter()
        ours = run(torch.float32, half)
        device.synchronize()
        seconds = time.perf_counter() - began
        again = run(torch.float32, half)
        share = math.sqrt(512 / d) * scale / 64
        budgets = [1e-6 * abs(float(truth[0])) + 2e-6 * scale, *[5e-5 * scale / 64] * 2]
        if half:
            budgets = [budgets[0] + 3e-2 * share, 5e-3 * share, 5e-3 * share]
        errors = [abs(float(ours[0]) - float(truth[0])), *(_relative(o, t) for o, t in zip(ours[1:], truth[1:], strict=True))]
        same = all(map(torch.equal, ours, again))
        lines = [{"output": o, "error": e, "budget": b} for o, e, b in zip(("loss", "dx", "dW"), errors, budgets, strict=True)]
        rows.append({"name": "margin_softmax_loss", "case": name, "dtype": "bf16" if half else "float32", "errors": lines, "same_bits": same,
                     "passes": same and all(e <= b for e, b in zip(errors, budgets, strict=True)), "first_call_s": seconds})  # fmt: skip
    return rows


def _relative(value: Tensor, truth: Tensor) -> float:
    """Frobenius; NaN stays NaN and passes no budget."""
    size = float(truth.norm())
    return float((value.double() - truth).norm()) / (size if size > 0 else 1.0)


def gate_regime(device: Device, regime: str, small: bool) -> list[dict[str, Any]]:
    """Full steps of ours in one regime against the float64 truth written apart from the package: loss, dx, dW on the sample, step."""
    n, c, d = (12, 200, 32) if small else (256, 20_000, 512)
    problem = make_device_problem(regime, n, c, d, device.where)
    truths = {margin_key(MARGIN): device_truth(problem, MARGIN)}
    arena = DeviceArena(problem)
    rows = []
    kinds: tuple[type[Contender], ...] = (GpuStep, GpuStepBF16) if small else (GpuDense, GpuStep, GpuDenseBF16, GpuStepBF16)
    for kind in kinds:
        times = DeviceTimes()
        gate, _ = gate_step(device, kind(arena), problem, truths, times)
        found = {"loss": gate.loss, "dx": gate.d_embeddings, "dW": gate.d_weight, "dW of negatives": gate.d_weight_negatives, "step": gate.step}
        limit = gate.limit * math.sqrt(512 / d)  # bf16: 1e-2 is "must", 4e-3 "strong" (performance.md)
        lines = [{"output": o, "error": e, "budget": limit} for o, e in found.items()]
        passes = gate.same_bits and all(e <= limit for e in found.values())
        rows.append({"name": kind.name, "case": regime, "dtype": "bf16" if "bf16" in kind.name else "float32", "errors": lines,
                     "same_bits": gate.same_bits, "passes": passes, "first_call_s": times.wall[0]})  # fmt: skip
    loss = truths[margin_key(MARGIN)].loss
    off = abs(loss - problem.expected_loss) if math.isfinite(problem.expected_loss) and not small else 0.0
    rows.append({"name": "the regime's own loss", "case": regime, "dtype": "float64", "same_bits": True, "first_call_s": 0.0,
                 "passes": off <= problem.tolerance, "errors": [{"output": f"{loss:.3f}", "error": off, "budget": min(problem.tolerance, 1e9)}]})  # fmt: skip
    return rows


__all__ = ["DRY_SHAPES", "REGIMES", "SHAPES", "STEMS", "VARIANTS", "gate_loss", "gate_memory_write", "gate_operation", "gate_regime"]
