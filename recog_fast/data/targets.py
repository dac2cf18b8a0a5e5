"""Where `convert_dataset` writes: one class per format, each able to go on in mid-file."""

from __future__ import annotations

import csv
import os
import tarfile
from io import TextIOWrapper
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from .datasets import is_image
from .images import EncodedDataset
from .records import RecordWriter, pack_record


class Target:
    """A format being written: `order` (n,) the source's images in the order they are written, `readable` what is opened
    to read it back, `kind` how."""

    kind = ""

    def __init__(self, path: Path, labels: NDArray[np.int64]) -> None:
        self.path = self.readable = path
        self.labels = labels
        self.order: NDArray[np.int64] = np.arange(len(labels))

    def takes(self, names: list[str]) -> bool:
        """Whether these names can stay: relative, of images, each once, not leading out of the target."""
        return len(set(names)) == len(names) and all(map(_harmless, names))

    def open(self, state: Any) -> None:
        """Begin, or go on where `sync` gave `state`."""

    def write(self, step: int, name: str, label: int, data: bytes) -> None:
        """Append one image."""

    def sync(self) -> Any:
        """Put everything on the disk; what `open` needs to go on from here."""

    def finish(self) -> None:
        """What follows the last image."""

    def close(self) -> None:
        """Close the files."""

    def position(self, written: EncodedDataset, step: int, name: str) -> int:
        """Where the image of `step` lies in the target once it is read back."""
        return step


def _harmless(name: str) -> bool:
    path = PurePosixPath(name)
    plain = not path.is_absolute() and ".." not in path.parts and path.as_posix() == name and "\\" not in name
    return plain and name.isprintable() and is_image(name)


def _places_classes(names: list[str], labels: NDArray[np.int64]) -> bool:
    """Whether the folders of the names, sorted, are the classes 0, 1, 2, ..."""
    folders = [name.rpartition("/")[0] or "." for name in names]
    number = {folder: k for k, folder in enumerate(sorted(set(folders)))}
    return all(number[folder] == label for folder, label in zip(folders, labels.tolist(), strict=True))


class RecordTarget(Target):
    """.rec, .idx and .lst."""

    kind = "rec"

    def __init__(self, path: Path, labels: NDArray[np.int64], layout: str = "auto") -> None:
        super().__init__(path, labels)
        counts = np.bincount(labels) if labels.min() >= 0 and labels.max() < len(labels) else np.zeros(1, np.int64)
        self.whole = bool(counts.min() > 0)
        if layout not in ("auto", "identities", "plain") or (layout == "identities" and not self.whole):
            raise ValueError(
                f"convert_dataset: expected layout auto or plain, or identities with labels 0 .. n-1 without gaps, got {layout!r}"
            )
        self.identities = self.whole and layout != "plain"
        self.counts = counts
        if self.identities:
            self.order = np.argsort(labels, kind="stable")
        self.list = path.with_suffix(".lst")

    def open(self, state: Any) -> None:
        self.records = RecordWriter(self.path, resume=None if state is None else (state[0], state[1]))
        self.names: BinaryIO = open(self.list, "wb" if state is None else "r+b")
        self.names.seek(0 if state is None else state[2])
        self.names.truncate()
        if state is None and self.identities:
            end = len(self.labels) + 1
            self.records.write(0, pack_record([end, end + len(self.counts)], b""))

    def write(self, step: int, name: str, label: int, data: bytes) -> None:
        key = step + self.identities
        self.records.write(key, pack_record(label, data, key=key))
        self.names.write(f"{key}\t{label}\t{name}\n".encode())

    def sync(self) -> Any:
        self.names.flush()
        os.fsync(self.names.fileno())
        return [*self.records.sync(), self.names.tell()]

    def finish(self) -> None:
        if self.identities:
            end = len(self.labels) + 1
            past = np.cumsum(self.counts) + 1
            for label, (count, last) in enumerate(zip(self.counts.tolist(), past.tolist(), strict=True)):
                self.records.write(end + label, pack_record([last - count, last], b"", key=end + label))
        self.sync()

    def close(self) -> None:
        self.records.close()
        self.names.close()


class TarTarget(Target):
    """A WebDataset tar of images and .cls files, or a folder of tars of `images_per_shard` each."""

    kind = "tar"

    def __init__(self, path: Path, labels: NDArray[np.int64], images_per_shard: int = 0) -> None:
        super().__init__(path, labels)
        if images_per_shard < 0:
            raise ValueError(f"convert_dataset: expected images_per_shard >= 0, got {images_per_shard}")
        self.per_shard = images_per_shard
        self.file: BinaryIO | None = None

    @staticmethod
    def member(name: str) -> str:
        """The name in the tar: WebDataset ends a sample's key at the first dot, so other dots are written %2E."""
        folder, slash, base = name.replace("%", "%25").rpartition("/")
        stem, dot, suffix = base.rpartition(".")
        return f"{folder}{slash}{stem.replace('.', '%2E')}{dot}{suffix}"

    @staticmethod
    def original(member: str) -> str:
        """The name behind `member`."""
        return member.replace("%2E", ".").replace("%25", "%")

    def takes(self, names: list[str]) -> bool:
        keys = {self.member(name).rpartition(".")[0] for name in names}
        return super().takes(names) and len(keys) == len(names)

    def _shard(self, number: int) -> Path:
        return self.path / f"{number:06d}.tar" if self.per_shard else self.path

    def open(self, state: Any) -> None:
        self.number, size = (0, 0) if state is None else (int(state[0]), int(state[1]))
        if self.per_shard:
            self.path.mkdir(exist_ok=True)
        self.file = open(self._shard(self.number), "wb" if state is None else "r+b")
        self.file.seek(size)
        self.file.truncate()

    def write(self, step: int, name: str, label: int, data: bytes) -> None:
        assert self.file is not None
        if self.per_shard and step // self.per_shard > self.number:
            self.finish()
            self.file.close()
            self.number += 1
            self.file = open(self._shard(self.number), "wb")
        member = self.member(name)
        for part, content in ((member, data), (f"{member.rpartition('.')[0]}.cls", str(label).encode())):
            info = tarfile.TarInfo(part)
            info.size = len(content)
            self.file.write(info.tobuf(tarfile.PAX_FORMAT) + content + bytes(-len(content) % tarfile.BLOCKSIZE))

    def sync(self) -> Any:
        assert self.file is not None
        self.file.flush()
        os.fsync(self.file.fileno())
        return [self.number, self.file.tell()]

    def finish(self) -> None:
        assert self.file is not None
        self.file.write(bytes(2 * tarfile.BLOCKSIZE))
        self.sync()

    def close(self) -> None:
        if self.file is not None:
            self.file.close()


class FolderTarget(Target):
    """<class>/<name> files; each appears whole or not at all."""

    kind = "folder"

    def __init__(self, path: Path, labels: NDArray[np.int64]) -> None:
        super().__init__(path, labels)
        present = np.unique(labels)
        if not len(present) or present[0] != 0 or present[-1] != len(present) - 1:
            raise ValueError(
                f"convert_dataset: expected labels 0 .. n-1 without gaps or unlabelled images for a folder, got {len(present)} "
                f"labels from {present.min(initial=0)} to {present.max(initial=0)}; use list"
            )
        self.found: dict[str, int] | None = None

    def takes(self, names: list[str]) -> bool:
        return super().takes(names) and _places_classes(names, self.labels)

    def open(self, state: Any) -> None:
        self.path.mkdir(exist_ok=True)

    def write(self, step: int, name: str, label: int, data: bytes) -> None:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f".{path.name}.new")
        new.write_bytes(data)
        os.replace(new, path)

    def position(self, written: EncodedDataset, step: int, name: str) -> int:
        if self.found is None:
            self.found = {path: k for k, path in enumerate(written.paths)}  # type: ignore[attr-defined]
        path = os.path.join(os.fspath(self.path), name)
        if path not in self.found:
            raise ValueError(f"convert_dataset: expected {path} in the target, got no such image")
        return self.found[path]


class ListTarget(FolderTarget):
    """A folder of images and labels.csv: any labels, unlabelled images too."""

    kind = "list"

    def __init__(self, path: Path, labels: NDArray[np.int64]) -> None:
        Target.__init__(self, path, labels)
        self.readable = path / "labels.csv"

    def takes(self, names: list[str]) -> bool:
        return Target.takes(self, names)

    def open(self, state: Any) -> None:
        super().open(state)
        self.raw: BinaryIO = open(self.readable, "wb" if state is None else "r+b")
        self.raw.seek(0 if state is None else state)
        self.raw.truncate()
        self.text = TextIOWrapper(self.raw, "utf-8", newline="", write_through=True)
        self.rows = csv.writer(self.text, lineterminator="\n")
        if state is None:
            self.rows.writerow(["path", "label"])

    def write(self, step: int, name: str, label: int, data: bytes) -> None:
        super().write(step, name, label, data)
        self.rows.writerow([name, label])

    def sync(self) -> Any:
        self.text.flush()
        os.fsync(self.raw.fileno())
        return self.raw.tell()

    def close(self) -> None:
        self.text.close()

    def position(self, written: EncodedDataset, step: int, name: str) -> int:
        return step
