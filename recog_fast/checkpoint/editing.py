"""Classes added to and merged in a checkpoint of any size: W, the optimizer's state and the memory's entries, by blocks of rows."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..memory import Entries
from ..ops import _planes
from .encoding import tensor_keys
from .errors import CheckpointError
from .files import STATE, read_tensors, sizes_of, write
from .loading import _fill, _open
from .rows import SavedRows, new_rows
from .saving import RANKS
from .state import ENTRIES, RING, _entries, _join

_BLOCK = 1 << 24  # bytes of a block of rows
_STD = 0.01  # of the init rule of MarginHead
_WEIGHT, _LOW = "head/weight", "head/weight_low"
_PART = f"head/{ENTRIES}/0/"


@dataclass
class _Plan:
    """What becomes of the classes: row of the old head for each new class (-1: none), and the rows that are made."""

    origin: Tensor  # (C',) int64
    label_map: Tensor  # (C,) int64, old class -> new class
    groups: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)  # new class -> merged old classes (M,), shares (M,) of sum 1
    directions: Tensor | None = None  # (A, D) of the new classes in the order of their ids
    seed: int = 0


def add_classes(
    source: str | os.PathLike[str], target: str | os.PathLike[str], count: int, *, directions: Tensor | None = None, at: Sequence[int] | None = None,
    seed: int = 0, images: int | None = None,
) -> Tensor:  # fmt: skip
    """Writes the checkpoint `source` with `count` more classes to the folder `target`; returns old class -> new class, (C,) int64.

    W of a new class is drawn from N(0, 0.01) by `seed`, or, with directions (count, D), points there with the mean norm of the old
    rows (of K sub-centers the first; the others are drawn). Optimizer state 0, no memory entry. at: ids of the new classes among
    all C + count, ascending (default: behind the others); old classes move up. images: training images there are from now on: an
    epoch in progress starts over. Statistics of margin and memory, clock and step stay.

    Raises CheckpointError (a ValueError) for a damaged checkpoint or one without a head, ValueError naming an argument.
    """
    classes, dimension = _sizes(Path(source))
    if count < 1:
        raise ValueError(f"add_classes: expected count >= 1, got {count}")
    ids = torch.arange(classes, classes + count) if at is None else torch.tensor(list(at), dtype=torch.int64)
    if ids.numel() != count or bool((ids[1:] <= ids[:-1]).any()) or int(ids[0]) < 0 or int(ids[-1]) >= classes + count:
        raise ValueError(f"add_classes: expected at to be {count} ascending ids below {classes + count}, got {ids.tolist()[:10]}")
    if directions is not None:
        good = tuple(directions.shape) == (count, dimension) and bool(torch.isfinite(directions).all()) and bool((directions.norm(dim=1) > 1e-12).all())
        if not good:
            raise ValueError(f"add_classes: expected directions finite, not 0 and of shape {(count, dimension)}, got {tuple(directions.shape)}")
    origin = torch.full((classes + count,), -1, dtype=torch.int64)
    old = torch.ones(classes + count, dtype=torch.bool).index_fill_(0, ids, False)
    origin[old] = torch.arange(classes)
    plan = _Plan(origin, old.nonzero().squeeze(1), directions=None if directions is None else directions.float(), seed=seed)
    _rewrite(Path(source), Path(target), plan, images)
    return plan.label_map


def merge_classes(
    source: str | os.PathLike[str], target: str | os.PathLike[str], groups: Sequence[Sequence[int]], *, counts: Tensor | None = None,
    images: int | None = None,
) -> Tensor:  # fmt: skip
    """Writes the checkpoint `source` with the classes of each group made one to `target`; returns old class -> new class, (C,) int64.

    Groups that share a class are one. W of the merged class points to sum_j n_j W_j/|W_j| with the norm sum_j n_j |W_j| / sum_j n_j;
    n: counts (C,) of images (None: 1 each). Its optimizer state is the members' mean by n, its memory entry their newest. It takes
    the place of its lowest class; the others close up in their order. images: as in `add_classes`.

    Raises CheckpointError for a damaged checkpoint, ValueError for groups that are not of two or more classes in [0, C), for a
    member without images, for opposite members and for sub-centers (no two classes' centers belong together).
    """
    classes, _ = _sizes(Path(source), subcenters=False)
    weights = torch.ones(classes, dtype=torch.float64) if counts is None else counts.double()
    if tuple(weights.shape) != (classes,) or not bool((torch.isfinite(weights) & (weights >= 0)).all()):
        raise ValueError(f"merge_classes: expected finite counts >= 0 of shape {(classes,)}, got {tuple(weights.shape)}")
    together = _united(groups, classes)
    first = torch.arange(classes)
    for members in together:
        first[members[1:]] = members[0]
    kept = (first == torch.arange(classes)).nonzero().squeeze(1)
    number = torch.full((classes,), -1, dtype=torch.int64)
    number[kept] = torch.arange(kept.numel())
    plan = _Plan(kept, number[first])
    for members in together:
        share = weights[members]
        if not bool(share.sum() > 0):
            raise ValueError(f"merge_classes: expected images of the classes {members.tolist()[:10]}, got counts of 0")
        plan.groups[int(number[members[0]])] = (members, (share / share.sum()).float())
    _rewrite(Path(source), Path(target), plan, images)
    return plan.label_map


def _united(groups: Sequence[Sequence[int]], classes: int) -> list[Tensor]:
    """Ascending members of the groups, those that share a class joined."""
    root: dict[int, int] = {}

    def find(c: int) -> int:
        while root.setdefault(c, c) != c:
            root[c] = root[root[c]]
            c = root[c]
        return c

    for group in groups:
        if len(set(group)) < 2 or min(group) < 0 or max(group) >= classes:
            raise ValueError(f"merge_classes: expected groups of two or more classes in [0, {classes}), got {list(group)[:10]}")
        for other in group[1:]:
            low, high = sorted((find(group[0]), find(other)))
            root[high] = low
    if not root:
        raise ValueError("merge_classes: expected groups of classes, got none")
    members: dict[int, list[int]] = {}
    for c in sorted(root):
        members.setdefault(find(c), []).append(c)
    return [torch.tensor(m) for m in members.values()]


def _sizes(folder: Path, subcenters: bool = True) -> tuple[int, int]:
    """C and D of a checkpoint's head."""
    _open(folder, None)
    size = sizes_of(folder).get(_WEIGHT)
    if size is None:
        raise CheckpointError(f"load_checkpoint: expected a head in {folder}, got none")
    if len(size[0]) == 3 and not subcenters:
        raise ValueError(f"merge_classes: expected a head without sub-centers, got {size[0][1]} of each class in {folder}")
    return int(size[0][0]), int(size[0][-1])


def _rewrite(source: Path, target: Path, plan: _Plan, images: int | None) -> None:
    """The checkpoint with the plan's classes; what has a row per class goes by way of files beside the target."""
    format_ = json.loads((source / STATE).read_text())["format"]
    entries = _open(source, None)
    sizes = sizes_of(source)
    by_class = _keys_by_class(dict(entries), sizes)
    memory = _edited_memory(source, entries, plan)
    structure = _edited_structure(entries, memory is not None, images)
    wanted: set[str] = set()
    tensor_keys([value for _, value in structure], wanted)
    tensors = {} if memory is None else {f"{_PART}{name}": value for name, value in memory._asdict().items()}
    copied = {key: torch.empty(sizes[key][0], dtype=sizes[key][1]) for key in sorted(wanted - by_class - set(tensors))}
    read_tensors(source, copied)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.rows.", dir=target.parent) as folder:
        rows = _edited_rows(source, Path(folder), sorted(by_class), plan)
        write(target, {"format": format_ if memory is None else RANKS, "content": {"dict": structure}}, copied | tensors | rows)


def _keys_by_class(saved: dict[str, Any], sizes: dict[str, tuple[torch.Size, torch.dtype]]) -> set[str]:
    """Names of the tensors with a row per class: the planes of W, and the optimizer's state shaped like it."""
    shape = sizes[_WEIGHT][0]
    keys: set[str] = set()
    tensor_keys(saved.get("optimizer"), keys)
    found = {_WEIGHT} | ({_LOW} & set(sizes)) | {key for key in keys if sizes[key][0] == shape}
    head: set[str] = set()
    tensor_keys([value for name, value in saved["head"]["dict"] if name not in (*RING, ENTRIES)], head)
    other = sorted(key for key in head - found if sizes[key][0][:1] == shape[:1])
    if other:
        raise CheckpointError(f"load_checkpoint: expected W alone to have a row per class in the head, got {other} too: nobody knows how to edit them")
    return found


def _edited_memory(source: Path, entries: list[list[Any]], plan: _Plan) -> Entries | None:
    """The memory's entries under their new classes, of merged ones the newest; None without a memory."""
    head = next(value for name, value in entries if name == "head")
    own = [[name, value] for name, value in head["dict"] if name in (*RING, ENTRIES)]
    if not own:
        return None
    saved = _fill(source, [["head", {"dict": own}]], {})["head"]
    old = _join(saved[ENTRIES]) if ENTRIES in saved else _entries(saved)
    ids = plan.label_map[old.ids]
    order = torch.argsort(old.stamp, stable=True)
    order = order[torch.argsort(ids[order], stable=True)]  # by class, the newest of each last
    last = torch.ones(order.numel(), dtype=torch.bool)
    last[:-1] = ids[order][1:] != ids[order][:-1]
    chosen = order[last]
    return Entries(ids[chosen], old.rows[chosen], old.strength[chosen], old.stamp[chosen])


def _edited_structure(entries: list[list[Any]], memory: bool, images: int | None) -> list[list[Any]]:
    """The JSON form: entries of the memory instead of its ring, and where in the data a run is."""
    out = []
    for name, value in entries:
        if name == "head" and memory:
            part = {"dict": [["first", 0], ["last", 1 << 62], *[[field, {"tensor": f"{_PART}{field}"}] for field in Entries._fields]]}
            value = {"dict": [*[item for item in value["dict"] if item[0] not in (*RING, ENTRIES)], [ENTRIES, {"list": [part]}]]}
        if name == "position" and images is not None:
            now = {"length": images, "done": 0}
            value = {"dict": [[key, now.get(key, old)] for key, old in value["dict"]]}
        out.append([name, value])
    return out


def _edited_rows(source: Path, folder: Path, keys: list[str], plan: _Plan) -> dict[str, Tensor]:
    """The tensors with a row per class, in new files of `folder`."""
    saved = {key: SavedRows(source, key) for key in keys}
    made = {
        key: new_rows(folder / str(number), (plan.origin.numel(), *rows.shape[1:]), rows.dtype) for number, (key, rows) in enumerate(saved.items())
    }
    norms = 0.0
    for key in keys:
        if key == _LOW:
            continue
        planes = [key, _LOW] if key == _WEIGHT and _LOW in saved else [key]
        block = max(1, _BLOCK // max(1, saved[key].width))
        for start in range(0, plan.origin.numel(), block):
            origin = plan.origin[start : start + block]
            for plane in planes:
                made[plane][start : start + block] = saved[plane].take(origin.clamp_min(0))
            if key == _WEIGHT and plan.directions is not None:
                rows = _whole([made[plane][start : start + block] for plane in planes])
                norms += float(torch.linalg.vector_norm(rows, dim=-1)[origin >= 0].double().sum())
        for place, (members, share) in plan.groups.items():
            rows = _whole([saved[plane].take(members) for plane in planes]).float()
            _put([made[plane] for plane in planes], place, _merged_weight(rows, share, members) if key == _WEIGHT else share @ rows)
        _fill_new([made[plane] for plane in planes], plan, key == _WEIGHT, norms / max(1, plan.label_map.numel()))
    return made


def _whole(planes: list[Tensor]) -> Tensor:
    return planes[0] if len(planes) == 1 else _planes.join(*planes)


def _put(planes: list[Tensor], place: int | slice, values: Tensor) -> None:
    if len(planes) == 1:
        planes[0][place] = values.to(planes[0].dtype)
    else:
        _planes.split(values.float(), planes[0][place], planes[1][place])


def _merged_weight(rows: Tensor, share: Tensor, members: Tensor) -> Tensor:
    """(D,) of members (M, D): the weighted mean direction with the weighted mean norm."""
    norms = torch.linalg.vector_norm(rows, dim=1)
    direction = share @ (rows / norms.clamp_min(1e-12).unsqueeze(1))
    length = float(direction.norm())
    if length < 1e-4:
        raise ValueError(f"merge_classes: expected classes that point somewhere together, got {members.tolist()[:10]}, whose mean direction is 0")
    merged: Tensor = direction / length * (share @ norms)
    return merged


def _fill_new(planes: list[Tensor], plan: _Plan, weight: bool, norm: float) -> None:
    """New classes: state 0; W drawn, or along their directions with the mean norm of the others."""
    places = (plan.origin < 0).nonzero().squeeze(1)
    draw = torch.Generator().manual_seed(plan.seed)
    for number, place in enumerate(places.tolist()):
        values = torch.zeros(planes[0].shape[1:])
        if weight:
            values.normal_(0.0, _STD, generator=draw)
            if plan.directions is not None:
                first = values if values.dim() == 1 else values[0]
                first.copy_(torch.nn.functional.normalize(plan.directions[number], dim=0) * norm)
        _put(planes, slice(place, place + 1), values.unsqueeze(0))
