"""VPL and QAFace, golden cases and edges: math.md section 2."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from paths import golden_dir
from torch import Tensor

from recog_fast.memory import VPL, NormStatistics, PrototypeMemory, QAFace

F64 = torch.float64


def load(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """kwargs and tensors of a golden case."""
    with np.load(golden_dir() / f"{name}.npz") as file:
        meta = json.loads(str(file["meta"]))
        return meta["kwargs"], {key: torch.from_numpy(file[key].copy()) for key in file.files if key != "meta"}


def close(value: Tensor, truth: Tensor, dtype: torch.dtype = torch.float64) -> None:
    """1e-9 in float64; in float32 the rounding of a norm and its exponential: 1e-5 of the value."""
    rtol, atol = (1e-9, 1e-9) if dtype == torch.float64 else (1e-5, 1e-6)
    torch.testing.assert_close(value.detach().double(), truth, rtol=rtol, atol=atol)


def qaface(kwargs: dict[str, Any]) -> QAFace:
    return QAFace(
        tau=kwargs["tau"],
        delta=kwargs["delta_t"],
        ema=kwargs["momentum"],
        on_reject=kwargs["on_reject"],
        literal=kwargs["literal"],
    )


QA_CASES = ["qa_memory__default", "qa_memory__literal_ema", "qa_memory__skip", "qa_memory__tau1"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", QA_CASES)
def test_qa_memory(name: str, dtype: torch.dtype) -> None:
    kwargs, case = load(name)
    memory = PrototypeMemory(kwargs["C"], kwargs["D"], qaface(kwargs), dtype=dtype)
    for k in range(kwargs["steps"]):
        embeddings = case[f"in_X{k}"].to(dtype)
        norms = torch.linalg.vector_norm(embeddings, dim=1)
        memory.write(embeddings, case[f"in_y{k}"], case[f"in_it{k}"])
        step = int(case[f"in_it{k}"])
        close(memory.strength(step), case[f"out_lambda{k}"], dtype)
        close(memory.rows(), case[f"out_mem{k}"], dtype)
        close(torch.stack([memory.mean, memory.std]), case[f"out_stats{k}"], dtype)
        strengths, _ = memory.policy.strengths(norms, NormStatistics(memory.mean, memory.std, memory.norm_batches))
        close(strengths, case[f"out_f{k}"], dtype)
        stored = memory.entries()
        by_class = torch.zeros(kwargs["C"], dtype=F64).index_put((stored.ids,), stored.strength.double())
        stamps = torch.full((kwargs["C"],), -1).index_put((stored.ids,), stored.stamp)
        close(by_class, case[f"out_lamq{k}"], dtype)
        assert torch.equal(stamps, case[f"out_stamp{k}"])


@pytest.mark.parametrize("name", QA_CASES)
def test_qa_memory_default_dtype(name: str) -> None:
    kwargs, case = load(name)
    memory = PrototypeMemory(kwargs["C"], kwargs["D"], qaface(kwargs))
    for k in range(kwargs["steps"]):
        memory.write(case[f"in_X{k}"].float(), case[f"in_y{k}"], int(case[f"in_it{k}"]))
        assert memory.rows().dtype == torch.bfloat16
        # A unit row rounded to bf16: half a unit in the last of 8 bits.
        torch.testing.assert_close(memory.rows().double(), case[f"out_mem{k}"], rtol=2**-8, atol=1e-7)
        torch.testing.assert_close(
            memory.strength(int(case[f"in_it{k}"])).double(), case[f"out_lambda{k}"], rtol=1e-5, atol=0
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_vpl_lambda(dtype: torch.dtype) -> None:
    kwargs, case = load("vpl_lambda__official")
    written = case["in_queue_iters"].tolist()
    policy = VPL(lam=kwargs["lam"], delta=kwargs["allowed_delta"], start=kwargs["start_iters"])
    memory = PrototypeMemory(len(written), 3, policy, dtype=dtype)
    for label, step in enumerate(written):
        memory.write(torch.ones(1, 3, dtype=dtype), torch.tensor([label]), step)
    close(torch.stack([memory.strength(step) for step in case["in_iters"].tolist()]), case["out_lam"], dtype)


def test_qaface_statistics_against_torch() -> None:
    policy = QAFace(ema=0.9)
    none = NormStatistics(torch.tensor(0.0, dtype=F64), torch.tensor(0.0, dtype=F64), torch.tensor(0))
    norms = torch.rand(9, dtype=F64) + 5
    labelled = torch.arange(9) % 3 != 0
    first = policy.update(norms, labelled, none)
    close(first.mean, norms[labelled].mean())
    close(first.std, norms[labelled].std())
    second = policy.update(norms + 1, labelled, first)
    close(second.mean, first.mean * 0.9 + 0.1 * (norms[labelled] + 1).mean())
    # A row that does not count may hold anything.
    norms[0] = math.nan
    assert torch.equal(policy.update(norms, labelled, none).mean, first.mean)


def test_qaface_one_row() -> None:
    memory = PrototypeMemory(4, 2, QAFace(), dtype=F64)
    memory.write(torch.tensor([[3.0, 4.0]], dtype=F64), torch.tensor([1]), 0)
    assert (float(memory.mean), float(memory.std)) == (5.0, 1.0)
    assert memory.strength(0).tolist() == [0.0, 1.0, 0.0, 0.0]
    memory.write(torch.tensor([[6.0, 8.0]], dtype=F64), torch.tensor([2]), 1)
    close(memory.mean, torch.tensor(5.05, dtype=F64))
    assert float(memory.std) == 1.0
    close(memory.strength(1)[2], torch.exp(torch.tensor(-4.95, dtype=F64)))


def test_qaface_equal_norms_give_strength_one() -> None:
    memory = PrototypeMemory(3, 2, QAFace())
    memory.write(torch.tensor([[1.0, 0.1], [0.1, 1.0], [-1.0, 0.1]]), torch.tensor([0, 1, 2]), 0)
    torch.testing.assert_close(memory.strength(0), torch.ones(3), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("on_reject", "strength"), [("overwrite", 0.0), ("skip", 1.0)])
def test_rejected_sample(on_reject: str, strength: float) -> None:
    memory = PrototypeMemory(2, 2, QAFace(tau=0.5, ema=1.0, on_reject=on_reject), dtype=F64)
    good, poor = torch.tensor([[10.0, 0.0]], dtype=F64), torch.tensor([[0.0, 2.0]], dtype=F64)
    memory.write(good, torch.tensor([1]), 0)  # mu = 10, sigma = 1
    memory.write(poor, torch.tensor([1]), 3)  # n^ = -8
    assert float(memory.strength(3)[1]) == strength
    assert memory.rows()[1].tolist() == ([0.0, 1.0] if on_reject == "overwrite" else [1.0, 0.0])
    assert memory.stats()["rejected"] == 1
    # In one batch, skip keeps the last row that was not rejected.
    memory.write(torch.cat([-good, poor]), torch.tensor([1, 1]), 4)
    assert memory.rows()[1].tolist() == ([0.0, 1.0] if on_reject == "overwrite" else [-1.0, 0.0])


def test_inject_scale() -> None:
    x, y = torch.rand(3, 4, dtype=F64), torch.arange(3)
    literal, preset = (PrototypeMemory(3, 4, QAFace(inject_scale=scale), dtype=F64) for scale in (1.0, 0.176))
    for memory in (literal, preset):
        memory.write(x, y, 0)
    close(preset.strength(0), literal.strength(0) * 0.176)


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: VPL(lam=-0.1), "lam"),
        (lambda: VPL(delta=-1), "delta"),
        (lambda: VPL(start=-1), "start"),
        (lambda: QAFace(delta=-5), "delta"),
        (lambda: QAFace(ema=1.5), "ema"),
        (lambda: QAFace(tau=math.nan), "tau"),
        (lambda: QAFace(inject_scale=-1.0), "inject_scale"),
        (lambda: QAFace(on_reject="drop"), "on_reject"),
    ],
)
def test_policy_errors(make: Any, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        make()
    with pytest.raises(TypeError, match="delta"):
        VPL(delta=2.5)  # type: ignore[arg-type]
