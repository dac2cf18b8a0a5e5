"""Every public function with one bad argument at a time: a ValueError or TypeError, or a result; never an error from deep inside."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import recog_fast as rf
from recog_fast import evaluation
from recog_fast import recognizability as quality

G = torch.Generator().manual_seed(0)
X, W, Y = torch.randn(8, 4, generator=G), torch.randn(10, 4, generator=G), torch.arange(8)
UNIT, P = torch.nn.functional.normalize(X, dim=1), torch.nn.functional.normalize(W, dim=1)
SCORES, SAME = np.linspace(-1, 1, 24), np.arange(24) % 3 == 0
SIMILARITY, PAIRS = SCORES.reshape(6, 4), X.repeat(4, 1).numpy()
MATED = np.array([[True, False, False, False]] * 4 + [[False] * 4] * 2)
IDS, GALLERY = np.arange(6) % 3, np.arange(4) % 3

CASES: dict[Callable[..., Any], dict[str, Any]] = {
    rf.margin_softmax_loss: {"embeddings": X, "weight": W, "labels": Y},
    rf.unknown_rejection_loss: {"embeddings": X, "weight": W},
    rf.effective_prototypes: {"weight": W, "memory_rows": W, "strength": torch.ones(10)},
    rf.negative_logsumexp: {"unit_embeddings": UNIT, "prototypes": P, "labels": Y, "scale": 16.0},
    rf.center_sparsity: {"weight": W},
    quality.embedding_recognizability: {"embeddings": X, "center": X[0]},
    quality.pair_decision: {"scores": UNIT[:, 0], "e1": UNIT[:, 1], "e2": UNIT[:, 2]},
    quality.threshold_table: {"scores": torch.tensor(SCORES), "same": torch.tensor(SAME), "e1": torch.tensor(abs(SCORES)), "e2": torch.tensor(abs(SCORES))},
    quality.unrecognizable_center: {"embeddings": X},
    quality.cluster_labels: {"embeddings": X},
    quality.cluster_table: {"embeddings": X},
    quality.recognizability_index: {"target_cosine": UNIT[:, 0], "nearest_cosine": UNIT[:, 1], "ui_cosine": UNIT[:, 2]},
    quality.regression_loss: {"predicted": X[:, 0], "index": X[:, 1]},
    quality.attention_loss: {"attended": X, "projected": UNIT},
    quality.project_away: {"v": X, "center": UNIT[0]},
    evaluation.verification_accuracy: {"emb1": PAIRS, "emb2": PAIRS[::-1].copy(), "same": np.arange(32) % 2 == 0, "folds": 4},
    evaluation.verification_result: {"emb1": PAIRS, "emb2": PAIRS[::-1].copy(), "same": np.arange(32) % 2 == 0, "folds": 4, "fars": [0.1]},
    evaluation.roc_curve: {"scores": SCORES, "same": SAME},
    evaluation.tar_at_far: {"scores": SCORES, "same": SAME, "fars": [0.1]},
    evaluation.equal_error_rate: {"scores": SCORES, "same": SAME},
    evaluation.identification: {"similarity": SIMILARITY, "mated": MATED, "ranks": (1, 2), "fpirs": (0.1,)},
    evaluation.fpir_threshold: {"best": SCORES, "fpir": 0.1},
    evaluation.mean_average_precision: {"similarity": SIMILARITY, "query_ids": IDS, "gallery_ids": GALLERY},
    evaluation.cumulative_match: {"similarity": SIMILARITY, "query_ids": IDS, "gallery_ids": GALLERY, "ranks": (1, 2)},
    evaluation.template_embeddings: {"embeddings": X.numpy(), "template_ids": np.arange(8) // 2},
    evaluation.template_scores: {"ids": np.arange(8), "templates": UNIT.numpy(), "first": np.array([0, 1]), "second": np.array([2, 3])},
    evaluation.error_versus_reject: {"scores": SCORES, "same": SAME, "pair_quality": abs(SCORES), "fmr": 0.5, "reject": [0.0, 0.1]},
    evaluation.compare_qualities: {"scores": SCORES, "same": SAME, "pair_qualities": {"own": abs(SCORES)}, "fmr": 0.5, "reject": [0.0, 0.1]},
    evaluation.pair_minimum: {"quality": abs(SCORES), "first": np.arange(4), "second": np.arange(4, 8)},
    evaluation.erc_protocol: {"fmr": 0.1},
    evaluation.all_pairs: {"embeddings": X, "ids": Y // 2, "bins": 64},
    evaluation.search: {"probes": UNIT, "gallery": P, "k": 2},
    evaluation.subgroup_report: {"scores": SCORES, "same": SAME, "groups": ["a", "b"] * 12, "fars": [0.1]},
    evaluation.four_forms: {"embeddings": X, "mirrored": UNIT},
    evaluation.resize: {"image": np.zeros((4, 6, 3), np.uint8), "size": 3},
    evaluation.survface_identification: {"similarity": SIMILARITY, "mated": MATED},
    evaluation.survface_verification: {"scores": SCORES, "same": SAME},
    evaluation.tinyface_identification: {"probes": X, "probe_ids": np.arange(8) % 4, "gallery": P, "gallery_ids": np.arange(10) % 4},
    evaluation.tinyface_pairs: {"ids": np.arange(8) // 2, "impostors": 4},
    evaluation.to_input: {"images": np.zeros((2, 8, 8, 3), np.uint8)},
}  # fmt: skip
# Of files, of images and models, or a text of two booleans: their own tests.
OTHERS = set("backends load_checkpoint save_checkpoint class_activation embed_images evaluate_bin overlay pair_galleries png_data_uri post_processing require_plots robustness".split())
OTHERS |= set("scface strip write_report ytf".split())
# Only their truth is used; a margin is the user's own code, whose errors are its own.
ANY = set("cap detach fixed_threshold bgr renormalize check_labels return_stats skip_equal_index margin".split())
HOSTILE: list[Any] = [
    object(), None, "x", b"x", 1j, math.nan, math.inf, -1, 0, 10**30, [], {}, [[1], [1, 2]], True, torch.ones(()), torch.ones(2, 3), torch.ones(1, 2, 3),
    torch.zeros(0), torch.zeros(0, 4), torch.ones(8, 4, dtype=torch.complex64), torch.ones(8, 4, dtype=torch.bool), torch.full((8, 4), math.nan),
    torch.full((8,), -7), torch.ones(8, 4).to_sparse(), np.zeros((3, 3)), np.array(["a", "b"]), np.array([None]), np.full(24, np.nan), np.zeros(24, np.complex64),
    torch.float16, rf.ArcFace, len,
]  # fmt: skip


def complaint(function: Callable[..., Any], arguments: dict[str, Any]) -> str | None:
    """What is wrong with how one call ends."""
    try:
        function(**arguments)
    except (ValueError, TypeError) as error:
        said = str(error)
        return None if "expected" in said and "got" in said else f"{type(error).__name__}: {said:.110}"
    except Exception as error:
        return f"{type(error).__name__}: {error!s:.110}"
    return None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("function", CASES, ids=lambda f: f.__name__)
def test_bad_arguments_are_named(function: Callable[..., Any]) -> None:
    function(**CASES[function])
    wrong = []
    for name in [n for n in inspect.signature(function).parameters if n not in ANY]:
        for value in HOSTILE:
            if (said := complaint(function, {**CASES[function], name: value})) is not None:
                wrong.append(f"{name}={value!r:.40}: {said}")
    assert not wrong, "\n".join(wrong)


def test_every_public_function_is_looked_at() -> None:
    functions = {f for m in (rf, quality, evaluation) for f in (getattr(m, name) for name in m.__all__) if inspect.isfunction(f)}
    assert {f.__name__ for f in functions} - {f.__name__ for f in CASES} - OTHERS == set()
