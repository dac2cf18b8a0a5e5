"""Search in a gallery that streams by, and the threshold of an open set; `recog-fast identify` over both."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models_for_tests import tiny
from training_data import make_folder

pytest.importorskip("safetensors")

from recog_fast.cli import main
from recog_fast.evaluation import GallerySearch, fpir_threshold, search
from recog_fast.models import ModelCard, save_model


@pytest.mark.parametrize("engine", ["exact", "faiss"])
@pytest.mark.parametrize("block", [1, 7, 64, 300])
def test_blocks_are_the_whole(tmp_path: Path, engine: Any, block: int) -> None:
    """An iterator of blocks and a memory map find what float64 over everything finds, ties by the lower row."""
    if engine == "faiss":
        pytest.importorskip("faiss")
    rng = np.random.default_rng(block)
    probes, gallery = rng.normal(size=(9, 16)).astype(np.float32), rng.normal(size=(300, 16)).astype(np.float32)
    if engine == "exact":
        gallery[200:220] = gallery[20:40]  # ties
    unit = [e.astype(np.float64) / np.linalg.norm(e.astype(np.float64), axis=1, keepdims=True) for e in (probes, gallery)]
    truth = unit[0] @ unit[1].T
    truth[:, 200:220] = truth[:, 20:40] if engine == "exact" else truth[:, 200:220]
    order = np.argsort(-truth, axis=1, kind="stable")[:, :6]
    cosine, found = search(probes, (gallery[k : k + block] for k in range(0, 300, block)), 6, engine=engine)
    np.testing.assert_allclose(cosine, np.take_along_axis(truth, order, 1), atol=1e-6)
    assert np.array_equal(found, order)
    np.save(tmp_path / "g.npy", gallery)
    mapped = np.load(tmp_path / "g.npy", mmap_mode="r")
    assert np.array_equal(search(probes, mapped, 6, engine=engine)[1], order)
    assert np.array_equal(search(torch.from_numpy(probes), torch.from_numpy(gallery), 6, engine=engine)[1], order)


def test_memory_does_not_grow_with_the_gallery() -> None:
    """40 MB of gallery pass through less than a tenth of it."""
    probes = np.random.default_rng(0).normal(size=(4, 128)).astype(np.float32)

    def blocks(rows: int) -> Iterator[Any]:
        for k in range(rows // 500):
            yield np.random.default_rng(k).normal(size=(500, 128)).astype(np.float32)

    tracemalloc.start()
    _, found = search(probes, blocks(80_000), 10)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found.shape == (4, 10) and found.max() > 50_000 and peak < 4e6


def test_what_search_refuses() -> None:
    for arguments, said in (
        (([[1.0]], iter([[[1.0]], [[1.0, 2.0]]])), r"gallery of shape \(rows, D = 1\), got \(1, 2\)"), (([[1.0]], iter([[[1.0]], [[0.0]]])), "not 0, got row 1"),
        (([[1.0]], iter([])), "k in"), (([[1.0]], [[1.0]], True), "k >= 1, got True"), (([[1.0]], [[1.0]], 0), "k >= 1, got 0"),
        (([1.0], [[1.0]]), "probes of shape"), (([[1.0]], [1.0]), r"gallery of shape \(G, D\)"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"search: expected .*{said}"):
            search(*arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one gallery row"):
        GallerySearch([[1.0]]).result()


def test_fpir_threshold() -> None:
    best = [0.9, 0.5, 0.5, 0.3, 0.1, 0.0, -0.2, -0.3, -0.4, -0.5]
    for fpir, passed in ((0.0, 0), (0.05, 0), (0.1, 1), (0.2, 1), (0.3, 3), (0.5, 5), (1.0, 10)):
        t = fpir_threshold(best, fpir)
        assert sum(b >= t for b in best) == passed, (fpir, t)  # 0.2: both at 0.5 would be 0.3
    assert fpir_threshold(torch.tensor(best), 0.1) == pytest.approx(0.5)
    for arguments, said in (((best, 1.5), "fpir in"), ((best, "x"), "fpir in"), (([], 0.1), "non-mated"), (([np.nan], 0.1), "finite")):
        with pytest.raises(ValueError, match=f"fpir_threshold: expected .*{said}"):
            fpir_threshold(*arguments)  # type: ignore[arg-type]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    save_model(tiny(), tmp_path / "m", ModelCard("tiny", 8, network_options={"widths": [4, 4, 8, 8]}))
    return tmp_path / "m"


def told(capsys: pytest.CaptureFixture[str], *command: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["identify", *command, "--json"]) == 0, capsys.readouterr().err
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert set(document) == {"probes", "gallery", "rank_1", "open_set"}
    return document


def rows_of(capsys: pytest.CaptureFixture[str], *command: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = told(capsys, *command)["probes"]
    return rows


def assert_alike(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> None:
    """The same matches; a network rounds otherwise in other batches."""
    for one, two in zip(a, b, strict=True):
        assert one["probe"] == two["probe"] and [m["name"] for m in one["matches"]] == [m["name"] for m in two["matches"]]
        assert [m["cosine"] for m in one["matches"]] == pytest.approx([m["cosine"] for m in two["matches"]], abs=1e-5)


def test_blocks_and_people_by_command(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--block changes nothing but memory, unreadable images in it apart."""
    faces = make_folder(tmp_path / "faces", identities=6, images=3)
    (faces / "id00" / "0.png").write_bytes(b"no image")
    (faces / "id02" / "1.png").write_bytes(b"no image")
    command = [str(model), "--gallery", str(faces), "--probes", str(faces)]
    whole = rows_of(capsys, *command)
    assert len(whole) == 16 and all(row["matches"][0]["name"] == row["probe"] for row in whole)
    for block in ("1", "5"):
        assert_alike(rows_of(capsys, *command, "--block", block), whole)
    people = rows_of(capsys, *command, "--per-person")
    assert_alike(rows_of(capsys, *command, "--per-person", "--block", "2"), people)
    assert {match["name"] for row in people for match in row["matches"]} == {f"id{k:02d}" for k in range(6)}
    with pytest.raises(SystemExit) as stop:
        main(["identify", *command, "--block", "0"])
    assert stop.value.code == 2 and "--block: expected a whole number from 1 on" in capsys.readouterr().err


@pytest.mark.parametrize("engine", ["exact", "faiss"])
def test_open_set_by_command(tmp_path: Path, model: Path, engine: str, capsys: pytest.CaptureFixture[str]) -> None:
    """No more strangers than asked for get a match; known people are counted above that threshold."""
    if engine == "faiss":
        pytest.importorskip("faiss")
    faces = make_folder(tmp_path / "faces", identities=6, images=3)
    others = make_folder(tmp_path / "others", identities=10, images=2, seed=9)
    for k, folder in enumerate(sorted(others.iterdir())):
        folder.rename(others / f"stranger{k}")
    command = [str(model), "--gallery", str(faces), *(["--faiss"] if engine == "faiss" else [])]
    plain = rows_of(capsys, *command, "--probes", str(others), "--top", "1")
    best = np.array([row["matches"][0]["cosine"] for row in plain])
    for fpir in (0.0, 0.1, 0.5):
        found = told(capsys, *command, "--probes", str(faces), "--strangers", str(others), "--fpir", str(fpir))
        rows, said = found["probes"], found["open_set"]
        assert said["non_mated"] == 20 and said["false_positives"] <= fpir * 20 and said["mated"] == 18
        assert abs(int((best >= said["threshold"]).sum()) - said["false_positives"]) <= 1  # rounded to six digits when printed
        assert said["tpir"] == pytest.approx(np.mean([bool(row["matches"]) for row in rows])), "each finds itself, where it finds anyone"
        mixed = told(capsys, *command, "--probes", str(others), "--fpir", str(fpir))
        assert mixed["open_set"] == {**said, "mated": 0, "tpir": None}, "probes that are nobody's serve as strangers"
    assert main(["identify", *command, "--probes", str(faces), "--fpir", "0.1"]) == 1
    assert "expected --strangers, or probes of people who are not in the gallery" in capsys.readouterr().err
    assert main(["identify", *command, "--probes", str(faces), "--strangers", str(others)]) == 2
    assert "expected --fpir with --strangers" in capsys.readouterr().err
    assert main(["identify", *command, "--probes", str(faces), "--strangers", str(others), "--fpir", "0"]) == 0
    assert "threshold " in (out := capsys.readouterr().out) and "0 of 20 people who are not in the gallery get a match" in out
