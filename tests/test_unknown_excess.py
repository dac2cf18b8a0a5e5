"""The UIR excess of the worst row: within 1e-8 of float64 whatever carries its probability, before the loss is rounded (math.md 3)."""

from __future__ import annotations

import pytest
import torch
from routes import NATIVE, Route, each
from torch import Tensor

import recog_fast as rf
from recog_fast.ops import _unknown

N, SCALE = 48, 64.0


def problem(kind: str, classes: int, dimension: int) -> tuple[Tensor, Tensor]:
    """(x, W). "unit": rows that float32 takes for unit; "alike": rows between three classes."""
    g = torch.Generator().manual_seed(classes + dimension)
    weight, x = torch.randn(classes, dimension, generator=g), torch.randn(N, dimension, generator=g)
    unit = torch.nn.functional.normalize(weight, dim=1)
    if kind == "alike":
        near = unit[torch.randint(classes, (N, 3), generator=g)] * torch.tensor([1.0, 0.99, 0.97]).reshape(1, 3, 1)
        x = 0.3 * near.sum(dim=1) + x / dimension**0.5
    return x, weight if kind == "random" else unit


def true_excess(x: Tensor, weight: Tensor) -> Tensor:
    """(N,) in float64, from the definition's sums."""
    unit = (torch.nn.functional.normalize(t.double(), dim=1) for t in (x, weight))
    p = torch.softmax(SCALE * torch.einsum("nd,cd->nc", *unit), dim=1)
    series = p**2 / 2 * (1 + p / 3 * (1 + p / 4 * (1 + p / 5 * (1 + p / 6))))
    remainder = torch.where(p < 0.05, series, torch.expm1(p) - p).sum(dim=1)
    ratio = (1 + remainder) / weight.shape[0]  # A - C log1p(A/C) = C (r - log1p(r)), by its series: r <= 2e-3 here
    bend = ratio**2 * (1 / 2 - ratio * (1 / 3 - ratio * (1 / 4 - ratio * (1 / 5 - ratio / 6))))
    return remainder - weight.shape[0] * bend


@each(NATIVE)
@pytest.mark.parametrize(
    ("kind", "classes", "dimension"),
    [("random", 10_000, 512), ("unit", 10_000, 512), ("alike", 10_000, 512), ("random", 3_000, 17), ("unit", 3_000, 64), ("alike", 3_000, 130)],
)
def test_every_row_is_within_1e_8(route: Route, kind: str, classes: int, dimension: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = problem(kind, classes, dimension)
    found: list[Tensor] = []
    compute = _unknown.excess_double

    def seen(remainder: Tensor, count: int) -> Tensor:
        found.append(compute(remainder, count))
        return found[-1]

    monkeypatch.setattr(_unknown, "excess_double", seen)
    with route():
        loss = rf.unknown_rejection_loss(x, weight, reduction="none", scale=SCALE)
    truth = true_excess(x, weight)
    assert float((found[0] - truth).abs().max()) <= 1e-8
    assert torch.equal(loss, found[0].float())
