"""arcface_torch's spellings: `CombinedMarginLoss`, a PartialFC-like head, the import of its per-rank head files.

    margin_loss = CombinedMarginLoss(64, *config.margin_list, config.interclass_filtering_threshold)
    module_partial_fc = PartialFC_V2(margin_loss, config.embedding_size, config.num_classes, config.sample_rate)
    loss = module_partial_fc(embeddings, labels)

The ArcFace margin is InsightFace's: cos(theta + m) everywhere, without fallback, its acos and cos outside autograd, so
that dphi/dcos = 1 (straight-through). Its recipes were tuned with that gradient.
"""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recog_fast._arguments import are_numbers, is_number, is_whole, refusal
from recog_fast.counting import Progress
from recog_fast.heads import MarginHead
from recog_fast.margins import ArcFace, CosFace, InterclassFilter

__all__ = ["CombinedMarginLoss", "PartialFC_V2", "head_shards", "import_head", "margin_from_list", "read_head"]


def margin_from_list(margin_list: Sequence[float], interclass_filtering_threshold: float = 0.0) -> Any:
    """The margin that arcface_torch's CombinedMarginLoss makes of (m1, m2, m3), straight-through gradient included.

    (1, m2, 0): ArcFace(m2, fallback="none", gradient="straight_through"). m3 > 0: CosFace(m3), whatever m1 and m2 are, as
    there. A threshold > 0 wraps it in `InterclassFilter`. Raises ValueError for what arcface_torch has no formula for.
    """
    if not are_numbers(margin_list, 3):
        raise ValueError(f"margin_from_list: expected margin_list of three numbers, got {margin_list!r}")
    if not is_number(interclass_filtering_threshold, -1.0, 1.0):
        raise ValueError(f"margin_from_list: expected interclass_filtering_threshold in [-1, 1], got {interclass_filtering_threshold!r}")
    m1, m2, m3 = (float(m) for m in margin_list)
    margin: Any
    if m1 == 1.0 and m3 == 0.0:
        margin = ArcFace(m2, fallback="none", gradient="straight_through")
    elif m3 > 0:
        margin = CosFace(m3)
    else:
        raise ValueError(f"margin_from_list: expected margin_list (1, m2, 0) or (., ., m3 > 0), got {(m1, m2, m3)}")
    return InterclassFilter(margin, interclass_filtering_threshold) if interclass_filtering_threshold > 0 else margin


@dataclass(frozen=True)
class CombinedMarginLoss:
    """arcface_torch's settings of a margin; here it holds them, the head computes. Raises ValueError as
    `margin_from_list`."""

    s: float
    m1: float
    m2: float
    m3: float
    interclass_filtering_threshold: float = 0.0

    def __post_init__(self) -> None:
        for name in ("s", "m1", "m2", "m3", "interclass_filtering_threshold"):
            if not is_number(getattr(self, name)):
                raise ValueError(f"CombinedMarginLoss: expected {name} as a finite number, got {getattr(self, name)!r}")
        if not self.s > 0:
            raise ValueError(f"CombinedMarginLoss: expected s > 0, got {self.s!r}")
        try:
            _ = self.margin
        except ValueError as error:
            raise ValueError(
                f"CombinedMarginLoss: expected margin_list (m1, m2, m3) = (1, m2 in [0, pi], 0) or (., ., m3 in (0, 2]) and "
                f"interclass_filtering_threshold in [-1, 1], got {(self.m1, self.m2, self.m3)} and {self.interclass_filtering_threshold}"
            ) from error

    @property
    def margin(self) -> Any:
        """The margin for `MarginHead`."""
        return margin_from_list((self.m1, self.m2, self.m3), self.interclass_filtering_threshold)


class PartialFC_V2(MarginHead):
    """`MarginHead` with arcface_torch's arguments: module(local_embeddings (N, D), local_labels (N,)) -> mean loss, 0-dim;
    label -1 is nobody.

    margin_loss: a `CombinedMarginLoss`. sample_rate: share of the classes that serve as negatives of a step. fp16: 16-bit
    sweeps. Its state dict takes arcface_torch's {"weight"}. options: further ones of `MarginHead`. Raises TypeError for
    another margin_loss, ValueError as `MarginHead`.
    """

    def __init__(
        self,
        margin_loss: CombinedMarginLoss,
        embedding_size: int,
        num_classes: int,
        sample_rate: float = 1.0,
        fp16: bool = False,
        **options: Any,
    ) -> None:
        if not isinstance(margin_loss, CombinedMarginLoss):
            raise TypeError(
                f"PartialFC_V2: expected margin_loss to be a CombinedMarginLoss, got {type(margin_loss).__name__}"
            )
        for name, value in (("embedding_size", embedding_size), ("num_classes", num_classes)):
            if not is_whole(value, 1):
                raise ValueError(f"PartialFC_V2: expected {name} as an integer >= 1, got {value!r}")
        if not is_number(sample_rate, 0, 1, above=True):
            raise ValueError(f"PartialFC_V2: expected sample_rate in (0, 1], got {sample_rate!r}")
        super().__init__(
            num_classes,
            embedding_size,
            margin=margin_loss.margin,
            scale=margin_loss.s,
            sample_rate=sample_rate,
            compute_dtype=torch.bfloat16 if fp16 else None,
            **options,
        )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state_dict.setdefault(prefix + "steps", self.steps)  # arcface_torch has no clock
        super()._load_from_state_dict(state_dict, prefix, *args)


_SHARD = re.compile(r"(?:checkpoint_gpu_|rank_)(\d+)(?:_softmax_weight)?\.pt")


def head_shards(source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> list[Path]:
    """arcface_torch's head files in the order of their ranks: those of a folder (checkpoint_gpu_<rank>.pt, or
    rank_<rank>_softmax_weight.pt of older versions), or the given ones.

    Raises ValueError for none, a name without a rank, a rank twice, or one that is missing (ranks are 0 .. R-1).
    """
    if isinstance(source, (str, os.PathLike)) and os.path.isdir(source):
        paths = [p for p in Path(source).iterdir() if _SHARD.fullmatch(p.name)]
    else:
        paths = [Path(source)] if isinstance(source, (str, os.PathLike)) else [Path(p) for p in source]
    ranks: dict[int, Path] = {}
    for path in paths:
        found = _SHARD.fullmatch(path.name)
        if found is None or int(found[1]) in ranks:
            raise ValueError(f"head_shards: expected checkpoint_gpu_<rank>.pt files of distinct ranks, got {path}")
        ranks[int(found[1])] = path
    if not ranks or sorted(ranks) != list(range(len(ranks))):
        raise ValueError(f"head_shards: expected the files of ranks 0 .. R-1 in {source}, got ranks {sorted(ranks)}")
    return [ranks[rank] for rank in sorted(ranks)]


def _shard_weight(path: Path) -> Tensor:
    try:
        # A mapped file costs no memory until its rows are copied; torch maps zip files only.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise ValueError(
            f"import_head: expected {path} to be a torch.save file of tensors only, got: {refusal(error)}"
        ) from error
    if isinstance(content, Mapping):
        content = content.get("state_dict_softmax_fc", content)
    if isinstance(content, Mapping):
        content = content.get("weight")
    if not isinstance(content, Tensor) or content.ndim != 2:
        raise ValueError(
            f"import_head: expected state_dict_softmax_fc.weight (classes, D) in {path}, got {type(content).__name__}"
        )
    return content


Placed = list[tuple[Path, int, int]]
Source = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


def _shards(
    source: Source, classes: int | None, dim: int | None, progress: Progress | None = None
) -> tuple[list[Tensor], Placed]:
    """The parts of W and where they go, their sizes checked."""
    paths = head_shards(source)
    weights = []
    for path in paths:
        weights.append(_shard_weight(path))
        if progress is not None:
            progress(len(weights), len(paths))
    for path, weight in zip(paths, weights, strict=True):
        if weight.shape[1] != (weights[0].shape[1] if dim is None else dim):
            raise ValueError(f"import_head: expected D = {dim or weights[0].shape[1]} in {path}, got {weight.shape[1]}")
    sizes = [len(weight) for weight in weights]
    if classes is not None and sum(sizes) != classes:
        raise ValueError(
            f"import_head: expected {classes} classes in {len(sizes)} files, got {sum(sizes)} "
            f"({', '.join(map(str, sizes))}): a file is missing or of another run"
        )
    ends = [sum(sizes[: k + 1]) for k in range(len(sizes))]
    return weights, [(path, end - size, end) for path, size, end in zip(paths, sizes, ends, strict=True)]


def read_head(
    source: Source, num_classes: int | None = None, progress: Progress | None = None
) -> tuple[Tensor, Placed]:
    """(W (C, D), [(file, first class, past last)]) of arcface_torch's per-rank files, whatever the number of ranks and
    however the classes were split: rows follow each other in the order of the ranks. progress(done, total) is called after every
    file.

    Raises ValueError as `head_shards`, for a file of anything else, D that differ, or rows that do not add up to
    `num_classes`.
    """
    weights, placed = _shards(source, num_classes, None, progress)
    return torch.cat([weight.float() for weight in weights]), placed


def import_head(head: MarginHead, source: Source) -> Placed:
    """Copy arcface_torch's per-rank class centres into `head.weight` (C, D), as `read_head` orders them, one file at a
    time. Raises ValueError as there, for another D, and for a head with sub-centers; the head is then left as it was.
    """
    if head.subcenters != 1:
        raise ValueError(f"import_head: expected a head without sub-centers, got {head.subcenters}")
    weights, placed = _shards(source, head.num_classes, head.embedding_dim)
    with torch.no_grad():
        for weight, (_, first, past) in zip(weights, placed, strict=True):
            head.weight[first:past].copy_(weight)
    head.invalidate()
    return placed
