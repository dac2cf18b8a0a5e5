"""Errors of every group of people by itself: FRR at FAR per subgroup, pooled and mean (math.md section 5)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import ArrayLike

from recog_fast._arguments import is_choice
from recog_fast.evaluation._arrays import FloatArray, array_of, floats, scored_pairs
from recog_fast.evaluation.verification import conservative_thresholds


@dataclass(frozen=True)
class SubgroupReport:
    """False reject rates of G subgroups at F false accept rates; str(report) is a table.

    names   (G,) subgroups, ascending            fars      (F,) as asked
    frr     (G, F) of each subgroup              far       (G, F) its false accept rate at the threshold used
    pooled  (F,) of all pairs under one threshold from all impostor pairs
    mean    (F,) mean of frr over subgroups      genuine, impostor  (G,) pairs of each
    threshold  "own": each subgroup's own impostors set its threshold; "pooled": the common one
    """

    names: tuple[str, ...]
    fars: tuple[float, ...]
    frr: FloatArray
    far: FloatArray
    pooled: FloatArray
    mean: FloatArray
    genuine: tuple[int, ...]
    impostor: tuple[int, ...]
    threshold: str

    def __str__(self) -> str:
        head = "".join(f"  FRR@{far:g}" for far in self.fars)
        width = max(len("pooled"), *map(len, self.names))
        lines = [f"{'':<{width}}{head}  (thresholds: {self.threshold})"]
        for name, row in zip(self.names, self.frr, strict=True):
            lines.append(
                f"{name:<{width}}"
                + "".join(f"  {v:>{len(f'FRR@{f:g}')}.4f}" for v, f in zip(row, self.fars, strict=True))
            )
        for name, row in (("pooled", self.pooled), ("mean", self.mean)):
            lines.append(
                f"{name:<{width}}"
                + "".join(f"  {v:>{len(f'FRR@{f:g}')}.4f}" for v, f in zip(row, self.fars, strict=True))
            )
        return "\n".join(lines)


def subgroup_report(
    scores: ArrayLike | torch.Tensor,  # (P,) higher = more alike; -1 where a pair was rejected (ERS pair decision)
    same: ArrayLike | torch.Tensor,  # (P,) bool
    groups: ArrayLike | Sequence[str],  # (P,) subgroup of each pair, text or numbers
    fars: Sequence[float] = (1e-2, 1e-3),
    threshold: Literal["own", "pooled"] = "own",
) -> SubgroupReport:
    """FRR at the conservative threshold of each FAR, for each subgroup, pooled over all pairs, and as the mean of
    subgroups: scores, same and groups (P,) -> tables (G, F).

    threshold "pooled" applies the one threshold of all impostors to every subgroup (what a deployed system does; the
    subgroups' real FARs then differ and are in `.far`), "own" sets each subgroup's from its own impostors.
    A subgroup with less than 1 / FAR impostor pairs says little.
    Raises ValueError for shapes that do not match, a FAR outside [0, 1], another `threshold`, or a subgroup without
    genuine or impostor pairs. Source: Deng et al., Harnessing Unrecognizable Faces.
    """
    where = "subgroup_report"
    checked, mask = scored_pairs(where, scores, same)
    which = array_of(where, "groups", groups)
    if which.shape != checked.shape:
        raise ValueError(f"{where}: expected groups of shape {checked.shape}, got {which.shape}")
    targets = floats(where, "fars", fars, 1)
    if ((targets < 0) | (targets > 1)).any():
        raise ValueError(f"{where}: expected fars (n,) in [0, 1], got {targets.tolist()}")
    if not is_choice(threshold, ("own", "pooled")):
        raise ValueError(f"{where}: expected threshold 'own' or 'pooled', got {threshold!r}")
    common = conservative_thresholds(checked[~mask], targets)
    names, frr, far, counts = np.unique(which), [], [], []
    for name in names:
        genuine, impostor = checked[(which == name) & mask], checked[(which == name) & ~mask]
        if 0 in (len(genuine), len(impostor)):
            raise ValueError(
                f"{where}: expected genuine and impostor pairs in every subgroup, got {len(genuine)} and {len(impostor)} in {name}"
            )
        limits = common if threshold == "pooled" else conservative_thresholds(impostor, targets)
        frr.append([float((genuine <= limit).mean()) for limit in limits])
        far.append([float((impostor > limit).mean()) for limit in limits])
        counts.append((len(genuine), len(impostor)))
    pooled = np.array([float((checked[mask] <= limit).mean()) for limit in common])
    table = np.array(frr)
    return SubgroupReport(
        tuple(map(str, names)), tuple(float(f) for f in targets), table, np.array(far), pooled, table.mean(axis=0),
        tuple(g for g, _ in counts), tuple(i for _, i in counts), threshold,
    )  # fmt: skip
