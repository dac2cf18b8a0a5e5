"""Stages 3 and 4: what a training loop does around the kernels (errors, streams, graphs, torch.compile, autocast), and launches.

Public names only. A check returns lines {"check", "result", "detail"}; result: "ok", "WRONG", "not supported", "error" or "info".
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import recog_fast as rf

from .contenders import Unsuitable
from .gpu_contenders import GpuDense, GpuGraph, GpuStep, GpuStepBF16, captured
from .gpu_device import Device, first_line, is_fatal
from .gpu_model import predict
from .gpu_problems import DeviceArena, make_device_problem
from .gpu_times import DeviceTimes, run_once
from .peers import PartialFC

Line = dict[str, Any]


def _line(check: str, result: str, detail: str = "") -> Line:
    return {"check": check, "result": result, "detail": detail}


def _verdict(check: str, right: bool, detail: str = "") -> Line:
    return _line(check, "ok" if right else "WRONG", detail)


class Loop:
    """A head with its fused optimizer and fixed batches, from the same start every time."""

    def __init__(self, device: Device, small: bool, seed: int = 0, classes: int = 0) -> None:
        self.n, self.c, self.d = (6, classes or 80, 32) if small else (256, classes or 30_000, 512)
        torch.manual_seed(seed)
        self.head = rf.MarginHead(self.c, self.d, compute_dtype=torch.bfloat16).to(device.where)
        self.optimizer = rf.HeadSGD(self.head, lr=0.1)
        g = torch.Generator().manual_seed(seed)
        self.x = device.to(torch.randn(self.n, self.d, generator=g)).requires_grad_()
        self.labels = device.to(torch.randint(0, self.c, (self.n,), generator=g))

    def step(self) -> Tensor:
        """One training step; the loss, detached."""
        self.x.grad = None
        loss = self.head(self.x, self.labels)
        loss.backward()
        self.optimizer.step()
        return loss.detach()  # type: ignore[no-any-return]

    def state(self) -> list[Tensor]:
        """Copies of W and dx."""
        assert self.x.grad is not None
        return [self.head.weight.detach().clone(), self.x.grad.clone()]


def _same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def check_errors(device: Device, small: bool) -> list[Line]:
    """Out of memory, bad labels and non-finite rows: named, confined, and the same bits afterwards."""
    expected = Loop(device, small)
    first = expected.step()
    lines = [_after(device, small, "out of memory", _out_of_memory, first, expected.state())]
    for name, spoil in (("a label beyond C", _bad_label), ("a row with NaN", _bad_row)):
        lines += spoil(device, small)
        lines.append(_after(device, small, name, lambda d, s: "", first, expected.state()))
    return lines


def _after(device: Device, small: bool, what: str, provoke: Callable[[Device, bool], str], loss: Tensor, state: list[Tensor]) -> Line:
    detail = provoke(device, small)
    loop = Loop(device, small)
    again = loop.step()
    return _verdict(f"after {what}: a step gives the bits it gave before", torch.equal(loss, again) and _same(state, loop.state()), detail)


def _out_of_memory(device: Device, small: bool) -> str:
    """A plain allocation, then one inside a step whose graph already exists."""
    seen = []
    for attempt in range(2):
        try:
            if attempt:
                loop = Loop(device, small)
                loss = loop.head(loop.x, loop.labels)
                device.allocate_too_much()
                loss.backward()
            device.allocate_too_much()
        except torch.OutOfMemoryError as error:
            seen.append(type(error).__name__)
        device.clean()
    return f"{len(seen)} of 2 raised {seen[0] if seen else 'nothing'}"


def _outcome(call: Callable[[], Tensor]) -> tuple[Tensor | None, str]:
    try:
        result = call()
    except (ValueError, RuntimeError) as error:
        if is_fatal(error):
            raise
        return None, first_line(error)
    return result, ""


def _bad_label(device: Device, small: bool) -> list[Line]:
    """Either the call raises and names the row, or the row has loss 0 and a later call, step or check raises."""
    loop = Loop(device, small)
    labels = loop.labels.clone()
    labels[2] = loop.c + 5

    def call(**options: Any) -> Tensor:
        return loop.head(loop.x, labels, reduction="none", **options)  # type: ignore[no-any-return]

    losses, at_once = _outcome(call)
    if losses is None:
        return [_verdict("a label beyond C", "row 2" in at_once, f"raised in the same call (it waits for the device): {at_once}")]
    device.synchronize()
    later = [what for what, again in (("call", lambda: loop.head(loop.x, loop.labels)), ("step", loop.step)) if _outcome(again)[1]]
    _, checked = _outcome(lambda: call(check_labels=True))
    return [
        _verdict("a label beyond C: loss 0 in its row", float(losses[2].detach()) == 0.0),
        _verdict("a label beyond C: raised later", bool(later), ", ".join(later)),
        _verdict("a label beyond C: check_labels=True raises at once", "row 2" in checked, checked),
    ]


def _bad_row(device: Device, small: bool) -> list[Line]:
    """Either the call raises and names the row, or its loss alone is not finite."""
    loop = Loop(device, small)
    x = loop.x.detach().clone()
    x[3, 1] = float("nan")
    losses, at_once = _outcome(lambda: loop.head(x, loop.labels, reduction="none").detach())
    if losses is None:
        return [_verdict("a row with NaN", "row 3" in at_once, f"raised in the same call (it waits for the device): {at_once}")]
    device.synchronize()
    finite = torch.isfinite(losses)
    alone = not bool(finite[3]) and int((~finite).sum()) == 1
    with contextlib.suppress(ValueError):  # the report of the row above may come now
        loop.head(loop.x, loop.labels)
    return [_verdict("a row with NaN: a non-finite loss for that row alone", alone)]


def check_streams(device: Device, small: bool) -> list[Line]:
    """Two heads, three steps each, one after the other and on two streams at once: the same bits."""
    serial = [Loop(device, small, seed) for seed in range(2)]
    for loop in serial:
        for _ in range(3):
            loop.step()
    device.synchronize()
    together = [Loop(device, small, seed) for seed in range(2)]
    device.synchronize()
    contexts = [torch.cuda.stream(torch.cuda.Stream()) if device.name == "cuda" else contextlib.nullcontext() for _ in together]
    for _ in range(3):
        for loop, context in zip(together, contexts, strict=True):
            with context:
                loop.step()
    device.synchronize()
    right = all(_same(a.state(), b.state()) for a, b in zip(serial, together, strict=True))
    return [_verdict("two heads on two streams: the bits of one after the other", right)]


def check_graph(device: Device, small: bool) -> list[Line]:
    """Head and HeadSGD captured as one graph: the bits of eager steps, and both times."""
    eager, replayed = Loop(device, small), Loop(device, small)
    start = replayed.head.weight.detach().clone()
    try:
        loss, graph = captured(replayed.step)
    except Unsuitable as error:
        return [_line("CUDA graph of head and HeadSGD.step", "not supported", str(error))]
    with torch.no_grad():
        replayed.head.weight.copy_(start)
        replayed.optimizer.state[replayed.head.weight]["momentum_buffer"].zero_()
    losses = []
    for _ in range(3):
        graph.replay()
        losses.append(torch.equal(loss, eager.step()))
    lines = [_verdict("CUDA graph: losses and W of three eager steps", all(losses) and torch.equal(replayed.head.weight, eager.head.weight))]
    seconds = {}
    for name, call in (("graph", graph.replay), ("eager", eager.step)):
        marks = [device.mark()]
        for _ in range(10):
            call()
        marks.append(device.mark())
        device.synchronize()
        seconds[name] = device.seconds(*marks) / 10
    shape = f"{eager.n} x {eager.c} x {eager.d}"
    return [*lines, _line("CUDA graph: time", "info", f"{shape}: {1e3 * seconds['graph']:.3f} ms replayed, {1e3 * seconds['eager']:.3f} ms eager")]


def check_compile(device: Device, small: bool) -> list[Line]:
    """torch.compile of a function around the loss: the values of the plain call."""
    loop = Loop(device, small)
    weight = loop.head.weight.detach().clone().requires_grad_()
    backbone = nn.Linear(loop.d, loop.d, bias=False).to(device.where)

    def function(x: Tensor) -> Tensor:
        rows = backbone(x)
        return 2 * rf.margin_softmax_loss(rows, weight, loop.labels, compute_dtype=torch.bfloat16)

    def run(call: Callable[[Tensor], Tensor]) -> list[Tensor]:
        loss = call(loop.x.detach())
        return [loss.detach(), *torch.autograd.grad(loss, (weight, backbone.weight))]

    torch.compiler.reset()
    plain, began = run(function), time.perf_counter()
    try:
        compiled = run(torch.compile(function, dynamic=False, backend="inductor" if device.name == "cuda" else "eager"))
    except Exception as error:
        if is_fatal(error):
            raise
        return [_line("torch.compile around margin_softmax_loss", "error", first_line(error))]
    worst = max(float((a - b).norm() / b.norm()) for a, b in zip(compiled, plain, strict=True))
    return [_verdict("torch.compile around margin_softmax_loss", worst < 1e-3, f"relative difference {worst:.1e}, {time.perf_counter() - began:.1f} s")]


def check_autocast(device: Device, small: bool) -> list[Line]:
    """Under bf16 autocast, and with bf16 embeddings, the head runs in bf16; moving it there and back keeps every bit."""
    loop = Loop(device, small)
    plain = rf.MarginHead(loop.c, loop.d).to(device.where)
    plain.load_state_dict(loop.head.state_dict())
    asked = loop.head(loop.x, loop.labels).detach()
    with torch.autocast(device.where.type, dtype=torch.bfloat16):
        inside = plain(loop.x, loop.labels)
    (gradient,) = torch.autograd.grad(inside, loop.x)
    lines = [_verdict("autocast: the bits of compute_dtype=bfloat16", torch.equal(asked, inside.detach()) and gradient.dtype == torch.float32)]
    half = loop.x.detach().bfloat16().requires_grad_()
    (d_half,) = torch.autograd.grad(plain(half, loop.labels), half)
    lines.append(_verdict("bf16 embeddings have bf16 gradients", d_half.dtype == torch.bfloat16 and bool(torch.isfinite(d_half).all())))
    there = plain.weight.detach().clone()
    plain.to("cpu").to(device.where)
    lines.append(_verdict("head to the CPU and back", torch.equal(plain.weight, there) and bool(torch.isfinite(plain(loop.x, loop.labels)))))
    return lines


def launches(device: Device, small: bool) -> list[dict[str, Any]]:
    """Stage 4: of one step, the seconds the host needs to issue it, those until it is done, those the device is busy, its kernels."""
    sizes = ((6, 90, 32),) if small else ((128, 100_000, 512), (1024, 1_000_000, 512))
    rows = []
    for shape in sizes:
        problem = make_device_problem("R0", *shape, device.where)
        arena = DeviceArena(problem)
        for kind in (GpuGraph, GpuStepBF16, PartialFC) if small else (GpuGraph, GpuStepBF16, GpuStep, GpuDense, PartialFC):
            row: dict[str, Any] = {"name": kind.name, "N": shape[0], "C": shape[1], "D": shape[2]}
            try:
                contender, times = kind(arena), DeviceTimes()
                run_once(device, contender)
                for _ in range(3):
                    run_once(device, contender, times)
                contender.restore()
                profile = device.profile(partial(_step, contender))
            except Unsuitable as error:
                rows.append({**row, "skipped": str(error)})
                continue
            except torch.OutOfMemoryError:
                rows.append({**row, "skipped": "oom"})
                device.clean()
                continue
            issued, wall = sorted(times.issued)[1], sorted(times.wall)[1]
            row.update(issued_s=issued, wall_s=wall, busy_s=profile.busy, kernels=profile.kernels, top=profile.top)
            # the host is the limit where it is still issuing when the device has nothing left, and the device idles
            row["launch_bound"] = issued > 0.9 * wall and profile.busy < 0.8 * wall
            rows.append(row)
        expected = predict(*shape, {"tflops": 790.0, "tbs": 4.3, "l2": device.l2_bytes, "multiprocessors": device.multiprocessors})
        rows.append({"name": f"predicted of {GpuStepBF16.name}", "N": shape[0], "C": shape[1], "D": shape[2], "kernels": expected.kernels, "skipped": ""})
    return rows


def _step(contender: Any) -> None:
    loss = contender.forward()
    if loss.requires_grad:
        torch.autograd.backward(loss)
    contender.update()


_HEADS: dict[str, dict[str, Any]] = {
    "sampled classes": {"sample_rate": 0.2, "sample_seed": 3}, "sampled classes, sparse": {"sample_rate": 0.2, "sample_seed": 3, "unsampled": "sparse"},
    "sampled classes, unknown rows": {"sample_rate": 0.2, "sample_seed": 3, "unknown_weight": 0.1}, "memory": {"memory": True},
    "sub-centers": {"subcenters": 2}, "CurricularFace": {"margin": rf.CurricularFace()},
}  # fmt: skip


def _trained(device: Device, small: bool, backend: str, half: bool, options: dict[str, Any]) -> Tensor:
    """W minus its start after three steps."""
    n, c, d = (6, 80, 32) if small else (200, 5000, 64)
    options = copy.deepcopy(options)
    held = rf.PrototypeMemory(c, d, rf.VPL(delta=50, start=0)) if options.pop("memory", False) else None
    unsampled = options.pop("unsampled", "dense")
    torch.manual_seed(0)
    head = rf.MarginHead(c, d, memory=held, compute_dtype=torch.bfloat16 if half else torch.float32, **options).to(device.where)
    # so small a rate that W moves in a straight line: errors of the gradients are then those of the movement
    optimizer, start = rf.HeadSGD(head, lr=1e-4, unsampled=unsampled), head.weight.detach().clone()
    with rf.ops.use_backend(backend):
        for step in range(3):
            g = torch.Generator().manual_seed(step)
            x = device.to(torch.randn(n, d, generator=g)).requires_grad_()
            labels = device.to(torch.randint(-1, c, (n,), generator=g))
            head(x, labels, **({} if held is None else {"keys": x.detach()})).backward()
            optimizer.step()
    return head.weight.detach() - start


def check_heads(device: Device, small: bool) -> list[Line]:
    """Heads with HeadSGD: W after three steps as on the reference in float32, and the same bits in a second training."""
    lines = []
    for name, options in list(_HEADS.items())[2:3] if small else _HEADS.items():
        truth = _trained(device, small, "reference", False, options)
        for half in (False, True):
            ours, again = (_trained(device, small, "auto", half, options) for _ in range(2))
            error, budget = float((ours - truth).norm() / truth.norm()), 2e-2 if half else 1e-4
            detail = f"error of the movement of W {error:.1e} (budget {budget:.0e}), bits {'equal' if torch.equal(ours, again) else 'NOT equal'}"
            lines.append(_verdict(f"head, {name}, {'bf16' if half else 'float32'}", error <= budget and torch.equal(ours, again), detail))
    return lines


CHECKS: dict[str, Callable[[Device, bool], list[Line]]] = {
    "errors": check_errors, "heads": check_heads, "graph": check_graph, "streams": check_streams, "autocast": check_autocast, "compile": check_compile,
}  # fmt: skip
