"""Errors at very many classes, against float64: one full step of the head, and the UIR excess."""

from __future__ import annotations

import gc
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import recog_fast as rf

from .contenders import Arena, Contender
from .problems import SCALE, Problem
from .protocol import errors, run_once
from .truth import Truth

_CHUNK = 8192
_FIELDS = ("loss", "d_embeddings", "d_weight", "d_weight_negatives", "step")


def head_errors(kind: type[Contender], problem: Problem, truth: Truth) -> dict[str, Any]:
    """Relative errors of one full step, on copies of W and velocity."""
    contender = kind(Arena(problem))
    loss = run_once(contender)
    weight, velocity = problem.weight[truth.sample].double(), problem.velocity[truth.sample].double()
    found = errors(contender, truth, loss, weight, velocity)
    del contender
    gc.collect()  # a head and its optimizer hold each other, and W and velocity: 4 GB at C = 1M
    rows, classes, _ = problem.shape
    return {"name": kind.name, "N": rows, "C": classes, **dict(zip(_FIELDS, found, strict=True))}


def _class_logits(problem: Problem, dtype: torch.dtype, rows_dtype: torch.dtype) -> Tensor:
    """s c over all classes, (N, C) in `dtype`, from unit rows rounded to `rows_dtype`."""
    rows, classes, _ = problem.shape
    unit = F.normalize(problem.embeddings.to(dtype)).to(rows_dtype).to(dtype)
    logits = torch.empty(rows, classes, dtype=dtype)
    for start in range(0, classes, _CHUNK):
        part = F.normalize(problem.weight[start : start + _CHUNK].to(dtype))
        logits[:, start : start + _CHUNK] = SCALE * (unit @ part.t())
    return logits


def excess_truth(problem: Problem, rows_dtype: torch.dtype = torch.float64) -> Tensor:
    """L - C log C of the double softmax per row, (N,) float64, by math.md 3 with every cancelling difference as a series.

    rows_dtype float32: from unit rows rounded once to float32, exact after that: what float32 operands cost by themselves.
    """
    classes = problem.shape[1]
    p = torch.softmax(_class_logits(problem, torch.float64, rows_dtype), dim=1)
    series = p * p * (1 / 2 + p * (1 / 6 + p * (1 / 24 + p * (1 / 120 + p * (1 / 720 + p * (1 / 5040 + p / 40320))))))
    remainder = torch.where(p < 0.1, series, torch.expm1(p) - p).sum(1)
    slack = 1 + remainder  # A of math.md
    ratio = slack / classes
    small = slack * ratio * (1 / 2 - ratio * (1 / 3 - ratio * (1 / 4 - ratio / 5)))
    return remainder - torch.where(ratio < 1e-3, small, slack - classes * torch.log1p(ratio))


def excess_errors(problem: Problem) -> dict[str, Any]:
    """Absolute errors of `unknown_rejection_loss`: the largest of the rows and of their mean; beside them the largest that
    rounding the unit rows to float32 makes alone, and that of plain PyTorch float32."""
    rows, classes, _ = problem.shape
    want = excess_truth(problem)
    got = rf.unknown_rejection_loss(problem.embeddings, problem.weight, scale=SCALE, reduction="none")
    assert isinstance(got, Tensor)
    # the paper's formula as written: -sum log softmax(softmax(z)), less its minimum
    q = torch.log_softmax(torch.softmax(_class_logits(problem, torch.float32, torch.float32), dim=1), dim=1)
    plain = -q.sum(1) - classes * math.log(classes)
    return {
        "name": "UIR excess",
        "N": rows,
        "C": classes,
        "largest_excess": float(want.max()),
        "absolute": float((got.double() - want).abs().max()),
        "absolute_of_mean": abs(float(got.double().mean() - want.mean())),
        "rounded_rows": float((excess_truth(problem, torch.float32) - want).abs().max()),
        "plain_float32": float((plain.double() - want).abs().max()),
    }
