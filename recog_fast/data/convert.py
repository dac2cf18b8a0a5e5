"""From one format to another: image files are copied byte for byte, never decoded; what is cut short goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recog_fast.counting import Progress

from . import formats
from .archives import TarDataset, ZipDataset
from .datasets import FolderDataset, ListDataset
from .images import EncodedDataset, image_format
from .opening import JOURNAL, KINDS
from .record_dataset import RecordDataset
from .targets import FolderTarget, ListTarget, RecordTarget, Target, TarTarget

_WRITERS = (RecordTarget, TarTarget, FolderTarget, ListTarget)
TARGETS: dict[str, type[Target]] = dict(zip(formats.TARGETS, _WRITERS, strict=True))


@dataclass(frozen=True)
class Conversion:
    """What `convert_dataset` did: images in the target, how many of them an earlier, interrupted call had written, and
    whether the target was read back and compared."""

    images: int
    resumed: int
    verified: bool
    kind: str


def target_kind(target: str | os.PathLike[str]) -> str:
    """ "rec" or "tar" by the suffix, "folder" without one or with a slash at the end. Raises ValueError for another suffix."""
    text = os.fspath(target)
    if text.endswith(("/", os.sep)):
        return "folder"
    kind = {".rec": "rec", ".tar": "tar", "": "folder"}.get(Path(text).suffix.lower())
    if kind is None:
        raise ValueError(
            f"convert_dataset: expected a target ending in .rec or .tar, or a folder (ending in / where its name has a dot), or a kind "
            f"({', '.join(TARGETS)}), got {text}"
        )
    return kind


def convert_dataset(
    source: EncodedDataset,
    target: str | os.PathLike[str],
    kind: str | None = None,
    *,
    verify: bool = True,
    sync_every: int = 1000,
    progress: Progress | None = None,
    **options: Any,
) -> Conversion:
    """Write `source` to `target` as `kind`: "rec", "tar", "folder" or "list" (None: by the suffix of `target`).

    rec     InsightFace's layout (record 0, identity records; images sorted by label) where labels are 0 .. n-1 without
            gaps, else im2rec's; names go to the .lst beside it ("key label name"), where the next conversion finds them.
            layout="identities" or "plain" says which.
    tar     WebDataset: <name> and <name>.cls; images_per_shard=n makes `target` a folder of tars
    folder  <class>/<name>; unlabelled images have no place there: ValueError, use list
    list    a folder of images and labels.csv
    Image files are copied, not decoded. Names are the source's where they fit the target, else <label>/<number>. Every
    `sync_every` images the position goes to `<target>.converting`: the same call after a crash goes on there, any other
    source is refused, and so is the target by `open_dataset` until it is whole. verify: read the target back and compare every
    byte and label. progress(done, total) is called after every image written, and with verify after every one read back: total
    counts both. Raises ValueError for an existing target, a kind or a suffix that is none, a source image that cannot be read
    (CorruptImage), or a target that does not read back.
    """
    kind = target_kind(target) if kind is None else kind
    if kind not in TARGETS:
        raise ValueError(f"convert_dataset: expected kind in {', '.join(TARGETS)}, got {kind!r}")
    place = Path(target)
    journal = place.with_name(f"{place.name}{JOURNAL}")
    labels: NDArray[np.int64] = np.asarray(source.labels, np.int64)  # type: ignore[attr-defined]
    writer = TARGETS[kind](place, labels, **options)
    names = _names(source, labels, writer)
    print_of = _fingerprint(source, labels, kind, options)
    done, state = _position(journal, place, print_of)
    place.parent.mkdir(parents=True, exist_ok=True)
    writer.open(state)
    _note(journal, print_of, done, writer.sync())
    total = len(labels) * (1 + verify)
    try:
        for step in range(done, len(writer.order)):
            index = int(writer.order[step])
            data, label = source.encoded(index)
            writer.write(step, names(index, data), label, data)
            if (step + 1) % sync_every == 0:
                _note(journal, print_of, step + 1, writer.sync())
            if progress is not None:
                progress(step + 1, total)
        writer.finish()
    finally:
        writer.close()
    if verify:
        _compare(source, place, writer, names, progress)
    journal.unlink()
    return Conversion(len(labels), done, verify, kind)


def _fingerprint(source: EncodedDataset, labels: NDArray[np.int64], kind: str, options: dict[str, Any]) -> str:
    what = [
        type(source).__name__,
        len(labels),
        source.source(0),
        source.source(len(labels) - 1),
        kind,
        sorted(options.items()),
    ]
    return hashlib.blake2b(json.dumps(what, default=str).encode() + labels.tobytes(), digest_size=16).hexdigest()


def _position(journal: Path, target: Path, print_of: str) -> tuple[int, Any]:
    """(images done, state of the files) of an interrupted conversion, (0, None) for a new one."""
    if not journal.is_file():
        if target.exists():
            raise ValueError(f"convert_dataset: expected a target that does not exist yet, got {target}")
        return 0, None
    try:
        saved = json.loads(journal.read_text())
        found, done, state = str(saved["source"]), int(saved["done"]), saved["state"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"convert_dataset: expected {journal} to tell a position, got {error}; remove it and the target"
        ) from error
    if found != print_of:
        raise ValueError(
            f"convert_dataset: expected the source that {target} was begun with, got another; remove it and {journal}"
        )
    return done, state


def _note(journal: Path, print_of: str, done: int, state: Any) -> None:
    new = journal.with_name(journal.name + ".new")
    new.write_text(json.dumps({"source": print_of, "done": done, "state": state}))
    os.replace(new, journal)


def _names(source: EncodedDataset, labels: NDArray[np.int64], writer: Target) -> Callable[[int, bytes], str]:
    """(index, file bytes) -> name in the target."""
    own = _own_names(source)
    if own is not None and writer.takes(own):
        kept = own
        return lambda index, data: kept[index]
    width = max(6, len(str(int(labels.max(initial=0)))))

    def made(index: int, data: bytes) -> str:
        label = int(labels[index])
        return f"{'unlabelled' if label < 0 else f'{label:0{width}d}'}/{index:09d}{image_format(data)[1]}"

    return made


def _own_names(source: EncodedDataset) -> list[str] | None:
    """Relative paths of the images in their source, None where there are none that say more than a number."""
    if isinstance(source, (FolderDataset, ListDataset)):
        return [os.path.relpath(path, source.root).replace(os.sep, "/") for path in source.paths]
    if isinstance(source, TarDataset):
        return [TarTarget.original(path) for path in source.paths]
    if isinstance(source, ZipDataset):
        return list(source.paths)
    if isinstance(source, RecordDataset):
        return _listed_names(source)
    return None


def _listed_names(source: RecordDataset) -> list[str] | None:
    """The names in the .lst beside a .rec (key, label(s), name), None unless it names every image."""
    path = Path(source.file.path).with_suffix(".lst")
    if not path.is_file():
        return None
    named: dict[str, str] = {}
    for line in path.read_bytes().decode("utf-8", "replace").split("\n"):
        fields = line.split("\t")
        if len(fields) >= 3:
            named[fields[0]] = fields[-1]
    found = [named.get(str(key), "") for key in source.keys.tolist()]
    return found if all(found) else None


def _compare(
    source: EncodedDataset, target: Path, writer: Target, names: Callable[[int, bytes], str], progress: Progress | None
) -> None:
    """Every image and label of the target against the source."""
    written = KINDS[writer.kind](writer.readable, decode=False)
    if len(written) != len(writer.order):
        raise ValueError(f"convert_dataset: expected {len(writer.order)} images in {target}, got {len(written)}")
    for step, index in enumerate(writer.order.tolist()):
        data, label = source.encoded(index)
        found, other = written.encoded(writer.position(written, step, names(index, data)))
        if found != data or other != label:
            raise ValueError(
                f"convert_dataset: expected {len(data)} bytes of class {label} from {source.source(index)} in {target}, "
                f"got {len(found)} bytes of class {other}"
            )
        if progress is not None:
            progress(len(written) + step + 1, 2 * len(written))
