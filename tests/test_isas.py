"""Choosing which build of the CPU kernels runs: by name, for the whole process, the same results in budget."""

from __future__ import annotations

import pytest
import torch
from routes import isas
from test_ops import calls, sample
from torch import Tensor

import recog_fast as rf
from recog_fast import native


def test_the_best_runs_unless_another_is_forced() -> None:
    names = isas()
    best = native.select_isa()
    assert names[0] == best
    assert {"baseline", "emulated_bf16"} <= set(names) <= {*native.ISAS, "emulated_bf16"}
    for name in names:
        assert native.select_isa(name) == name
        assert f"native {name}" in rf.backends()["cpu"]
    assert native.select_isa() == best


@pytest.mark.parametrize("name", ["avx", "AVX2", "sse9"])
def test_unknown_names_are_refused_and_change_nothing(name: str) -> None:
    before = native.select_isa()
    with pytest.raises(ValueError, match=f"select_isa: expected one of .*got '{name}'"):
        native.select_isa(name)
    assert before in rf.backends()["cpu"]


@pytest.mark.parametrize("stem", ["effective_prototypes", "negative_logsumexp", "unknown_rejection", "class_gradient", "class_step"])
def test_every_operation_gives_the_same_on_every_isa(stem: str) -> None:
    """Differences between two ISAs stay within what each may differ from float64 (2e-6 of the largest value, s = 8), twice."""
    s = sample(33, 1000, 75)
    results: dict[str, tuple[Tensor, ...]] = {}
    for isa in isas():
        native.select_isa(isa)
        try:
            torch.manual_seed(0)
            taken = [a.clone() if isinstance(a, Tensor) else a for a in calls(s)[stem]]
            out = getattr(torch.ops.recog_fast, stem)(*taken)
        finally:
            native.select_isa()
        results[isa] = (taken[3], taken[4]) if stem == "class_step" else out if isinstance(out, tuple) else (out,)
    first, *others = results.values()
    for other in others:
        for a, b in zip(first, other, strict=True):
            if a.dtype.is_floating_point:
                assert (a - b).abs().max() <= 4e-6 * a.abs().max() + 4e-6, stem
            else:
                assert (a == b).float().mean() >= 0.99  # an index may differ where two cosines round alike
