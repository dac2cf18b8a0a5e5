"""Margins refuse bad arguments by name, value and expectation."""

from __future__ import annotations

import math
from typing import Any

import pytest

from recog_fast.margins import (
    AdaFace,
    ArcFace,
    CircleMargin,
    CombinedMargin,
    CosFace,
    CurricularFace,
    InterclassFilter,
    MagFace,
    MVSoftmax,
    SphereFace,
)

BAD: list[tuple[Any, str]] = [
    (lambda: CosFace(3.0), r"CosFace: expected m in \[-2, 2\], got 3.0"),
    (lambda: SphereFace(0.5), r"SphereFace: expected m in \[1, 64\], got 0.5"),
    (lambda: SphereFace(4, -1.0), r"SphereFace: expected lam in \[0, inf\), got -1.0"),
    (lambda: ArcFace(28.6), r"ArcFace: expected m in \[0, 3.14159\], got 28.6"),
    (lambda: ArcFace(math.nan), "ArcFace: expected m in .*, got nan"),
    (lambda: ArcFace(fallback="hard"), "ArcFace: expected fallback one of linear, easy, keep, clip, none, got 'hard'"),  # type: ignore[arg-type]
    (lambda: ArcFace(gradient="ste"), "ArcFace: expected gradient one of exact, straight_through, got 'ste'"),  # type: ignore[arg-type]
    (lambda: CombinedMargin(0.0, 0.1, 0.1), r"CombinedMargin: expected m1 in \(0, 64\], got 0.0"),
    (lambda: CombinedMargin(1.0, 9.0, 0.1), "CombinedMargin: expected m2 in .*, got 9.0"),
    (lambda: CombinedMargin(1.0, 0.1, math.inf), "CombinedMargin: expected m3 in .*, got inf"),
    (lambda: MagFace(la=0.0), r"MagFace: expected la in \(0, inf\), got 0.0"),
    (lambda: MagFace(la=110.0), r"MagFace: expected ua in \(110, inf\), got 110.0"),
    (lambda: MagFace(um=0.1), "MagFace: expected um in .*, got 0.1"),
    (lambda: MagFace(lambda_g=-1.0), "MagFace: expected lambda_g in .*, got -1.0"),
    (lambda: MagFace(fallback="x"), "MagFace: expected fallback one of"),  # type: ignore[arg-type]
    (lambda: AdaFace(m=-0.1), "AdaFace: expected m in .*, got -0.1"),
    (lambda: AdaFace(h=-0.1), "AdaFace: expected h in .*, got -0.1"),
    (lambda: AdaFace(t_alpha=1.5), r"AdaFace: expected t_alpha in \[0, 1\], got 1.5"),
    (lambda: AdaFace(eps=0.0), r"AdaFace: expected eps in \(0, 0.5\], got 0.0"),
    (lambda: CurricularFace(m=4.0), "CurricularFace: expected m in .*, got 4.0"),
    (lambda: CurricularFace(momentum=-0.5), "CurricularFace: expected momentum in .*, got -0.5"),
    (lambda: MVSoftmax("arcface"), "MVSoftmax: expected kind one of arc, am, got 'arcface'"),  # type: ignore[arg-type]
    (lambda: MVSoftmax("am", 2.5), r"MVSoftmax: expected m in \[0, 2\], got 2.5"),
    (lambda: MVSoftmax(t=-0.2), "MVSoftmax: expected t in .*, got -0.2"),
    (lambda: CircleMargin(1.5), r"CircleMargin: expected m in \[0, 1\], got 1.5"),
    (lambda: InterclassFilter(CosFace(), 1.5), r"InterclassFilter: expected threshold in \[-1, 1\], got 1.5"),
]


@pytest.mark.parametrize(("build", "message"), BAD, ids=[message.split(",")[0] for _, message in BAD])
def test_bad_values_are_named(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_wrong_types_are_named() -> None:
    with pytest.raises(TypeError, match="ArcFace: expected m to be a number"):
        ArcFace("0.5")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="CosFace: expected m to be a number"):
        CosFace(True)
    with pytest.raises(TypeError, match="InterclassFilter: expected margin callable"):
        InterclassFilter(0.4)  # type: ignore[arg-type]
