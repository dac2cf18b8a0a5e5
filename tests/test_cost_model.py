"""The benchmarks' cost model against what PyTorch counts and touches."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from paths import ROOT
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(ROOT))  # benchmarks/ is no part of the installed package

import recog_fast as rf
from benchmarks import contenders, cost_model, peers, problems, truth
from recog_fast import reference

# N << C and C D far above N C: every kind of term shows, and a C x D pass cannot hide in a N x C one
N, C, D = 16, 2000, 96


class _Traffic(TorchDispatchMode):
    """Bytes of the distinct storages each operation that is no view reads and writes."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name
        if func.is_view or name in (
            "aten::detach",
            "aten::_unsafe_view",
            "aten::empty",
            "aten::empty_like",
            "aten::index_put_",
        ):
            return out
        self.bytes += sum(_size(t) for t in _tensors(out))
        if name == "aten::index":  # reads what it returns
            self.bytes += sum(_size(t) for t in _tensors(out))
        kept = [t for t, a in zip(args, func._schema.arguments, strict=False) if not _unread(name, a)]
        self.bytes += sum(_size(t) for t in _tensors((kept, kwargs or {})))
        return out


def _unread(name: str, argument: Any) -> bool:
    """Arguments whose values an operation does not read: it takes their shape alone, or overwrites a few elements."""
    return (
        name in ("aten::zeros_like", "aten::ones_like", "aten::zero_", "aten::new_zeros")
        or (name == "aten::nll_loss_backward" and argument.name in ("self", "total_weight"))
        or (name in ("aten::nll_loss_forward", "aten::gather", "aten::index") and argument.name == "self")
    )


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]


def _size(t: torch.Tensor) -> int:
    return min(t.numel(), t.untyped_storage().nbytes() // t.element_size()) * t.element_size()


def _arena() -> contenders.Arena:
    return contenders.Arena(problems.make_problem("R0", N, C, D))


@pytest.mark.parametrize(
    ("kind", "cost"),
    [(peers.Eager, cost_model.eager), (peers.PartialFC, cost_model.partial_fc)],
)
def test_matrix_flops_are_those_torch_counts(kind: type[contenders.Contender], cost: cost_model.CostModel) -> None:
    contender = kind(_arena())
    with FlopCounterMode(display=False) as counter:
        contender.forward().backward()
    assert (
        counter.get_total_flops()
        == cost(N, C, D).flops("backward", matrix_only=True)
        == cost_model.least_flops(N, C, D, "backward")
    )


def test_matrix_flops_of_ours_are_those_of_the_reference_schedule() -> None:
    """Two products per sweep, two sweeps: the reference's operations run the same ones."""
    problem = problems.make_problem("R0", N, C, D)
    unit, _ = reference.unit_rows(problem.embeddings)
    with FlopCounterMode(display=False) as counter:
        lse, *_ = reference.negative_logsumexp(unit, problem.weight, problem.labels, problems.SCALE)
        terms = torch.zeros(reference.TERM_ROWS, N)
        terms[0] = lse
        reference.class_gradient(unit, problem.labels, terms, problem.weight, problems.SCALE)
    for cost, phase in ((cost_model.recomputing, "backward"), (cost_model.fused_step, "update")):
        assert counter.get_total_flops() == cost(N, C, D).flops(phase, matrix_only=True) == 8 * N * C * D


@pytest.mark.parametrize(
    ("kind", "cost"),
    [
        (peers.Eager, cost_model.eager),
        (peers.PartialFC, cost_model.partial_fc),
        (peers.PartialFCSampled, cost_model.partial_fc_sampled),
    ],
)
def test_bytes_are_those_the_operations_touch(kind: type[contenders.Contender], cost: cost_model.CostModel) -> None:
    """Within 10 %: vectors of C or N numbers are not in the model."""
    contender = kind(_arena())
    with _Traffic() as traffic:
        loss = contender.forward()
    assert traffic.bytes == pytest.approx(cost(N, C, D).bytes("forward"), rel=0.10)
    with traffic:
        loss.backward()
    assert traffic.bytes == pytest.approx(cost(N, C, D).bytes("backward"), rel=0.10)


def test_bytes_of_ours_are_four_streams_of_w_and_the_state() -> None:
    """Dense: W read twice, dW written, SGD 20 B; fused: W read twice, W written, v read and written. Per element of W."""
    assert cost_model.recomputing(N, C, D).bytes("backward") == 12 * C * D
    assert cost_model.recomputing(N, C, D).bytes() == 32 * C * D
    assert cost_model.fused_step(N, C, D).bytes() == 20 * C * D


def test_keeping_exponentials_saves_one_product_and_moves_them_twice_in_bf16() -> None:
    for kept, recomputed in (
        (cost_model.kept_exponentials, cost_model.recomputing),
        (cost_model.fused_step_kept, cost_model.fused_step),
    ):
        assert kept(N, C, D).flops(matrix_only=True) == 6 * N * C * D
        assert recomputed(N, C, D).flops(matrix_only=True) == 8 * N * C * D
        assert kept(N, C, D).bytes() - recomputed(N, C, D).bytes() == 4 * N * C
        assert kept(N, C, D).bytes("forward") - recomputed(N, C, D).bytes("forward") == 2 * N * C
    exact, kept = cost_model.fused_step_kept_exact(N, C, D), cost_model.fused_step_kept(N, C, D)
    assert exact.flops() == kept.flops() and exact.bytes() - kept.bytes() == 4 * N * C


def test_truth_agrees_with_the_reference_in_float64() -> None:
    problem = problems.make_problem("R0", N, C, D)
    want = truth.compute_truth(problem, problems.MARGIN)
    x = problem.embeddings.double().requires_grad_()
    w = problem.weight.double().requires_grad_()
    loss = rf.margin_softmax_loss(x, w, problem.labels, margin=rf.ArcFace(problems.MARGIN), scale=problems.SCALE)
    loss.backward()
    assert x.grad is not None
    assert w.grad is not None
    assert float(loss.detach()) == pytest.approx(want.loss, rel=1e-12)
    assert truth.relative(x.grad, want.d_embeddings) < 1e-11
    assert truth.relative(w.grad[want.sample], want.d_weight) < 1e-11


@pytest.mark.parametrize("wanted", [0.22, 0.87, 1.5])
def test_converged_problem_has_the_mean_loss_it_promises(wanted: float) -> None:
    problem = problems.make_problem(f"R1-{wanted}", 32, 3000, 128)
    assert truth.compute_truth(problem, problems.MARGIN).loss == pytest.approx(wanted, abs=problem.tolerance)


def _gate(**changes: float) -> truth.Gate:
    clean: dict[str, Any] = {"loss": 0.0, "d_embeddings": 0.0, "d_weight": 0.0, "d_weight_negatives": 0.0, "step": 0.0}
    return truth.Gate(**{**clean, **changes}, same_bits=True, limit=1e-4, needs_same_bits=True)


@pytest.mark.parametrize("field", ["loss", "d_embeddings", "d_weight", "d_weight_negatives", "step"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 2e-4])
def test_gate_fails_on_any_bad_error(field: str, value: float) -> None:
    assert _gate().passes
    assert not _gate(**{field: value}).passes


def test_unknown_regime_is_an_error() -> None:
    make: Callable[..., Any] = problems.make_problem
    with pytest.raises(ValueError, match="expected regime 'R0' or 'R1-<mean loss>', got 'R9'"):
        make("R9", 4, 8, 4)
