"""Cards, other people's weights and recipes, and search in a gallery."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models_for_tests import BGR, tiny
from paths import ROOT, data_dir
from torch import Tensor, nn
from training_data import make_folder, settings

pytest.importorskip("safetensors")

from recog_fast.cli import main
from recog_fast.compat.recipe import read_recipe, recipe_settings
from recog_fast.data import decode_image
from recog_fast.evaluation import embed_images, search
from recog_fast.models import (
    ModelCard,
    Preprocessing,
    build_model,
    load_backbone,
    load_model,
    read_card,
    save_model,
)
from recog_fast.training.config import TrainConfig, read_config
from recog_fast.training.loop import train

# -- cards -----------------------------------------------------------------------------------------------------------------


def test_a_card_round_trip(tmp_path: Path) -> None:
    backbone = tiny(preprocessing=BGR)
    card = ModelCard(
        "tiny",
        1,
        network_options={"widths": [4, 4, 8, 8]},
        licence="MIT",
        metrics=({"lfw": 0.99},),
        training_data="a | b",
    )
    written = save_model(backbone, tmp_path / "m", card)
    loaded, found = load_model(tmp_path / "m")
    assert found == written == read_card(tmp_path / "m" / "card.json")
    assert (found.embedding_dim, found.input_size, found.preprocessing, found.licence) == (8, (32, 32), BGR, "MIT")
    assert loaded.preprocessing == BGR and not loaded.training
    pixels = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8)
    assert torch.equal(loaded(loaded.preprocessing(pixels)), backbone(backbone.preprocessing(pixels)))
    page = (tmp_path / "m" / "README.md").read_text()
    for said in ("| colour order | BGR |", "mean 0.1, 0.4, 0.6; std 0.3, 0.5, 0.7", "| licence of the weights | MIT |", "lfw 0.9900",
                 "| licence of the training data | not stated |", "a \\| b", written.sha256):  # fmt: skip
        assert said in page
    assert not list((tmp_path / "m").glob(".*"))


def test_cards_and_weights_that_do_not_fit(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    card = ModelCard("tiny", 8, network_options={"widths": [4, 4, 8, 8]})
    save_model(tiny(), folder, card)
    text = (folder / "card.json").read_text()
    for change in ({"format": 9}, {"colour": 1}, {"input_size": 3}, {"preprocessing": {}}, {"metrics": 5}):
        (folder / "card.json").write_text(json.dumps({**json.loads(text), **change}))
        with pytest.raises(ValueError, match=r"read_card: expected a model card in .*card.json"):
            load_model(folder)
    (folder / "card.json").write_text("{")
    with pytest.raises(ValueError, match="read_card"):
        load_model(folder)
    (folder / "card.json").write_text(text)
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    with pytest.raises(ValueError, match="of sha256"):
        load_model(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="got none"):
        load_model(folder)
    with pytest.raises(ValueError, match="expected the tensors of tiny"):
        save_model(tiny(), folder, dataclasses.replace(card, network_options={}))


def test_real_weights_through_a_card(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """foamliu's MobileFaceNet: import declares its pixels in the card, and the embeddings are the stored ones. Every tenth pair of
    LFW's fold 5 through `recog-fast eval`, all 600 with RECOG_FAST_WHOLE_FOLD=1."""
    data = data_dir()
    weights = data / "weights" / "mobilefacenet_foamliu.pt"
    command = ["import", str(weights), str(tmp_path / "m"), "--network", "mobilenet_v2", "--embedding-size", "128"]
    assert main([*command, "--licence", "Apache-2.0", "--training-data", "MS-Celeb-1M"]) == 0
    assert "307 tensors loaded" in capsys.readouterr().out
    backbone, card = load_model(tmp_path / "m")
    assert (
        card.preprocessing == Preprocessing((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        and card.licence == "Apache-2.0"
    )
    stored = np.load(data / "embeddings" / "lfw_fold05_mobilefacenet128.npz")
    rows = [line.split("\t") for line in (data / "lfw112" / "lfw_fold05.tsv").read_text().splitlines()]
    from recog_fast.data import read_bin

    encoded, _ = read_bin(data / "lfw112" / "lfw_fold05.bin")
    ours = embed_images(backbone, [decode_image(encoded[2 * i]) for i in range(6)], flip=False)
    place = {name: k for k, name in enumerate(stored["names"].tolist())}
    theirs = torch.from_numpy(np.stack([stored["clean"][place[rows[i][0]]] for i in range(6)])).float()
    assert torch.nn.functional.cosine_similarity(ours, theirs).min() > 0.997  # theirs are of the images before JPEG
    # Of 60 pairs one is 1.7 points: too few to tell pixel conventions apart, which the cosines above do.
    whole = bool(os.environ.get("RECOG_FAST_WHOLE_FOLD"))
    encoded, same = read_bin(data / "lfw112" / "lfw_fold05.bin")
    chosen = range(0, len(same), 1 if whole else 10)
    images = [bytes(encoded[k]) for i in chosen for k in (2 * i, 2 * i + 1)]
    (tmp_path / "fold.bin").write_bytes(pickle.dumps((images, [bool(same[i]) for i in chosen])))
    assert main(["eval", str(tmp_path / "m"), "--target", str(tmp_path / "fold.bin"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)["fold"]
    assert report["accuracy"] >= (0.98 if whole else 0.93), report
    assert main([*command[:3], "--network", "iresnet18"]) == 1
    assert "missing" in capsys.readouterr().err, "no silent partial load"
    assert main(command[:3]) == 2


# -- AdaFace ---------------------------------------------------------------------------------------------------------------


class AdaBlock(nn.Module):
    """A residual block with AdaFace's names: identity shortcuts are strided by a 1x1 max pool."""

    def __init__(self, inside: int, width: int, stride: int) -> None:
        super().__init__()
        plain = inside == width
        self.shortcut_layer: nn.Module = nn.MaxPool2d(1, stride)
        if not plain:
            self.shortcut_layer = nn.Sequential(nn.Conv2d(inside, width, 1, stride, bias=False), nn.BatchNorm2d(width))
        self.res_layer = nn.Sequential(
            nn.BatchNorm2d(inside), nn.Conv2d(inside, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.PReLU(width),
            nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.res_layer(x) + self.shortcut_layer(x)
        return result


class AdaNet(nn.Module):
    """The IR-18 of AdaFace, for small images."""

    def __init__(self, dim: int, side: int) -> None:
        super().__init__()
        self.input_layer = nn.Sequential(nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.PReLU(64))
        widths = [(64, 64), (64, 128), (128, 256), (256, 512)]
        self.body = nn.Sequential(
            *(AdaBlock(a if k == 0 else b, b, 2 if k == 0 else 1) for a, b in widths for k in range(2))
        )
        self.output_layer = nn.Sequential(
            nn.BatchNorm2d(512),
            nn.Dropout(0.4),
            nn.Flatten(),
            nn.Linear(512 * side * side, dim),
            nn.BatchNorm1d(dim, affine=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.output_layer(self.body(self.input_layer(x)))
        return result


def test_adaface_weights(tmp_path: Path) -> None:
    """The same embeddings from an IResNet, and BGR pixels."""
    torch.manual_seed(0)
    theirs = AdaNet(16, 2)
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.normal_(module.running_mean, 0.0, 0.2)
    state = {f"model.{name}": value for name, value in theirs.state_dict().items()}
    state |= {"head.kernel": torch.zeros(16, 100), "head.batch_mean": torch.ones(1)}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "adaface.ckpt")
    ours = build_model("iresnet18", embedding_dim=16, input_size=32)
    report = load_backbone(ours, tmp_path / "adaface.ckpt")
    assert report.complete and ours.preprocessing == Preprocessing(color_order="BGR")
    bare = load_backbone(build_model("iresnet18", embedding_dim=16, input_size=32), theirs.state_dict())
    assert bare.loaded == report.loaded, "with or without the prefix"
    theirs.double().eval()
    ours.double().eval()
    pixels = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    bgr = (pixels.flip(3).permute(0, 3, 1, 2).double() / 255 - 0.5) / 0.5
    with torch.no_grad():
        torch.testing.assert_close(ours(ours.preprocessing(pixels, torch.float64)), theirs(bgr), rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="tensors of IResNet"):
        load_backbone(build_model("iresnet34", embedding_dim=16, input_size=32), tmp_path / "adaface.ckpt")
    with pytest.raises(ValueError, match=r"AdaFace's names in the state dict, got 'body.0.res_layer.6.fc'"):
        load_backbone(ours, {**theirs.state_dict(), "body.0.res_layer.6.fc": torch.zeros(1)})


# -- recipes ---------------------------------------------------------------------------------------------------------------

RECIPE = '''"""A recipe."""
from easydict import EasyDict as edict

config = edict()
config.margin_list = (1.0, 0.5, 0.0)
config.network = "r50"
config.output = None
config.fp16 = True
config.rec = "ms1m-retinaface-t1"
config.num_classes = 93431
config.num_image = 5179510
config.num_epoch = 20
config.warmup_epoch = 0
config.val_targets = ["lfw", "cfp_fp", "agedb_30"]
config.some_new_field = 3
'''


def test_the_preset_is_the_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "r50.py").write_text(RECIPE)
    assert main(["import", str(tmp_path / "r50.py"), str(tmp_path / "r50.yaml")]) == 0
    out = capsys.readouterr().out
    assert "num_classes = 93431 is counted from the data" in out and "some_new_field = 3 has no counterpart" in out
    ours, preset = read_config(tmp_path / "r50.yaml"), read_config(ROOT / "configs" / "insightface_r50.yaml")
    assert ours == preset and ours != TrainConfig()
    assert ours.margin == {"name": "ArcFace", "m": 0.5, "fallback": "none", "gradient": "straight_through"}


def test_other_recipes(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(
        "network: mbf\nmargin_list: [1.0, 0.0, 0.4]\ninterclass_filtering_threshold: 0.3\noptimizer: adamw\n"
    )
    recipe = recipe_settings(read_recipe(tmp_path / "r.yaml"))
    assert recipe.settings["margin"] == {
        "name": "InterclassFilter",
        "margin": {"name": "CosFace", "m": 0.4},
        "threshold": 0.3,
    }
    assert recipe.settings["network"] == "mobilefacenet" and recipe.settings["head_optimizer"] == "adamw"
    with pytest.raises(ValueError, match="expected network in r18, .*, got 'vit_t'"):
        recipe_settings({"network": "vit_t"})


@pytest.mark.parametrize(
    "line",
    [
        "import os; os.mkdir('marker')", "config.lr = __import__('os').mkdir('marker')", "config.lr = open('marker', 'w')",
        "os.mkdir('marker')", "config = edict(a=open('marker', 'w'))", "for i in range(3): config.lr = i", "config.a.b = 1",
        "config.lr = [i for i in (1,)]", "def f(): pass", "config.x = config.y = 1", "config.lr = (", "config.rec = f'{1}'",
    ],
)  # fmt: skip
def test_recipes_are_read_not_run(tmp_path: Path, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.py").write_text(f"from easydict import EasyDict as edict\nconfig = edict()\n{line}\n")
    with pytest.raises(ValueError, match=r"read_recipe: expected .* in .*r.py, got"):
        read_recipe(tmp_path / "r.py")
    assert not (tmp_path / "marker").exists()


# -- heads, search, commands -----------------------------------------------------------------------------------------------


def test_head_files_by_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import load_file

    weight = torch.randn(10, 4)
    for rank, part in enumerate(torch.split(weight, [3, 3, 2, 2])):
        torch.save({"state_dict_softmax_fc": {"weight": part.clone()}}, tmp_path / f"checkpoint_gpu_{rank}.pt")
    assert main(["import", str(tmp_path), str(tmp_path / "head.safetensors"), "--num-classes", "10"]) == 0
    assert "checkpoint_gpu_2.pt: classes 6 to 7" in capsys.readouterr().out
    assert torch.equal(load_file(tmp_path / "head.safetensors")["weight"], weight)
    assert main(["import", str(tmp_path), str(tmp_path / "h.safetensors"), "--num-classes", "11"]) == 1
    assert "expected 11 classes in 4 files, got 10 (3, 3, 2, 2)" in capsys.readouterr().err


@pytest.mark.parametrize("engine", ["exact", "faiss"])
def test_search(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if engine == "faiss":
        pytest.importorskip("faiss")
    rng = np.random.default_rng(0)
    probes, gallery = rng.normal(size=(7, 16)) * 5, rng.normal(size=(300, 16))
    unit = [e / np.linalg.norm(e, axis=1, keepdims=True) for e in (probes, gallery)]
    truth = unit[0] @ unit[1].T
    order = np.argsort(-truth, axis=1)[:, :5]
    monkeypatch.setattr("recog_fast.evaluation.nearest._BLOCK_BYTES", 4 * 7 * 64)  # several blocks
    cosine, found = search(probes, torch.from_numpy(gallery), 5, engine=engine)
    assert np.array_equal(found, order)
    np.testing.assert_allclose(cosine, np.take_along_axis(truth, order, 1), atol=1e-6)


def test_search_ties_and_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recog_fast.evaluation.nearest._BLOCK_BYTES", 8)
    _, found = search([[1.0, 0.0]], [[0.0, 1.0], [2.0, 0.0], [1.0, 0.0], [3.0, 0.0], [0.0, -1.0]], 3)
    assert found.tolist() == [[1, 2, 3]]
    for arguments, message in [
        (([[1.0]], [[1.0]], 2), "k in"), (([[1.0]], [[1.0, 2.0]]), "gallery"), (([[0.0]], [[1.0]]), "probes that are not 0, got row 0"),
        (([[1.0]], [[1.0], [np.nan]]), "got row 1"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            search(*arguments)
    with pytest.raises(ValueError, match="engine exact or faiss"):
        search([[1.0]], [[1.0]], engine="magic")  # type: ignore[arg-type]


def test_export_eval_and_identify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run becomes a folder with a card, which evaluates as the run does; the same images find themselves."""
    folder = make_folder(tmp_path / "faces")
    run = train(
        settings(tmp_path, folder, max_steps=3, data__holdout_classes=4, val_targets=["holdout"], val_pairs=24)
    ).output
    assert main(["export", str(run), str(tmp_path / "m"), "--licence", "MIT", "--metric", '{"mine": 1}']) == 0
    card = read_card(tmp_path / "m")
    assert (
        card.metrics[0]["set"] == "holdout" and card.metrics[-1] == {"mine": 1} and card.training_data == "folder faces"
    )
    pairs = [(folder / f"id{k:02d}" / f"{j}.png").read_bytes() for k in range(10) for j in (0, 1)] * 2
    same = [True] * 10 + [False] * 10
    pairs[20:] = [pairs[(3 * k) % 20] for k in range(20)]
    (tmp_path / "p.bin").write_bytes(pickle.dumps((pairs, same)))
    capsys.readouterr()
    reports = []
    for model in (run, tmp_path / "m"):
        assert main(["eval", str(model), "--target", str(tmp_path / "p.bin"), "--json"]) == 0
        reports.append(json.loads(capsys.readouterr().out))
    assert reports[0] == reports[1]
    (folder / "id03" / "2.png").write_bytes(b"no image")
    command = ["identify", str(tmp_path / "m"), "--gallery", str(folder), "--probes", str(folder)]
    assert main([*command, "--json", "--top", "2"]) == 0
    rows = json.loads(capsys.readouterr().out)["probes"]
    assert len(rows) == 69 and all(
        row["matches"][0]["name"] == row["probe"] and len(row["matches"]) == 2 for row in rows
    )
    assert main([*command, "--per-person", "--threshold", "0.999"]) == 0
    assert ": nobody" in capsys.readouterr().out
    assert main(command) == 0
    assert "rank 1: 1.0000 of 69 probes, 69 in the gallery" in capsys.readouterr().out
    assert main(["identify", str(tmp_path / "none"), *command[2:]]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert main(["import", str(run / "model.pt"), str(tmp_path / "n"), "--network", "tiny", "--embedding-size", "16", "--size", "32",
                     "--network-options", '{"widths": [4, 8, 8, 8]}', "--color-order", "BGR", "--mean", "0", "0", "0"]) == 0  # fmt: skip
    assert read_card(tmp_path / "n").preprocessing == Preprocessing((0, 0, 0), (0.5, 0.5, 0.5), "BGR")
