"""Prints the table of docs/data.md: bytes an image that a source keeps and takes while it opens, and MB it copies into a worker.

    python tools/names_memory.py --images 1000000

Empty files called n000123/0001_01.jpg, ten a class, in a temporary folder (--folder: below another one;
a million inodes); of zip and tar, whose opening takes most, at most 100,000 and 50,000. Counted by tracemalloc; a worker's own pages are
Private_Dirty of a forked process that has seen every name. Linux.
"""

from __future__ import annotations

import argparse
import gc
import io
import os
import tarfile
import tempfile
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from recog_fast.data import FolderDataset, ListDataset, RecordDataset, TarDataset, ZipDataset, write_identities

IMAGES_A_CLASS = 10
ROOT_LENGTH = 24  # of the folder that holds the source, where the temporary folder allows
WARM = 1000  # names a worker sees before its pages are counted
MOST = {"zip": 100_000, "tar": 50_000}


def names(count: int) -> Iterator[tuple[str, int]]:
    """(n000123/0001_01.jpg, class) of every image."""
    for k in range(count):
        label, image = divmod(k, IMAGES_A_CLASS)
        yield f"n{label:06d}/{image:04d}_01.jpg", label


def make_folder(place: Path, count: int) -> Path:
    root = place / "faces"
    for name, _ in names(count):
        file = root / name
        if not file.parent.exists():
            file.parent.mkdir(parents=True)
        file.touch()
    return root


def make_list(place: Path, count: int) -> Path:
    file = make_folder(place, count) / "list.csv"
    file.write_text("".join(f"{name},{label}\n" for name, label in names(count)))
    return file


def make_tar(place: Path, count: int) -> Path:
    file = place / "faces.tar"
    with tarfile.open(file, "w") as tar:
        for name, _ in names(count):
            tar.addfile(tarfile.TarInfo(name), io.BytesIO())
    return file


def make_zip(place: Path, count: int) -> Path:
    file = place / "faces.zip"
    with zipfile.ZipFile(file, "w") as archive:
        for name, _ in names(count):
            archive.writestr(name, b"")
    return file


def make_records(place: Path, count: int) -> Path:
    file = place / "faces.rec"
    write_identities(file, ((label, b"") for _, label in names(count)))
    return file


SOURCES: dict[str, tuple[Callable[[Path, int], Path], Callable[[Path], Any]]] = {
    "folder": (make_folder, lambda path: FolderDataset(path, decode=False)),
    ".csv": (make_list, lambda path: ListDataset(path, decode=False)),
    "tar": (make_tar, lambda path: TarDataset(path, decode=False)),
    "zip": (make_zip, lambda path: ZipDataset(path, decode=False)),
    ".rec": (make_records, lambda path: RecordDataset(path, decode=False)),
}


def private_bytes() -> int:
    """Pages of this process that are its own and written."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty:"))


def of_a_worker(dataset: Any) -> int:
    """Own pages a forked process gains by looking at every name."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        gc.disable()
        for _ in dataset.paths[:WARM]:  # the interpreter's own pages
            pass
        private_bytes()
        before = private_bytes()
        for _ in dataset.paths:
            pass
        os.write(write, str(private_bytes() - before).encode())
        os._exit(0)
    os.close(write)
    with open(read, "rb") as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return int(said)


def measure(kind: str, count: int, place: Path) -> tuple[float, float, float]:
    """Bytes an image: kept, at most while opening; MB of a worker's own pages, of all images."""
    make, open_source = SOURCES[kind]
    path = make(place, count)
    open_source(make(Path(tempfile.mkdtemp(dir=place)), IMAGES_A_CLASS))  # what is imported at the first use is nobody's
    gc.collect()
    tracemalloc.start()
    dataset = open_source(path)
    peak = tracemalloc.get_traced_memory()[1]
    gc.collect()
    kept = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(dataset.paths) == len(dataset) == count
    return kept / count, peak / count, of_a_worker(dataset) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, help="where the temporary files go")
    parser.add_argument("--kinds", nargs="+", choices=list(SOURCES), default=list(SOURCES))
    options = parser.parse_args()
    print("| source | images | kept | at most while opening | MB of own pages, in all, of a forked worker that has seen all names |\n|---|---|---|---|---|")
    for kind in options.kinds:
        count = min(options.images, MOST.get(kind, options.images))
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            place = Path(folder).resolve()
            place = place / ("x" * max(1, ROOT_LENGTH - len(str(place)) - 1))  # roots of the same length where that can be
            place.mkdir()
            kept, peak, own = measure(kind, count, place)
        print(f"| {kind} | {count:,} | {kept:.0f} | {peak:.0f} | {own:.1f} |", flush=True)


if __name__ == "__main__":
    main()
