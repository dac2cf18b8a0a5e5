"""Classes spread over ranks: 2, 3 and 4 processes train as one does, whatever the margin, the method and the batches."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch
from budgets import relative
from golden import cases, load
from ranks import Ranks, ranks
from sharded import MARGINS, UNEVEN, D, Problem, close, joined, shard_bounds, train
from sharded_ranks import copies, cosine_steps, ddp_rank, error_of, golden_rank, without_group

import recog_fast as rf
from recog_fast.sharding import initial_rows

processes = pytest.fixture(scope="module")(ranks)


def compare(ranks: Ranks, problem: Problem, allowed: float, approximate: bool = False) -> None:
    """Every number of every step, relative to the whole tensor; approximate: but for the mass left out and what depends on a moved W."""
    world = len(problem.sizes)
    found = ranks.run(world, train, problem)
    truth = train(None, problem)
    for step, expected in enumerate(truth[:-1] if approximate else truth):
        got = joined([r[step] for r in found])
        assert set(got) == set(expected)
        for name, value in expected.items():
            where = f"step {step}, {name}"
            assert got[name].shape == value.shape and got[name].dtype == value.dtype, where
            if not value.dtype.is_floating_point:
                assert torch.equal(got[name], value), where
            else:
                assert (approximate and name.startswith("dropped")) or close(got[name], value, allowed), (where, got[name], value)


@pytest.mark.parametrize("margin", list(MARGINS))
def test_every_margin_in_float32(processes: Ranks, margin: str) -> None:
    """With the native kernels; float64, the other methods, optimizers and numbers of ranks: test_shards_matrix.py."""
    compare(processes, Problem(UNEVEN[2], margin=margin, scale=256.0 if margin == "circle" else 16.0), 1e-5)


METHODS: dict[str, Problem] = {
    "subcenters": Problem(UNEVEN[3], options={"subcenters": 3}),
    "unknown": Problem(UNEVEN[3], options={"unknown_weight": 0.3}, micro=2),
    "unknown, subcenters": Problem(UNEVEN[2], options={"unknown_weight": 0.3, "subcenters": 2}, margin="adaface"),
    "unknown, saturated": Problem(UNEVEN[2], options={"unknown_weight": 0.3}, scale=120.0),
    "qaface": Problem(UNEVEN[4], policy="qaface", steps=4, options={"unknown_weight": 0.1}),
    "qaface skips": Problem(UNEVEN[2], policy="skip", steps=4, margin="adaface"),
    "weights": Problem(UNEVEN[3], weighted=True, micro=2),
    "sum": Problem(UNEVEN[4], weighted=True, call={"reduction": "sum"}, options={"unknown_weight": 0.1}),
    "none": Problem(UNEVEN[3], weighted=True, call={"reduction": "none"}, options={"unknown_weight": 0.2}),
    "none, adaface": Problem(UNEVEN[2], call={"reduction": "none"}, margin="adaface", micro=2),
    "normalizer": Problem(UNEVEN[3], call={"normalizer": 5.0}, micro=3),
    "empty shards": Problem(UNEVEN[4], classes=5, options={"unknown_weight": 0.2}),  # 2, 2, 1, 0
    "empty shards, memory": Problem(UNEVEN[4], classes=5, policy="vpl", steps=3),
    "one class a shard": Problem(UNEVEN[4], classes=4 + 1, margin="curricular"),
    "one class": Problem(UNEVEN[2], classes=5, labels="first"),
    "labels of one shard": Problem(UNEVEN[3], labels="first"),
    "unlabelled rows only": Problem(UNEVEN[3], labels="unlabelled", options={"unknown_weight": 1.0}, margin="adaface"),
    "no rows": Problem((0, 0), options={"unknown_weight": 0.5}),
    "large scale": Problem(UNEVEN[3], scale=2000.0),
    "drop_mass": Problem(UNEVEN[2], options={"drop_mass": 0.2}),
}


@pytest.mark.parametrize("fused", [True, False], ids=["HeadSGD", "SGD"])
@pytest.mark.parametrize("method", list(METHODS))
def test_every_method(processes: Ranks, method: str, fused: bool) -> None:
    problem = dataclasses.replace(METHODS[method], fused=fused)
    micro = problem.micro if fused or problem.policy is None else 1  # without HeadSGD a memory moves at every forward
    compare(processes, dataclasses.replace(problem, double=True, micro=micro), 1e-9)
    if fused:
        compare(processes, problem, 1e-5 if method != "large scale" else 1e-3)


SAMPLED: dict[str, Problem] = {
    "dense": Problem(UNEVEN[3], micro=2, options={"sample_rate": 0.4}),
    "sparse": Problem(UNEVEN[3], micro=2, options={"sample_rate": 0.4}, unsampled="sparse"),
    "subcenters": Problem(UNEVEN[2], options={"sample_rate": 0.3, "subcenters": 2}, unsampled="sparse"),
    "memory": Problem(UNEVEN[3], steps=4, policy="qaface", options={"sample_rate": 0.4}),
    "memory, sparse": Problem(UNEVEN[2], steps=4, policy="vpl", options={"sample_rate": 0.4}, unsampled="sparse"),
    "unknown": Problem(UNEVEN[3], micro=2, options={"sample_rate": 0.4, "unknown_weight": 0.3}),
    "empty shards": Problem(UNEVEN[4], classes=5, options={"sample_rate": 0.5}, unsampled="sparse"),
    "positives of one shard": Problem((9, 0), labels="first", options={"sample_rate": 0.05}),
    "none": Problem(UNEVEN[3], options={"sample_rate": 0.4}, call={"reduction": "none"}, margin="curricular"),
}


@pytest.mark.parametrize("fused", [True, False], ids=["HeadSGD", "SGD"])
@pytest.mark.parametrize("method", list(SAMPLED))
def test_sampled_classes(processes: Ranks, method: str, fused: bool) -> None:
    """Every shard draws by (seed, step, shard), its positives first; the step is one process's over the union of the samples."""
    problem = SAMPLED[method]
    if not fused and problem.unsampled == "sparse":
        pytest.skip("a policy of HeadSGD")
    problem = dataclasses.replace(problem, fused=fused, options={**problem.options, "sample_seed": 5}, micro=problem.micro if fused else 1)
    compare(processes, dataclasses.replace(problem, double=True), 1e-9)
    compare(processes, problem, 1e-5)


KEPT: dict[str, tuple[dict[str, Any], float]] = {
    "float32": ({"keep_exponentials": torch.float32}, 1e-5),
    "bfloat16": ({"keep_exponentials": True}, 4e-3),
    "sampled": ({"keep_exponentials": torch.float32, "sample_rate": 0.4, "sample_seed": 5}, 1e-5),
    "lists": ({"drop_elements": 2**-20}, 1e-3),
}


@pytest.mark.parametrize("name", list(KEPT))
def test_kept_exponentials(processes: Ranks, name: str) -> None:
    options, allowed = KEPT[name]
    compare(processes, Problem(UNEVEN[3], options=options, classes=200, steps=1), allowed, approximate=True)


HALVES = {name: METHODS[name] for name in ("subcenters", "unknown", "qaface", "none", "empty shards")}


@pytest.mark.parametrize("name", list(HALVES))
def test_sixteen_bits(processes: Ranks, name: str) -> None:
    """16-bit sweeps of a shard round other operands (a step per row and tile of its classes): the budget of such sweeps."""
    compare(processes, dataclasses.replace(HALVES[name], half=True, steps=1), 2e-2 if name == "unknown" else 5e-3)


# -- golden cases ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", cases("shard"))
def test_golden_shards(processes: Ranks, name: str) -> None:
    case = load(name)
    cuts, scale = case.kwargs["cuts"], case.kwargs["s"]
    if len(cuts) - 1 > 4:
        pytest.skip(f"{len(cuts) - 1} shards, 4 processes")
    inputs = [case[key] for key in ("in_X", "in_W", "in_y", "in_gout")]
    parts = processes.run(len(cuts) - 1, golden_rank, name, cuts, *inputs, scale)
    got = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    assert torch.equal(got["nn_idx"], case["out_nn_idx"])
    for key in ("loss", "dX", "dW"):
        assert relative(got[key], case[f"grad_{key}" if key[0] == "d" else f"out_{key}"]) <= 1e-9, key
    for key in ("nn_cos", "lse_neg"):  # float32 statistics
        assert relative(got[key], case[f"out_{key}"]) <= 1e-7, key


# -- DistributedDataParallel -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("average", [True, False])
def test_backbone_gradients(processes: Ranks, average: bool) -> None:
    """Under DDP, which averages, every rank gets the gradient of the global mean; without it the ranks' parts add up to it."""
    truth, d_weight = ddp_rank(None, False)
    found = processes.run(3, ddp_rank, average)
    whole = found[0][0] if average else torch.stack([g for g, _ in found]).sum(0)
    assert relative(whole, truth) <= 1e-12
    assert relative(torch.cat([w for _, w in found]), d_weight) <= 1e-12


# -- W -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 3), (30, 12), (7, 2, 5), (1000, 64), (1, 1)])
@pytest.mark.parametrize("piece", [16, 1 << 12])
def test_initial_rows_are_those_of_one_process(shape: tuple[int, ...], piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recog_fast.sharding.rows._PIECE", piece)
    torch.manual_seed(4)
    whole = torch.empty(shape).normal_(0.0, 0.01)
    after = torch.rand(3)
    for world in (1, 2, 3, 4):
        parts = []
        for first, last in shard_bounds(shape[0], world):
            torch.manual_seed(4)
            parts.append(initial_rows(shape, first, last))
            assert torch.equal(torch.rand(3), after)  # the generator stands where one process's stands
        assert torch.equal(torch.cat(parts), whole)


def test_class_ranges_are_those_of_chunk() -> None:
    for classes in (1, 2, 5, 30, 31, 1000):
        for world in (1, 2, 3, 4, 7, 40):
            ours = [torch.arange(classes)[a:b] for a, b in shard_bounds(classes, world)]
            theirs = torch.arange(classes).chunk(world)
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=False))
            assert all(part.numel() == 0 for part in ours[len(theirs) :])


# -- errors: on every rank, at once ------------------------------------------------------------------------------------


ERRORS = {
    "num_classes": ("expected the same num_classes on every rank, got 30 on rank 0 and 31 on rank 1", None),
    "margin": (r"expected the same margin on every rank, got .*ArcFace.* on rank 0 and .*CosFace.* on rank 1", None),
    "scale": (r"expected the same scale on every rank, got 64.0 on rank 0 and 8.0 on rank 1", None),
    "policy": (r"expected the same memory on every rank, got .*delta=5.* and .*delta=9", None),
    "run/labels": (r"got a refusal of rank 1: .*labels in \[-1, C\) = \[-1, 30\), got 30 in row 1", r"labels in .*got 30 in row 1"),
    "run/nan": (r"got a refusal of rank 1: .*finite embeddings, got a non-finite value in row 0", "non-finite value in row 0"),
    "run/reduction": (r"expected the same reduction on every rank, got 'mean' on rank 0 and 'sum' on rank 1", None),
    "run/keys": (r"expected the same keys on every rank, got a tensor on rank 0 and None on rank 1", None),
    "run/topk": ("expected the same call on every rank, got MarginHead on rank 0 and MarginHead.topk on rank 1", "MarginHead.topk: expected the same call"),
    "run/width": (r"got a refusal of rank 1: .*expected weight with D = 13", "expected weight with D = 13"),
    "run/write": (r"refusal of rank 1: .*labels in \[-1, C\) = \[-1, 30\), got 33 at row 1", "got 33 at row 1"),
    "run/optimizer": ("expected the same fused optimizer on every rank, got True on rank 0 and False on rank 1", None),
}


@pytest.mark.parametrize("case", list(ERRORS))
def test_an_error_of_one_rank_is_raised_on_all(processes: Ranks, case: str) -> None:
    others, odd = ERRORS[case]
    said = processes.run(3, error_of, case)
    for rank, text in enumerate(said):
        assert re.search(odd if rank == 1 and odd is not None else others, text), (rank, text)
        if "/" in case:
            assert text.endswith("(0, 0, -1.0)"), text  # all state untouched
    assert processes.run(3, error_of, "run/nothing") == ["none: 1"] * 3  # and they go on together


def test_several_ranks_need_a_group(processes: Ranks) -> None:
    for text in processes.run(4, without_group):
        assert "expected group=torch.distributed.group.WORLD or another process group under 4 ranks, got None" in text
    for bad in ("world", 3):
        with pytest.raises(ValueError, match="expected group to be a torch.distributed.ProcessGroup"):
            rf.MarginHead(30, D, group=bad)


def test_copies_share_the_group(processes: Ranks) -> None:
    assert processes.run(2, copies) == [[True, True]] * 2


@pytest.mark.parametrize("options", [{}, {"subcenters": 2}, {"sample_rate": 0.5, "sample_seed": 5}], ids=["plain", "subcenters", "sampled"])
def test_fused_steps_from_attached_cosines(processes: Ranks, options: dict[str, Any]) -> None:
    """Rows reach the shard of their class, whose step moves it; shards without one step by momentum and decay alone."""
    problem = Problem(UNEVEN[3], double=True, options=options)
    parts, truth = processes.run(3, cosine_steps, problem), cosine_steps(None, problem)
    for step, expected in enumerate(truth[:2] if "sample_rate" in options else truth):  # another sample with one process
        got = joined([part[step] for part in parts])
        assert all(close(got[name], value, 1e-10) for name, value in expected.items()), step
