"""Loads the golden cases: which there are, what one holds, and the margin it names.

    @pytest.mark.parametrize("name", cases("margin_softmax", "n1"))
    def test_it(name): case = load(name); margin = build_margin(case.kwargs, case); case["in_X"] ...

Cases are found by looking at the folder, so others of the same kind work too. Where the folder is absent, `cases` gives
one skipped case that states the reason.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from paths import golden_dir
from torch import Tensor

from recog_fast import margins

# golden "mode" of arcface and magface -> (fallback, gradient)
MODES = {
    "raw": ("none", "exact"),
    "ste": ("none", "straight_through"),
    "linear": ("linear", "exact"),
    "easy": ("easy", "exact"),
    "keep": ("keep", "exact"),
    "clip": ("clip", "exact"),
}


@dataclass(frozen=True)
class Case:
    """One golden case: `case["in_X"]` is a tensor, float64 or int64 (bool stays bool)."""

    name: str
    op: str
    kwargs: dict[str, Any]
    tags: tuple[str, ...]
    arrays: dict[str, Tensor]

    def __getitem__(self, key: str) -> Tensor:
        """A copy of one array, so no test can change what another reads."""
        return self.arrays[key].clone()

    def __contains__(self, key: object) -> bool:
        return key in self.arrays

    def get(self, key: str, default: Tensor | None = None) -> Tensor | None:
        """One array, or `default` where the case has none of that name."""
        return self.arrays[key].clone() if key in self.arrays else default

    def keys(self, prefix: str = "") -> list[str]:
        """Names of the arrays that start with `prefix`."""
        return [key for key in self.arrays if key.startswith(prefix)]


@functools.cache
def _index() -> dict[str, tuple[str, tuple[str, ...]]]:
    """name -> (op, tags) of every case, in the order of names; raises pytest's Skipped where there is no folder."""
    found = {}
    for path in sorted(golden_dir().glob("*.npz")):
        with np.load(path, allow_pickle=False) as arrays:
            meta = _meta(path, arrays)
        found[path.stem] = (meta["op"], tuple(meta.get("tags", ())))
    return found


def _meta(path: Path, arrays: Any) -> dict[str, Any]:
    meta: dict[str, Any] = json.loads(str(arrays["meta"]))
    if "op" not in meta or "kwargs" not in meta:
        raise ValueError(f"{path.name}: expected meta with op and kwargs, got {sorted(meta)}")
    return meta


def cases(op: str, *tags: str, without: tuple[str, ...] = ()) -> list[Any]:
    """For `pytest.mark.parametrize`: the names of the cases of `op` with every tag of `tags` and none of `without`.

    Never fails at collection: without golden data, or without a case that fits, it gives one skipped parameter.
    """
    try:
        names = [
            name
            for name, (its_op, its_tags) in _index().items()
            if its_op == op and set(tags) <= set(its_tags) and not set(without) & set(its_tags)
        ]
        reason = f"no golden case of {op} with tags {tags} and without {without}"
    except pytest.skip.Exception as absent:
        names, reason = [], str(absent)
    if not names:
        return [pytest.param("absent", marks=pytest.mark.skip(reason=reason))]
    return [pytest.param(name, id=name.removeprefix(f"{op}__")) for name in names]


@functools.lru_cache(maxsize=256)
def load(name: str) -> Case:
    """The case of that name (file name without `.npz`); skips the test where golden data is absent."""
    path = golden_dir() / f"{name}.npz"
    with np.load(path, allow_pickle=False) as arrays:
        meta = _meta(path, arrays)
        tensors = {key: torch.from_numpy(np.array(arrays[key])) for key in arrays.files if key != "meta"}
    return Case(name, meta["op"], meta["kwargs"], tuple(meta.get("tags", ())), tensors)


def build_margin(kwargs: dict[str, Any], case: Case | None = None) -> Any:
    """The margin that golden `kwargs` (margin, params, filter_thr) name, in the state `case["in_state"]`."""
    params = dict(kwargs.get("params") or {})
    name = kwargs["margin"]
    margin = _BUILDERS[name](params)
    state = case.get("in_state") if case is not None else None
    if state is not None:
        set_state(margin, state)
    threshold = kwargs.get("filter_thr") or 0.0
    return margins.InterclassFilter(margin, threshold) if threshold > 0.0 else margin


def set_state(margin: Any, state: Tensor) -> None:
    """Write a golden state: (mean, std) of AdaFace, t of CurricularFace."""
    if isinstance(margin, margins.AdaFace):
        margin.mean.copy_(state[0])
        margin.std.copy_(state[1])
    else:
        margin.t.copy_(state.reshape(()))


def get_state(margin: Any) -> Tensor:
    """A copy of the state of AdaFace or CurricularFace (or a filter around one) as golden files write it, float64."""
    inner = getattr(margin, "margin", margin)
    if isinstance(inner, margins.AdaFace):
        return torch.stack([inner.mean, inner.std]).double()
    if isinstance(inner, margins.CurricularFace):
        return inner.t.double().clone()
    raise TypeError(f"get_state: expected a margin with state, got {inner!r}")


def value_and_slope(margin: Any, cosine: Tensor, norms: Tensor) -> tuple[Tensor, Tensor]:
    """(phi, d phi / d c) of a margin, (N,) each, detached."""
    cosine = cosine.detach().clone().requires_grad_()
    value = margin(cosine, norms)
    (slope,) = torch.autograd.grad(value.sum(), cosine)
    return value.detach(), slope


def _arcface(params: dict[str, Any]) -> Any:
    fallback, gradient = MODES[params.pop("mode", "raw")]
    return margins.ArcFace(params.pop("m", 0.5), fallback=fallback, gradient=gradient, **params)  # type: ignore[arg-type]


def _magface(params: dict[str, Any]) -> Any:
    fallback, _ = MODES[params.pop("mode", "easy")]
    # magface cases leave the penalty out; mag_reg has it.
    return margins.MagFace(fallback=fallback, **{"lambda_g": 0.0, **params})  # type: ignore[arg-type]


def _mv(kind: str, params: dict[str, Any]) -> Any:
    return margins.MVSoftmax(kind, params.pop("m", 0.5), params.pop("t", 0.2), **params)  # type: ignore[arg-type]


_BUILDERS: dict[str, Any] = {
    "softmax": lambda p: margins.Softmax(**p),
    "cosface": lambda p: margins.CosFace(p.pop("m", 0.5), **p),
    "arcface": _arcface,
    "combined": lambda p: margins.CombinedMargin(p.pop("m1", 1.0), p.pop("m2", 0.0), p.pop("m3", 0.0), **p),
    "sphereface": lambda p: margins.SphereFace(p.pop("m", 4), p.pop("lam", 0.0), **p),
    "magface": _magface,
    "adaface": lambda p: margins.AdaFace(**p),
    "curricular": lambda p: margins.CurricularFace(p.pop("m", 0.5), p.pop("momentum", 0.99), **p),
    "mv_am": lambda p: _mv("am", p),
    "mv_arc": lambda p: _mv("arc", p),
    "circle": lambda p: margins.CircleMargin(**p),
}
