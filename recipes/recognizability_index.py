"""The learned recognizability index (RI) while fine-tuning MobileFaceNet on LFW, against ArcFace fine-tuning, paired by seed.

L = L_cls + 5 L_L1 + 2 L_ID + L_MSE (math.md 4); the UI centre is refreshed every epoch from the 8x8 training images;
gradients of the network and of the RI modules are clipped separately.
"""

from __future__ import annotations

import sys
from itertools import chain

import numpy as np
import torch
from torch import Tensor, nn

import recog_fast as rf
from recipes import fold5, lfw
from recipes.common import Gate, Outcome, main, progress
from recog_fast import recognizability as ri
from recog_fast.evaluation import compare_qualities, pair_minimum
from recog_fast.evaluation.figures import rank_correlation
from recog_fast.training.schedules import polynomial_smooth


def ui_center(tail: lfw.Tail, faces: lfw.Faces, count: int = 1000) -> Tensor:
    """(128,) from 8x8 training images, in eval mode."""
    training = tail.training
    tail.eval()
    rows = torch.from_numpy(lfw.embed(tail, faces.maps[2:, :count])[0]).float()
    tail.train(training)
    center: Tensor = ri.unrecognizable_center(rows)[0]
    return center


def fine_tune(faces: lfw.Faces, settings: lfw.Settings) -> tuple[lfw.Tail, nn.Module]:
    """(network, regression head); weights, order and conditions as `lfw.fine_tune` of the same seed has them."""
    torch.manual_seed(settings.seed)
    tail, classes = lfw.Tail(lfw.network()), int(faces.people.max()) + 1
    torch.manual_seed(settings.seed)
    head = rf.MarginHead(classes, 128, margin=rf.ArcFace(settings.margin), scale=settings.scale)
    regressor, attention = ri.RecognizabilityRegressor(512 * 49, 0.0), ri.PerceptibilityAttention(512, 7, 128)
    diversion = ri.IndexDiversionLoss()
    branches = [*regressor.parameters(), *attention.parameters()]
    first = torch.optim.SGD(chain(tail.parameters(), branches), lr=settings.lr, momentum=0.9, weight_decay=5e-4)
    second = rf.HeadSGD(head, lr=settings.head_lr, momentum=0.9, weight_decay=5e-4)
    per_epoch = len(faces.people) // settings.batch
    total = settings.epochs * per_epoch
    for module in (tail, head, regressor, attention):
        module.train()
    center = ui_center(tail, faces)
    for step, (maps, labels) in enumerate(lfw.batches(faces, settings)):
        if step and step % per_epoch == 0:
            center = ui_center(tail, faces)
        share = polynomial_smooth(step, base=1.0, warmup=total // 10, total=total)
        for optimizer, lr in ((first, settings.lr), (second, settings.head_lr)):
            optimizer.param_groups[0]["lr"] = lr * share
            optimizer.zero_grad()
        features = tail.forward_features(maps)
        embeddings = tail.embed(features)
        loss, stats = head(embeddings, labels, return_stats=True)
        fixed = embeddings.detach()
        index = ri.recognizability_index(
            stats.target_cosine, stats.nearest_cosine, nn.functional.normalize(fixed, dim=1) @ center
        )
        predicted = regressor(features)
        pooled = nn.functional.mse_loss(attention(features), ri.project_away(fixed, center))
        (loss + 5 * ri.regression_loss(predicted, index) + 2 * diversion(predicted) + pooled).backward()
        nn.utils.clip_grad_norm_(tail.parameters(), 5.0)
        nn.utils.clip_grad_norm_(branches, 5.0)
        first.step()
        second.step()
    return tail.eval(), regressor.eval()


def quality(tail: lfw.Tail, regressor: nn.Module, maps: lfw.Maps) -> np.ndarray:
    """(3, M) predicted index of the three conditions."""
    found = []
    with torch.inference_mode():
        for condition in maps:
            parts = [
                regressor(tail.forward_features(torch.from_numpy(condition[i : i + 256].astype(np.float32))))
                for i in range(0, len(condition), 256)
            ]
            found.append(torch.cat(parts).double().numpy())
    return np.stack(found)


def compared(seed: int, rows: np.ndarray, qualities: dict[str, np.ndarray]) -> dict[str, float]:
    """FNMR at FMR 1e-2, re-estimated, at 0 and 60 % of pairs rejected, on the mix .55 / .2 / .25 of fold 5."""
    first, second, same = fold5.pairs()
    level = np.random.default_rng(seed).choice(3, rows.shape[1], p=fold5.MIX)
    images = np.arange(rows.shape[1])
    x = fold5.unit(rows[level, images])
    found = compare_qualities(
        (x @ x.T)[first, second], same, {name: pair_minimum(q[level, images], first, second) for name, q in qualities.items()},
        1e-2, fixed_threshold=False, reject=[0.0, 0.6], random_seed=seed,
    )  # fmt: skip
    return {"FNMR, all pairs": found.curves["RI"][0]} | {
        f"FNMR, 60 % rejected, {name}": float(curve[1]) for name, curve in found.curves.items()
    }


def run(seeds: list[int]) -> Outcome:
    """Gates: rho >= .7, FNMR <= .35 at 60 % and below ERS of the same network; recognition within 4 points of ArcFace."""
    outcome = Outcome(
        "recognizability_index", "RI's learned quality (LFW fine-tuning)", seeds,
        gates=[
            Gate("rank correlation with resolution", 0.7),
            Gate("FNMR, 60 % rejected, RI", 0.35, at_least=False),
            Gate("FNMR, RI minus ERS of the same network", 0.0, at_least=False),
            *(Gate(f"TAR@1e-2 {name} against ArcFace, points", -4.0) for name in lfw.NAMES),
        ],
        note="fold 5: FNMR at FMR 1e-2, threshold re-estimated, 60 % of the pairs rejected",
    )  # fmt: skip
    faces = lfw.load()
    for seed in seeds:
        settings = lfw.Settings(seed)
        tail, regressor = fine_tune(faces, settings)
        other = lfw.verify(lfw.fine_tune(faces, settings), faces)
        rows, predicted = np.stack(lfw.embed(tail, faces.test_maps)), quality(tail, regressor, faces.test_maps)
        center = ui_center(tail, faces).double().numpy()
        qualities = {
            "RI": predicted,
            "ERS": 1 - fold5.unit(rows) @ center,
            "feature norm": np.linalg.norm(rows, axis=2),
        }
        level = np.repeat([2, 1, 0], rows.shape[1])
        values = {"rank correlation with resolution": rank_correlation(predicted.ravel(), level)}
        for name in ("ERS", "feature norm"):
            values[f"rank correlation with resolution, {name}"] = rank_correlation(qualities[name].ravel(), level)
        values |= compared(seed, rows, qualities)
        values["FNMR, RI minus ERS of the same network"] = (
            values["FNMR, 60 % rejected, RI"] - values["FNMR, 60 % rejected, ERS"]
        )
        for name, value in lfw.verify(tail, faces).items():
            values[f"{name} against ArcFace, points"] = 100 * (value - other[name])
        outcome.put(values)
        progress(f"seed {seed}: " + ", ".join(f"{k} {v:.3f}" for k, v in values.items()))
    return outcome


if __name__ == "__main__":
    sys.exit(main("recognizability_index", run, seeds=(0, 1, 2)))
