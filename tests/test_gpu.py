"""The operations on CUDA tensors: Triton tiles and GEMMs against the reference on the CPU. Golden cases on CUDA are routes of
their own tests; `interpreted.py` runs the same kernels without a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sweeps import STEMS, check, results
from test_ops import calls, sample
from torch import Tensor

import recog_fast as rf
from recog_fast.ops import _dispatch, chunks

DEVICE = "cuda"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")]


@pytest.fixture(autouse=True)
def _takes_the_kernels() -> None:
    missing = _dispatch.triton_missing()
    if missing is not None:
        pytest.skip(f"the reference runs here: {missing}")


def there(t: Tensor) -> Tensor:
    return t.to(DEVICE, copy=True)


def run(stem: str) -> Any:
    """The operation; a step's results come back on the CPU too."""
    return getattr(torch.ops.recog_fast, stem)


# N: below, above and at a tile, a small batch and a large one; C: one tile, many, several chunks of the plan (N = 1024, D = 512); D: descriptors
# (multiples of 8), pointers (odd, and 500), a step of the tile cut short
@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize(("n", "c", "d", "k"), [
    (5, 9, 6, 1), (37, 1000, 64, 1), (130, 3000, 33, 1), (64, 4000, 512, 1), (128, 5000, 500, 1), (1024, 20000, 512, 1), (70, 900, 64, 3), (200, 2000, 128, 2),
])  # fmt: skip
def test_operations_agree_with_the_reference(stem: str, n: int, c: int, d: int, k: int) -> None:
    check(stem, calls(sample(n, c, d, k, seed=n))[stem], run(stem), there)


@pytest.mark.parametrize("stem", STEMS)
def test_plain_rows_agree_with_the_reference(stem: str) -> None:
    """Without rules and memory: the tiles of 128 x 128, and rows of the margin alone."""
    s = sample(256, 9000, 512, rules=False, memory=False)
    s["terms"][4] = 0
    check(stem, calls(s)[stem], run(stem), there)


@pytest.mark.parametrize("sparse", [False, True])
def test_sampled_classes(sparse: bool) -> None:
    s = sample(60, 3000, 64, seed=3)
    members = torch.randperm(3000, generator=torch.Generator().manual_seed(0))[:300].sort().values
    check("class_step", calls(s)["class_step"], run("class_step"), there, members=members, sparse=sparse)
    check("class_gradient", calls(s)["class_gradient"], run("class_gradient"), there, members=members)
    check("negative_logsumexp", calls(s)["negative_logsumexp"], run("negative_logsumexp"), there, members=members)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("stem", STEMS[1:])
def test_the_same_bits_again(stem: str, half: bool) -> None:
    arguments = calls(sample(300, 30000, 256))[stem]
    first, *others = (results(stem, arguments, run(stem), there, half=half) for _ in range(3))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_float32_is_ieee_whatever_the_flags_say() -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        for stem in STEMS:
            check(stem, calls(sample(128, 3000, 512))[stem], run(stem), there)
    finally:
        torch.set_float32_matmul_precision(before)


def test_the_kernels_run_and_what_they_do_not_take_goes_to_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    plans: list[str] = []
    plan = chunks.plan_for
    monkeypatch.setattr(chunks, "plan_for", lambda kernel, *rest: plans.append(kernel) or plan(kernel, *rest))
    arguments = [there(a) if isinstance(a, Tensor) else a for a in calls(sample())["negative_logsumexp"]]
    run("negative_logsumexp")(*arguments)
    assert plans == ["negative_logsumexp"]
    run("negative_logsumexp")(*arguments, kept=torch.empty(100, device=DEVICE))
    run("negative_logsumexp")(*[a.double() if isinstance(a, Tensor) and a.dtype == torch.float32 else a for a in arguments])
    with rf.ops.use_backend("reference"):
        run("negative_logsumexp")(*arguments)
    assert plans == ["negative_logsumexp"]
    assert "Triton" in rf.backends()["cuda"]


def test_a_forward_loop_of_unit_rows_does_not_synchronise() -> None:
    """Scale 64, no rule, W raw: the offset is proved beforehand."""
    arguments = [there(a) if isinstance(a, Tensor) else a for a in calls(sample(64, 3000, 64, rules=False, memory=False))["negative_logsumexp"]]
    arguments[3] = 64.0
    run("negative_logsumexp")(*arguments, half=True)  # compiles
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run("negative_logsumexp")(*arguments, half=True)
    finally:
        torch.cuda.set_sync_debug_mode(before)


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


@pytest.mark.parametrize("half", [False, True])
def test_a_head_trains_as_on_the_reference(half: bool) -> None:
    ours, losses = train(DEVICE, "auto", half)
    truth, expected = train("cpu", "reference", half)
    # bfloat16 gradients at D = 64: 5e-3 sqrt(512/64), and rows that fall on the other side of the rule's threshold
    assert losses == pytest.approx(expected, rel=2e-3 if half else 1e-5)
    assert (ours - truth).norm() <= (3e-2 if half else 1e-4) * (truth - initial_weight()).norm()


def initial_weight() -> Tensor:
    """The weight `train` starts from."""
    torch.manual_seed(0)
    return rf.MarginHead(2000, 64).weight.detach()
