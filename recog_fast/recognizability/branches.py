"""The training-time modules of the recognizability index around one feature map, and the total loss (math.md 4)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .._arguments import are_whole, is_choice, is_number, is_whole
from ..ops import _checks
from ..reference import unit_rows
from .attention import PerceptibilityAttention
from .index import (
    IndexDiversionLoss,
    RecognizabilityRegressor,
    attention_loss,
    project_away,
    recognizability_index,
    regression_loss,
)
from .ui_center import unrecognizable_center


class RecognizabilityTerms(NamedTuple):
    """The terms of a batch, 0-dim, each a sum over the rows given (divide by their number over the whole step); true and predicted index (N,)."""

    total: Tensor  # () weighted: what is added to the classification loss
    regression: Tensor  # () detached
    diversion: Tensor  # () detached
    attention: Tensor  # () detached
    xi: Tensor  # (N,) detached, the true index
    predicted: Tensor  # (N,) detached, xi_hat


class RecognizabilityBranches(nn.Module):
    """Regression head, attention branch, index diversion and UI centre beside a backbone.

    L_total = L_cls + regression L_L1 + diversion L_ID + attention L_MSE, by default 5, 2 and 1. A weight of 0 switches
    its term off (the ablation table); the attention branch is not made without its term. State: parameters, `center` (D,)
    unit (zero before the first `refresh`), mu and sigma of the diversion.

    Args: feature_shape (C, h, w) of the last feature map; embedding_dim D; weights >= 0; tau; beta; dropout before the
    regression; elements: "mean" or "sum" of the attention error (printed form); seed of the N(0, 1) draws.
    Raises ValueError naming the argument. Source: Recognizability Index, eq. 8.
    """

    center: Tensor

    def __init__(
        self,
        feature_shape: tuple[int, int, int],
        embedding_dim: int,
        *,
        regression: float = 5.0,
        diversion: float = 2.0,
        attention: float = 1.0,
        tau: float = 2.0,
        beta: float = 0.75,
        dropout: float = 0.0,
        elements: str = "mean",
        seed: int = 0,
    ) -> None:
        super().__init__()
        where = "RecognizabilityBranches"
        for name, value in (("regression", regression), ("diversion", diversion), ("attention", attention)):
            _checks.expect(is_number(value, 0), where, f"{name} >= 0", repr(value))
        _checks.expect(is_choice(elements, ("mean", "sum")), where, "elements 'mean' or 'sum'", repr(elements))
        _checks.expect(is_number(beta, 0, above=True), where, "beta > 0", repr(beta))
        _checks.expect(is_number(tau, 0), where, "tau >= 0 and finite", repr(tau))
        _checks.expect(is_number(dropout, 0, 1, below=True), where, "dropout in [0, 1)", repr(dropout))
        _checks.expect(are_whole(feature_shape, 3, 1), where, "feature_shape (C, h, w) of integers >= 1", repr(feature_shape))
        _checks.expect(is_whole(embedding_dim, 1), where, "embedding_dim >= 1, an integer", repr(embedding_dim))
        _checks.expect(is_whole(seed, -(2**63), 2**64 - 1), where, "seed as an integer of 64 bits", repr(seed))
        channels, height, width = feature_shape
        self.regression, self.diversion, self.attention = float(regression), float(diversion), float(attention)
        self.beta, self.elements = float(beta), elements
        self.regressor = RecognizabilityRegressor(channels * height * width, dropout)
        self.diversion_loss = IndexDiversionLoss(tau, seed=seed)
        self.attend = PerceptibilityAttention(channels, (height, width), embedding_dim) if attention > 0 else None
        self.register_buffer("center", torch.zeros(embedding_dim))

    @property
    def ready(self) -> bool:
        """Whether there is a UI centre."""
        return bool(self.center.any())

    @torch.no_grad()
    def refresh(self, embeddings: Tensor, features: Tensor | None = None) -> None:
        """u^ from the embeddings (M, D) of unrecognizable faces; with their feature maps (M, C, h, w) also mu and sigma of the
        diversion, from the head's predictions for them (made in eval mode, without dropout)."""
        self.center.copy_(unrecognizable_center(embeddings)[0])
        if features is not None:
            training = self.regressor.training
            self.regressor.eval()
            self.diversion_loss.fit(self.regressor(features))
            self.regressor.train(training)

    def forward(self, features: Tensor) -> Tensor:
        """Quality xi_hat (N,) of feature maps (N, C, h, w): inference, which needs no UI centre."""
        predicted: Tensor = self.regressor(features)
        return predicted

    def losses(
        self,
        embeddings: Tensor,  # (N, D) un-normalised
        features: Tensor,  # (N, C, h, w)
        target_cosine: Tensor,  # (N,)
        nearest_cosine: Tensor,  # (N,)
    ) -> RecognizabilityTerms:
        """The three terms over labelled rows, summed. Gradients reach the branches and, through the feature map, the
        backbone; the target index and the projected embeddings are detached.

        Raises RuntimeError before the first `refresh`.
        """
        if not self.ready:
            raise RuntimeError(
                "RecognizabilityBranches: expected a UI centre, got none: call refresh(embeddings of unrecognizable faces)"
            )
        fixed = embeddings.detach().to(self.center.dtype)
        unit, _ = unit_rows(fixed)
        index = recognizability_index(target_cosine, nearest_cosine, unit @ self.center)
        predicted = self.regressor(features)
        index = index.to(predicted.dtype)
        zero = predicted.new_zeros(())
        l1 = regression_loss(predicted, index, self.beta, reduction="sum") if self.regression else zero
        away = self.diversion_loss(predicted, "sum") if self.diversion else zero
        mse = zero
        if self.attend is not None:
            attended = self.attend(features)
            target = project_away(fixed, self.center).to(attended)
            mse = attention_loss(attended, target, self.elements, reduction="sum")  # type: ignore[arg-type]
        total = self.regression * l1 + self.diversion * away + self.attention * mse
        return RecognizabilityTerms(total, l1.detach(), away.detach(), mse.detach(), index, predicted.detach())


class RecognizabilityModel(nn.Module):
    """Inference: images (N, 3, H, W) -> (embeddings (N, D), quality (N,)).

    backbone: any module with forward_features (images -> map) and embed (map -> embeddings), as recog_fast.models have;
    branches: `RecognizabilityBranches` trained with it. Raises TypeError where they are none; images and maps that do not fit raise the
    ValueError of the part that takes them. Source: Recognizability Index (math.md 4).
    """

    def __init__(self, backbone: nn.Module, branches: RecognizabilityBranches) -> None:
        super().__init__()
        for name, value, kind in (("backbone", backbone, nn.Module), ("branches", branches, RecognizabilityBranches)):
            if not isinstance(value, kind):
                raise TypeError(f"RecognizabilityModel: expected {name} as a {kind.__name__}, got {type(value).__name__}")
        self.backbone, self.branches = backbone, branches

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """One pass of the backbone gives both."""
        embeddings, features = self.backbone(images, return_features=True)
        return embeddings, self.branches(features)
