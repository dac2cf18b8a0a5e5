"""MarginHead(weight_format="split") and HeadSGD(momentum_dtype=torch.bfloat16): the training of a float32 head in 8 or 6 bytes per element."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from budgets import relative
from test_heads import MARGINS
from torch import Tensor

import recog_fast as rf
from recog_fast.ops import _planes

N, C, D = 24, 150, 12
FORMATS = ("float32", "split")


def make_head(weight_format: Any = "split", **options: Any) -> rf.MarginHead:
    torch.manual_seed(1)
    return rf.MarginHead(C, D, scale=16.0, weight_format=weight_format, sample_seed=5, **options)


def batch(seed: int = 0, n: int = N) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, D, generator=g), torch.randint(-1, C, (n,), generator=g)


def train(head: rf.MarginHead, steps: int = 20, momentum_dtype: torch.dtype = torch.float32, **options: Any) -> list[Tensor]:
    """Losses, dx and W of every step, and the velocity."""
    optimizer = rf.HeadSGD(head, 0.5, 0.9, 1e-2, momentum_dtype=momentum_dtype, **options)
    found = []
    for step in range(steps):
        for micro in range(2):
            x, labels = batch(10 * step + micro)
            x.requires_grad_()
            labels[0] = -1  # rows of unknown people in every batch
            loss = head(x, labels, keys=x.detach() if head.memory is not None and micro == 0 else None)
            loss.backward()
            assert x.grad is not None
            found += [loss.detach(), x.grad]
        optimizer.step()
        assert head.weight.grad is None
        found.append(head.full_weight())
    return [*found, optimizer.state[head.weight]["momentum_buffer"].clone()]


def memory() -> rf.PrototypeMemory:
    return rf.PrototypeMemory(C, D, rf.VPL(lam=0.4, delta=3, start=0), dtype=torch.float32)


HEADS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "nesterov": ({}, {"nesterov": True}),
    "sub-centers": ({"subcenters": 3}, {}),
    "unknown": ({"unknown_weight": 0.3}, {}),
    "bfloat16": ({"compute_dtype": torch.bfloat16}, {}),
    "sampled": ({"sample_rate": 0.3}, {}),
    "sparse": ({"sample_rate": 0.3}, {"unsampled": "sparse"}),
    "dropped mass": ({"drop_mass": 0.01}, {}),
}


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("momentum_dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", [*HEADS, "memory"])
def test_a_split_head_trains_as_a_float32_one(name: str, momentum_dtype: torch.dtype, backend: str) -> None:
    """W in one chunk: losses, dx, W and velocity of 20 steps (some of few) have the same bits."""
    steps = 2 if backend == "reference" else 20 if name in ("plain", "unknown") else 6
    options, settings = HEADS.get(name, ({}, {}))
    with rf.ops.use_backend(backend):
        runs = [train(make_head(f, **options, memory=memory() if name == "memory" else None), steps, momentum_dtype, **settings) for f in FORMATS]
    for one, two in zip(*runs, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("margin", MARGINS)
def test_margins(margin: str) -> None:
    runs = [train(make_head(f, margin=MARGINS[margin]()), 3) for f in FORMATS]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """W in chunks of 64 classes."""
    monkeypatch.setattr(_planes, "chunks", lambda weight: ((at, min(at + 64, len(weight))) for at in range(0, len(weight), 64)))


@pytest.mark.parametrize("name", [*HEADS, "memory"])
def test_several_chunks_train_to_the_precision_of_float32(name: str, pieces: None) -> None:
    """Sums of chunks are other float32 sums than those of tiles: twice test_heads' budget of 2e-6, after 5 steps."""
    options, settings = HEADS.get(name, ({}, {}))
    runs = [train(make_head(f, **options, memory=memory() if name == "memory" else None), 5, **settings) for f in FORMATS]
    for one, two in zip(*runs, strict=True):
        # 16-bit sweeps: exponentials are rounded in steps of a tile, and the tiles are others
        assert relative(two, one) <= (2**-8 if name == "bfloat16" else 4e-6)


def test_the_same_bits_on_two_threads(pieces: None) -> None:
    before = torch.get_num_threads()
    runs = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            runs.append(train(make_head(), 3, torch.bfloat16))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_statistics_and_uses_are_those_of_a_float32_head(pieces: None) -> None:
    x, labels = batch()
    heads = [make_head(f, memory=memory()) for f in FORMATS]
    for head in heads:
        train(head, 2)
    heads[0].copy_weight(heads[1].full_weight())
    for head in heads:
        head.eval()
    plain, split = heads
    assert torch.equal(split.prototypes(), plain.prototypes()) and split.prototypes() is split.prototypes()
    assert (split.logits(x) - plain.logits(x)).abs().max() <= 1e-5
    assert torch.equal(split.topk(x, 5)[1], plain.topk(x, 5)[1])
    loss, stats = split(x, labels, return_stats=True)
    expected, truth = plain(x, labels, return_stats=True)
    assert loss.dtype == torch.float32 and abs(loss - expected) <= 1e-5
    for ours, theirs in zip(stats, truth, strict=True):
        assert torch.equal(ours, theirs) or (ours - theirs).abs().max() <= 1e-5
    ids = torch.tensor([0, 149, 63, 64])
    assert torch.equal(split.cosine(x[:4], ids), plain.cosine(x[:4], ids))
    rows = x.clone().requires_grad_()
    (d_x,) = torch.autograd.grad(split(rows, labels), rows)  # no weight gradient is asked for
    assert bool(d_x.any())


def test_attached_cosines_move_the_weight() -> None:
    moved = []
    for head in (make_head(f) for f in FORMATS):
        optimizer = rf.HeadSGD(head, 1.0)
        x, _ = batch()
        head.cosine(x, torch.arange(N)).sum().backward()
        optimizer.step()
        moved.append(head.full_weight())
    assert torch.equal(*moved) and not torch.equal(moved[0], make_head().full_weight())


# -- what a plane must not be taken for ----------------------------------------------------------------------------------


@pytest.mark.parametrize("use", ["forward", "cosine", "evaluation"])
def test_another_optimizer_is_refused(use: str) -> None:
    head = make_head()
    x, labels = batch()
    if use == "evaluation":  # with HeadSGD too: rows are left in training mode alone
        rf.HeadSGD(head, 0.1)
        head.eval()
    value = head.cosine(x, torch.arange(N)).sum() if use == "cosine" else head(x, labels)
    with pytest.raises(RuntimeError, match="MarginHead: expected HeadSGD with weight_format='split'"):
        value.backward()
    assert head.weight.grad is None


BAD: list[tuple[dict[str, Any], str]] = [
    ({"weight_format": "bf16"}, "weight_format 'float32' or 'split', got 'bf16'"),
    ({"keep_exponentials": True}, "weight_format 'float32' with keep_exponentials or drop_elements"),
    ({"drop_elements": 2**-16}, "weight_format 'float32' with keep_exponentials or drop_elements"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=lambda v: v if isinstance(v, str) else "")
def test_options_that_do_not_go_together(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"MarginHead: expected {message}"):
        rf.MarginHead(**{"num_classes": C, "embedding_dim": D, "weight_format": "split", **change})


def test_other_momentum_types_are_refused() -> None:
    with pytest.raises(ValueError, match="HeadSGD: expected momentum_dtype torch.float32 or torch.bfloat16, got torch.float16"):
        rf.HeadSGD(make_head(), 0.1, momentum_dtype=torch.float16)


def test_kept_exponentials_want_a_float32_velocity() -> None:
    with pytest.raises(ValueError, match="HeadSGD: expected momentum_dtype torch.float32 with keep_exponentials or drop_elements"):
        rf.HeadSGD(rf.MarginHead(C, D, keep_exponentials=True), 0.1, momentum_dtype=torch.bfloat16)


def test_bad_embeddings_are_named_as_for_a_float32_head() -> None:
    head = make_head()
    with pytest.raises(ValueError, match="MarginHead: expected weight with D = 5"):
        head(torch.ones(2, 5), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="MarginHead: expected finite embeddings"):
        head(torch.full((1, D), torch.nan), torch.tensor([0]))


def test_writing_the_weight() -> None:
    for head in (make_head(f) for f in FORMATS):
        x, labels = batch()
        optimizer = rf.HeadSGD(head, 0.1)
        before = head.prototypes().clone()
        head(x, labels).backward()
        values = torch.randn(C, D, dtype=torch.float64)
        head.copy_weight(values)
        assert torch.equal(head.full_weight(), values.float())
        assert not torch.equal(head.prototypes(), before)
        with pytest.raises(RuntimeError, match="pending rows"):
            optimizer.step()
        with pytest.raises(ValueError, match=r"MarginHead.copy_weight: expected values of shape \(150, 12\), got \(12, 150\)"):
            head.copy_weight(values.t())
        copied = head.full_weight()
        copied.zero_()
        assert bool(head.full_weight().any())


def test_a_changed_lower_plane_makes_rows_stale() -> None:
    head = make_head()
    optimizer = rf.HeadSGD(head, 0.1)
    head(*batch()).backward()
    assert head.weight_low is not None
    head.weight_low.zero_()
    with pytest.raises(RuntimeError, match="pending rows"):
        optimizer.step()


CASTS = {
    "half": lambda m: m.half(), "bfloat16": lambda m: m.bfloat16(), "double": lambda m: m.double(), "float": lambda m: m.float(),
    "to": lambda m: m.to(torch.float16), "to device": lambda m: m.to("cpu"), "type": lambda m: m.type(torch.float64),
}  # fmt: skip


@pytest.mark.parametrize("name", CASTS)
def test_casts_of_a_model_keep_the_planes(name: str) -> None:
    head = make_head(margin=rf.AdaFace())
    expected = head.full_weight()
    model = torch.nn.ModuleDict({"backbone": torch.nn.Linear(3, D), "head": head})
    CASTS[name](model)
    assert head.weight.dtype == torch.bfloat16 and head.weight_low is not None and head.weight_low.dtype == torch.int16
    assert torch.equal(head.full_weight(), expected)
    assert isinstance(head.margin, rf.AdaFace) and head.margin.mean.dtype == CASTS[name](rf.AdaFace()).mean.dtype
    assert next(model["backbone"].parameters()).dtype == CASTS[name](torch.nn.Linear(1, 1)).weight.dtype


def test_moves_take_both_planes() -> None:
    head = make_head().to("meta")
    assert head.weight.is_meta and head.weight_low is not None and head.weight_low.is_meta


# -- state -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("source", "target", "momentum_dtype"), [
    ("split", "split", torch.bfloat16), ("split", "float32", torch.bfloat16), ("float32", "split", torch.float32), ("float32", "float32", torch.bfloat16),
])  # fmt: skip
@pytest.mark.parametrize("way", ["state_dict", "assign", "checkpoint"])
def test_training_goes_on_in_either_format(way: str, source: str, target: str, momentum_dtype: torch.dtype, tmp_path: Path) -> None:
    """From a head's state and its optimizer's into new ones: the bits of the run that was not interrupted."""
    first = make_head(source)
    optimizer = rf.HeadSGD(first, 0.5, momentum_dtype=momentum_dtype)
    second = make_head(target)
    torch.nn.init.zeros_(second.weight)
    other = rf.HeadSGD(second, 0.1, momentum_dtype=momentum_dtype)

    def run(head: rf.MarginHead, its: rf.HeadSGD, steps: range) -> None:
        for step in steps:
            head(*batch(step)).backward()
            its.step()

    run(first, optimizer, range(3))
    if way == "checkpoint":
        rf.save_checkpoint(tmp_path / "c", head=first, optimizer=optimizer, step=3)
        rf.load_checkpoint(tmp_path / "c", head=second, optimizer=other)
    else:
        state = copy.deepcopy(first.state_dict())  # what is assigned is shared
        missing, unexpected = second.load_state_dict(state, assign=way == "assign")
        assert not missing and not unexpected and set(state) == set(first.state_dict())  # the caller's dictionary is as it was
        if way == "assign":
            other = rf.HeadSGD(second, 0.1, momentum_dtype=momentum_dtype)
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert second.weight_format == target and torch.equal(second.full_weight(), first.full_weight())
    velocity = other.state[second.weight]["momentum_buffer"]
    assert velocity.dtype == momentum_dtype and torch.equal(velocity, optimizer.state[first.weight]["momentum_buffer"])
    run(first, optimizer, range(3, 6))
    run(second, other, range(3, 6))
    assert torch.equal(second.full_weight(), first.full_weight())


def test_a_bfloat16_weight_alone_has_no_residual() -> None:
    head = make_head()
    state = head.state_dict()
    del state["weight_low"]
    head.load_state_dict(state)
    assert torch.equal(head.full_weight(), state["weight"].float())


@pytest.mark.parametrize("source", FORMATS)
@pytest.mark.parametrize("target", FORMATS)
def test_a_state_of_another_shape_is_refused(source: str, target: str) -> None:
    head = make_head(target)
    before = head.full_weight()
    other = rf.MarginHead(C + 1, D, weight_format=source)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        head.load_state_dict(other.state_dict())
    assert torch.equal(head.full_weight(), before)


@pytest.mark.parametrize(("before", "after"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_a_velocity_is_converted_when_loaded(before: torch.dtype, after: torch.dtype) -> None:
    """To the nearest; and torch.optim.SGD takes either."""
    head = make_head("float32")
    optimizer = rf.HeadSGD(head, 0.5, momentum_dtype=before)
    head(*batch()).backward()
    optimizer.step()
    other = rf.HeadSGD(make_head("float32"), 0.1, momentum_dtype=after)
    other.load_state_dict(optimizer.state_dict())
    velocity = optimizer.state[head.weight]["momentum_buffer"]
    assert torch.equal(other.state[other.head.weight]["momentum_buffer"], velocity.to(after))
    dense = torch.optim.SGD([torch.nn.Parameter(torch.zeros(C, D))], 0.1, momentum=0.5)
    dense.load_state_dict(optimizer.state_dict())
    assert torch.equal(next(iter(dense.state.values()))["momentum_buffer"], velocity.float())


def test_copies_and_pickles() -> None:
    head = make_head()
    optimizer = rf.HeadSGD(head, 0.5, momentum_dtype=torch.bfloat16)
    head(*batch()).backward()
    optimizer.step()
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert twin.momentum_dtype == torch.bfloat16 and torch.equal(twin.head.full_weight(), head.full_weight())
        assert twin.head.weight_low is not head.weight_low
        twin.head(*batch(1)).backward()
        twin.step()
        assert twin.state[twin.head.weight]["momentum_buffer"].dtype == torch.bfloat16
    head(*batch(1)).backward()
    optimizer.step()
    assert torch.equal(twin.head.full_weight(), head.full_weight())


def test_the_same_draws_as_a_float32_head() -> None:
    assert torch.equal(make_head("split").full_weight(), make_head("float32").full_weight())
    assert "weight_format='split'" in repr(make_head()) and "weight_format" not in repr(make_head("float32"))


# -- bfloat16 momentum -------------------------------------------------------------------------------------------------


def test_momentum_in_bfloat16_follows_float32_without_bias() -> None:
    """v of constant gradients g: rounding to nearest stalls where (1 - mu) of v's distance to g / (1 - mu) is under half an ulp; by
    chance its mean over the elements comes within 5 standard errors of float32's, and W's path with it."""
    paths = {}
    for dtype in (torch.float32, torch.bfloat16):
        head = rf.MarginHead(500, 16, weight_format="split", sample_seed=3)
        start = torch.full((500, 16), 0.777)
        head.copy_weight(start)
        optimizer = rf.HeadSGD(head, 1e-3, momentum=0.99, weight_decay=1e-2, momentum_dtype=dtype)
        for _ in range(300):  # a gradient of weight decay alone: 0 rows' worth from the loss
            (head.cosine(torch.zeros(1, 16), torch.tensor([0])).sum() * 0).backward()
            optimizer.step()
        paths[dtype] = head.full_weight(), optimizer.state[head.weight]["momentum_buffer"].float()
    nearest = torch.zeros(())
    for _ in range(300):
        nearest = (0.99 * nearest + 0.00777).bfloat16().float()
    (weight, velocity), (plain, exact) = paths[torch.bfloat16], paths[torch.float32]
    assert (nearest - exact[1, 0]).abs() > 0.05 * exact[1, 0]  # what is avoided
    for ours, truth in ((velocity, exact), (weight, plain)):
        error = (ours - truth)[1:].double()
        assert error.std() > 0
        assert error.mean().abs() <= 5 * error.std() / error.numel() ** 0.5
    # the spread of v: at most half an ulp (2^-8 of v) a step, forgotten with mu: sqrt(1 / (1 - mu^2)) = 7 of them
    assert (velocity - exact)[1:].std() <= 2**-8 * exact[1, 0] * 0.5 / (1 - 0.99**2) ** 0.5


def test_a_foreign_write_into_the_upper_plane_is_the_weight() -> None:
    """In-place edits that autograd sees (zero_, an EMA's copy_, a broadcast): W is what was written, no residual of the old one."""
    fresh = rf.MarginHead(20, 16, weight_format="split")
    torch.nn.init.zeros_(fresh.weight)
    assert not fresh.full_weight().any()
    head = rf.MarginHead(20, 16, weight_format="split")
    optimizer = rf.HeadSGD(head, lr=0.1)
    x, y = torch.randn(4, 16), torch.arange(4)
    head(x, y).backward()
    optimizer.step()
    before = head.full_weight()
    assert torch.equal(head.full_weight(), before)  # the step wrote both planes
    with torch.no_grad():
        head.weight.copy_(torch.ones(20, 16))
    assert torch.equal(head.full_weight(), torch.ones(20, 16))
    with torch.no_grad():
        head.weight.zero_()
    assert bool(head(x, y).isfinite()) and not head.full_weight().any()
    head.copy_weight(before)
    assert torch.equal(head.full_weight(), before)
    other = rf.MarginHead(20, 16, weight_format="split")
    other.load_state_dict(head.state_dict())
    assert torch.equal(other.full_weight(), before)
