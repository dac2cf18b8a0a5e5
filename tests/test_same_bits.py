"""The same bits whatever the threads and the memory's former contents; the same curves as float64 to the error budget."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from routes import HALF, NATIVE, Route, each
from torch import Tensor

import recog_fast as rf

C, D = 60, 12


@each([*NATIVE, *HALF])
def test_threads_do_not_change_a_bit(route: Route) -> None:
    torch.manual_seed(5)
    x, w = torch.randn(33, 70), torch.randn(5000, 70)
    labels = torch.randint(-1, 5000, (33,))
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            a, b = x.clone().requires_grad_(), w.clone().requires_grad_()
            with route():
                loss, stats = rf.margin_softmax_loss(
                    a, b, labels, unknown_weight=0.1, margin=rf.CurricularFace(), compute_dtype=route.compute_dtype, return_stats=True
                )
                loss.backward()
            results.append((loss.detach(), *stats, a.grad, b.grad))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(p, q) for p, q in zip(results[0], other, strict=True))


_UNINITIALISED = """
import sys, torch
sys.path.insert(0, {tests!r})
import recog_fast as rf
from recog_fast import native
native.select_isa(sys.argv[1])
torch.manual_seed(6)
torch.set_num_threads(2)
if sys.argv[2] == "poisoned":
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills torch.empty with NaN; malloc's fill is in the environment
SHAPES = ((7, 200, 33, 1, None), (20, 1500, 64, 1, None), (5, 60, 16, 3, None), (7, 200, 33, 1, torch.bfloat16), (20, 1500, 64, 1, torch.bfloat16),
          (5, 60, 16, 3, torch.bfloat16), (0, 100, 20, 1, torch.bfloat16))
for n, c, d, k, half in SHAPES:
    memory = None if k > 1 else rf.PrototypeMemory(c, d, rf.VPL(start=0))
    head = rf.MarginHead(c, d, subcenters=k, unknown_weight=0.1, memory=memory, compute_dtype=half, keep_exponentials=n == 20)
    optimizer = rf.HeadSGD(head, lr=0.1)
    for _ in range(3):
        x, labels = torch.randn(n, d, requires_grad=True), torch.randint(-1, c, (n,))
        loss, stats = head(x, labels, keys=None if k > 1 else x.detach(), return_stats=True)
        dense = torch.autograd.grad(rf.margin_softmax_loss(x, head.weight, labels, compute_dtype=half), head.weight)[0]
        loss.backward()
        optimizer.step()
    for t in (loss, x.grad, dense, head.weight, *stats):
        print(t.detach().double().sum().item().hex(), bool(torch.isfinite(t).all()))
"""


@pytest.mark.parametrize("isa", ["amx_bf16", "avx512", "avx2", "baseline", "emulated_bf16", "emulated_amx"])
def test_uninitialised_memory_is_never_read(isa: str) -> None:
    """The same bits with torch.empty full of NaN and malloc's memory full of one byte as without."""
    with Route(isa, torch.float32, "auto", isa)():
        pass  # skips where this CPU has no such ISA
    script = _UNINITIALISED.format(tests=str(Path(__file__).parent))
    outputs = [
        subprocess.run(
            [sys.executable, "-c", script, isa, kind], capture_output=True, text=True, check=True, env={**os.environ, **extra}
        ).stdout
        for kind, extra in (("plain", {}), ("poisoned", {"MALLOC_PERTURB_": "129"}))
    ]
    assert outputs[0] == outputs[1]
    assert "True" in outputs[0]
    assert "False" not in outputs[0]


def _curve(backend: str, dtype: torch.dtype) -> Tensor:
    """Losses of 100 steps of a small network with HeadSGD, same seed and data whatever the route."""
    torch.manual_seed(0)
    net, head = torch.nn.Linear(20, D).to(dtype), rf.MarginHead(C, D, scale=16.0, margin=rf.CosFace(0.2)).to(dtype)
    sgd, optimizer = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9), rf.HeadSGD(head, lr=0.02)
    g = torch.Generator().manual_seed(5)
    centres, losses = torch.randn(C, 20, generator=g), []
    with rf.ops.use_backend(backend):
        for _ in range(100):
            labels = torch.randint(0, C, (32,), generator=g)
            images = centres[labels] + 0.3 * torch.randn(32, 20, generator=g)
            loss = head(net(images.to(dtype)), labels)
            sgd.zero_grad()
            loss.backward()
            sgd.step()
            optimizer.step()
            losses.append(loss.item())
    return torch.tensor(losses, dtype=torch.float64)


def test_loss_curves_agree_to_the_error_budget() -> None:
    """100 steps: the native curve is as close to float64 as plain PyTorch in float32 (twice its error and 1e-6)."""
    truth, plain = _curve("reference", torch.float64), _curve("reference", torch.float32)
    with NATIVE[0]():  # skips without the compiled kernels
        native = _curve("auto", torch.float32)
    assert truth[-10:].mean() < 0.6 * truth[:10].mean()  # it learns
    own, error = ((curve - truth).abs() / truth for curve in (plain, native))
    assert error.max() <= 2 * own.max() + 1e-6
