"""What was stopped halfway is not taken for whole: checkpoints, conversions, tars that end early; and archives no reader may guess at."""

from __future__ import annotations

import io
import os
import struct
import tarfile
import threading
import zipfile
from pathlib import Path
from typing import Any

import pytest
from mutations import picture

import recog_fast as rf
from recog_fast.checkpoint import read_checkpoint, save_checkpoint
from recog_fast.cli import main
from recog_fast.data import TarDataset, ZipDataset, convert_dataset, open_dataset
from recog_fast.training.config import DataConfig
from recog_fast.training.data import open_source

IMAGE = picture("PNG", 1)


def test_ctrl_c_in_a_save_is_no_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed.checkpoint.filesystem import FileSystemWriter

    head = rf.MarginHead(5, 3)
    save_checkpoint(tmp_path / "c", head=head, step=1)

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(FileSystemWriter, "write_data", stop)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path / "c", head=head, step=2)
    assert read_checkpoint(tmp_path / "c", keys=("step",)) == {"step": 1}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for k in range(12):
        path = tmp_path / "faces" / str(k % 3) / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture("PNG", k))
    return tmp_path / "faces"


@pytest.mark.parametrize(("target", "kind", "opened"), [
    ("x.rec", "rec", "x.rec"), ("x.tar", "tar", "x.tar"), ("x", "folder", "x"), ("x", "list", "x/labels.csv"),
])  # fmt: skip
def test_half_a_target_opens_nowhere_until_it_is_whole(
    tmp_path: Path, folder: Path, target: str, kind: str, opened: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, place = open_dataset(folder), tmp_path / target

    def stop(done: int, total: int) -> None:
        if done == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_dataset(source, place, kind, progress=stop)
    with pytest.raises(ValueError, match="expected a finished source, got .*whose conversion was stopped"):
        open_dataset(tmp_path / opened)
    with pytest.raises(ValueError, match="expected a finished source"):
        open_source(DataConfig(kind=kind, path=str(tmp_path / opened)))  # type: ignore[arg-type]
    assert main(["data", "check", str(tmp_path / opened)]) == 1
    assert "conversion was stopped" in capsys.readouterr().err
    assert convert_dataset(source, place, kind).images == 12
    whole = open_dataset(tmp_path / opened, decode=False)
    assert sorted(whole.encoded(i)[0] for i in range(12)) == sorted(source.encoded(i)[0] for i in range(12))


def tar_of(path: Path, members: int = 4) -> bytes:
    with tarfile.open(path, "w") as archive:
        for k in range(members):
            for name, data in ((f"{k}.png", IMAGE), (f"{k}.cls", b"1")):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return path.read_bytes()


def test_a_tar_that_ends_early_is_refused_wherever_it_ends(tmp_path: Path) -> None:
    path = tmp_path / "t.tar"
    data = tar_of(path)
    end = len(data.rstrip(b"\0"))
    end += -end % 512
    for cut in (*range(0, end, 37), end - 512, end, end + 511):
        path.write_bytes(data[:cut])
        with pytest.raises(ValueError, match="TarDataset: expected"):
            TarDataset(path)
    path.write_bytes(data[: end + 512])  # one block of zeros is an end
    assert len(TarDataset(path)) == 4


def test_a_damaged_header_in_a_tar_is_not_its_end(tmp_path: Path) -> None:
    path = tmp_path / "t.tar"
    data = bytearray(tar_of(path))
    second = 1024 + 512 * (1 + -(-len(IMAGE) // 512))
    data[second + 3] ^= 4
    path.write_bytes(data)
    with pytest.raises(ValueError, match="no header and no end of the archive"):
        TarDataset(path)


def test_a_tar_member_with_holes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:
        info = tarfile.TarInfo("a.png")
        info.size, info.type = len(IMAGE), tarfile.GNUTYPE_SPARSE
        archive.addfile(info, io.BytesIO(IMAGE))
    with pytest.raises(ValueError, match="member a.png with holes"):
        TarDataset(path)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="no /proc/self/fd on this system")
def test_shards_and_threads_keep_few_descriptors(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    for k in range(150):
        tar_of(tmp_path / "s" / f"{k:03}.tar", 1)
    before, sources, wrong = descriptors(), [TarDataset(tmp_path / "s", decode=False)], list[Any]()
    gate = threading.Barrier(8)

    def read() -> None:
        gate.wait()
        wrong.extend(i for i in range(150) if sources[0][i][0] != IMAGE)

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and descriptors() <= before + 64
    sources.clear()
    assert descriptors() == before


@pytest.mark.parametrize(("size", "offset"), [(2**64 - 1, 0), (2**63, 0), (10, 2**64 - 5), (1 << 40, 0)])
def test_wild_zip64_numbers_are_refused(tmp_path: Path, size: int, offset: int) -> None:
    name, extra = b"a/x.png", struct.pack("<HHQQQ", 1, 24, size, 69, offset)
    entry = struct.pack(
        "<4sBBBBHHHHIIIHHHHHII", b"PK\1\2", 45, 3, 45, 0, 0, 0, 0, 0, 0, 0xFFFFFFFF, 0xFFFFFFFF, len(name), len(extra), 0, 0, 0, 0, 0xFFFFFFFF
    )  # fmt: skip
    directory = entry + name + extra
    (tmp_path / "z.zip").write_bytes(directory + struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, 1, 1, len(directory), 0, 0))
    with pytest.raises(ValueError, match=r"z\.zip"):
        ZipDataset(tmp_path / "z.zip", decode=False)[0]


@pytest.mark.parametrize("flag", [1, 1 << 5, 1 << 6])
def test_entries_that_are_not_what_they_look_are_refused(tmp_path: Path, flag: int) -> None:
    path = tmp_path / "z.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/x.png", IMAGE)
    data = bytearray(path.read_bytes())
    at = data.index(b"PK\1\2") + 8
    data[at] |= flag
    path.write_bytes(data)
    with pytest.raises(ValueError, match="an encrypted entry|a patched entry"):
        ZipDataset(path, decode=False)[0]
