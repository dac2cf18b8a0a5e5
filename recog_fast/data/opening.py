"""One call that opens any source by what it looks like."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .archives import TarDataset, ZipDataset
from .datasets import FolderDataset, ListDataset
from .formats import SOURCES, training_kinds
from .images import EncodedDataset
from .record_dataset import RecordDataset

_READERS = (RecordDataset, FolderDataset, ListDataset, ZipDataset, TarDataset)
KINDS: dict[str, Any] = dict(zip(SOURCES, _READERS, strict=True))
JOURNAL = ".converting"  # beside the target of a conversion until it is whole
_SUFFIXES = {".rec": "rec", ".csv": "list", ".jsonl": "list", ".zip": "zip", ".tar": "tar"}


def source_kind(path: str | os.PathLike[str]) -> str:
    """ "rec", "folder", "list", "zip" or "tar": by the suffix; a folder with tars and no folder in it is of tars.

    Raises ValueError for anything else and for a path that does not exist.
    """
    place = Path(path)
    if not place.exists():
        raise ValueError(f"open_dataset: expected path to be a folder or file, got {place}, which does not exist")
    if place.is_dir():
        return "tar" if any(place.glob("*.tar")) and not any(p.is_dir() for p in place.iterdir()) else "folder"
    kind = _SUFFIXES.get(place.suffix.lower())
    if kind is None:
        raise ValueError(f"open_dataset: expected a folder or a file ending in {', '.join(_SUFFIXES)}, got {place}")
    return kind


def register_source(kind: str, reader: Callable[..., Any]) -> None:
    """Makes `kind` a name for `open_dataset(path, kind)`, for `data.kind` of a training run and for --kind of the commands in this process.

    reader: (path, **options) -> a dataset of (image (H, W, 3) uint8 RGB, label int) with `__len__`, `num_classes`, `paths` and `labels`
    (N,) int64, -1 where nobody knows; usually its class. Registering the same reader again changes nothing.

    Raises ValueError for a name that is taken or no identifier, TypeError for a reader that cannot be called.
    """
    if not kind.isidentifier():
        raise ValueError(f"register_source: expected kind to be one word of letters and digits, got {kind!r}")
    if not callable(reader):
        raise TypeError(f"register_source: expected a callable reader, got {reader!r}")
    if KINDS.get(kind) is reader:
        return
    if kind in training_kinds():
        raise ValueError(f"register_source: expected a kind that is not taken ({', '.join(training_kinds())}), got {kind!r}")
    KINDS[kind] = reader
    SOURCES.append(kind)


def refuse_unfinished(path: str | os.PathLike[str]) -> None:
    """ValueError where `path`, or the folder it lies in, is what a `convert_dataset` that was stopped has written so far."""
    place = Path(os.path.abspath(path))
    for target in (place, place.parent):
        journal = target.with_name(f"{target.name}{JOURNAL}")
        if target.name and journal.is_file():
            raise ValueError(
                f"open_dataset: expected a finished source, got {target}, whose conversion was stopped ({journal.name} lies beside it): "
                "the same conversion again goes on; or remove both"
            )


def open_dataset(path: str | os.PathLike[str], kind: str | None = None, **options: Any) -> EncodedDataset:
    """The dataset at `path`: `kind` ("rec", "folder", "list", "zip", "tar", or one of `register_source`) or what it looks like; InsightFace's folders
    open by their train.rec. options: of the dataset, e.g. decode=False.

    Raises ValueError for a kind or source that is none, and for the target of a conversion that was stopped.
    """
    place = Path(path)
    refuse_unfinished(place)
    if kind is None and (place / "train.rec").is_file():
        place = place / "train.rec"
    found = source_kind(place) if kind is None else kind
    if found not in KINDS:
        raise ValueError(f"open_dataset: expected kind in {', '.join(KINDS)}, got {kind!r}")
    opened: EncodedDataset = KINDS[found](place, **options)
    return opened
