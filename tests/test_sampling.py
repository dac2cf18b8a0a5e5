"""Sampled classes (Partial FC): which are drawn, what the loss over them is, and what moves the classes left out."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from budgets import budget, relative
from golden import Case, build_margin, cases, load
from routes import FLOAT64, NATIVE, ROUTES, Route, each
from test_margin_softmax_golden import check_loss
from torch import Tensor

import recog_fast as rf
from recog_fast import reference
from recog_fast.sampling import class_priorities, sample_classes

BOTH = [FLOAT64, NATIVE[0]]
N, C, D = 7, 130, 12


def batch(route: Route, seed: int = 0, n: int = N) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, D, generator=g).to(route.dtype), torch.randint(0, C, (n,), generator=g)


def make_head(route: Route, rate: float = 0.2, **options: Any) -> rf.MarginHead:
    torch.manual_seed(1)
    return rf.MarginHead(C, D, scale=16.0, sample_rate=rate, **{"sample_seed": 5, **options}).to(route.dtype)


def tolerance(route: Route) -> float:
    return 1e-11 if route.dtype == torch.float64 else 3e-6


def materialised(x: Tensor, w: Tensor, labels: Tensor, ids: Tensor, margin: Any, scale: float = 16.0) -> Tensor:
    """Row losses (N,) from explicit logits: the negatives of every row are the classes `ids` but its own."""
    centres = torch.nn.functional.normalize(w, dim=-1).reshape(w.shape[0], -1, w.shape[-1])
    cosine = torch.einsum("nd,ckd->nck", torch.nn.functional.normalize(x, dim=1), centres).amax(dim=2)
    rows = torch.arange(len(labels))
    negative = torch.zeros_like(cosine, dtype=torch.bool)
    negative[:, ids] = True
    negative[rows, labels] = False
    lse = torch.logsumexp((scale * cosine).masked_fill(~negative, float("-inf")), dim=1)
    target = scale * margin(cosine[rows, labels], x.norm(dim=1))
    return torch.logaddexp(torch.zeros_like(lse), lse - target)


# -- which classes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [1, 2, 7, 200, 4099])  # odd and even: two classes share a random word
@pytest.mark.parametrize("rate", [0.01, 0.3, 0.9])
def test_the_sample_is_the_references(classes: int, rate: float) -> None:
    labels = torch.randint(-1, classes, (20,), generator=torch.Generator().manual_seed(classes))
    count = max(1, int(rate * classes))
    for step in (0, 1, 7):
        ids = sample_classes(labels, classes, count, 3, step)
        assert torch.equal(ids, reference.sample_classes(labels, class_priorities(classes, 3, step), count))
        positive = labels[labels >= 0].unique()
        assert bool(torch.isin(positive, ids).all())
        assert ids.numel() == max(count, positive.numel())
        assert bool((ids[1:] > ids[:-1]).all())


@pytest.mark.parametrize("name", cases("margin_softmax", "partial_fc"))
def test_the_reference_picks_the_golden_classes(name: str) -> None:
    """With the golden classes drawn first: positives and these; as many as there are positives: the positives alone."""
    case = load(name)
    kept, classes = case["in_class_index"], case["in_W"].shape[0]
    priorities = torch.arange(classes) + classes
    priorities[kept] -= classes
    assert torch.equal(reference.sample_classes(case["in_y"], priorities, kept.numel()), kept)
    positive = case["in_y"].unique()
    for count in (1, positive.numel()):
        assert torch.equal(reference.sample_classes(case["in_y"], priorities, count), positive)


def test_the_stream_is_fixed() -> None:
    """The same classes on every machine and in every version: a resumed run goes on with the classes it would have had."""
    assert sample_classes(torch.tensor([3]), 100, 6, 42, 7).tolist() == [3, 12, 31, 33, 39, 56]
    assert class_priorities(5, 1, 0).tolist() == [*class_priorities(4, 1, 0).tolist(), int(class_priorities(5, 1, 0)[4])]


def test_seed_step_and_shard_each_change_the_sample() -> None:
    labels = torch.tensor([0])
    draws = [sample_classes(labels, 10_000, 100, *key) for key in ((1, 0, 0), (2, 0, 0), (1, 1, 0), (1, 0, 1), (0, 1, 0), (2**62, 0, 0))]
    for i, one in enumerate(draws):
        for other in draws[:i]:  # two independent draws share 1 class on average: more than 12 is one in 10^9
            assert int(torch.isin(one, other).sum()) <= 12


def test_every_class_is_drawn_alike() -> None:
    draws = torch.stack([torch.zeros(50).index_fill_(0, sample_classes(torch.tensor([-1]), 50, 10, 0, step), 1) for step in range(2000)])
    share = draws.mean(0)  # 0.2, standard error 0.009: 5 of them
    assert bool(((share - 0.2).abs() < 0.045).all())
    together = (draws.t() @ draws / 2000)[0, 1:]  # 10 * 9 / (50 * 49) = 0.0367, standard error 0.0042
    assert bool(((together - 0.0367).abs() < 0.021).all())


def test_nothing_is_drawn_from_the_global_generators() -> None:
    import numpy as np

    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index, union-attr]
    head = make_head(FLOAT64)
    torch.set_rng_state(before[0])
    head(*batch(FLOAT64))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()  # type: ignore[index]


# -- the loss over them ------------------------------------------------------------------------------------------------


@each(ROUTES)
@pytest.mark.parametrize("name", cases("margin_softmax", "partial_fc"))
def test_golden_through_the_operations(name: str, route: Route) -> None:
    """The golden cases with `members` given: nothing is gathered by hand, ids and gradients are those of all classes."""
    case = load(name)
    loss, stats, d_x, d_w = _run_members(case, route)
    check_loss(loss, case, route, torch.ones_like(loss, dtype=torch.bool))
    assert route.half or torch.equal(stats.nearest_index, case["out_nn_idx"])
    allowed = budget(route, case.kwargs["s"], case["in_X"].shape[1]).gradient
    assert relative(d_x, case["grad_dX"]) <= allowed
    assert relative(d_w, case["grad_dW"]) <= allowed
    left_out = torch.ones(len(d_w), dtype=torch.bool)
    left_out[case["in_class_index"]] = False
    assert float(d_w[left_out].abs().max()) == 0


def _run_members(case: Case, route: Route) -> tuple[Tensor, rf.RowStats, Tensor, Tensor]:
    from recog_fast.ops.margin_softmax import LossOptions, margin_softmax

    margin = build_margin(case.kwargs, case)
    if isinstance(margin, torch.nn.Module):
        margin.to(route.dtype)
    x, w = case["in_X"].to(route.dtype).requires_grad_(), case["in_W"].to(route.dtype).requires_grad_()
    options = LossOptions(
        margin=margin, scale=case.kwargs["s"], reduction="none", members=case["in_class_index"], compute_dtype=route.compute_dtype
    )
    with route():
        loss, stats = margin_softmax(x, w, case["in_y"], options)
        d_x, d_w = torch.autograd.grad((loss * case["in_gout"].to(loss.dtype)).sum(), (x, w))
    return loss.detach(), stats, d_x, d_w


@each([route for route in ROUTES if not route.half])  # 16 bits: test_sampled_kept.py
@pytest.mark.parametrize("subcenters", [1, 3])
def test_a_sampled_loss_and_its_gradients(route: Route, subcenters: int) -> None:
    head = make_head(route, subcenters=subcenters)
    x, labels = batch(route)
    a, b = x.clone().requires_grad_(), x.double().requires_grad_()
    with route():
        loss, stats = head(a, labels, reduction="none", return_stats=True)
        loss.sum().backward()
    ids = head.last_sampled
    assert ids is not None and torch.equal(ids, sample_classes(labels, C, 26, 5, 0))
    w = head.weight.detach().double().requires_grad_()
    truth = materialised(b, w, labels, ids, head.margin)
    truth.sum().backward()
    assert relative(loss, truth) <= tolerance(route)
    assert a.grad is not None and b.grad is not None and head.weight.grad is not None and w.grad is not None
    assert relative(a.grad, b.grad) <= 10 * tolerance(route)
    assert relative(head.weight.grad, w.grad) <= 10 * tolerance(route)
    assert bool(torch.isin(stats.nearest_index, ids).all())
    left_out = ~torch.isin(torch.arange(C), ids)
    assert float(head.weight.grad[left_out].abs().max()) == 0


def test_more_positives_than_the_rate_allows() -> None:
    head = make_head(NATIVE[0], rate=0.01)
    x, labels = batch(NATIVE[0])
    head(x, labels)
    assert torch.equal(head.last_sampled, labels.unique())  # type: ignore[arg-type]
    head(x[:1], labels[:1])  # one class, so no negative
    assert head(x[:1], labels[:1]).item() == 0


@each(BOTH)
def test_everything_but_training_sees_all_classes(route: Route) -> None:
    head = make_head(route).eval()
    x, labels = batch(route)
    labels[3] = -1
    with route():
        assert torch.equal(head(x, labels), rf.margin_softmax_loss(x, head.weight, labels, scale=16.0))
        assert head.last_sampled is None
        assert head.logits(x).shape == (N, C)
        head.train()
        assert head.topk(x, C)[1].sort().values[0].tolist() == list(range(C))
        assert head.prototypes().shape == (C, D)


@each(BOTH)
def test_unlabelled_rows_see_all_classes(route: Route) -> None:
    """UIR and the statistics of unlabelled rows are those of an unsampled head; labelled rows' are those of a sampled one."""
    x, labels = batch(route, n=9)
    labels[[2, 5, 8]] = -1
    grads = []
    with route():
        for rate in (0.2, 1.0):
            head = make_head(route, rate, unknown_weight=0.3)
            a = x.clone().requires_grad_()
            loss, stats = head(a, labels, reduction="none", return_stats=True)
            loss.sum().backward()
            grads.append((loss.detach(), stats, a.grad, head.weight.grad, head.last_sampled))
        (loss, stats, d_x, d_w, ids), (full, all_stats, d_full, *_) = grads
        unlabelled = labels < 0
        assert torch.equal(loss[unlabelled], full[unlabelled])
        assert torch.equal(d_x[unlabelled], d_full[unlabelled])
        for one, other in zip(stats, all_stats, strict=True):
            assert torch.equal(one[unlabelled], other[unlabelled])
        w = make_head(route).weight
        excess = rf.unknown_rejection_loss(x[unlabelled], w, scale=16.0, reduction="sum")
        truth = materialised(x[~unlabelled], w, labels[~unlabelled], ids, head.margin).sum() + 0.3 * excess
        truth.backward()
        assert relative(loss.sum(), truth) <= tolerance(route)
        assert relative(d_w, w.grad) <= 10 * tolerance(route)


@each(BOTH)
def test_unlabelled_rows_cost_nothing_where_nobody_looks(route: Route) -> None:
    """Without UIR and statistics they go with the sampled sweep: the loss of the labelled rows is the same to the last bit."""
    x, labels = batch(route)
    labels[3] = -1
    with route():
        heads = [make_head(route) for _ in range(2)]
        loss, _ = heads[0](x, labels, return_stats=True)
        assert relative(heads[1](x, labels), loss) <= tolerance(route)
        heads[1](x, labels).backward()
        assert bool(torch.isfinite(heads[1].weight.grad).all())  # type: ignore[arg-type]


@each(BOTH)
def test_a_memory_is_read_by_global_class(route: Route) -> None:
    held = rf.PrototypeMemory(C, D, rf.VPL(lam=0.6, delta=50, start=0), dtype=route.dtype)
    head = make_head(route, memory=held)
    y, stored = batch(route, seed=3, n=60)
    with route():
        held.write(y, stored, 0)
        held.flush()
        x, labels = batch(route)
        a = x.clone().requires_grad_()
        loss = head(a, labels, step=1, reduction="sum")
        loss.backward()
        ids = head.last_sampled
        w = head.weight.detach().clone().requires_grad_()
        b = x.clone().requires_grad_()
        prototypes = reference.effective_prototypes(w, *held.injection(1))
        truth = materialised(b, prototypes, labels, ids, head.margin).sum()  # type: ignore[arg-type]
        truth.backward()
    assert relative(loss, truth) <= tolerance(route)
    assert a.grad is not None and b.grad is not None and head.weight.grad is not None and w.grad is not None
    assert relative(a.grad, b.grad) <= 10 * tolerance(route)
    assert relative(head.weight.grad, w.grad) <= 20 * tolerance(route)


# -- one class set per optimizer step ----------------------------------------------------------------------------------


@each(BOTH)
def test_micro_batches_share_their_negatives(route: Route) -> None:
    """The first micro-batch draws; a later row of a class left out meets the same negatives and its own class by its target."""
    head = make_head(route)
    optimizer = rf.HeadSGD(head, lr=1.0, momentum=0.0, weight_decay=0.0)
    start = head.weight.detach().clone()
    w = start.double().requires_grad_()
    total, first = torch.zeros((), dtype=torch.float64), None
    with route():
        for micro in range(3):
            x, labels = batch(route, seed=10 + micro)
            loss, stats = head(x.clone().requires_grad_(), labels, reduction="none", return_stats=True)
            loss.sum().backward()
            ids = head.last_sampled
            first = ids if first is None else first
            assert ids is not None and ids is first
            assert bool(torch.isin(stats.nearest_index, ids).all())
            truth = materialised(x.double(), w, labels, ids, head.margin)
            assert relative(loss, truth) <= tolerance(route)
            total = total + truth.sum()
        assert not bool(torch.isin(labels, ids).all())  # the case meant
        optimizer.step()
    total.backward()
    assert w.grad is not None
    assert relative(start.double() - head.weight.double(), w.grad) <= (1e-9 if route.dtype == torch.float64 else 2e-5)
    x, labels = batch(route, seed=10)
    head(x, labels)
    assert head.last_sampled is not first
    assert torch.equal(head.last_sampled, sample_classes(labels, C, 26, 5, 1))  # type: ignore[arg-type]


def test_the_sample_does_not_depend_on_history() -> None:
    x, labels = batch(NATIVE[0], seed=4)
    sets = []
    for before in (0, 1, 5):
        head = make_head(NATIVE[0])
        optimizer = rf.HeadSGD(head, lr=0.1)
        for step in range(6):
            for micro in range(before if step < 5 else 0):
                y, others = batch(NATIVE[0], seed=100 * step + micro)
                head(y.requires_grad_(), others).backward()
            if step < 5:
                optimizer.step()
        head(x, labels)
        sets.append(head.last_sampled)
    assert torch.equal(sets[0], sets[1]) and torch.equal(sets[0], sets[2])


def test_a_batch_after_zero_grad_draws_its_own_classes() -> None:
    """A skipped step's rows are gone, so its positives are no longer asked for; rows still to come keep theirs."""
    head = make_head(NATIVE[0])
    optimizer = rf.HeadSGD(head, lr=0.1)
    x, labels = batch(NATIVE[0])
    head(x.clone().requires_grad_(), labels).backward()
    optimizer.zero_grad()
    y, others = batch(NATIVE[0], seed=1)
    head(y.clone().requires_grad_(), others).backward()
    assert bool(torch.isin(others, head.last_sampled).all())  # type: ignore[arg-type]
    optimizer.step()
    loss = head(x.clone().requires_grad_(), labels)  # the usual order: forward, zero_grad, backward, step
    drawn = head.last_sampled
    optimizer.zero_grad()
    loss.backward()
    head(y.clone().requires_grad_(), others).backward()
    assert head.last_sampled is drawn
    optimizer.step()


def test_without_head_sgd_the_step_argument_is_the_clock() -> None:
    head = make_head(NATIVE[0])
    x, labels = batch(NATIVE[0])
    sets = []
    for step in (None, None, 9, 9, 10):
        head(x.clone().requires_grad_(), labels, step=step).backward()
        sets.append(head.last_sampled)
    expected = [sample_classes(labels, C, 26, 5, step) for step in (0, 1, 9, 9, 10)]
    assert all(torch.equal(a, b) for a, b in zip(sets, expected, strict=True))
    assert sets[2] is sets[3]


# -- state -------------------------------------------------------------------------------------------------------------


def test_a_resumed_run_draws_the_same_classes(tmp_path: Path) -> None:
    def run(head: rf.MarginHead, optimizer: rf.HeadSGD, steps: range) -> list[Tensor]:
        sets = []
        for step in steps:
            x, labels = batch(NATIVE[0], seed=step)
            head(x.requires_grad_(), labels).backward()
            optimizer.step()
            sets.append(head.last_sampled)
        return sets  # type: ignore[return-value]

    head = make_head(NATIVE[0])
    optimizer = rf.HeadSGD(head, lr=0.1, unsampled="sparse")
    run(head, optimizer, range(3))
    rf.save_checkpoint(tmp_path / "c", head=head, optimizer=optimizer, step=3)
    expected = run(head, optimizer, range(3, 6))
    twin = make_head(NATIVE[0], sample_seed=77)
    other = rf.HeadSGD(twin, lr=9.0)
    rf.load_checkpoint(tmp_path / "c", head=twin, optimizer=other)
    assert other.param_groups[0]["unsampled"] == "sparse"
    found = run(twin, other, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert torch.equal(head.weight, twin.weight)


def test_the_seed_travels_with_the_state() -> None:
    torch.manual_seed(123)
    head = rf.MarginHead(C, D, sample_rate=0.5)
    assert int(head.sample_seed) == 123
    assert int(rf.MarginHead(C, D, sample_rate=0.5, sample_seed=-1).sample_seed) >= 0
    old = {k: v for k, v in head.state_dict().items() if k != "sample_seed"}
    other = rf.MarginHead(C, D, sample_rate=0.5, sample_seed=8)
    other.load_state_dict(old)  # saved before there was sampling
    assert int(other.sample_seed) == 8
    other.load_state_dict(head.state_dict())
    assert int(other.sample_seed) == 123
    x, labels = batch(NATIVE[0])
    for twin in (copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
        twin(x, labels)
        assert torch.equal(twin.last_sampled, sample_classes(labels, C, 65, 123, 0))
    assert "sample_rate=0.5" in repr(head)
    assert "sample_rate" not in repr(rf.MarginHead(C, D))


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.01, float("nan")])
def test_a_rate_outside_its_range_is_named(rate: float) -> None:
    with pytest.raises(ValueError, match=r"MarginHead: expected sample_rate in \(0, 1\]"):
        rf.MarginHead(C, D, sample_rate=rate)
