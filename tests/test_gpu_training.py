"""Losses, heads and training loops on a CUDA device: every margin and option, and what a loop does around them. See `devices.py`."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from budgets import ideal_bfloat16, relative
from devices import DEVICE, GPU, ON_CUDA_ALONE, synchronize, there
from torch import Tensor, nn

import recog_fast as rf

pytestmark = GPU
N, C, D = 60, 2000, 64
MARGINS: dict[str, Callable[[], Any]] = {
    "softmax": lambda: rf.Softmax(), "arcface": lambda: rf.ArcFace(0.5), "cosface": lambda: rf.CosFace(0.35), "sphereface": lambda: rf.SphereFace(),
    "combined": lambda: rf.CombinedMargin(1.0, 0.3, 0.2), "magface": lambda: rf.MagFace(), "adaface": lambda: rf.AdaFace(),
    "curricular": lambda: rf.CurricularFace(), "mv arc": lambda: rf.MVSoftmax("arc"), "mv am": lambda: rf.MVSoftmax("am"),
    "filter": lambda: rf.InterclassFilter(rf.ArcFace(0.5), 0.1), "circle": lambda: rf.CircleMargin(),
    "a function": lambda: lambda cosine, norms: cosine - 0.2,
}  # fmt: skip


def batch(seed: int = 0, k: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """x (N, D), W (C, D) or (C, K, D), labels with -1; on the CPU."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(N, D, generator=g) * (1 + 20 * torch.rand(N, 1, generator=g))
    w = torch.randn(*((C, D) if k == 1 else (C, k, D)), generator=g)
    return x, w, torch.randint(-1, C, (N,), generator=g)


def losses(x: Tensor, w: Tensor, labels: Tensor, margin: Any, **options: Any) -> tuple[Tensor, ...]:
    """Loss, dx, dW, the target cosines and the nearest ones, on the CPU."""
    margin = copy.deepcopy(margin)
    margin = margin.to(x.device) if isinstance(margin, nn.Module) else margin
    x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
    loss, stats = rf.margin_softmax_loss(x, w, labels, margin=margin, return_stats=True, **options)
    found = loss.detach(), *torch.autograd.grad(loss.sum(), (x, w)), stats.target_cosine, stats.nearest_cosine
    return tuple(t.cpu() for t in found)


def check_loss(margin: Any, half: bool, k: int = 1, **options: Any) -> None:
    """The device against float64 on the CPU (bf16: with x^ and P rounded), within the golden cases' budgets."""
    x, w, labels = batch(k=k)
    scale = options.pop("scale", 64.0)

    def moved(to: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        return {name: to(o) if isinstance(o, Tensor) else o for name, o in options.items()}

    def double(t: Tensor) -> Tensor:
        return t.double() if t.dtype.is_floating_point else t

    with ideal_bfloat16() if half else rf.ops.use_backend("reference"):
        truth = losses(x.double(), w.double(), labels, margin, scale=scale, **moved(double))
    chosen = torch.bfloat16 if half else torch.float32
    ours, again = (losses(there(x), there(w), there(labels), margin, scale=scale, compute_dtype=chosen, **moved(there)) for _ in range(2))
    share = (512 / D) ** 0.5 * scale / 64 if half else 0.0
    size = truth[0].abs().max().item()
    rows = 1 if truth[0].dim() else max(int((labels >= 0).sum()), 1) if options.get("reduction") == "sum" else 1
    assert (ours[0].double() - truth[0]).abs().max().item() <= 1e-6 * size + rows * (2e-6 * scale + 3e-2 * share)
    for mine, exact in zip(ours[1:3], truth[1:3], strict=True):
        assert relative(mine, exact) <= (5e-3 * share if half else 5e-5 * scale / 64)
    for mine, exact in zip(ours[3:], truth[3:], strict=True):
        assert (mine.double() - exact).abs().max() <= (1e-3 * (512 / D) ** 0.5 if half else 1e-6)
    assert all(map(torch.equal, ours, again))


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("name", MARGINS)
def test_margins(name: str, half: bool) -> None:
    check_loss(MARGINS[name](), half, scale=256.0 if name == "circle" else 64.0)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("options", [
    {"k": 3}, {"unknown_weight": 0.1}, {"reduction": "sum"}, {"reduction": "none"}, {"normalizer": 7.0},
    {"sample_weight": torch.linspace(0, 2, N)},
    {"memory_rows": torch.randn(5, D, generator=torch.Generator().manual_seed(3)), "strength": torch.rand(5, generator=torch.Generator().manual_seed(4)),
     "slot": torch.randint(-1, 5, (C,), generator=torch.Generator().manual_seed(5)).int()},
], ids=lambda o: "-".join(o))  # fmt: skip
def test_options(options: dict[str, Any], half: bool) -> None:
    check_loss(rf.ArcFace(0.5), half, **options)


@pytest.mark.parametrize("softmax", ["double", "single"])
def test_unknown_rejection(softmax: Any) -> None:
    x, w, _ = batch()
    found = []
    for device, dtype in ((DEVICE, torch.float32), ("cpu", torch.float64)):
        a, b = (t.to(device, dtype).requires_grad_() for t in (x, w))
        loss = rf.unknown_rejection_loss(a, b, softmax=softmax)
        assert isinstance(loss, Tensor)
        found.append([t.cpu() for t in (loss.detach(), *torch.autograd.grad(loss, (a, b)))])
    assert abs(found[0][0].item() - found[1][0].item()) <= 1e-6 * abs(found[1][0].item()) + 2e-8 + 2e-6 * 64 * (softmax == "single")
    assert all(relative(a, b) <= 5e-5 for a, b in zip(found[0][1:], found[1][1:], strict=True))


def train(device: str, backend: str, half: bool) -> tuple[Tensor, list[float]]:
    """Three steps of a head with its fused optimizer: W, and the losses."""
    torch.manual_seed(0)
    head = rf.MarginHead(2000, 64, margin=rf.CurricularFace(), unknown_weight=0.1, compute_dtype=torch.bfloat16 if half else None).to(device)
    optimizer = rf.HeadSGD(head, lr=0.1, momentum=0.9)
    losses = []
    with rf.ops.use_backend(backend):
        for step in range(3):
            g = torch.Generator().manual_seed(step)
            x = torch.randn(48, 64, generator=g).to(device).requires_grad_()
            loss = head(x, torch.randint(-1, 2000, (48,), generator=g).to(device))
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return head.weight.detach().cpu(), losses


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


# -- heads ---------------------------------------------------------------------------------------------------------------

HEADS: dict[str, dict[str, Any]] = {
    "plain": {}, "sub-centers": {"subcenters": 2}, "sampled": {"sample_rate": 0.2, "sample_seed": 3},
    "sampled, unknown rows": {"sample_rate": 0.2, "sample_seed": 3, "unknown_weight": 0.1}, "memory": {"memory": True},
    "adaface": {"margin": rf.AdaFace()},
}  # fmt: skip


def make_head(device: str, half: bool, memory: bool = False, **options: Any) -> rf.MarginHead:
    torch.manual_seed(0)
    held = rf.PrototypeMemory(C, D, rf.VPL(delta=50, start=0), capacity=300) if memory else None
    dtype = torch.bfloat16 if half else torch.float32
    return rf.MarginHead(C, D, memory=held, compute_dtype=dtype, **copy.deepcopy(options)).to(device)


def steps(head: rf.MarginHead, optimizer: torch.optim.Optimizer, count: int = 3, first: int = 0) -> list[float]:
    """Training steps on the head's device; the losses."""
    seen = []
    for number in range(first, first + count):
        x, _, labels = (t.to(head.weight.device) for t in batch(number))
        optimizer.zero_grad()
        loss = head(x.requires_grad_(), labels, **({} if head.memory is None else {"keys": x.detach()}))
        loss.backward()
        optimizer.step()
        seen.append(loss.item())
    return seen


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("optimizer", ["HeadSGD", "HeadSGD sparse", "SGD"])
@pytest.mark.parametrize("name", HEADS)
def test_heads_train_as_on_the_reference(name: str, optimizer: str, half: bool) -> None:
    if optimizer == "HeadSGD sparse" and "sampled" not in name:
        pytest.skip("only a sampled head leaves classes out")
    found = []
    for device, backend in ((DEVICE, "auto"), ("cpu", "reference")):
        head = make_head(device, half, **HEADS[name])
        start = head.weight.detach().cpu().clone()
        unsampled: Any = "sparse" if "sparse" in optimizer else "dense"
        # so small a rate that W moves in a straight line: errors of the gradients are then those of the movement
        settings: dict[str, Any] = {"lr": 1e-4, "momentum": 0.9, "weight_decay": 5e-4}
        chosen = rf.HeadSGD(head, unsampled=unsampled, **settings) if "Head" in optimizer else torch.optim.SGD([head.weight], **settings)
        with rf.ops.use_backend(backend):
            seen = steps(head, chosen)
        found.append((seen, head.weight.detach().cpu() - start, head.last_sampled))
    (ours, moved, drawn), (expected, truth, same) = found
    assert ours == pytest.approx(expected, rel=2e-3 if half else 1e-5)
    assert (moved - truth).norm() <= (2e-2 if half else 1e-4) * truth.norm()
    assert drawn is None if same is None else drawn is not None and torch.equal(drawn.cpu(), same)


def test_heads_move_between_devices() -> None:
    """There, back and there again, by state_dict and by copy: the same bits, and training goes on where it was."""
    head = make_head("cpu", True, memory=True, margin=rf.CurricularFace())
    weight = head.weight.detach().clone()
    head.to(DEVICE)
    optimizer = rf.HeadSGD(head, lr=0.1)
    steps(head, optimizer, 2)
    state = {name: t.cpu() for name, t in head.state_dict().items()}
    other = make_head("cpu", True, memory=True, margin=rf.CurricularFace())
    other.load_state_dict(state)
    assert not torch.equal(other.weight, weight) and torch.equal(other.weight, head.weight.cpu())
    other.to(DEVICE)
    saved = copy.deepcopy(optimizer.state_dict())
    second = rf.HeadSGD(other, lr=0.1)
    second.load_state_dict(saved)
    assert steps(head, optimizer, 2, first=2) == steps(other, second, 2, first=2)
    assert torch.equal(head.weight, other.weight)
    twin = copy.deepcopy(other).to("cpu")
    assert torch.equal(twin.weight, other.weight.cpu()) and all(b.device.type == "cpu" for b in twin.buffers())


def test_prototypes_logits_topk_and_cosine_are_the_cpus() -> None:
    head = make_head("cpu", False)
    twin = copy.deepcopy(head).to(DEVICE)
    x, _, labels = batch()
    labels = labels.clamp_min(0)
    assert (twin.prototypes().cpu() - head.prototypes()).abs().max() <= 1e-6
    assert (twin.logits(there(x)).cpu() - head.logits(x)).abs().max() <= 2e-6 * 64
    cosine, index = twin.topk(there(x), 5)
    expected, ids = head.topk(x, 5)
    assert (cosine.cpu() - expected).abs().max() <= 1e-6 and (index.cpu() == ids).float().mean() > 0.99
    assert (twin.cosine(there(x), there(labels)).cpu() - head.cosine(x, labels)).abs().max() <= 1e-6


def test_autocast_and_half_precision_embeddings() -> None:
    head, x, labels = make_head(DEVICE, False), *(there(t) for t in (batch()[0], batch()[2]))
    head.compute_dtype = None
    asked = make_head(DEVICE, True)(x, labels)
    x.requires_grad_()
    with torch.autocast(DEVICE, torch.bfloat16):
        inside = head(x, labels)
    (d_x,) = torch.autograd.grad(inside, x)
    assert torch.equal(inside, asked) and inside.dtype == torch.float32 and d_x.dtype == torch.float32
    for dtype in (torch.bfloat16, torch.float16):
        half = x.detach().to(dtype).requires_grad_()
        loss = head(half, labels)
        (d_half,) = torch.autograd.grad(loss, half)
        assert loss.dtype == torch.float32 and d_half.dtype == dtype and bool(torch.isfinite(d_half).all())
        assert abs(loss.item() - asked.item()) <= 0.02 * asked.item()


def test_a_backbone_under_torch_compile_and_the_loss_inside_it() -> None:
    torch.manual_seed(0)
    backbone, (x, w, labels) = nn.Linear(D, D).to(DEVICE), map(there, batch())
    w.requires_grad_()

    def function(rows: Tensor) -> Tensor:
        return 2 * rf.margin_softmax_loss(backbone(rows), w, labels)

    wanted = [w, *backbone.parameters()]
    compiled = torch.compile(function, backend="inductor" if DEVICE == "cuda" else "eager")
    ours, truth = (torch.autograd.grad(f(x), wanted) for f in (compiled, function))
    assert all(relative(a, b) <= 1e-4 for a, b in zip(ours, truth, strict=True))


def test_two_micro_batches_are_one_step() -> None:
    one, two = (make_head(DEVICE, False) for _ in range(2))
    x, _, labels = map(there, batch())
    for head, parts in ((one, [slice(None)]), (two, [slice(0, 25), slice(25, N)])):
        optimizer = rf.HeadSGD(head, lr=0.1)
        for part in parts:
            head(x[part], labels[part], normalizer=float(N)).backward()
        optimizer.step()
    start = make_head(DEVICE, False).weight
    assert relative((two.weight - start).detach(), (one.weight - start).detach()) <= 1e-4


# -- errors --------------------------------------------------------------------------------------------------------------


def usable() -> None:
    """A head gives on the device what it gives on the reference."""
    test_a_head_trains_as_on_the_reference(False)


def outcome(call: Callable[[], Any]) -> str:
    """The text of the error a call raises, "" where it raises none."""
    try:
        call()
        synchronize()
    except (ValueError, RuntimeError) as error:
        return str(error)
    return ""


def test_a_bad_label_is_named_at_once_or_later() -> None:
    """Where labels are read without waiting for the device the row has loss 0 and a later call or step raises, else the call does."""
    head, (x, _, labels) = make_head(DEVICE, False), map(there, batch())
    optimizer = rf.HeadSGD(head, lr=0.1)
    bad = labels.clone()
    bad[2] = C + 7
    found: list[Tensor] = []
    at_once = outcome(lambda: found.append(head(x, bad, reduction="none").detach()))
    if found:
        assert found[0][2].item() == 0 and bool(torch.isfinite(found[0]).all())
        later = [outcome(lambda: head(x, labels)), outcome(lambda: optimizer.step())]
        assert any("label" in text for text in later), later
        assert "row 2" in outcome(lambda: head(x, bad, check_labels=True))
        outcome(lambda: head(x, labels))  # takes the last report with it, if there is one
    else:
        assert "in row 2" in at_once and str(C + 7) in at_once
    usable()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_is_named_or_alone(value: float) -> None:
    head, (x, _, labels) = make_head(DEVICE, False), map(there, batch())
    clean = head(x, labels, reduction="none").detach()
    labelled = int((labels >= 0).nonzero()[3])
    x[labelled, 1] = value
    found: list[Tensor] = []
    at_once = outcome(lambda: found.append(head(x, labels, reduction="none").detach()))
    if found:
        others = torch.arange(N, device=clean.device) != labelled
        assert not bool(torch.isfinite(found[0][labelled])) and torch.equal(found[0][others], clean[others])
        with contextlib.suppress(ValueError):  # the report may come now
            head(batch()[0].to(DEVICE), labels)
    else:
        assert f"in row {labelled} " in at_once
    usable()


@ON_CUDA_ALONE
def test_after_out_of_memory_the_process_is_usable() -> None:
    total = torch.cuda.get_device_properties(0).total_memory
    head, (x, _, labels) = make_head(DEVICE, False), map(there, batch())
    loss = head(x.requires_grad_(), labels)
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(2 * total, dtype=torch.uint8, device=DEVICE)
    loss.backward()
    assert x.grad is not None and bool(torch.isfinite(x.grad).all())
    usable()


# -- streams and graphs --------------------------------------------------------------------------------------------------


@ON_CUDA_ALONE
def test_two_heads_on_two_streams_give_their_bits() -> None:
    expected = []
    for seed in range(2):
        torch.manual_seed(seed)
        head = rf.MarginHead(20_000, D, compute_dtype=torch.bfloat16).to(DEVICE)
        expected.append((copy.deepcopy(head), rf.HeadSGD(head, lr=0.1), head))
    truth = [(steps(head, optimizer), head.weight.detach().clone()) for _, optimizer, head in expected]
    heads = [twin for twin, _, _ in expected]
    optimizers, streams = [rf.HeadSGD(head, lr=0.1) for head in heads], [torch.cuda.Stream() for _ in heads]
    synchronize()
    seen: list[list[float]] = [[], []]
    for number in range(3):
        for at, (head, optimizer, stream) in enumerate(zip(heads, optimizers, streams, strict=True)):
            with torch.cuda.stream(stream):
                seen[at] += steps(head, optimizer, 1, first=number)
    synchronize()
    for (exact, weight), ours, head in zip(truth, seen, heads, strict=True):
        assert ours == exact and torch.equal(head.weight, weight)


@ON_CUDA_ALONE
def test_a_captured_step_gives_the_bits_of_eager_steps() -> None:
    """Head, backward and HeadSGD as one CUDA graph; skipped with the error's words where a capture is refused."""
    x, _, labels = map(there, batch())
    x.requires_grad_()
    head = make_head(DEVICE, True)
    twin, optimizer = copy.deepcopy(head), rf.HeadSGD(head, lr=0.1)
    other = rf.HeadSGD(twin, lr=0.1)

    def step(of: rf.MarginHead, by: rf.HeadSGD) -> Tensor:
        x.grad = None
        loss = of(x, labels)
        loss.backward()
        by.step()
        return loss.detach()  # type: ignore[no-any-return]

    start, stream, before = head.weight.detach().clone(), torch.cuda.Stream(), torch.cuda.current_stream()
    stream.wait_stream(before)
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(head, optimizer)
    before.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            loss = step(head, optimizer)
    except Exception as error:
        torch.cuda.set_stream(before)
        pytest.skip(f"no capture: {error.__context__ or error}")
    with torch.no_grad():
        head.weight.copy_(start)
        optimizer.state[head.weight]["momentum_buffer"].zero_()
    for _ in range(3):
        graph.replay()
        assert torch.equal(loss, step(twin, other))
    assert torch.equal(head.weight, twin.weight)
