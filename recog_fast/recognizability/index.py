"""The recognizability index: its target, its losses and the head that predicts it (math.md 4)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._arguments import is_choice, is_number, is_whole
from ..ops import _checks
from .ers import unit_center

Reduction = Literal["mean", "sum", "none"]
_EPS = 1e-7


def recognizability_index(
    target_cosine: Tensor,  # (N,) <x^, P_y>
    nearest_cosine: Tensor,  # (N,) largest cosine to another class
    ui_cosine: Tensor,  # (N,) <x^, u^>
    detach: bool = True,
) -> Tensor:
    """xi = d_UI d_N / (d_P + 1e-7), (N,): d_P = 1 - c_y, d_N = 1 - max_{j != y} c_j, d_UI = 1 - <x^, u^>.

    Large where an image lies near its own class and far from the other classes and from unrecognizable faces. The first
    two cosines are `RowStats.target_cosine` and `.nearest_cosine` of the labelled rows: the sweep gives them for free.
    Distances are clamped to [0, 2] (a float32 cosine may exceed 1 by an ulp; a head of one class reports -2 for "none").
    detach: xi is a target, without gradient (the paper); False keeps the graph.

    Raises ValueError for shapes that differ. Source: Recognizability Index, eq. 2.
    """
    where = "recognizability_index"
    rows = _checks.expect_tensor(target_cosine, where, "target_cosine").numel()
    for name, value in (("target_cosine", target_cosine), ("nearest_cosine", nearest_cosine), ("ui_cosine", ui_cosine)):
        _checks.check_vector(_checks.expect_tensor(value, where, name), rows, where, name)
    d_p, d_n, d_ui = ((1 - c).clamp(0.0, 2.0) for c in (target_cosine, nearest_cosine, ui_cosine))
    index = d_ui * d_n / (d_p + _EPS)
    return index.detach() if detach else index


def _reduce(loss: Tensor, reduction: str, where: str) -> Tensor:
    """(N,) -> mean (0 of no rows), sum or itself."""
    _checks.expect(is_choice(reduction, ("mean", "sum", "none")), where, "reduction 'mean', 'sum' or 'none'", repr(reduction))
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / max(1, loss.numel())


def regression_loss(
    predicted: Tensor,  # (N,)
    index: Tensor,  # (N,)
    beta: float = 0.75,
    *,
    reduction: Reduction = "mean",
) -> Tensor:
    """Smooth L1 of predicted against true index: d^2 / (2 beta) where |d| < beta, |d| - beta / 2 beyond; 0 of no rows.

    Both (N,); reduction "none" gives (N,). Raises ValueError for shapes that differ or beta <= 0. Source: Recognizability Index, eq. 4.
    """
    where = "regression_loss"
    _checks.check_vector(_checks.expect_tensor(index, where, "index"), _checks.expect_tensor(predicted, where, "predicted").numel(), where, "index")
    _checks.expect(predicted.dim() == 1, where, "predicted of shape (N,)", f"shape {tuple(predicted.shape)}")
    _checks.expect(is_number(beta, 0, above=True), where, "beta > 0", repr(beta))
    return _reduce(F.smooth_l1_loss(predicted, index, beta=beta, reduction="none"), reduction, where)


class IndexDiversionLoss(nn.Module):
    """max(0, tau - (xi_hat - mu_UI) / sigma_UI): pushes predictions of recognizable faces away from those of unrecognizable ones.

    mu, sigma: buffers () float64, mean and unbiased deviation of `k` draws of N(0, 1) made once from `seed`, or of
    predictions for unrecognizable images (`fit`); part of state_dict.

    Raises ValueError for a negative or infinite tau and k < 2. Source: Recognizability Index, eq. 5.
    """

    mu: Tensor
    sigma: Tensor

    def __init__(self, tau: float = 2.0, k: int = 5000, seed: int = 0) -> None:
        super().__init__()
        _checks.expect(is_number(tau, 0), "IndexDiversionLoss", "tau >= 0 and finite", repr(tau))
        _checks.expect(is_whole(k, 2), "IndexDiversionLoss", "k >= 2 draws, an integer", repr(k))
        _checks.expect(is_whole(seed, -(2**63), 2**64 - 1), "IndexDiversionLoss", "seed as an integer of 64 bits", repr(seed))
        self.tau = float(tau)
        drawn = torch.randn(k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        self.register_buffer("mu", drawn.mean())
        self.register_buffer("sigma", drawn.std())

    @torch.no_grad()
    def fit(self, predicted: Tensor) -> None:
        """mu and sigma from the head's predictions (M,) for unrecognizable images, M >= 2; sigma is kept above 1e-6.

        Raises ValueError for fewer or non-finite predictions.
        """
        where = "IndexDiversionLoss.fit"
        values = predicted.detach().double().reshape(-1)
        _checks.expect(values.numel() >= 2, where, "at least two predictions", values.numel())
        _checks.expect(bool(torch.isfinite(values).all()), where, "finite predictions", "others")
        self.mu.copy_(values.mean())
        self.sigma.copy_(values.std().clamp_min(1e-6))

    def forward(self, predicted: Tensor, reduction: Reduction = "mean") -> Tensor:
        """predicted (N,) -> mean over rows (0 of none), "sum" or "none" (N,)."""
        where = "IndexDiversionLoss"
        _checks.expect(
            _checks.expect_tensor(predicted, where, "predicted").dim() == 1,
            where,
            "predicted of shape (N,)",
            tuple(predicted.shape),
        )
        return _reduce((self.tau - (predicted - self.mu) / self.sigma).clamp_min(0), reduction, where)

    def extra_repr(self) -> str:
        """tau, for print."""
        return f"tau={self.tau}"


def project_away(
    v: Tensor,  # (N, D) un-normalised embeddings
    center: Tensor,  # (D,)
) -> Tensor:
    """v' = v - <v, u^> u^ (N, D): what is left of v outside the direction of unrecognizable faces; u^ = center / |center|.

    Differentiable in v; as a target give it v.detach(). Raises ValueError naming the argument.
    Source: Recognizability Index, eq. 6.
    """
    where = "project_away"
    _checks.check_embeddings(v, where, "v")
    u = unit_center(center, v.shape[1], where).to(v)
    return v - (v @ u).unsqueeze(1) * u


def attention_loss(
    attended: Tensor,  # (N, D)
    projected: Tensor,  # (N, D)
    elements: Literal["mean", "sum"] = "mean",
    *,
    reduction: Reduction = "mean",
) -> Tensor:
    """Squared error between v_attn and v' of each row, averaged (or, as printed, summed: D times larger) over its elements.

    Both (N, D); reduction is over rows, "none" gives (N,). Raises ValueError for shapes that differ. Source: Recognizability Index, eq. 7.
    """
    where = "attention_loss"
    _checks.check_embeddings(attended, where, "attended")
    _checks.check_embeddings(projected, where, "projected")
    _checks.expect(
        attended.shape == projected.shape, where, f"projected of shape {tuple(attended.shape)}", tuple(projected.shape)
    )
    _checks.expect(is_choice(elements, ("mean", "sum")), where, "elements 'mean' or 'sum'", repr(elements))
    square = (attended - projected).square()
    return _reduce(square.mean(dim=1) if elements == "mean" else square.sum(dim=1), reduction, where)


class RecognizabilityRegressor(nn.Module):
    """flatten -> dropout -> Linear(features, 1): last feature map (N, C, h, w), C h w = features, -> xi_hat (N,).

    Computed in the weight's dtype whatever autocast says. Raises ValueError for features < 1 or a dropout outside [0, 1).
    Source: Recognizability Index, section 3.3.
    """

    def __init__(self, features: int, dropout: float = 0.0) -> None:
        super().__init__()
        _checks.expect(is_whole(features, 1), "RecognizabilityRegressor", "features >= 1, an integer", repr(features))
        _checks.expect(is_number(dropout, 0, 1, below=True), "RecognizabilityRegressor", "dropout in [0, 1)", repr(dropout))
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(features, 1)

    def forward(self, features: Tensor) -> Tensor:
        """(N, C, h, w) or (N, features) -> (N,)."""
        with torch.autocast(features.device.type, enabled=False):
            flat = torch.flatten(features, 1).to(self.fc.weight.dtype)
            expected = self.fc.in_features
            _checks.expect(
                flat.shape[1] == expected,
                "RecognizabilityRegressor",
                f"features of {expected} numbers a row",
                tuple(features.shape),
            )
            predicted: Tensor = self.fc(self.dropout(flat)).squeeze(1)
            return predicted
