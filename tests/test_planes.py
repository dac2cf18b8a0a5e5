"""W in two 16-bit planes, a velocity rounded by chance: the formats, and the operations on them against float32."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from test_ops import calls, sample
from torch import Tensor

import recog_fast as rf
from recog_fast import native
from recog_fast.ops import _chunked, _planes, _stochastic

# zeros, denormals (a tie among them), ties with even and odd neighbours, beside ties, the largest bfloat16 and beyond it, the largest
AWKWARD = torch.tensor(
    [0x00000000, 0x80000000, 0x00000001, 0x80000001, 0x00008000, 0x00018000, 0x007FFFFF, 0x807F8001, 0x3F808000, 0x3F818000, 0xBF808000,
     0x3F807FFF, 0x3F808001, 0x7F7F0000, 0x7F7F7FFF, 0x7F7F8000, 0x7F7FFFFF, 0xFF7FFFFF, 0x7F800000, 0xFF800000, 0x7FC00000, 0xFFC00000],
    dtype=torch.int64,
).to(torch.int32).view(torch.float32)  # fmt: skip


def planes_of(values: Tensor) -> tuple[Tensor, Tensor]:
    high, low = torch.empty(values.shape, dtype=torch.bfloat16), torch.empty(values.shape, dtype=torch.int16)
    _planes.split(values, high, low)
    return high, low


def bits(t: Tensor) -> Tensor:
    return t.view(torch.int32 if t.dtype == torch.float32 else torch.int16)


# -- the format --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", range(4))
def test_every_upper_half_with_many_lower_ones_comes_back(part: int) -> None:
    """All 2^16 upper halves; lower ones at and beside the borders, and others: every bit but a NaN's payload."""
    upper = torch.arange(2**16, dtype=torch.int64).unsqueeze(1) << 16
    borders = torch.tensor([0, 1, 0x7FFE, 0x7FFF, 0x8000, 0x8001, 0xFFFE, 0xFFFF])
    lower = borders if part == 0 else torch.randint(2**16, (16,), generator=torch.Generator().manual_seed(part))
    values = (upper + lower).to(torch.int32).view(torch.float32)
    high, low = planes_of(values)
    back, missing = _planes.join(high, low), torch.isnan(values)
    assert torch.equal(bits(back)[~missing], bits(values)[~missing])
    assert torch.equal(torch.isnan(back), missing) and torch.equal(torch.isnan(high), missing)


def test_the_high_plane_is_the_nearest_bfloat16() -> None:
    """As torch rounds, but for ties, of which torch takes the even one."""
    values = torch.cat([torch.randn(10000), AWKWARD])
    high, _ = planes_of(values)
    tie = (bits(values) & 0xFFFF == 0x8000) | torch.isnan(values)
    assert torch.equal(bits(high)[~tie], bits(values.bfloat16())[~tie])
    finite = torch.isfinite(high.float()) & torch.isfinite(values)
    distance = (high.double() - values.double()).abs()[finite], (values.bfloat16().double() - values.double()).abs()[finite]
    assert torch.equal(*distance)
    assert bool(torch.isinf(high[torch.isfinite(values) & (values.abs() >= 3.3961775e38)]).all())  # what low finds its way back from


def test_planes_stand_for_their_weight() -> None:
    values = torch.randn(9, 2, 5)
    weight = _planes.Planes(*planes_of(values))
    assert (weight.shape, weight.dim(), weight.numel(), weight.dtype, weight.device) == (values.shape, 3, 90, torch.float32, values.device)
    for at in (torch.tensor([3, 3, 0]), slice(2, 7), 4):
        assert torch.equal(weight[at], values[at])


# -- rounding by chance ------------------------------------------------------------------------------------------------


def rounded(values: Tensor, seed: int = 1, step: int = 2, first: int = 0, rows: Tensor | None = None) -> Tensor:
    out = torch.empty(values.shape, dtype=torch.bfloat16)
    _stochastic.round_into(values, out, torch.tensor([seed, step, first]), rows)
    return out


@pytest.mark.parametrize("share", [0, 1, 0x3FFF, 0x8000, 0xFFFF])
def test_rounding_is_unbiased(share: int) -> None:
    """A value `share` / 2^16 of the way between two neighbours goes up that often: within 5 standard deviations of 2^20 draws."""
    draws = 2**20
    value = torch.tensor(0x3F800000 + share, dtype=torch.int32).view(torch.float32)
    for sign in (1.0, -1.0):
        out = rounded(torch.full((draws // 64, 64), value.item() * sign)).abs()
        up, chance = (out > 1).sum().item(), share / 2**16
        assert set(out.unique().tolist()) <= {1.0, 1 + 2**-7}
        assert abs(up - draws * chance) <= 5 * math.sqrt(draws * chance * (1 - chance))
    # the variance: (2^-7)^2 p (1 - p), at most a quarter of the distance squared
    assert out.double().var(unbiased=False).item() == pytest.approx(2**-14 * (up / draws) * (1 - up / draws), rel=1e-9)


def test_the_bits_are_those_of_independent_draws() -> None:
    """Uniform in 16 bits (chi square over the upper and the lower byte), and uncorrelated between neighbours: columns, rows, steps, seeds."""
    shape, key = (4096, 64), torch.tensor([3, 5, 0])
    base = _stochastic.noise(key, torch.arange(shape[0]), shape[1])
    assert base.min() >= 0 and base.max() < 2**16
    for byte in (base & 0xFF, base >> 8):
        counts = torch.bincount(byte.flatten(), minlength=256).double()
        expected = base.numel() / 256
        chi = ((counts - expected) ** 2 / expected).sum().item()
        assert abs(chi - 255) <= 5 * math.sqrt(2 * 255)
    uniform = base.double() / 2**16 - 0.5
    others = {
        "column": (uniform[:, 1:], uniform[:, :-1]),
        "row": (uniform[1:], uniform[:-1]),
        "step": (uniform, _stochastic.noise(key + torch.tensor([0, 1, 0]), torch.arange(shape[0]), shape[1]).double() / 2**16 - 0.5),
        "seed": (uniform, _stochastic.noise(key + torch.tensor([1, 0, 0]), torch.arange(shape[0]), shape[1]).double() / 2**16 - 0.5),
        "2^32 rows on": (uniform, _stochastic.noise(key + torch.tensor([0, 0, 2**32]), torch.arange(shape[0]), shape[1]).double() / 2**16 - 0.5),
    }
    for name, (a, b) in others.items():
        assert abs((a * b).mean().item()) * 12 <= 5 / math.sqrt(a.numel()), name


def test_the_place_in_the_weight_decides() -> None:
    """Chunks, shards and selections of rows round as the whole; other seeds, steps and rows do not."""
    values = torch.randn(300, 33)
    whole = rounded(values)
    assert torch.equal(rounded(values), whole)
    assert torch.equal(torch.cat([rounded(values[:101]), rounded(values[101:], first=101)]), whole)
    ids = torch.tensor([0, 7, 8, 250])
    assert torch.equal(rounded(values[ids], rows=ids), whole[ids])
    subcenters = values.reshape(100, 3, 33)
    assert torch.equal(rounded(subcenters), whole.reshape(100, 3, 33))
    assert torch.equal(rounded(subcenters[ids[:3]], rows=ids[:3]), whole.reshape(100, 3, 33)[ids[:3]])
    for other in (rounded(values, seed=2), rounded(values, step=3), rounded(values, first=1), rounded(values, seed=1 + 2**32)):
        assert 0.2 < (other != whole).double().mean().item() < 0.45  # 1/3: two draws of p (1 - p), p uniform


def test_blocks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(50, 20)
    whole = rounded(values)
    monkeypatch.setattr(_stochastic, "_BLOCK", 60)
    assert torch.equal(rounded(values), whole)


def test_what_bfloat16_holds_stays() -> None:
    values = torch.cat([torch.randn(4096).bfloat16().float(), torch.tensor([0.0, -0.0, math.inf, -math.inf, 1e-40])]).unsqueeze(1)
    out = rounded(values)
    assert torch.equal(bits(out.float())[:-1], bits(values)[:-1])
    special = rounded(AWKWARD.unsqueeze(1).repeat(1, 64))
    assert torch.equal(torch.isnan(special).all(1), torch.isnan(AWKWARD)) and torch.equal(torch.isnan(special).any(1), torch.isnan(AWKWARD))
    assert (special[2] == 0).sum() + (special[2].float() == 2**-133).sum() == 64  # a denormal's neighbours


# -- the compiled twins ------------------------------------------------------------------------------------------------


@pytest.mark.skipif(native.load()[0] is None, reason="of the compiled kernels")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (3, 33), (2, 40000), (9001, 33)], ids=str)  # none, a tail alone, rows longer than a block, many blocks
def test_compiled_planes_and_rounding_have_the_same_bits(shape: tuple[int, int], threads: int) -> None:
    """Any bits, those hard to split among them; rows far beyond 2^32."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        values = torch.randint(-(2**31), 2**31, shape, generator=torch.Generator().manual_seed(0)).to(torch.int32).view(torch.float32)
        there = min(values.numel(), AWKWARD.numel())
        values.view(-1)[:there] = AWKWARD[:there]
        high, low = planes_of(values)
        ours = torch.empty_like(high), torch.empty_like(low)
        _chunked._split(values, *ours)
        assert all(torch.equal(bits(a), b) for a, b in zip(ours, (bits(high), low), strict=True))
        assert torch.equal(bits(_chunked._joined(high, low)), bits(_planes.join(high, low)))
        velocity, rounding = torch.empty_like(high), torch.tensor([2**62 + 3, 77, 2**34])
        _chunked._round(values, velocity, rounding, 123)
        expected = torch.empty_like(high)
        _stochastic.round_into(values, expected, rounding + torch.tensor([0, 0, 123]))
        assert torch.equal(bits(velocity), bits(expected))
    finally:
        torch.set_num_threads(before)


# -- operations on the CPU ---------------------------------------------------------------------------------------------


@pytest.fixture(params=[None, 7], ids=["one chunk", "chunks of 7 classes"])
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the CPU sweeps take W whole."""
    if native.load()[0] is None:
        pytest.skip(f"compiled kernels {native.load()[1]}")
    if request.param is not None:
        monkeypatch.setattr(_planes, "chunks", lambda weight: ((at, min(at + 7, len(weight))) for at in range(0, len(weight), 7)))
    return request.param is None


def run(stem: str, arguments: tuple[Any, ...], *, split: bool, **options: Any) -> tuple[Tensor, ...]:
    """Results on a float32 W or its planes; of a step W and velocity."""
    taken = [a.clone() if isinstance(a, Tensor) else a for a in arguments]
    at = {"effective_prototypes": 0, "class_step": 3}.get(stem, 1)
    if split:
        taken[at], options["residual"] = planes_of(taken[at])
    out = getattr(torch.ops.recog_fast, stem)(*taken, **options)
    if stem == "class_step":
        return (_planes.join(taken[at], options["residual"]) if split else taken[at]), taken[4]
    return out if isinstance(out, tuple) else (out,)


MEMBERS = torch.tensor([0, 3, 4, 22, 23])
STEMS = ("effective_prototypes", "negative_logsumexp", "unknown_rejection", "class_step")


OPTIONS: dict[str, dict[str, Any]] = {"plain": {}, "half": {"half": True}, "sampled": {"members": MEMBERS}, "sparse": {"members": MEMBERS, "sparse": True}}
TAKEN = {"effective_prototypes": ("plain",), "negative_logsumexp": ("plain", "half", "sampled"), "unknown_rejection": ("plain", "half"), "class_step": tuple(OPTIONS)}


@pytest.mark.parametrize(("k", "unknown"), [(1, True), (1, False), (3, True), (3, False)])
@pytest.mark.parametrize(("stem", "chosen"), [(stem, chosen) for stem in STEMS for chosen in TAKEN[stem]])
def test_operations_on_planes(pieces: bool, stem: str, k: int, unknown: bool, chosen: str) -> None:
    """One chunk: the bits of the float32 W. Several: of a step of margin rows too; the forward's sums to float32's precision."""
    options = OPTIONS[chosen]
    s = sample(9, 30, 12, k, memory=k == 1, seed=k)
    if not unknown:
        s["terms"][4] = 0
        s["labels"] = torch.where(s["labels"] == -1, -2, s["labels"])
    arguments = calls(s)[stem]
    for one, two in zip(run(stem, arguments, split=False, **options), run(stem, arguments, split=True, **options), strict=True):
        if pieces or (stem == "class_step" and not unknown) or not one.dtype.is_floating_point:
            assert torch.equal(one, two)
        else:
            # 16-bit operands have steps of a tile's classes: 2^-9 of the exponentials or slopes
            assert (one - two).abs().max() <= (2**-8 if "half" in options else 2e-6) * (1 + one.abs().max())


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("options", [{}, {"members": MEMBERS}, {"members": MEMBERS, "sparse": True}], ids=["all", "sampled", "sparse"])
def test_a_velocity_in_bfloat16(pieces: bool, options: dict[str, Any], split: bool) -> None:
    """W as of a float32 velocity of the same values; v that one's, rounded."""
    rounding = torch.tensor([9, 4, 1000])
    s = sample(9, 30, 12, seed=2)
    s["terms"][4] = 0
    arguments = list(calls(s)["class_step"])
    arguments[4] = arguments[4].bfloat16()
    weight, velocity = run("class_step", tuple(arguments), split=split, rounding=rounding, **options)
    arguments[4] = arguments[4].float()
    expected, exact = run("class_step", tuple(arguments), split=split, **options)
    assert torch.equal(weight, expected)
    assert torch.equal(velocity, rounded(exact, 9, 4, 1000)) and not torch.equal(velocity, exact.bfloat16())


@pytest.mark.parametrize("stem", STEMS)
def test_the_reference_joins(stem: str) -> None:
    arguments = calls(sample(9, 30, 12))[stem]
    with rf.ops.use_backend("reference"):
        for one, two in zip(run(stem, arguments, split=False), run(stem, arguments, split=True), strict=True):
            assert torch.equal(one, two)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("stem", STEMS)
def test_opcheck(stem: str, backend: str) -> None:
    arguments = list(calls(sample())[stem])
    at = {"effective_prototypes": 0, "class_step": 3}.get(stem, 1)
    arguments[at], low = planes_of(arguments[at])
    more: dict[str, Any] = {"residual": low}
    if stem == "class_step":
        arguments[4], more["rounding"] = arguments[4].bfloat16(), torch.tensor([1, 2, 3])
    with rf.ops.use_backend(backend):
        torch.library.opcheck(getattr(torch.ops.recog_fast, stem).default, tuple(arguments), more)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "float32 weight": ({"residual": torch.zeros(9, 6, dtype=torch.int16)}, "a bfloat16 weight with residual"),
    "float residual": ({"weight": torch.zeros(9, 6).bfloat16(), "residual": torch.zeros(9, 6)}, "an int16 residual"),
    "other shape": ({"weight": torch.zeros(9, 6).bfloat16(), "residual": torch.zeros(8, 6, dtype=torch.int16)}, "residual of shape"),
    "strided": ({"weight": torch.zeros(9, 6).bfloat16(), "residual": torch.zeros(6, 9, dtype=torch.int16).t()}, "contiguous planes"),
    "no rounding": ({"velocity": torch.zeros(9, 6).bfloat16()}, "rounding .3,. int64"),
    "bad rounding": ({"velocity": torch.zeros(9, 6).bfloat16(), "rounding": torch.zeros(3)}, "rounding .3,. int64"),
}


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", BAD)
def test_bad_planes_are_named(name: str, backend: str) -> None:
    change, message = BAD[name]
    arguments = list(calls(sample())["class_step"])
    change = dict(change)
    arguments[3] = change.pop("weight", arguments[3])
    arguments[4] = change.pop("velocity", arguments[4])
    with rf.ops.use_backend(backend), pytest.raises(ValueError, match=f"class_step: expected {message}"):
        torch.ops.recog_fast.class_step(*arguments, **change)
