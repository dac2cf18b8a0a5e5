"""Properties of whatever is drawn: checkpoints, other libraries' losses, the cost model, backbones, the training script's margins."""

from __future__ import annotations

import inspect
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fuzz import examples
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

import recog_fast as rf
from recog_fast import models
from recog_fast.checkpoint import load_checkpoint, read_checkpoint, save_checkpoint
from recog_fast.compat import pml
from recog_fast.compat.insightface import CombinedMarginLoss, PartialFC_V2
from recog_fast.estimate import DEVICES, estimate
from recog_fast.training.model import MARGINS, named

SEEDS = st.integers(0, 2**32 - 1)

# -- checkpoint --------------------------------------------------------------------------------------------------------


@st.composite
def heads(draw: st.DrawFn) -> dict[str, Any]:
    """Sizes and options of a head and its HeadSGD; equal ones give equal objects."""
    split = draw(st.booleans())
    return {
        "classes": draw(st.integers(1, 40)), "dimension": draw(st.integers(1, 20)), "subcenters": draw(st.sampled_from([1, 1, 3])),
        "weight_format": "split" if split else "float32", "sample_rate": draw(st.sampled_from([1.0, 0.4])),
        "momentum": draw(st.sampled_from([0.0, 0.9])), "momentum_dtype": draw(st.sampled_from([torch.float32, torch.bfloat16])),
        "policy": draw(st.sampled_from([None, "VPL", "QAFace"])), "margin": draw(st.sampled_from(["ArcFace", "CurricularFace", "AdaFace"])),
    }  # fmt: skip


def build(drawn: dict[str, Any], seed: int) -> tuple[rf.MarginHead, rf.HeadSGD]:
    """The head and optimizer of what was drawn."""
    torch.manual_seed(seed)
    classes, dimension = drawn["classes"], drawn["dimension"]
    policy = None if drawn["policy"] is None else rf.VPL(start=0) if drawn["policy"] == "VPL" else rf.QAFace(start=0)
    memory = None if policy is None or drawn["subcenters"] > 1 else rf.PrototypeMemory(classes, dimension, policy, capacity=max(1, classes // 2))
    head = rf.MarginHead(
        classes, dimension, margin=getattr(rf, drawn["margin"])(), scale=16.0, subcenters=drawn["subcenters"], memory=memory,
        sample_rate=drawn["sample_rate"], sample_seed=seed, weight_format=drawn["weight_format"],
    )  # fmt: skip
    return head, rf.HeadSGD(head, lr=0.1, momentum=drawn["momentum"], momentum_dtype=drawn["momentum_dtype"])


def one_step(head: rf.MarginHead, optimizer: rf.HeadSGD, seed: int) -> Tensor:
    """The loss of a step of rows drawn by `seed`."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(6, head.embedding_dim, generator=draw, dtype=torch.float32).requires_grad_()
    labels = torch.randint(-1, head.num_classes, (6,), generator=draw)
    loss = head(x, labels, keys=None if head.memory is None else x.detach())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def bits(tensor: Tensor) -> Tensor:
    """Its bytes."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def same_bits(one: Any, other: Any) -> bool:
    """Equal states, tensors bit for bit."""
    if isinstance(one, Tensor):
        return (one.dtype, one.shape) == (other.dtype, other.shape) and torch.equal(bits(one), bits(other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same_bits(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same_bits, one, other))
    return bool(one == other) or (one != one and other != other)


@pytest.mark.filterwarnings("ignore:PrototypeMemory. the ring")
@examples(15)
@given(drawn=heads(), steps=st.integers(0, 3), seed=SEEDS)
def test_a_head_comes_back_bit_for_bit_and_goes_on_with_the_same_bits(drawn: dict[str, Any], steps: int, seed: int) -> None:
    head, optimizer = build(drawn, seed)
    for step in range(steps):
        one_step(head, optimizer, seed + step)
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(Path(folder) / "c", head=head, optimizer=optimizer, step=steps)
        other, its = build(drawn, seed + 1)
        assert load_checkpoint(Path(folder) / "c", head=other, optimizer=its) == {"step": steps}
    assert same_bits(dict(head.state_dict()), dict(other.state_dict()))
    assert same_bits(optimizer.state_dict()["state"], its.state_dict()["state"])
    assert same_bits(one_step(head, optimizer, seed + 9), one_step(other, its, seed + 9))
    assert same_bits(dict(head.state_dict()), dict(other.state_dict()))


PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.binary(max_size=8)
VALUES = st.recursive(
    PLAIN, lambda v: st.lists(v, max_size=3) | st.tuples(v, v) | st.dictionaries(st.text(max_size=4) | st.integers(), v, max_size=3), max_leaves=8
)


@examples(25)
@given(more=st.dictionaries(st.from_regex(r"[a-z]{1,6}", fullmatch=True), VALUES, max_size=3))
def test_what_is_saved_beside_the_head_is_read_as_it_was(more: dict[str, Any]) -> None:
    assume(not {"head", "optimizer", "step", "path"} & set(more))
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(Path(folder) / "c", head=torch.nn.Linear(1, 1), step=3, **more)
        back = read_checkpoint(Path(folder) / "c", keys=tuple(more))
    assert same_bits(back, more) and repr(back) == repr({name: more[name] for name in back})


# -- other libraries' losses -------------------------------------------------------------------------------------------


def logits_loss(x: Tensor, w: Tensor, y: Tensor, scale: float, phi: Any, centers: int = 1, keep: Any = None) -> Tensor:
    """Mean cross entropy of margin logits, materialised; w (C K, D), centres of a class together; label -1 is left out."""
    cosine = (F.normalize(x, dim=1) @ F.normalize(w, dim=1).t()).clamp(-1, 1).unflatten(1, (-1, centers)).amax(2)[y >= 0]
    y = y[y >= 0]
    rows = torch.arange(len(y))
    target = phi(cosine[rows, y])
    logits = cosine if keep is None else torch.where(keep(cosine), cosine, torch.zeros_like(cosine))
    return F.cross_entropy(scale * logits.index_put((rows, y), target), y)


def within(made: Tensor, x: Tensor, w: Tensor, *rest: Any) -> bool:
    """Error against float64 at most twice PyTorch's in float32, plus 2e-6 of the loss and of 1."""
    truth, plain = logits_loss(x.double(), w.double(), *rest), logits_loss(x, w, *rest)
    return bool((made - truth).abs() <= 2 * (plain - truth).abs() + 2e-6 * (1 + truth.abs()))


@st.composite
def batches(draw: st.DrawFn) -> tuple[Tensor, Tensor, int]:
    """x (N, D), labels (N,) of which one at least is no -1, C."""
    n, d, c = draw(st.integers(1, 20)), draw(st.integers(1, 33)), draw(st.integers(1, 70))
    generator = torch.Generator().manual_seed(draw(SEEDS))
    labels = torch.randint(-1, c, (n,), generator=generator)
    labels[0] = 0
    return torch.randn(n, d, generator=generator) * draw(st.sampled_from([1e-2, 1.0, 30.0])), labels, c


def arcface(cosine: Tensor, m: float) -> Tensor:
    theta = torch.acos(cosine)
    return torch.where(theta <= math.pi - m, torch.cos(theta + m), cosine - m * math.sin(m))


@examples(40)
@given(drawn=batches(), kind=st.sampled_from(["arc", "cos", "plain", "centers"]), margin=st.floats(0, 90), scale=st.floats(1, 64), k=st.integers(1, 4))
def test_pytorch_metric_learnings_losses_are_their_formulas(drawn: Any, kind: str, margin: float, scale: float, k: int) -> None:
    x, labels, c = drawn
    m, centers = math.radians(margin), k if kind == "centers" else 1
    if kind == "cos":
        loss: Any = pml.CosFaceLoss(c, x.shape[1], margin=m, scale=scale)
    elif kind == "plain":
        loss = pml.NormalizedSoftmaxLoss(c, x.shape[1], temperature=1 / scale)
    else:
        loss = (pml.ArcFaceLoss if kind == "arc" else pml.SubCenterArcFaceLoss)(
            c, x.shape[1], margin=margin, scale=scale, **({} if kind == "arc" else {"sub_centers": centers})
        )
    phi = {"cos": lambda cosine: cosine - m, "plain": lambda cosine: cosine}.get(kind, lambda cosine: arcface(cosine, m))
    assert tuple(loss.W.shape) == (x.shape[1], c * centers)
    assert within(loss(x, labels).detach(), x, loss.W.detach().t(), labels, scale, phi, centers)


@examples(30)
@given(drawn=batches(), m2=st.floats(0, 3), m3=st.just(0.0) | st.floats(0.01, 1.5), threshold=st.just(0.0) | st.floats(0.05, 0.9), s=st.floats(1, 64))
def test_arcface_torchs_head_is_its_formula(drawn: Any, m2: float, m3: float, threshold: float, s: float) -> None:
    x, labels, c = drawn
    head = PartialFC_V2(CombinedMarginLoss(s, 1.0, m2, m3, threshold), x.shape[1], c)
    phi = (lambda cosine: cosine - m3) if m3 > 0 else (lambda cosine: torch.cos(torch.acos(cosine) + m2))
    keep = (lambda cosine: cosine <= threshold) if threshold > 0 else None
    assert within(head(x, labels).detach(), x, head.weight.detach(), labels, s, phi, 1, keep)


# -- the cost model ----------------------------------------------------------------------------------------------------


@examples(60)
@given(
    classes=st.integers(1, 10**8), gpus=st.integers(1, 64), batch=st.integers(1, 4096), dimension=st.integers(1, 1024), device=st.sampled_from(sorted(DEVICES)),
    optimizer=st.sampled_from(["headsgd", "sgd", "adamw"]), momentum=st.booleans(), half=st.booleans(), subcenters=st.integers(1, 3),
    memory_steps=st.integers(0, 500), sample_rate=st.sampled_from([1.0, 0.1]), more=st.integers(1, 1000),
)  # fmt: skip
def test_a_larger_head_costs_no_less_and_items_add_up(classes: int, gpus: int, batch: int, more: int, **options: Any) -> None:
    report = estimate(classes, gpus, batch, **options)
    assert report.bytes == sum(item.bytes for item in report.items) and all(item.bytes >= 0 for item in report.items)
    assert report.times.sweeps == max(report.times.arithmetic, report.times.memory) and report.times.total == report.times.sweeps + report.times.messages
    assert report.fits == (report.bytes <= report.device.usable) and bool(report.options) != report.fits
    assert all(option.fits == (option.bytes <= report.device.usable) for option in report.options if " instead of " not in option.what and option.what.split()[-1] not in DEVICES)
    plain = json.loads(json.dumps(report.plain()))
    assert plain["memory"]["bytes"] == sum(plain["memory"]["items"].values()) == report.bytes
    assert plain["seconds"]["total"] == pytest.approx(report.times.total)
    even = estimate(classes, gpus, gpus * batch, **options)  # rows that differ over the ranks are padded: one row more may take less
    for smaller, larger in (
        (report, estimate(classes + more, gpus, batch, **options)), (even, estimate(classes, gpus, gpus * (batch + more), **options)),
        (report, estimate(classes, gpus, batch, **{**options, "dimension": options["dimension"] + more})),
    ):  # fmt: skip
        assert larger.bytes >= smaller.bytes and larger.times.total >= smaller.times.total
    wider = estimate(classes, gpus + more, batch, **options)
    assert wider.items[0].bytes <= report.items[0].bytes and (report.messages or gpus == 1) and wider.messages


# -- backbones ---------------------------------------------------------------------------------------------------------

LARGE = ("iresnet34", "iresnet100", "iresnet200")  # their shapes alone, on the meta device


@pytest.mark.parametrize("name", models.model_names())
@examples(2)
@given(size=st.tuples(st.integers(16, 40), st.integers(16, 40)), rows=st.integers(2, 4), dimension=st.integers(1, 24), seed=SEEDS)
def test_a_backbone_gives_a_row_of_d_numbers_to_every_image_by_itself(name: str, size: tuple[int, int], rows: int, dimension: int, seed: int) -> None:
    torch.manual_seed(seed)
    with torch.device("meta" if name in LARGE else "cpu"):
        network = models.build_model(name, embedding_dim=dimension, input_size=size).eval()
    pixels = torch.randint(0, 256, (rows, *size, 3), dtype=torch.uint8)
    with torch.inference_mode():
        images = network.preprocessing(pixels).to(next(network.parameters()).device)
        embeddings, features = network(images, return_features=True)
        assert tuple(embeddings.shape) == (rows, dimension) and tuple(features.shape) == (rows, *network.feature_shape)
        if name in LARGE:
            return
        assert torch.equal(network(images), embeddings) and bool(torch.isfinite(embeddings).all())
        alone = torch.cat([network(images[k : k + 1]) for k in range(rows)])
    assert float((alone - embeddings).abs().max()) <= 1e-4 * max(1.0, float(embeddings.abs().max()))


# -- the training script's margins -------------------------------------------------------------------------------------

GIVEN: dict[str, dict[str, Any]] = {"MagFace": {"um": 0.8}, "CombinedMargin": {"m1": 1.0, "m2": 0.3, "m3": 0.1}, "InterclassFilter": {"margin": {"name": "CosFace"}}}


@pytest.mark.parametrize("name", MARGINS)
@examples(8)
@given(n=st.integers(1, 9), seed=SEEDS, dtype=st.sampled_from([torch.float32, torch.float64]))
def test_every_margin_of_the_settings_gives_finite_targets_and_slopes(name: str, n: int, seed: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    cosine = (2 * torch.rand(n, generator=generator, dtype=dtype) - 1).index_put((torch.tensor([0]),), torch.tensor(1 - 2.0 * (seed % 2), dtype=dtype)).requires_grad_()
    norms = (100 * torch.rand(n, generator=generator, dtype=dtype)).requires_grad_()
    target = named({"name": name, **GIVEN.get(name, {})}, MARGINS, "margin")(cosine, norms)
    assert target.shape == cosine.shape and target.dtype == dtype and bool(torch.isfinite(target).all())
    slopes = torch.autograd.grad(target.sum(), (cosine, norms), allow_unused=True)
    assert all(slope is None or bool(torch.isfinite(slope).all()) for slope in slopes)


@pytest.mark.parametrize("name", MARGINS)
@examples(12)
@given(data_=st.data())
def test_settings_of_a_margin_make_it_or_are_a_valueerror(name: str, data_: st.DataObject) -> None:
    known = list(inspect.signature(getattr(rf, name)).parameters)
    values = st.none() | st.booleans() | st.floats() | st.integers(-3, 3) | st.text(max_size=3) | st.lists(st.floats(), max_size=2)
    settings = data_.draw(st.dictionaries(st.sampled_from([*known, "x"]), values, max_size=4))
    try:
        made = named({"name": name, **settings}, MARGINS, "margin")
    except ValueError as error:
        assert "expected" in str(error) or "unknown key" in str(error)
    else:
        assert isinstance(made, getattr(rf, name))
