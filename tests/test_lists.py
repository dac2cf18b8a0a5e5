"""Element lists (drop_elements): exactly the elements above the floor enter dx and dW, and what is left out is reported."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from budgets import relative
from routes import HALF, NATIVE, Route, each, isas
from torch import Tensor

import recog_fast as rf
from recog_fast import native, reference
from recog_fast.ops._lists import SAMPLE, list_floor
from recog_fast.ops._rows import Injection
from recog_fast.rules import pack_rules

N, D = 21, 40  # lanes to pad, an odd depth
RULES: dict[str, rf.NegativeRule | None] = {
    "plain": None,
    "curricular": rf.NegativeRule(above=(1.0, 0.1, 0.0, 2.0, 0.1), f_max=1.1),
    "filter": rf.NegativeRule(above=(0.0, 0.0, 0.0, 0.0, 0.0)),
}


class Case:
    """A random problem, its logits in float64, and floors in gaps between them, so that rounding moves no element across."""

    def __init__(self, classes: int, subcenters: int = 1, rule: str = "plain", memory: bool = False, scale: float = 12.0, share: float = 0.08) -> None:
        g = torch.Generator().manual_seed(classes + subcenters)
        shape = (classes, D) if subcenters == 1 else (classes, subcenters, D)
        self.weight, self.scale = torch.randn(*shape, generator=g), scale
        self.x = torch.nn.functional.normalize(torch.randn(N, D, generator=g), dim=1)
        self.labels = torch.randint(0, classes, (N,), generator=g)
        self.labels[3] = -2  # of another shard
        slot = torch.full((classes,), -1, dtype=torch.int32)
        slot[:30] = torch.arange(30, dtype=torch.int32)
        rows = torch.nn.functional.normalize(torch.randn(30, D, generator=g), dim=1)
        self.memory = (rows, torch.full((30,), 0.7), slot) if memory else (None, None, None)
        self.rules = pack_rules(self.labels, RULES[rule], torch.full((N,), 0.1) if RULES[rule] else None, 1.0, torch.float32)
        self._logits(share)

    def prototypes(self, weight: Tensor) -> Tensor:
        rows, strength, slot = self.memory
        more = (None, None, None) if rows is None or strength is None else (rows.double(), strength.double(), slot)
        return reference.effective_prototypes(weight, *more).reshape(weight.shape[0], -1, D)

    def _logits(self, share: float) -> None:
        every = torch.einsum("nd,ckd->nck", self.x.double(), self.prototypes(self.weight.double()))
        cosine, self.sub = every.max(dim=2)
        f, self.g = (cosine, torch.ones_like(cosine)) if self.rules is None else reference._apply_rules(cosine, self.rules.double())
        self.z = self.scale * f
        self.negative = torch.ones_like(self.z, dtype=torch.bool)
        own = self.labels >= 0
        self.negative[own.nonzero().squeeze(1), self.labels[own]] = False
        order = self.z.sort(dim=1, descending=True).values
        k = int(share * self.z.shape[1])
        near = max(1, int(0.05 * self.z.shape[1]))
        gap = order[:, k : k + near] - order[:, k + 1 : k + near + 1]  # the widest gap nearby
        at = k + gap.argmax(dim=1)
        self.floor = (order.gather(1, at[:, None]) + order.gather(1, at[:, None] + 1)).squeeze(1) / 2
        self.p = torch.softmax(self.z.masked_fill(~self.negative, -math.inf), dim=1)
        self.listed = self.negative & (self.z >= self.floor[:, None])

    def pull(self, listed: Tensor) -> Tensor:
        """sum of the listed p g P (N, D)."""
        rows = self.prototypes(self.weight.double())
        chosen = rows[torch.arange(rows.shape[0]), self.sub]  # (N, C, D)
        return torch.einsum("nc,ncd->nd", self.p * self.g * listed, chosen)

    def gradient(self, terms: Tensor, listed: Tensor) -> Tensor:
        """dW of the listed elements and the targets."""
        weight = self.weight.double().requires_grad_()
        rows = self.prototypes(weight)
        slopes = terms[1].double()[:, None] * self.p * self.g * listed
        chosen = rows[torch.arange(rows.shape[0]), self.sub]
        total = torch.einsum("nc,ncd,nd->", slopes, chosen, self.x.double())
        own = (self.labels >= 0).nonzero().squeeze(1)
        total = total + (terms[2, own].double()[:, None] * rows[self.labels[own], 0] * self.x[own].double()).sum()
        return torch.autograd.grad(total, weight)[0]


def sweep(case: Case, floor: Tensor, half: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(lse, pull, listed share, buffer) of a forward sweep with lists."""
    buffer, listed = torch.full((500_000,), 0x7FFFFFFF, dtype=torch.int32), torch.zeros(N, dtype=torch.float64)
    lse, _, _, pull = torch.ops.recog_fast.negative_logsumexp(
        case.x, case.weight, case.labels, case.scale, case.rules, *case.memory, False, True, half, True, buffer, None, floor.float(), listed
    )
    return lse, pull, listed, buffer


def class_gradient(case: Case, lse: Tensor, buffer: Tensor | None, half: bool) -> tuple[Tensor, Tensor]:
    """(terms, dW) with other weights of negatives and targets for every row."""
    terms = torch.zeros(reference.TERM_ROWS, N)
    terms[0], terms[1], terms[2] = lse, torch.linspace(0.5, 2, N), torch.linspace(-1, 1, N)
    subcenters = case.weight.shape[1] if case.weight.dim() == 3 else 1
    targets = torch.where(case.labels >= 0, case.labels * subcenters, case.labels)
    return terms, torch.ops.recog_fast.class_gradient(
        case.x, targets, terms, case.weight, case.scale, case.rules, *case.memory, False, True, half, buffer
    )


CASES: dict[str, dict[str, Any]] = {
    "below a tile": {"classes": 50},
    "a tile": {"classes": 96},
    "blocks": {"classes": 2500},
    "subcenters": {"classes": 700, "subcenters": 3},
    "more subcenters than a tile": {"classes": 60, "subcenters": 101},
    "memory": {"classes": 500, "memory": True},
    "curricular": {"classes": 500, "rule": "curricular"},
    "filter": {"classes": 500, "rule": "filter"},
}


@each([*NATIVE, *HALF])
@pytest.mark.parametrize("name", list(CASES))
def test_exactly_the_listed_elements_count(route: Route, name: str) -> None:
    """lse over all, pull and dW over the elements above the floor, and the share of them. 16 bits: only the logits are rounded."""
    case = Case(**CASES[name])
    with route():
        lse, pull, listed, buffer = sweep(case, case.floor, route.half)
        terms, d_weight = class_gradient(case, lse, buffer, route.half)
    logit = 64 * (2e-7 if not route.half else 4e-3)  # what a logit may be off by, times a few
    keep = case.listed
    truth = torch.logsumexp(case.z.masked_fill(~case.negative, -math.inf), dim=1)
    torch.testing.assert_close(lse, truth, atol=logit, rtol=1e-6)
    if route.half:  # an element within rounding of the floor may fall on either side
        close = (case.z - case.floor[:, None]).abs() < logit
        slack = float((case.p * case.g.abs() * close).sum(1).max())
    else:
        slack = 0.0
    torch.testing.assert_close(listed, (case.p * keep).sum(1), atol=1e-6 + 4 * slack + (2e-3 if route.half else 0), rtol=0)
    assert relative(pull, case.pull(keep)) <= (2e-6 if not route.half else 1e-2 + 4 * slack)
    assert relative(d_weight, case.gradient(terms, keep)) <= (5e-6 if not route.half else 1e-2 + 4 * slack)
    assert 0.05 < float(keep.double().mean()) < 0.25


@each([NATIVE[0], *HALF])
def test_a_tile_with_too_much_to_list_is_swept_in_full(route: Route) -> None:
    """A floor below everything: the very numbers of a sweep without lists, and nothing is left out."""
    case = Case(1920)  # whole tiles: the last of a ragged sweep is small enough to list
    with route():
        lse, pull, listed, buffer = sweep(case, torch.full((N,), -1e9), route.half)
        plain = torch.ops.recog_fast.negative_logsumexp(case.x, case.weight, case.labels, case.scale, case.rules, *case.memory, False, True, route.half)
        assert torch.equal(lse, plain[0]) and torch.equal(pull, plain[3])
        assert torch.equal(listed, torch.ones(N, dtype=torch.float64))
        assert torch.equal(class_gradient(case, lse, buffer, route.half)[1], class_gradient(case, lse, None, route.half)[1])


def test_dense_and_listed_tiles_in_one_sweep() -> None:
    """The first 96 classes lie above every row's floor, past half also of the padded lanes: that tile counts in full, also what
    is below it."""
    case = Case(960)
    case.x = torch.nn.functional.normalize(case.x + 2 * torch.ones(D) / D**0.5, dim=1)
    case.weight[:96] += 2 * torch.ones(D)
    case.weight[95] = -case.weight[0]  # far below every floor, in the tile that is swept in full
    case._logits(0.15)
    keep = case.listed.clone()
    assert float(keep[:, :96].double().mean()) > 0.8 and not bool(keep[:, 95].any())
    keep[:, :96] = case.negative[:, :96]
    with NATIVE[0]():
        lse, pull, listed, buffer = sweep(case, case.floor, False)
        terms, d_weight = class_gradient(case, lse, buffer, False)
    torch.testing.assert_close(listed, (case.p * keep).sum(1), atol=1e-6, rtol=0)
    assert relative(pull, case.pull(keep)) <= 2e-6
    assert relative(d_weight, case.gradient(terms, keep)) <= 5e-6


@each([*NATIVE, *HALF])
def test_an_infinite_slope_lists_nothing_below_the_floor(route: Route) -> None:
    """0 times it is NaN: not counted when the tile was found to fit, it must not be written, past the buffer's end, either."""
    case = Case(960, rule="curricular")
    assert case.rules is not None
    case.rules[[5, 10]] = math.inf  # b1: what 1e300 in a rule is in float32
    buffer = torch.full((500_000,), 77, dtype=torch.int32)
    classes = native.load()[0].Classes(
        weight=0, memory_rows=0, strength=0, slot=0, C=960, K=1, D=D, S=0, unit=False, memory_bf16=False, renormalize=True
    )
    with route():
        needed = native.load()[0].kept_bytes(classes, N, route.half, keep_half=False, lists=True) // 4
        torch.ops.recog_fast.negative_logsumexp(
            case.x, case.weight, case.labels, case.scale, case.rules, None, None, None, False, True, route.half, True,
            buffer[:needed], None, torch.full((N,), 1e6), None
        )  # fmt: skip
    assert bool((buffer[needed:] == 77).all())


def test_same_bits_for_any_number_of_threads() -> None:
    case, threads = Case(9000), torch.get_num_threads()
    results = []
    try:
        for isa in isas():
            native.select_isa(isa)
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                lse, pull, listed, buffer = sweep(case, case.floor, True)
                results.append((lse, pull, listed, class_gradient(case, lse, buffer, True)[1]))
            assert all(torch.equal(a, b) for later in results[-2:] for a, b in zip(results[-3], later, strict=True))
    finally:
        torch.set_num_threads(threads)
        native.select_isa("")


# --- the head ---------------------------------------------------------------------------------------------------------


def make_head(drop: float, classes: int = 3000, **options: Any) -> rf.MarginHead:
    torch.manual_seed(1)
    return rf.MarginHead(classes, D, **{"scale": 24.0, "drop_elements": drop, **options})


def batch(classes: int = 3000, n: int = N, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, D, generator=g), torch.randint(0, classes, (n,), generator=g)


def train_once(head: rf.MarginHead, rows: tuple[Tensor, Tensor] | None = None, **options: Any) -> tuple[Tensor, Tensor, Tensor, rf.RowStats]:
    x, labels = rows or batch(head.num_classes)
    x = x.clone().requires_grad_()
    head.weight.grad = None
    loss, stats = head(x, labels, return_stats=True, **options)
    loss.backward()
    assert x.grad is not None and head.weight.grad is not None
    return loss.detach(), x.grad, head.weight.grad.clone(), stats


@each([NATIVE[0], *HALF])
def test_error_falls_with_the_share_and_is_reported(route: Route) -> None:
    """Loss and statistics are those of the full sweep; dropped_mass is the mass below the floor; errors go to 0 with it."""
    x, labels = batch()
    with route():
        truth = train_once(make_head(0.0, compute_dtype=route.compute_dtype))
        dropped, errors = [], []
        for share in (0.03, 1e-3, 2**-16, 1e-9):
            loss, dx, d_weight, stats = train_once(make_head(share, compute_dtype=route.compute_dtype))
            torch.testing.assert_close(loss, truth[0], rtol=5e-7, atol=0)  # the same sums; their last bit is another kernel's
            torch.testing.assert_close(stats.lse, truth[3].lse, rtol=5e-7, atol=0)
            assert torch.equal(stats.nearest_index, truth[3].nearest_index)
            dropped.append(float(stats.dropped_mass.mean()))
            errors.append(max(relative(dx, truth[1]), relative(d_weight, truth[2])))
    # 1e-9: tiles past half are swept in full
    assert dropped[0] > dropped[1] > dropped[2] >= dropped[3] >= 0
    assert errors[0] > errors[1] > errors[2] >= errors[3]
    assert errors[3] <= (1e-6 if not route.half else 1e-3)
    if not route.half:
        head = make_head(1e-3)
        cosine = reference.unit_rows(x.double())[0] @ reference.unit_rows(head.weight.detach().double())[0].t()
        z = (24 * cosine).scatter(1, labels[:, None], -math.inf)
        target = 24 * rf.ArcFace(0.5)(cosine.gather(1, labels[:, None]).squeeze(1), x.norm(dim=1))
        p = torch.exp(z - torch.logaddexp(torch.logsumexp(z, 1), target)[:, None])
        # the floor is estimated from half of the classes, whose logits have a standard deviation of 3.8: a factor of 2 either way
        low, high = (torch.where(p < 1e-3 * f, p, torch.zeros_like(p)).sum(1).mean() for f in (0.5, 2.0))
        assert low <= dropped[1] <= high


def test_sixteen_bits_of_share_err_as_bfloat16_does() -> None:
    """The random head at D = 512, where mass is spread widest: within the budgets of 16-bit operands."""
    torch.manual_seed(3)
    weight, x, labels = torch.randn(20_000, 512), torch.randn(32, 512), torch.randint(0, 20_000, (32,))
    results = []
    for share in (0.0, 2**-16):
        head = rf.MarginHead(20_000, 512, drop_elements=share)
        with torch.no_grad():
            head.weight.copy_(weight)
        results.append(train_once(head, (x, labels)))
    assert relative(results[1][1], results[0][1]) <= 1.5e-3
    assert relative(results[1][2], results[0][2]) <= 4e-3
    assert 0.01 < float(results[1][3].dropped_mass.mean()) < 0.2


@pytest.mark.parametrize("options", [{}, {"subcenters": 3}, {"margin": rf.CurricularFace}, {"margin": rf.AdaFace}, {"sample_rate": 0.3}])
def test_fused_step_equals_the_dense_gradient(options: dict[str, Any]) -> None:
    ends = []
    for fuse in (True, False):
        head = make_head(1e-3, sample_seed=1, **{k: v() if k == "margin" else v for k, v in options.items()})
        fused = rf.HeadSGD(head, lr=0.5) if fuse else torch.optim.SGD([head.weight], lr=0.5, momentum=0.9, weight_decay=5e-4)
        for seed in range(3):
            fused.zero_grad()
            x, labels = batch(seed=seed)
            head(x.requires_grad_(), labels).backward()
            fused.step()
        ends.append(head.weight.detach())
    assert relative(*ends) <= 2e-6


def test_a_small_budget_lists_whole_blocks_and_sweeps_the_rest() -> None:
    """Classes past the budget count in full; the buffer never exceeds it."""
    truth = train_once(make_head(0.0))[2]
    errors = []
    for budget in (1, 200_000, 10**8):  # no block, one of four, all
        head = make_head(1e-3, keep_budget=budget)
        errors.append(relative(train_once(head)[2], truth))
        assert head.keep is not None and head.keep._buffer is not None and head.keep._buffer.numel() * 4 <= budget
    assert errors[0] <= 5e-7 < errors[1] < errors[2]


def test_batches_where_unknown_rows_count_are_exact() -> None:
    x, labels = batch()
    labels[::4] = -1
    plain = train_once(make_head(0.0, unknown_weight=0.1), (x, labels))
    ours = train_once(make_head(0.01, unknown_weight=0.1), (x, labels))
    assert torch.equal(plain[1], ours[1]) and torch.equal(plain[2], ours[2])
    assert not bool(ours[3].dropped_mass.any())
    ignored = train_once(make_head(0.01), (x, labels))  # unknown_weight 0: unlabelled rows have no gradient to leave out
    assert not bool(ignored[3].dropped_mass[::4].any()) and bool(ignored[3].dropped_mass.any())
    assert not bool(ignored[1][::4].any())


def test_setting_the_share_to_zero_turns_lists_off() -> None:
    head, exact = make_head(0.01), make_head(0.0)
    head.drop_elements = 0.0
    ours, truth = train_once(head), train_once(exact)
    assert torch.equal(ours[1], truth[1]) and torch.equal(ours[2], truth[2]) and not bool(ours[3].dropped_mass.any())


def test_micro_batches_of_one_step_are_joined_in_full() -> None:
    """Their lists are of different rows: the step computes dW of all again, nothing left out."""
    ends = []
    for share in (0.0, 0.01):
        head = make_head(share)
        optimizer = rf.HeadSGD(head, lr=0.5)
        for seed in range(2):
            x, labels = batch(seed=seed)
            head(x.requires_grad_(), labels).backward()
        optimizer.step()
        ends.append(head.weight.detach())
    assert relative(*ends) <= 5e-7


def test_where_nothing_is_listed() -> None:
    """The reference, evaluation, no gradients: exact, and nothing is reported as dropped."""
    x, labels = batch()
    for backend, training, grad in (("reference", True, True), ("auto", False, True), ("auto", True, False)):
        head = make_head(0.01).train(training)
        with rf.ops.use_backend(backend), torch.set_grad_enabled(grad):
            _, stats = head(x.clone().requires_grad_(), labels, return_stats=True)
        assert not bool(stats.dropped_mass.any())
    empty = make_head(0.01)
    loss = empty(torch.empty(0, D, requires_grad=True), torch.empty(0, dtype=torch.int64))
    loss.backward()
    assert loss.item() == 0
    one = make_head(0.01, classes=1)
    loss, dx, d_weight, _ = train_once(one)
    assert loss.item() == 0 and not bool(dx.any()) and not bool(d_weight.any())


def test_a_row_of_w_that_is_not_finite_reaches_the_loss() -> None:
    head = make_head(0.01)
    with torch.no_grad():
        head.weight[7, 3] = math.nan
    x, labels = batch()
    assert math.isnan(head(x.requires_grad_(), labels).item())


def test_the_floor_does_not_take_one_look_alike_for_many() -> None:
    """L is estimated within 0.3 nats on random classes, and a single very near class among those looked at counts once."""
    classes = 40 * SAMPLE
    torch.manual_seed(0)
    weight, x = torch.randn(classes, 64), torch.nn.functional.normalize(torch.randn(8, 64), dim=1)
    labels, target = torch.arange(8) + 1, torch.full((8,), -1.0)
    weight[0] = x[0]  # class 0 is among those looked at
    weight[4] = x[1]  # class 4 is not
    floor = list_floor(x, weight, labels, target, 12.0, None, Injection(), False, None, 1e-3).double() - math.log(1e-3)
    z = (12 * x.double() @ reference.unit_rows(weight.double())[0].t()).scatter(1, labels[:, None], -math.inf)
    truth = torch.logsumexp(z, dim=1)
    assert (floor[2:] - truth[2:]).abs().max() <= 0.3
    assert abs(float(floor[0] - truth[0])) <= 0.3
    assert floor[1] <= truth[1] + 0.3  # what is not seen is not counted: more is listed, nothing lost


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drop_elements": 1.0}, r"drop_elements in \[0, 1\)"),
        ({"drop_elements": "a"}, "drop_elements"),
        ({"drop_elements": math.nan}, "drop_elements"),
        ({"drop_elements": 0.1, "drop_mass": 0.1}, "at most one"),
        ({"drop_elements": 0.1, "keep_exponentials": True}, "at most one"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rf.MarginHead(10, 4, **options)


def test_the_operation_refuses_lists_without_a_floor() -> None:
    case = Case(100)
    call = torch.ops.recog_fast.negative_logsumexp
    fixed = (case.x, case.weight, case.labels, case.scale, None, None, None, None, False, True, False, True)
    for kept, floor, listed in (
        (torch.zeros(9, dtype=torch.int32), None, None),
        (None, case.floor, None),
        (torch.zeros(9), case.floor, None),
        (torch.zeros(9, dtype=torch.int32), case.floor[1:], None),
        (torch.zeros(9, dtype=torch.int32), case.floor, torch.zeros(N)),
    ):
        with pytest.raises(ValueError, match="recog_fast: expected"):
            call(*fixed, kept, None, floor, listed)
