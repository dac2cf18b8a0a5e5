""".onnx files as networks: `recog-fast eval`, `identify` and `import` of them, with the card beside the file."""

from __future__ import annotations

import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models_for_tests import BGR, tiny
from training_data import make_folder

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("safetensors")

from recog_fast.cli import main
from recog_fast.models import ModelCard, OnnxModel, Preprocessing, load_onnx, read_card, save_model
from recog_fast.models.onnx_file import RAW

IMAGENET = Preprocessing((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    """Twenty pairs of drawn people as a .bin file."""
    faces = make_folder(tmp_path / "faces", identities=11, images=2)
    images = [[(faces / f"id{k:02d}" / f"{j}.png").read_bytes() for j in (0, 1)] for k in range(11)]
    listed = [image for k in range(10) for image in (images[k][0], images[k][1], images[k][0], images[k + 1][1])]
    (tmp_path / "p.bin").write_bytes(pickle.dumps((listed, [True, False] * 10)))
    return str(tmp_path / "p.bin")


def model_folder(place: Path, preprocessing: Preprocessing) -> Path:
    torch.manual_seed(0)
    save_model(tiny(preprocessing=preprocessing), place, ModelCard("tiny", 8, network_options={"widths": [4, 4, 8, 8]}, licence="MIT"))
    return place


def scores(capsys: pytest.CaptureFixture[str], model: Path, target: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["eval", str(model), "--target", target, "--json"]) == 0, capsys.readouterr().err
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    return report["p"]


def without(path: Path, **changes: Any) -> Path:
    """The file as another library would write it: no metadata; dimensions as given."""
    model = onnx.load(str(path))
    del model.metadata_props[:]
    if "batch" in changes:
        for value in (*model.graph.input, *model.graph.output):
            value.type.tensor_type.shape.dim[0].dim_value = changes["batch"]
    onnx.save(model, str(path))
    return path


@pytest.mark.parametrize("normalize", ["inside", "outside"])
@pytest.mark.parametrize("preprocessing", [Preprocessing(), IMAGENET, BGR], ids=["default", "imagenet", "bgr"])
def test_eval_of_an_exported_file(tmp_path: Path, pairs: str, preprocessing: Preprocessing, normalize: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The same numbers as from the folder, wherever pixels are normalised, with its own card or the folder's."""
    folder = model_folder(tmp_path / "m", preprocessing)
    file = tmp_path / "e.onnx"
    assert main(["export", str(folder), str(file), "--normalize", normalize]) == 0
    card = read_card(tmp_path / "e.card.json")
    assert card.preprocessing == (RAW if normalize == "inside" else preprocessing) and card.licence == "MIT"
    expected = scores(capsys, folder, pairs)
    assert scores(capsys, file, pairs)["eer"] == pytest.approx(expected["eer"])
    model, _ = load_onnx(file)
    pixels = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8)
    backbone = tiny(preprocessing=preprocessing)
    from recog_fast.models import load_backbone

    load_backbone(backbone, folder / "model.safetensors")
    with torch.no_grad():
        truth = backbone.eval()(preprocessing(pixels))
    assert (model(model.preprocessing(pixels)) - truth).abs().max() <= 1e-4 * truth.abs().max()
    (folder / "e.onnx").write_bytes(file.read_bytes())
    assert scores(capsys, folder / "e.onnx", pairs) == scores(capsys, file, pairs), "the card of the folder"


def test_cards_that_are_missing_or_lie(tmp_path: Path, pairs: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = model_folder(tmp_path / "m", IMAGENET)
    file = tmp_path / "e.onnx"
    assert main(["export", str(folder), str(file), "--normalize", "outside", "--no-check"]) == 0
    card = tmp_path / "e.card.json"
    told = json.loads(card.read_text())

    def refused(said: str) -> None:
        assert main(["eval", str(file), "--target", pairs]) == 1
        assert said in capsys.readouterr().err

    for change, said in (
        ({"preprocessing": dataclasses.asdict(BGR)}, "to say Preprocessing(mean=(0.485"), ({"sha256": "0" * 64}, "got another file"),
        ({"embedding_dim": 9}, "expected 9 numbers"), ({"input_size": [64, 64]}, "(batch, 3, 64, 64)"),
    ):  # fmt: skip
        card.write_text(json.dumps({**told, **change}))
        refused(said)
    card.unlink()
    refused("expected the card e.card.json or card.json beside")
    file.write_bytes(b"nothing")
    card.write_text(json.dumps({**told, "sha256": ""}))
    refused("expected an ONNX network in")
    file.unlink()
    refused("no file")
    assert main(["export", str(folder), str(folder / "x.onnx"), "--no-check"]) == 0
    assert main(["export", str(folder / "x.onnx"), str(tmp_path / "y.onnx")]) == 1
    assert "got the ONNX network" in capsys.readouterr().err


@pytest.mark.parametrize("batch", [0, 1, 3])
def test_import_of_a_foreign_file(tmp_path: Path, pairs: str, batch: int, capsys: pytest.CaptureFixture[str]) -> None:
    """No metadata, a symbolic or a fixed batch: what InsightFace's reader would conclude, or what the user says."""
    folder = model_folder(tmp_path / "m", IMAGENET)
    expected = scores(capsys, folder, pairs)
    for normalize, given in (("inside", []), ("outside", ["--color-order", "RGB", "--mean", *map(str, IMAGENET.mean), "--std", *map(str, IMAGENET.std)])):
        file = tmp_path / f"{normalize}.onnx"
        assert main(["export", str(folder), str(file), "--normalize", normalize, "--no-check"]) == 0
        without(file, **({"batch": batch} if batch else {}))
        place = tmp_path / normalize
        assert main(["import", str(file), str(place), "--size", "32", "--licence", "MIT", *given]) == 0
        card = read_card(place)
        assert card.preprocessing == (RAW if normalize == "inside" else IMAGENET) and (card.network, card.embedding_dim, card.licence) == ("onnx", 8, "MIT")
        found = scores(capsys, place, pairs)
        assert found["eer"] == pytest.approx(expected["eer"]) and found["threshold"] == pytest.approx(expected["threshold"], abs=1e-4)
    assert main(["import", str(file), str(place), "--size", "32", "--mean", "0", "0", "0"]) == 2
    assert "--color-order, --mean and --std together" in capsys.readouterr().err
    faces = tmp_path / "faces"
    assert main(["identify", str(place), "--gallery", str(faces), "--probes", str(faces), "--top", "1"]) == 0
    assert "rank 1: 1.0000 of 22 probes" in capsys.readouterr().out


def test_networks_of_another_kind(tmp_path: Path) -> None:
    """Two outputs, or an output that is no (B, D)."""
    make, kind = onnx.helper, onnx.TensorProto.FLOAT
    x = make.make_tensor_value_info("x", kind, ["n", 3, 32, 32])
    for names, said in ((["a", "b"], "one floating input"), (["a"], "output of shape")):
        outputs = [make.make_tensor_value_info(name, kind, ["n", 3, 32, 32]) for name in names]
        graph = make.make_graph([make.make_node("Identity", ["x"], [name]) for name in names], "g", [x], outputs)
        onnx.save(make.make_model(graph, opset_imports=[make.make_opsetid("", 17)], ir_version=8), str(tmp_path / "n.onnx"))
        with pytest.raises(ValueError, match=said):
            OnnxModel(tmp_path / "n.onnx", (32, 32), RAW)
    file = tmp_path / "m.onnx"
    from recog_fast.models import export_onnx

    export_onnx(tiny(), file)
    model = OnnxModel(file, (32, 32), Preprocessing())
    assert model(torch.zeros(0, 3, 32, 32)).shape == (0, 8) and np.isfinite(model(torch.zeros(2, 3, 32, 32)).numpy()).all()
    with pytest.raises(ValueError, match=r"images of shape \(B, 3, 32, 32\), got \(1, 3, 16, 16\)"):
        model(torch.zeros(1, 3, 16, 16))
