"""State of AdaFace and CurricularFace: what moves it, what does not, and that it is saved."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
import torch
from golden import get_state, value_and_slope

from recog_fast.margins import AdaFace, CurricularFace, InterclassFilter

STATEFUL: dict[str, Any] = {"adaface": AdaFace, "curricular": CurricularFace}


@pytest.mark.parametrize("kind", STATEFUL)
def test_state_moves_only_by_labelled_rows_in_training_mode(kind: str) -> None:
    cosine, norms = torch.tensor([0.5, 0.1, -0.9]), torch.tensor([30.0, 60.0, 90.0])
    margin = STATEFUL[kind]()
    before = get_state(margin)
    margin.update(cosine, norms, torch.zeros(3, dtype=torch.bool))  # nobody labelled
    margin.update(cosine[:0], norms[:0], torch.zeros(0, dtype=torch.bool))  # empty batch
    margin(cosine, norms)  # a call never moves the state
    margin.eval()
    margin.update(cosine, norms, torch.ones(3, dtype=torch.bool))
    assert torch.equal(get_state(margin), before)
    margin.train()
    margin.update(cosine, norms, torch.tensor([True, True, False]))
    alone = STATEFUL[kind]()
    alone.update(cosine[:2], norms[:2], torch.ones(2, dtype=torch.bool))
    torch.testing.assert_close(get_state(margin), get_state(alone), rtol=0, atol=1e-15)
    assert not torch.equal(get_state(margin), before)


def test_adaface_statistics_by_hand() -> None:
    margin = AdaFace(t_alpha=0.5)
    margin.update(torch.zeros(3), torch.tensor([10.0, 30.0, 1e9]), torch.tensor([True, True, True]))
    clipped = torch.tensor([10.0, 30.0, 100.0], dtype=torch.float64)
    torch.testing.assert_close(margin.mean, 0.5 * clipped.mean() + 10.0)
    torch.testing.assert_close(margin.std, 0.5 * clipped.std() + 50.0)
    std = margin.std.clone()
    margin.update(torch.zeros(2), torch.tensor([10.0, 30.0]), torch.tensor([True, False]))
    assert torch.equal(margin.std, std) and float(margin.mean) == pytest.approx(
        0.5 * (0.5 * clipped.mean() + 10.0) + 5.0
    )


def test_adaface_leaves_a_non_finite_norm_out() -> None:
    margin, clean = AdaFace(), AdaFace()
    norms, everyone = torch.tensor([10.0, math.nan, 30.0, math.inf]), torch.ones(4, dtype=torch.bool)
    margin.update(torch.zeros(4), norms, everyone)
    clean.update(torch.zeros(2), torch.tensor([10.0, 30.0]), everyone[:2])
    torch.testing.assert_close(get_state(margin), get_state(clean))


def test_adaface_clamps_the_target_cosine_with_gradient_zero_beyond() -> None:
    cosine = torch.tensor([0.9995, 0.9985, -0.9995], dtype=torch.float64)
    norms = torch.full((3,), 20.0, dtype=torch.float64)
    value, slope = value_and_slope(AdaFace(), cosine, norms)
    assert slope[0] == 0.0 and slope[1] != 0.0 and slope[2] == 0.0
    torch.testing.assert_close(value[[0, 2]], torch.tensor([0.999 - 0.4, -0.999 - 0.4], dtype=torch.float64))


@pytest.mark.parametrize("kind", STATEFUL)
def test_backward_survives_a_later_update(kind: str) -> None:
    """Two micro-batches: the second one's update must not disturb the first one's graph."""
    margin = STATEFUL[kind]()
    cosine = torch.tensor([0.5, 0.1], requires_grad=True)
    norms, everyone = torch.tensor([30.0, 60.0]), torch.ones(2, dtype=torch.bool)
    _, expected = value_and_slope(margin, cosine.detach(), norms)
    value = margin(cosine, norms)
    margin.update(cosine.detach(), norms, everyone)
    value.sum().backward()
    assert torch.equal(cosine.grad, expected)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrap", [False, True], ids=["alone", "filtered"])
@pytest.mark.parametrize("kind", STATEFUL)
def test_state_dict_round_trip(kind: str, wrap: bool) -> None:
    if wrap and kind == "curricular":
        pytest.skip("curricular has a rule, so no filter goes around it")
    margin, fresh = ((InterclassFilter(STATEFUL[kind]()) if wrap else STATEFUL[kind]()) for _ in range(2))
    margin.update(torch.tensor([0.5, 0.1]), torch.tensor([30.0, 60.0]), torch.ones(2, dtype=torch.bool))
    file = io.BytesIO()
    torch.save(margin.state_dict(), file)
    file.seek(0)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(get_state(fresh), get_state(margin))
    assert all(buffer.dim() == 0 for buffer in fresh.buffers())
