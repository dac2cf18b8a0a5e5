"""The operations on CUDA tensors: Triton tiles and GEMMs against the reference on the CPU. Golden cases on CUDA are routes of
their own tests; `interpreted.py` runs the same kernels without a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from devices import DEVICE, GPU, ON_CUDA_ALONE, there
from sweeps import STEMS, check, results
from test_ops import calls, sample
from torch import Tensor

import recog_fast as rf
from recog_fast import reference
from recog_fast.ops import _dispatch, chunks

pytestmark = GPU


@pytest.fixture(autouse=True)
def _takes_the_kernels() -> None:
    missing = _dispatch.triton_missing() if DEVICE == "cuda" else None
    if missing is not None:
        pytest.skip(f"the reference runs here: {missing}")


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
@pytest.mark.parametrize("d", [64, 128, 500, 512])
def test_plain_rows_agree_with_the_reference(stem: str, d: int) -> None:
    """Without rules and memory: the tiles of 128 x 128, and rows of the margin alone."""
    s = sample(256, 9000, d, rules=False, memory=False)
    s["terms"][4] = 0
    check(stem, calls(s)[stem], run(stem), there)


@pytest.mark.parametrize("kind", [reference.UNKNOWN_DOUBLE, reference.UNKNOWN_SINGLE])
def test_rows_of_one_unknown_kind(kind: int) -> None:
    s = sample(100, 3000, 64, rules=False)
    s["terms"][4] = kind
    check("class_gradient", calls(s)["class_gradient"], run("class_gradient"), there)


@pytest.mark.parametrize("rules", [False, True])
@pytest.mark.parametrize("memory", [False, True])
def test_rules_and_memory_apart(rules: bool, memory: bool) -> None:
    for stem in STEMS:
        check(stem, calls(sample(40, 2000, 128, rules=rules, memory=memory, seed=5))[stem], run(stem), there)


@pytest.mark.parametrize("scale", [100.0, 256.0])
def test_rows_far_from_every_class(scale: float) -> None:
    """Sums that leave float32's range under the fixed offset are done again; above a scale of 144 offsets follow the maximum."""
    g = torch.Generator().manual_seed(1)
    center = torch.nn.functional.normalize(torch.randn(1, 64, generator=g), dim=1)
    weight = center + torch.linspace(0.01, 0.1, 3000).unsqueeze(1) * torch.randn(3000, 64, generator=g)
    unit = torch.nn.functional.normalize(torch.cat([-center.expand(5, 64), torch.randn(6, 64, generator=g)]) + 0.01 * torch.randn(11, 64, generator=g), dim=1)
    labels = torch.tensor([0, 1, -1, -2, 4, 5, 6, 7, -1, 9, 2999])
    check("negative_logsumexp", (unit, weight, labels, scale, None, None, None, None, False, True), run("negative_logsumexp"), there)


def test_one_class_no_rows_and_a_step_without_velocity() -> None:
    s = sample(5, 1, 64, rules=False, memory=False)
    for stem in STEMS:
        check(stem, calls(s)[stem], run(stem), there)
    arguments = calls(sample(20, 1300, 64))["class_step"]
    check("class_step", (*arguments[:4], None, *arguments[5:12], 0.0, *arguments[13:]), run("class_step"), there)
    unit, weight = there(torch.zeros(0, 64)), there(torch.randn(9, 64))
    lse, cosine, index, pull = run("negative_logsumexp")(unit, weight, there(torch.zeros(0, dtype=torch.int64)), 64.0, None, None, None, None, False, True)
    assert (lse.shape, cosine.shape, index.shape, pull.shape) == ((0,), (0,), (0,), (0, 64))


def test_ties_take_the_lowest_class() -> None:
    p = there(torch.full((9000, 64), 0.125))
    for half in (False, True):
        labels = there(torch.tensor([0, 5, -1, 8999]))
        _, _, index, _ = run("negative_logsumexp")(p[:4], p, labels, 64.0, None, None, None, None, True, True, half)
        assert index.tolist() == [1, 0, 0, 0]


def test_a_row_with_nan_spoils_only_itself() -> None:
    arguments = [there(a) if isinstance(a, Tensor) else a for a in calls(sample(140, 3000, 64, rules=False, memory=False))["negative_logsumexp"]]
    clean = run("negative_logsumexp")(*arguments)
    arguments[0][7, 3] = float("nan")
    spoilt = run("negative_logsumexp")(*arguments)
    others = torch.arange(140) != 7
    assert all(torch.equal(a.cpu()[others], b.cpu()[others]) for a, b in zip(clean, spoilt, strict=True))
    assert not bool(torch.isfinite(spoilt[0][7]))


def test_memory_write_is_the_cpus() -> None:
    """Duplicates, ignored rows, evictions: the ring bit by bit, but for rows normalised there."""
    ours, truth = (rf.PrototypeMemory(500, 64, rf.VPL(delta=50, start=0), capacity=120).to(d) for d in (DEVICE, "cpu"))
    for step in range(6):
        g = torch.Generator().manual_seed(step)
        x, labels = torch.randn(40, 64, generator=g), torch.randint(-1, 500, (40,), generator=g)
        labels[5:9] = labels[4]
        ours.write(there(x), there(labels), step)
        truth.write(x, labels, step)
    ours.flush()
    truth.flush()
    for name in ("ring_strength", "stamp", "owner", "slot", "cursor", "evicted"):
        assert torch.equal(getattr(ours, name).cpu(), getattr(truth, name)), name
    assert (ours.ring.cpu().float() - truth.ring.float()).abs().max() <= 2**-8
    assert ours.stats() == truth.stats()


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


@ON_CUDA_ALONE
def test_the_kernels_run_and_what_they_do_not_take_goes_to_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    plans: list[str] = []
    plan = chunks.plan_for

    def noting(kernel: str, *rest: Any) -> chunks.Plan:
        plans.append(kernel)
        return plan(kernel, *rest)

    monkeypatch.setattr(chunks, "plan_for", noting)
    arguments = [there(a) if isinstance(a, Tensor) else a for a in calls(sample())["negative_logsumexp"]]
    run("negative_logsumexp")(*arguments)
    assert plans == ["negative_logsumexp"]
    run("negative_logsumexp")(*arguments, kept=torch.empty(100, device=DEVICE))
    run("negative_logsumexp")(*[a.double() if isinstance(a, Tensor) and a.dtype == torch.float32 else a for a in arguments])
    with rf.ops.use_backend("reference"):
        run("negative_logsumexp")(*arguments)
    assert plans == ["negative_logsumexp"]
    assert "Triton" in rf.backends()["cuda"]


@ON_CUDA_ALONE
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
