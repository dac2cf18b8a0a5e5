"""pytorch-metric-learning's classification losses: the same names, arguments, W and numbers, without an N x C tensor.

    from recog_fast.compat.pml import ArcFaceLoss          # instead of pytorch_metric_learning.losses
    loss_func = ArcFaceLoss(num_classes=100_000, embedding_size=512, margin=28.6, scale=64)
    loss_func(embeddings, labels).backward()               # loss_func.W (D, C) has its gradient

margin is in degrees where it is there (ArcFace), W is (D, C) and drawn from N(0, 1), state dicts interchange. W stays
float32 where pytorch-metric-learning casts it to the embeddings' type. Miners, reducers, regularizers and reference
embeddings raise. Label -1 (unlabelled: loss 0, not counted) is an addition. SphereFaceLoss and LargeMarginSoftmaxLoss
scale logits by norms, which these kernels do not: they are not here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recog_fast._arguments import is_number, is_whole
from recog_fast.heads import MarginHead
from recog_fast.losses import margin_softmax_loss
from recog_fast.margins import ArcFace, CosFace, Softmax

__all__ = ["ArcFaceLoss", "CosFaceLoss", "NormalizedSoftmaxLoss", "SubCenterArcFaceLoss"]


class _MarginLoss(nn.Module):
    """W (D, C K) over storage in the kernels' own order (C, K, D): its transpose costs nothing."""

    W: nn.Parameter

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: Callable[[Tensor, Tensor], Tensor],
        scale: float,
        sub_centers: int = 1,
        weight_init_func: Callable[[Tensor], Any] | None = None,
        **unsupported: Any,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        given = sorted(key for key, value in unsupported.items() if value is not None)
        if given:
            raise TypeError(
                f"{name}: expected no {', '.join(given)}: only weight_init_func is supported beside sizes, margin, scale"
            )
        for argument, value in (
            ("num_classes", num_classes),
            ("embedding_size", embedding_size),
            ("sub_centers", sub_centers),
        ):
            if not is_whole(value, 1):
                raise ValueError(f"{name}: expected {argument} >= 1, got {value!r}")
        if not is_number(scale, 0, above=True):
            raise ValueError(f"{name}: expected a positive scale, got {scale!r}")
        self.num_classes, self.embedding_size, self.sub_centers = num_classes, embedding_size, sub_centers
        self.scale, self._margin = float(scale), margin
        # Drawn in pytorch-metric-learning's order, so that one seed gives one W in both.
        drawn = torch.empty(embedding_size, num_classes * sub_centers)
        (nn.init.normal_ if weight_init_func is None else weight_init_func)(drawn)
        self.W = nn.Parameter(drawn.t().contiguous().t())

    def _weight(self) -> Tensor:
        """(C, D) or (C, K, D), a view of W."""
        rows = self.W.t()
        return rows if self.sub_centers == 1 else rows.unflatten(0, (self.num_classes, self.sub_centers))

    def forward(
        self,
        embeddings: Tensor,  # (N, D)
        labels: Tensor,  # (N,)
        indices_tuple: Any = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor:
        """The mean over the batch of softmax cross entropy with this margin; differentiable in embeddings and W.

        Raises ValueError for miners' tuples, reference embeddings, and what `margin_softmax_loss` refuses.
        """
        for argument, value in (("indices_tuple", indices_tuple), ("ref_emb", ref_emb), ("ref_labels", ref_labels)):
            if value is not None:
                raise ValueError(f"{type(self).__name__}: expected {argument}=None, got {type(value).__name__}")
        return margin_softmax_loss(embeddings, self._weight(), labels, margin=self._margin, scale=self.scale)

    def get_logits(self, embeddings: Tensor) -> Tensor:
        """scale * cosine without margin, (N, C): materialised, for inference over few classes."""
        unit = F.normalize(embeddings, dim=1)
        cosine = unit @ F.normalize(self.W.to(unit.dtype), dim=0)
        logits: Tensor = self.scale * cosine.unflatten(1, (self.num_classes, self.sub_centers)).amax(dim=2)
        return logits

    def to_head(self, **options: Any) -> MarginHead:
        """A `MarginHead` with this margin, scale and a copy of W, for `HeadSGD`, memories, sampling; options: the head's."""
        head = MarginHead(
            self.num_classes,
            self.embedding_size,
            margin=self._margin,
            scale=self.scale,
            subcenters=self.sub_centers,
            **options,
        )
        with torch.no_grad():
            head.weight.copy_(self._weight())
        return head.to(self.W.device)


def _checked(name: str, margin: float, low: float, high: float) -> float:
    if not is_number(margin, low, high):
        raise ValueError(f"{name}: expected margin in [{low}, {high}], got {margin!r}")
    return float(margin)


def _arcface(name: str, degrees: float) -> ArcFace:
    return ArcFace(math.radians(_checked(name, degrees, 0, 180)))


class ArcFaceLoss(_MarginLoss):
    """ArcFace: target logit scale * cos(theta + m), m = radians(margin); past theta = pi - m: scale * (cos theta - m sin m).

    margin: degrees. embeddings (N, D), labels (N,) -> the mean loss, 0-dim; W (D, C) float32.
    Raises ValueError for sizes below 1, a margin outside [0, 180], a scale that is not positive; TypeError for options other than
    weight_init_func. Source: pytorch-metric-learning's losses.ArcFaceLoss; Deng et al. 2019.
    """

    def __init__(
        self, num_classes: int, embedding_size: int, margin: float = 28.6, scale: float = 64, **options: Any
    ) -> None:
        super().__init__(num_classes, embedding_size, _arcface("ArcFaceLoss", margin), scale, **options)
        self.margin = math.radians(margin)


class CosFaceLoss(_MarginLoss):
    """CosFace: target logit scale * (cos theta - margin).

    embeddings (N, D), labels (N,) -> the mean loss, 0-dim; W (D, C) float32.
    Raises ValueError for sizes below 1, a margin outside [-2, 2] or a scale that is not positive; TypeError for options other than
    weight_init_func. Source: pytorch-metric-learning's losses.CosFaceLoss; Wang et al. 2018.
    """

    def __init__(
        self, num_classes: int, embedding_size: int, margin: float = 0.35, scale: float = 64, **options: Any
    ) -> None:
        super().__init__(num_classes, embedding_size, CosFace(_checked("CosFaceLoss", margin, -2, 2)), scale, **options)
        self.margin = margin


class NormalizedSoftmaxLoss(_MarginLoss):
    """NormFace: softmax over cosine / temperature.

    embeddings (N, D), labels (N,) -> the mean loss, 0-dim; W (D, C) float32.
    Raises ValueError for sizes below 1 or a temperature that is not positive; TypeError for options other than weight_init_func.
    Source: pytorch-metric-learning's losses.NormalizedSoftmaxLoss; Wang et al., NormFace, 2017.
    """

    def __init__(self, num_classes: int, embedding_size: int, temperature: float = 0.05, **options: Any) -> None:
        if not is_number(temperature, 0, above=True):
            raise ValueError(f"NormalizedSoftmaxLoss: expected a positive temperature, got {temperature!r}")
        super().__init__(num_classes, embedding_size, Softmax(), 1.0 / temperature, **options)
        self.temperature = temperature


class SubCenterArcFaceLoss(_MarginLoss):
    """Sub-center ArcFace (Deng et al. 2020): a class's cosine is the largest of its `sub_centers`; column
    label * sub_centers + k of W (D, C K) is sub-center k. margin: degrees.

    embeddings (N, D), labels (N,) -> the mean loss, 0-dim. Raises ValueError and TypeError as `ArcFaceLoss`, and for sub_centers
    below 1. Source: pytorch-metric-learning's losses.SubCenterArcFaceLoss.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: float = 28.6,
        scale: float = 64,
        sub_centers: int = 3,
        **options: Any,
    ) -> None:
        super().__init__(num_classes, embedding_size, _arcface("SubCenterArcFaceLoss", margin), scale, sub_centers, **options)
        self.margin = math.radians(margin)

    @torch.no_grad()
    def get_outliers(
        self, embeddings: Tensor, labels: Tensor, threshold: float = 75, return_dominant_centers: bool = True
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Rows (sorted by class) farther than `threshold` degrees from the dominant sub-center of their class, the one that
        is nearest to most of its rows; and those centers (D, C), 0 for classes without rows."""
        centers = (
            F.normalize(self._weight(), dim=-1) if self.sub_centers > 1 else F.normalize(self.W.t(), dim=1)[:, None]
        )
        cosine = torch.einsum("nd,nkd->nk", F.normalize(embeddings.to(self.W.dtype), dim=1), centers[labels])
        votes = torch.zeros(self.num_classes, self.sub_centers, dtype=torch.int64, device=labels.device)
        votes.index_put_((labels, cosine.argmax(dim=1)), torch.ones_like(labels), accumulate=True)
        dominant = votes.argmax(dim=1)
        far = cosine.gather(1, dominant[labels][:, None])[:, 0] < math.cos(math.radians(threshold))
        order = torch.sort(labels, stable=True).indices
        outliers = order[far[order]]
        if not return_dominant_centers:
            return outliers
        raw = self.W.t().unflatten(0, (self.num_classes, self.sub_centers))
        chosen = raw[torch.arange(self.num_classes, device=raw.device), dominant]
        return outliers, (chosen * (votes.sum(dim=1) > 0)[:, None]).t()
