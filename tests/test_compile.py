"""torch.compile around the losses and the head: the same results, one graph break, no recompilation by the step."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

import recog_fast as rf

N, C, D = 6, 50, 16


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


def parts() -> tuple[nn.Linear, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return nn.Linear(8, D), torch.randn(C, D), torch.randn(N, 8), torch.randint(0, C, (N,))


def test_the_loss_inside_a_compiled_function() -> None:
    backbone, weight, x, labels = parts()

    def loss(w: Tensor) -> Tensor:
        return rf.margin_softmax_loss(2 * backbone(x), w, labels) * 3

    found = []
    for run in (loss, torch.compile(loss, backend="aot_eager")):
        backbone.zero_grad()
        w = weight.clone().requires_grad_()
        value = run(w)
        value.backward()
        assert w.grad is not None and backbone.weight.grad is not None
        found.append((value.detach(), w.grad, backbone.weight.grad.clone()))
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)
    assert torch._dynamo.explain(loss)(weight).graph_break_count == 1


def test_a_head_trains_inside_a_compiled_function() -> None:
    trained = []
    for compiled in (False, True):
        backbone, _, x, labels = parts()
        head = rf.MarginHead(C, D, margin=rf.CurricularFace())
        optimizer = rf.HeadSGD(head, lr=0.1)

        def forward(x: Tensor, labels: Tensor, backbone: nn.Linear = backbone, head: rf.MarginHead = head) -> Tensor:
            return head(backbone(x), labels)

        run = torch.compile(forward, backend="aot_eager") if compiled else forward
        counters = torch._dynamo.utils.counters
        counters.clear()
        for _ in range(4):
            run(x, labels).backward()
            optimizer.step()
        assert int(head.steps) == 4 and head.weight.grad is None
        assert counters["frames"]["total"] <= 4  # of the first step
        trained.append(head.weight.detach())
    assert torch.allclose(*trained, rtol=1e-5, atol=1e-7)


def test_import_and_use_load_no_compiler() -> None:
    code = (
        "import sys, torch, recog_fast as rf; head = rf.MarginHead(9, 4); head(torch.randn(2, 4), torch.tensor([1, 2])).backward();"
        "assert 'torch._dynamo' not in sys.modules, 'torch._dynamo'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
