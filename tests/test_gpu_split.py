"""Split heads and bfloat16 momentum on a GPU: the bits of a float32 head; marker `gpu`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import recog_fast as rf

DEVICE = "cuda"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")]


def train(
    device: str, backend: str, half: bool, weight_format: Any = "float32", momentum_dtype: torch.dtype = torch.float32, rate: float = 1.0
) -> tuple[Tensor, list[float]]:
    """Three steps of a head with its fused optimizer: W, and the losses."""
    torch.manual_seed(0)
    head = rf.MarginHead(
        2000, 64, margin=rf.CurricularFace(), unknown_weight=0.1, compute_dtype=torch.bfloat16 if half else None, sample_rate=rate,
        sample_seed=1, weight_format=weight_format,
    ).to(device)  # fmt: skip
    optimizer = rf.HeadSGD(head, lr=0.1, momentum=0.9, momentum_dtype=momentum_dtype)
    losses = []
    with rf.ops.use_backend(backend):
        for step in range(3):
            g = torch.Generator().manual_seed(step)
            x = torch.randn(48, 64, generator=g).to(device).requires_grad_()
            loss = head(x, torch.randint(-1, 2000, (48,), generator=g).to(device))
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return head.full_weight().cpu(), losses


@pytest.mark.parametrize("rate", [1.0, 0.3])
@pytest.mark.parametrize("momentum_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("half", [False, True])
def test_a_split_head_trains_as_a_float32_one(half: bool, momentum_dtype: torch.dtype, rate: float) -> None:
    """The kernels see the same W, and round the velocity by the same chance: the same bits."""
    one, losses = train(DEVICE, "auto", half, "float32", momentum_dtype, rate)
    two, others = train(DEVICE, "auto", half, "split", momentum_dtype, rate)
    assert torch.equal(one, two) and losses == others
