"""The centre of unrecognizable faces, and the clusters it is found by (math.md 5)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .._arguments import is_choice, is_number
from ..ops import _checks
from ..reference import unit_rows
from .ers import unit_center

Labels = NDArray[np.int64]

SMALL = 10_000  # rows up to which SciPy's single linkage runs: its condensed distances take 4 N^2 bytes
_TILE = 2048  # rows of a tile of the N x N distances beyond
_GRID = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3)


def _unit(embeddings: Any, where: str) -> tuple[Tensor, torch.dtype]:
    """Unit rows (N, D) float64 and the dtype results are returned in."""
    x = _checks.as_tensor(embeddings, where, "embeddings")
    _checks.check_embeddings(x, where)
    _checks.expect(x.shape[0] >= 1, where, "at least one embedding", f"shape {tuple(x.shape)}")
    _checks.check_finite_rows(x, where)
    return unit_rows(x.detach().double())[0], torch.promote_types(x.dtype, torch.float32)


def unrecognizable_center(
    embeddings: Any,  # (N, D) raw or unit
    method: Literal["mean", "cluster"] = "mean",
    threshold: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """(u^ (D,) unit, mask (N,) bool of the rows it is the mean of).

    "mean", the direct approach: all rows are of unrecognizable (corrupted) faces; u^ = normalize(mean of unit rows).
    "cluster": among the rows of ordinary images the unrecognizable ones form the largest cluster of single linkage cut at
    Euclidean distance `threshold` between unit rows (`cluster_labels`); of equally large ones that with the lowest row.

    Look at the mask's size: at a threshold that is too large the cluster chains into identities (`cluster_table` shows a
    grid). Raises ValueError naming the argument, for no rows and for rows whose mean is zero (they have no direction).
    Source: Harnessing Unrecognizable Faces, section 3; Recognizability Index, section 3.2.
    """
    where = "unrecognizable_center"
    _checks.expect(is_choice(method, ("mean", "cluster")), where, "method 'mean' or 'cluster'", repr(method))
    unit, dtype = _unit(embeddings, where)
    mask = torch.ones(unit.shape[0], dtype=torch.bool)
    if method == "cluster":
        mask = torch.from_numpy(cluster_labels(unit, threshold) == 0)
    mask = mask.to(unit.device)
    center, norm = unit_rows(unit[mask].mean(dim=0))
    _checks.expect(
        float(norm) > 1e-9,
        where,
        "embeddings with a mean direction",
        f"a mean of norm {float(norm):.1e} over {int(mask.sum())} rows",
    )
    return center.to(dtype), mask


def cluster_labels(embeddings: Any, threshold: float = 1.0) -> Labels:
    """Cluster (N,) int64 of each row: single linkage on unit rows cut at Euclidean distance `threshold`.

    Clusters are numbered by size, the largest first, then by their lowest row. A cut of single linkage at t is the
    partition into connected components of the graph "distance <= t", so both ways are exact: up to 10,000 rows SciPy's
    hierarchical clustering, beyond it the components by tiles of the distance matrix (float64; N^2 D flops, memory of one
    tile). embeddings (N, D). Raises ValueError for a threshold outside [0, 2]. Source: Harnessing Unrecognizable Faces.
    """
    where = "cluster_labels"
    _checks.expect(is_number(threshold, 0, 2), where, "threshold in [0, 2] (distance of unit vectors)", repr(threshold))
    unit, _ = _unit(embeddings, where)
    rows = unit.shape[0]
    found = _linkage(unit, threshold) if 2 <= rows <= SMALL else components(unit, threshold)
    _, first, member, sizes = np.unique(found, return_index=True, return_inverse=True, return_counts=True)
    order = np.lexsort((first, -sizes))
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    labels: Labels = rank[member.reshape(-1)].astype(np.int64)
    return labels


def _linkage(unit: Tensor, threshold: float) -> Labels:
    """SciPy's single linkage, cut."""
    from scipy.cluster.hierarchy import fcluster, linkage  # type: ignore[import-untyped, unused-ignore]

    found: Labels = fcluster(linkage(unit.cpu().numpy(), method="single"), threshold, criterion="distance").astype(
        np.int64
    )
    return found


def components(unit: Tensor, threshold: float, tile: int = _TILE) -> Labels:
    """Connected components (N,) of the graph |x_i - x_j| <= threshold over unit rows (N, D), a tile of pairs at a time."""
    from scipy.sparse import coo_matrix  # type: ignore[import-untyped, unused-ignore]
    from scipy.sparse.csgraph import connected_components  # type: ignore[import-untyped, unused-ignore]

    rows = unit.shape[0]
    least = 1 - threshold**2 / 2  # |a - b|^2 = 2 - 2 <a, b>
    labels = torch.arange(rows, device=unit.device)
    for i in range(0, rows, tile):
        for j in range(i, rows, tile):
            a, b = labels[i : i + tile], labels[j : j + tile]
            # Pairs that are one component already say nothing: a large cluster costs its edges once.
            near = (unit[i : i + tile] @ unit[j : j + tile].t() >= least) & (a[:, None] != b[None, :])
            first, second = near.nonzero(as_tuple=True)
            if first.numel() == 0:
                continue
            edges = torch.cat([a[first], b[second]]).cpu().numpy()
            nodes, ends = np.unique(edges, return_inverse=True)
            ends = ends.reshape(2, -1)
            graph = coo_matrix((np.ones(first.numel(), np.int8), (ends[0], ends[1])), shape=(len(nodes), len(nodes)))
            _, joined = connected_components(graph, directed=False)
            lowest = np.full(joined.max() + 1, rows)
            np.minimum.at(lowest, joined, nodes)
            renamed = torch.arange(rows, device=unit.device)
            renamed[torch.from_numpy(nodes).to(unit.device)] = torch.from_numpy(lowest[joined]).to(unit.device)
            labels = renamed[labels]
    return labels.cpu().numpy()


class ClusterRow(NamedTuple):
    """One threshold of `cluster_table`: the clusters of the (N, D) embeddings at it, how many rows the largest has, how far it is from
    the direct centre (D,)."""

    threshold: float
    clusters: int
    largest: int  # rows of the largest cluster
    distance: float  # 1 - cosine between its centre and the direct one; nan without one


def cluster_table(
    embeddings: Any,  # (N, D)
    thresholds: Sequence[float] = _GRID,
    direct: Any = None,  # (D,) centre of corrupted faces
) -> list[ClusterRow]:
    """The grid (steps of 0.1) a clustering threshold is chosen from: number of clusters, size of the largest, and the cosine
    distance of its centre from the `direct` one (D,) (the paper found 0.0135 at 1.0). embeddings (N, D).

    Raises ValueError for embeddings that are no matrix and a threshold outside [0, 2]. Source: Harnessing Unrecognizable Faces.
    """
    unit, _ = _unit(embeddings, "cluster_table")
    given = None if direct is None else unit_center(direct, unit.shape[1], "cluster_table").to(unit)
    rows = []
    for threshold in _checks.listed(thresholds, "cluster_table", "thresholds"):
        labels = cluster_labels(unit, threshold)
        largest = torch.from_numpy(labels == 0).to(unit.device)
        center, _ = unit_rows(unit[largest].mean(dim=0))
        distance = float("nan") if given is None else float(1 - center @ given)
        rows.append(ClusterRow(float(threshold), int(labels.max()) + 1, int(largest.sum()), distance))
    return rows
