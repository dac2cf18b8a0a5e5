"""Bad arguments of public constructors: a ValueError or TypeError that names the class, the argument and what was expected,
never an error from deep inside."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import recog_fast as rf
from recog_fast import data, evaluation, models
from recog_fast import recognizability as quality
from recog_fast.compat import insightface, pml


class Images:
    """The least a labelled dataset is."""

    num_classes, labels, paths = 2, np.array([0, 1]), ("a", "b")

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Any:
        return np.zeros((4, 4, 3), np.uint8), 0


def _head() -> rf.MarginHead:
    return rf.MarginHead(4, 3)


def _branches() -> quality.RecognizabilityBranches:
    return quality.RecognizabilityBranches((8, 2, 2), 4)


_CASES: list[tuple[Callable[..., Any], Callable[[], dict[str, Any]]]] = [
    (rf.AdaFace, dict), (rf.ArcFace, dict), (rf.CircleMargin, dict), (rf.CosFace, dict), (rf.CurricularFace, dict), (rf.MVSoftmax, dict),
    (rf.MagFace, lambda: {"um": 3.0}), (rf.SphereFace, dict), (rf.VPL, dict), (rf.QAFace, dict), (rf.CombinedMargin, lambda: {"m1": 1.0, "m2": 0.5, "m3": 0.0}),
    (rf.InterclassFilter, lambda: {"margin": rf.ArcFace()}), (rf.HeadSGD, lambda: {"head": _head(), "lr": 0.1}),
    (rf.MarginHead, lambda: {"num_classes": 4, "embedding_dim": 3}), (rf.MomentumEncoder, lambda: {"backbone": torch.nn.Linear(2, 2)}),
    (rf.PrototypeMemory, lambda: {"num_classes": 4, "embedding_dim": 3, "policy": rf.VPL()}), (rf.NegativeRule, lambda: {"above": (0.0, 1.0, 0.0, 0.0, 1.0)}),
    (quality.IndexDiversionLoss, dict), (quality.RecognizabilityRegressor, lambda: {"features": 8}),
    (quality.PerceptibilityAttention, lambda: {"channels": 16, "spatial": 2, "embedding_dim": 4}),
    (quality.RecognizabilityBranches, lambda: {"feature_shape": (8, 2, 2), "embedding_dim": 4}),
    (quality.RecognizabilityModel, lambda: {"backbone": models.TinyNet(embedding_dim=4, input_size=32, widths=(2, 2, 2, 8)), "branches": _branches()}),
    (models.IResNet, lambda: {"depth": 18, "embedding_dim": 4, "input_size": 16}), (models.MobileFaceNet, lambda: {"embedding_dim": 4, "input_size": 16}),
    (models.MobileNetV1, lambda: {"embedding_dim": 4, "input_size": 16}), (models.MobileNetV2, lambda: {"embedding_dim": 4, "input_size": 16}),
    (models.TinyNet, lambda: {"embedding_dim": 4, "input_size": 16}), (models.Preprocessing, dict),
    (data.Augmentation, dict), (data.Augmented, lambda: {"dataset": Images()}), (data.Resized, lambda: {"dataset": Images(), "size": 8}),
    (data.MadeNames, lambda: {"length": 3, "name": str}),
    (data.SkipCorrupt, lambda: {"dataset": Images()}), (data.MixedDataset, lambda: {"datasets": [Images()]}),
    (data.ResumableBatches, lambda: {"length": 10, "batch_size": 2}), (data.StreamBatches, lambda: {"lengths": [10], "counts": [2]}),
    (data.SyntheticIdentities, dict), (evaluation.ScoreHistograms, dict),
    (pml.ArcFaceLoss, lambda: {"num_classes": 4, "embedding_size": 3}), (pml.CosFaceLoss, lambda: {"num_classes": 4, "embedding_size": 3}),
    (pml.NormalizedSoftmaxLoss, lambda: {"num_classes": 4, "embedding_size": 3}), (pml.SubCenterArcFaceLoss, lambda: {"num_classes": 4, "embedding_size": 3}),
    (insightface.CombinedMarginLoss, lambda: {"s": 64.0, "m1": 1.0, "m2": 0.5, "m3": 0.0}),
    (insightface.PartialFC_V2, lambda: {"margin_loss": insightface.CombinedMarginLoss(64.0, 1.0, 0.5, 0.0), "embedding_size": 3, "num_classes": 4}),
]  # fmt: skip
# Nothing takes these whatever the argument; what a number may be is in the second list.
_NEVER = [object(), 1j, b"x"]
_NUMBERS = [math.nan, math.inf, -math.inf, -1, 0, 2.5, "x", None, [], {}, torch.ones(2), np.zeros(3)]
# Only their truth is used, or they are handed to torch.distributed.
_ANY = {"easy", "ddp_average", "nesterov", "maximize", "literal", "share_classes", "drop_last", "fp16", "group", "options"}


@pytest.mark.parametrize(("make", "arguments"), _CASES, ids=[make.__name__ for make, _ in _CASES])
def test_bad_arguments_are_named(make: Any, arguments: Callable[[], dict[str, Any]]) -> None:
    assert make(**arguments()) is not None, "the good arguments are"
    wrong = []
    for name in inspect.signature(make).parameters:
        for value in [] if name in _ANY else [*_NEVER, *_NUMBERS]:
            try:
                make(**{**arguments(), name: value})
            except (ValueError, TypeError) as error:
                said = str(error)
                if not (make.__name__ in said and name in said and "expected" in said and "got" in said):
                    wrong.append(f"{name}={value!r:.40}: {type(error).__name__}: {said:.120}")
            except Exception as error:
                wrong.append(f"{name}={value!r:.40}: {type(error).__name__}: {error!s:.120}")
            else:
                if any(value is never for never in _NEVER):
                    wrong.append(f"{name}={value!r:.40} was taken")
    assert not wrong, "\n".join(wrong)


# Results, which the library makes itself; readers of files, whose errors name the file; what only others derive from.
_OTHERS = set(
    "RowStats Softmax ClusterRow RecognizabilityTerms ThresholdRow Backbone LoadReport ModelCard OnnxModel CorruptImage DataReport FolderDataset ListDataset "
    "RecordDataset TarDataset ZipDataset Gallery GalleryItem GallerySearch QualityComparison SubgroupReport VerificationResult".split()
)


def test_every_public_class_is_looked_at() -> None:
    public = {
        name
        for module in (rf, quality, models, data, evaluation, pml, insightface)
        for name in module.__all__
        if isinstance(getattr(module, name), type) and not name.endswith("Error")
    }
    assert public - {make.__name__ for make, _ in _CASES} - _OTHERS == set()
