"""TinyFace protocol files: real ones, self-made ones, damaged ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

scipy_io = pytest.importorskip("scipy.io")
from paths import data_dir

from recog_fast.data import read_tinyface


def write(path: Path, names: list[str], ids: np.ndarray) -> Path:
    cells = np.empty((len(names), 1), object)
    cells[:, 0] = names
    scipy_io.savemat(path, {"probe_set": cells, "probe_ids": ids})
    return path


def test_self_made(tmp_path: Path) -> None:
    names, ids = read_tinyface(write(tmp_path / "p.mat", ["7_1.jpg", "9_12.jpg"], np.array([[7], [9]], np.uint16)))
    assert names == ["7_1.jpg", "9_12.jpg"] and ids.tolist() == [7, 9] and ids.dtype == np.int64


def test_other_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="which is no file"):
        read_tinyface(tmp_path / "absent.mat")
    path = write(tmp_path / "p.mat", ["a", "b"], np.array([[7]]))
    with pytest.raises(ValueError, match="p.mat, got ValueError: 2 names and 1 ids"):
        read_tinyface(path)
    with pytest.raises(ValueError, match="p.mat, got"):
        read_tinyface(write(tmp_path / "p.mat", ["a"], np.array([[0.5]])))
    whole = write(tmp_path / "p.mat", ["a", "b"], np.array([[7], [8]])).read_bytes()
    for cut in (0, 60, 130, len(whole) - 20):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="read_tinyface: expected .*p.mat, got"):
            read_tinyface(path)
    scipy_io.savemat(path, {"other": 1})
    with pytest.raises(ValueError, match="p.mat, got"):
        read_tinyface(path)


def test_protocol() -> None:
    """3,728 probes and 4,443 gallery images of 2,569 people; names begin with another numbering of the same people."""
    folder = data_dir() / "tinyface_protocol"
    probes, probe_ids = read_tinyface(folder / "probe_img_ID_pairs.mat")
    gallery, gallery_ids = read_tinyface(folder / "gallery_match_img_ID_pairs.mat")
    assert (len(probes), len(gallery), len({*probes, *gallery})) == (3728, 4443, 3728 + 4443)
    people = {(name.split("_")[0], number) for name, number in zip(probes, probe_ids.tolist(), strict=True)}
    people |= {(name.split("_")[0], number) for name, number in zip(gallery, gallery_ids.tolist(), strict=True)}
    assert len(people) == len({prefix for prefix, _ in people}) == len({number for _, number in people}) == 2569
