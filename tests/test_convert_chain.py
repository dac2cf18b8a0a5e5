"""`recog-fast data convert` along a whole chain, folder -> .rec -> tar -> folder: every byte, label and name as it was, also when
every step is killed on its way."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from mutations import picture

from recog_fast.cli import main
from recog_fast.data import ListDataset, convert_dataset, open_dataset, read_records, unpack_record
from recog_fast.data.images import EncodedDataset

# Nested classes with spaces, dots, percent signs and letters outside ASCII; classes of one name in two folders; one of one image.
CLASSES = ["Zoë Ångström/front view", "Zoë Ångström/side view", "李 小龙/front view", "9", "10", "a.b/100 %/é"]
NAMES = [
    f"{name}/{'photo ' if j % 2 else 'été.'}{j}{'.jpg' if (j + k) % 3 else '.png'}"
    for k, name in enumerate(CLASSES)
    for j in range(1 if k == 4 else 4 + k)
]
SYNC = 5  # images between two positions on disk; 1000 by default


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    assert convert_dataset.__kwdefaults__ is not None
    monkeypatch.setitem(convert_dataset.__kwdefaults__, "sync_every", SYNC)
    for seed, name in enumerate(NAMES):
        path = tmp_path / "faces" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture("JPEG" if name.endswith("jpg") else "PNG", seed))
    return tmp_path / "faces"


def files(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def convert(source: Path, target: Path, *more: str) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    assert main(["data", "convert", str(source), str(target), *more]) == 0


def convert_killed(source: Path, target: Path, after: int, *more: str) -> None:
    """The command in a process of its own that gets SIGKILL when it asks for image `after`; then the same command again."""
    target.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    process = os.fork()
    if process == 0:
        try:
            kinds = type(open_dataset(source, decode=False))
            whole, seen = kinds.encoded, iter(range(after))

            def encoded(self: EncodedDataset, index: int) -> tuple[bytes, int]:
                if next(seen, None) is None:
                    os.kill(os.getpid(), signal.SIGKILL)
                return whole(self, index)

            kinds.encoded = encoded  # type: ignore[method-assign]
            main(["data", "convert", str(source), str(target), *more])
        finally:
            os._exit(1)
    _, status = os.waitpid(process, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    journal = json.loads(target.with_name(f"{target.name}.converting").read_text())
    assert journal["done"] == min(after, len(NAMES)) // SYNC * SYNC
    convert(source, target, *more)


def test_folder_rec_tar_folder(tmp_path: Path, folder: Path) -> None:
    """File names, file bytes, labels and class names; JPEG and PNG; nothing else lies in the end."""
    steps = [tmp_path / "1" / "faces.rec", tmp_path / "2" / "faces.tar", tmp_path / "3" / "faces"]
    for source, target in zip([folder, *steps], steps, strict=False):
        convert(source, target)
    assert files(steps[-1]) == files(folder) and len(files(folder)) == len(NAMES)
    first, last = open_dataset(folder), open_dataset(steps[-1])
    assert last.labels.tolist() == first.labels.tolist()  # type: ignore[attr-defined]
    assert last.class_names == first.class_names == sorted(CLASSES)  # type: ignore[attr-defined]
    assert [last.encoded(i) for i in range(len(last))] == [first.encoded(i) for i in range(len(first))]


@pytest.mark.parametrize("after", [SYNC - 2, 2 * SYNC + 3, len(NAMES) - 1, len(NAMES) + 4])
def test_killed_at_every_step_and_resumed(tmp_path: Path, folder: Path, after: int) -> None:
    """Before the first position on disk, in the middle, at the last image, while it is compared: every target the very bytes of the undisturbed chain."""
    for way, run in (("whole", convert), ("killed", lambda a, b: convert_killed(a, b, after))):
        place = folder
        for step in ("faces.rec", "faces.tar", "faces"):
            run(place, tmp_path / way / step)
            place = tmp_path / way / step
    whole, killed = files(tmp_path / "whole"), files(tmp_path / "killed")
    assert killed == whole
    assert {Path(name).suffix for name in whole} == {".rec", ".idx", ".lst", ".tar", ".jpg", ".png"}


@pytest.mark.parametrize("killed", [False, True])
def test_unlabelled_images_along_the_chain(tmp_path: Path, folder: Path, killed: bool) -> None:
    """list -> .rec -> tar -> list: labels with gaps and -1 stay, and every name below the list's folder."""
    labels = [(-1, 7, 3)[k % 3] for k in range(len(NAMES))]
    (folder / "labels.csv").write_text(
        "path,label\n" + "".join(f'"{name}",{label}\n' for name, label in zip(NAMES, labels, strict=True))
    )
    place = folder / "labels.csv"
    for step, more in (("some.rec", ()), ("some.tar", ()), ("some", ("--to", "list"))):
        target = tmp_path / "out" / step
        if killed:
            convert_killed(place, target, 2 * SYNC + 1, *more)
        else:
            convert(place, target, *more)
        place = target
    first, last = ListDataset(folder / "labels.csv"), ListDataset(place / "labels.csv")
    assert last.labels.tolist() == first.labels.tolist() == labels and last.num_classes == 8
    assert [last.encoded(i) for i in range(len(last))] == [first.encoded(i) for i in range(len(first))]
    before, after = files(folder), files(place)
    assert {name: after[name] for name in NAMES} == {name: before[name] for name in NAMES}
    assert len(after) == len(NAMES) + 1


def test_what_a_rec_cannot_carry_alone(tmp_path: Path, folder: Path) -> None:
    """Without its .lst a .rec has bytes, labels and their order: no names."""
    convert(folder, tmp_path / "a.rec")
    (tmp_path / "a.lst").unlink()
    convert(tmp_path / "a.rec", tmp_path / "b")
    first, last = open_dataset(folder), open_dataset(tmp_path / "b")
    assert last.labels.tolist() == first.labels.tolist()  # type: ignore[attr-defined]
    assert sorted(files(tmp_path / "b").values()) == sorted(files(folder).values())
    assert set(files(tmp_path / "b")).isdisjoint(NAMES)
    kinds = {unpack_record(payload).flag for _, payload in read_records(tmp_path / "a.rec")}
    assert kinds == {0, 2} and np.array_equal(np.bincount(last.labels), np.bincount(first.labels))  # type: ignore[attr-defined]
