"""drop_mass: the rows of least gradient mass leave dW, their mass is bounded and reported, everything else is exact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from budgets import relative
from routes import FLOAT64, HALF, NATIVE, Route, each
from torch import Tensor
from training_data import make_folder, settings

import recog_fast as rf
from recog_fast.evaluation.report import read_metrics
from recog_fast.ops._rows import least_mass
from recog_fast.training.loop import train

C, D, N = 400, 32, 64


def make_head(route: Route, **options: Any) -> rf.MarginHead:
    torch.manual_seed(1)
    return rf.MarginHead(C, D, scale=32.0, compute_dtype=route.compute_dtype, **options).to(route.dtype)


def batch(route: Route, unlabelled: bool = True) -> tuple[Tensor, Tensor]:
    """Rows between their centre and noise: q from 1e-9 to 1."""
    g = torch.Generator().manual_seed(2)
    head = make_head(route)
    labels = torch.randint(0, C, (N,), generator=g)
    noise = torch.randn(N, D, generator=g).to(route.dtype) / D**0.5
    x = torch.nn.functional.normalize(head.weight.detach()[labels], dim=1) + torch.linspace(0, 2, N).unsqueeze(1).to(route.dtype) * noise
    return x, torch.where(torch.arange(N) % 8 == 7, -1, labels) if unlabelled else labels


def test_least_mass_by_hand() -> None:
    mass = torch.tensor([0.5, 0.1, 0.0, 0.1, 0.3])
    assert least_mass(mass, 0.0).tolist() == [False, False, True, False, False]  # what has no mass goes at any share
    assert least_mass(mass, 0.1).tolist() == [False, True, True, False, False]  # of equal rows the first goes first
    assert least_mass(mass, 0.25).tolist() == [False, True, True, True, False]
    assert least_mass(mass, 0.99).tolist() == [False, True, True, True, True]
    assert not least_mass(torch.tensor([1.0, float("nan")]), 0.9).any()  # nothing is known of a diverged batch


@each([FLOAT64, NATIVE[0], HALF[0]])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("share", [1e-3, 0.05, 0.3])
def test_mass_is_bounded_reported_and_left_out(route: Route, weighted: bool, share: float) -> None:
    """dx is exact; dW is, to rounding, that of the batch whose dropped rows have weight 0."""
    x, labels = batch(route)
    weights = torch.rand(N, generator=torch.Generator().manual_seed(3)).to(route.dtype) if weighted else None
    dropping, plain = make_head(route, drop_mass=share, unknown_weight=0.1), make_head(route, unknown_weight=0.1)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    with route():
        loss, stats = dropping(a, labels, sample_weight=weights, return_stats=True)
        loss.backward()
        truth, its_stats = plain(b, labels, sample_weight=weights, return_stats=True)
        truth.backward()
    assert torch.equal(loss, truth)
    assert torch.equal(a.grad, b.grad)  # type: ignore[arg-type]
    q = torch.where(labels >= 0, 1 - its_stats.target_probability.double(), torch.zeros(N, dtype=torch.float64))
    mass = q if weights is None else q * weights.double()
    dropped = stats.dropped_mass > 0
    assert bool(dropped.any())
    assert not bool(dropped[labels < 0].any())
    scale = 1.0 if weights is None else weights.double()
    assert float((stats.dropped_mass.double() * scale).sum()) <= share * float(mass.sum()) * (1 + 1e-6)
    assert (stats.dropped_mass.double() - q)[dropped].abs().max() <= 1e-6  # q of each row left out
    heaviest, lightest = mass[dropped].max(), mass[~dropped & (labels >= 0)].min()
    assert heaviest <= lightest + 1e-9
    assert float(mass[dropped].sum() + lightest) > share * float(mass.sum()) - 1e-9  # one more would pass the share
    kept = torch.where(dropped, 0.0, 1.0).to(route.dtype) * (1 if weights is None else weights)
    without = make_head(route, unknown_weight=0.1)
    with route():
        without(x.clone().requires_grad_(), labels, sample_weight=kept).backward()
    # 16 bits: the fixed-point steps of a class's slopes depend on which rows are there
    assert relative(dropping.weight.grad, without.weight.grad) <= {torch.float64: 1e-12}.get(route.dtype, 1e-4 if route.half else 1e-6)  # type: ignore[arg-type]
    assert relative(dropping.weight.grad, plain.weight.grad) <= 8 * share  # type: ignore[arg-type]


@each([FLOAT64, NATIVE[0]])
def test_fused_steps_drop_the_same_rows(route: Route) -> None:
    x, labels = batch(route)
    ends = []
    for fuse in (True, False):
        head = make_head(route, drop_mass=0.2)
        optimizer = rf.HeadSGD(head, lr=0.5) if fuse else torch.optim.SGD([head.weight], lr=0.5, momentum=0.9, weight_decay=5e-4)
        with route():
            for _ in range(3):
                optimizer.zero_grad()
                head(x.clone().requires_grad_(), labels).backward()
                assert not fuse or 0 < head.pending_rows < N
                optimizer.step()
        ends.append(head.weight.detach())
    assert relative(*ends) <= (1e-12 if route.dtype == torch.float64 else 2e-6)


@each([FLOAT64, NATIVE[0]])
def test_rules_and_subcenters_lose_the_right_columns(route: Route) -> None:
    """The rows of the rules and the winning sub-centers are taken along."""
    x, labels = batch(route)
    heads = [make_head(route, drop_mass=d, subcenters=3, margin=rf.CurricularFace().to(route.dtype)) for d in (0.2, 0.0)]
    with route():
        _, stats = heads[0](x.clone().requires_grad_(), labels, return_stats=True)
        weights = torch.where(stats.dropped_mass > 0, 0.0, 1.0).to(route.dtype)
        heads[0].zero_grad()
        fresh = make_head(route, drop_mass=0.2, subcenters=3, margin=rf.CurricularFace().to(route.dtype))
        fresh(x.clone().requires_grad_(), labels).backward()
        heads[1](x.clone().requires_grad_(), labels, sample_weight=weights).backward()
    assert bool((weights == 0).any())
    assert relative(fresh.weight.grad, heads[1].weight.grad) <= (1e-12 if route.dtype == torch.float64 else 1e-6)  # type: ignore[arg-type]


def test_batches_that_lose_every_row_or_none() -> None:
    """All rows at loss 0 exactly: dW is 0. Evaluation and no_grad drop nothing. No rows: nothing to drop."""
    head = make_head(NATIVE[0], drop_mass=0.5)
    x = head.weight.detach()[:4].clone()
    with NATIVE[0]():
        head.margin = rf.Softmax()
        head.scale = 5000.0
        _, stats = head(x.requires_grad_(), torch.arange(4), return_stats=True)
        loss = head(x, torch.arange(4))
        loss.backward()
        assert loss.item() == 0
        assert head.weight.grad is not None and not bool(head.weight.grad.any())
        head = make_head(NATIVE[0], drop_mass=0.5)
        rows, labels = batch(NATIVE[0])
        with torch.no_grad():
            _, stats = head(rows, labels, return_stats=True)
        assert not bool(stats.dropped_mass.any())
        _, stats = head.eval()(rows.requires_grad_(), labels, return_stats=True)
        assert not bool(stats.dropped_mass.any())
        head.train()(torch.empty(0, D, requires_grad=True), torch.empty(0, dtype=torch.int64)).backward()


def test_training_logs_the_dropped_share(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "faces")
    shares = {}
    for name, options in {"off": {}, "on": {"drop_mass": 0.1}, "lists": {"drop_elements": 0.05}, "kept": {"keep_exponentials": "float32"}}.items():
        result = train(settings(tmp_path, folder, output=str(tmp_path / name), **options))
        lines = [line for line in read_metrics(result.output / "metrics.jsonl") if "loss" in line]
        shares[name] = [line.get("dropped_mass") for line in lines]
        assert lines[-1]["loss"] < lines[0]["loss"] * 1.5
    assert set(shares["off"]) == set(shares["kept"]) == {None}
    assert all(0 <= share <= 0.1 + 1e-6 for share in shares["on"])
    assert max(shares["on"]) > 0 and max(shares["lists"]) > 0


@pytest.mark.parametrize(("change", "message"), [
    ({"drop_mass": 1.0}, r"drop_mass in \[0, 1\)"), ({"keep_exponentials": "float16"}, "keep_exponentials"),
    ({"keep_exponentials": "float32", "drop_mass": 0.1}, "at most one"), ({"drop_elements": -0.1}, r"drop_elements in \[0, 1\)"),
    ({"drop_mass": 0.1, "drop_elements": 0.1}, "at most one"),
])  # fmt: skip
def test_bad_settings_are_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    folder = make_folder(tmp_path / "faces")
    with pytest.raises(ValueError, match=message):
        train(settings(tmp_path, folder, **change))
