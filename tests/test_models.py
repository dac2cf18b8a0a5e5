"""Backbones: names and shapes of their tensors, loading with a report, the published weights on real faces."""

from __future__ import annotations

import copy
import functools
import io
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from paths import data_dir
from torch import Tensor, nn
from torch.nn import functional

from recog_fast.models import Backbone, LoadReport, Preprocessing, TinyNet, build_model, load_backbone, model_names

# InsightFace's blocks per stage and tensors per state dict (475 for iresnet50 is its published file's count).
IRESNETS = {
    "iresnet18": ((2, 2, 2, 2), 187),
    "iresnet34": ((3, 4, 6, 3), 331),
    "iresnet50": ((3, 4, 14, 3), 475),
    "iresnet100": ((3, 13, 30, 3), 925),
    "iresnet200": ((6, 26, 60, 6), 1807),
}
BATCH_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def tiny(**options: object) -> Backbone:
    torch.manual_seed(0)
    return build_model("tiny", embedding_dim=8, input_size=32, **options)


@functools.cache
def on_meta(name: str, embedding_dim: int = 512, input_size: int | tuple[int, int] = 112, **options: object) -> Backbone:
    """Shapes without storage: even iresnet200 costs nothing."""
    with torch.device("meta"):
        return build_model(name, embedding_dim=embedding_dim, input_size=input_size, **options).eval()


def iresnet_keys(blocks: tuple[int, ...]) -> Iterator[str]:
    """InsightFace's key names, written down from their list and not from our modules."""

    def norm(name: str) -> Iterator[str]:
        return (f"{name}.{part}" for part in BATCH_NORM)

    yield from ("conv1.weight", *norm("bn1"), "prelu.weight", *norm("bn2"), "fc.weight", "fc.bias", *norm("features"))
    for stage, count in enumerate(blocks, start=1):
        for i in range(count):
            block = f"layer{stage}.{i}"
            yield from (f"{block}.conv1.weight", f"{block}.conv2.weight", f"{block}.prelu.weight")
            for name in ("bn1", "bn2", "bn3"):
                yield from norm(f"{block}.{name}")
        yield from (f"layer{stage}.0.downsample.0.weight", *norm(f"layer{stage}.0.downsample.1"))


@pytest.mark.parametrize("name", IRESNETS)
def test_iresnet_has_insightface_keys(name: str) -> None:
    blocks, count = IRESNETS[name]
    state = on_meta(name).state_dict()
    assert set(state) == set(iresnet_keys(blocks))
    assert len(state) == count


def test_iresnet50_shapes() -> None:
    state = on_meta("iresnet50").state_dict()
    expected = {
        "conv1.weight": (64, 3, 3, 3),
        "layer1.0.downsample.0.weight": (64, 64, 1, 1),
        "layer2.0.bn1.weight": (64,),
        "layer2.0.conv1.weight": (128, 64, 3, 3),
        "layer2.0.conv2.weight": (128, 128, 3, 3),
        "layer4.2.prelu.weight": (512,),
        "fc.weight": (512, 25088),
        "features.weight": (512,),
    }
    assert {key: tuple(state[key].shape) for key in expected} == expected
    strided = [key for key, layer in on_meta("iresnet50").named_modules() if getattr(layer, "stride", 1) == (2, 2)]
    assert [key for key in strided if "downsample" not in key] == [f"layer{k}.0.conv2" for k in (1, 2, 3, 4)]


def test_mobilefacenet_has_insightface_keys() -> None:
    state = on_meta("mobilefacenet").state_dict()
    expected = {
        "layers.0.layers.0.weight": (128, 3, 3, 3),
        "layers.1.layers.0.weight": (128, 2, 3, 3),  # 64 groups of two channels, as theirs
        "layers.2.layers.1.layers.0.weight": (128, 1, 3, 3),
        "layers.3.layers.3.layers.2.layers.1.running_var": (128,),
        "layers.6.layers.0.layers.2.weight": (512,),
        "layers.7.layers.1.layers.2.layers.0.weight": (256, 256, 1, 1),
        "conv_sep.layers.2.weight": (512,),
        "features.layers.0.layers.0.weight": (512, 1, 7, 7),
        "features.layers.2.weight": (512, 512),
        "features.layers.3.running_mean": (512,),
    }
    assert {key: tuple(state[key].shape) for key in expected} == expected
    assert (len(state), len(on_meta("mobilenet_v2").state_dict())) == (333, 307)
    large = on_meta("mobilefacenet", blocks=(2, 8, 12, 4), scale=4).state_dict()
    assert tuple(large["layers.1.layers.1.layers.2.layers.0.weight"].shape) == (256, 128, 1, 1)


@pytest.mark.parametrize("name", ["iresnet18", "mobilefacenet", "mobilenet_v1", "mobilenet_v2", "tiny"])
@pytest.mark.parametrize("size", [56, 40, (64, 32)])  # 3.5 and 2.5 steps of 16, rounded up; a person crop
def test_shapes(name: str, size: int | tuple[int, int]) -> None:
    model = build_model(name, embedding_dim=24, input_size=size).eval()
    height, width = (size, size) if isinstance(size, int) else size
    images = torch.randn(2, 3, height, width)
    features = model.forward_features(images)
    assert tuple(features.shape[1:]) == model.feature_shape
    assert model.feature_shape[1:] == (-(-height // 16), -(-width // 16))
    embeddings = model(images)
    assert embeddings.shape == (2, 24)
    assert torch.equal(embeddings, model.embed(features))
    assert model.input_size == (height, width)
    assert model.embedding_dim == 24


@pytest.mark.parametrize("name", model_names())
def test_every_name_builds_for_112_pixels(name: str) -> None:
    model = on_meta(name)
    assert model.feature_shape[1:] == (7, 7)
    assert (model.embedding_dim, model.input_size) == (512, (112, 112))


def test_iresnet_features_weight_is_frozen_and_the_rest_learns() -> None:
    torch.manual_seed(0)
    model = build_model("iresnet18", embedding_dim=8, input_size=32)
    model(torch.randn(4, 3, 32, 32)).square().mean().backward()
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen == ["features.weight"]
    assert torch.equal(model.get_parameter("features.weight"), torch.ones(8))
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    assert cast(Tensor, model.get_parameter("conv1.weight").grad).abs().sum() > 0


@pytest.mark.parametrize("name", ["mobilefacenet", "mobilenet_v1", "mobilenet_v2", "tiny"])
def test_gradient_reaches_every_parameter(name: str) -> None:
    torch.manual_seed(0)
    model = build_model(name, embedding_dim=8, input_size=32)
    # A random direction per row: the plain sum of a BatchNorm's output has no gradient.
    (model(torch.randn(4, 3, 32, 32)) * torch.randn(4, 8)).sum().backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert without == []


def test_dropout_acts_in_training_only() -> None:
    torch.manual_seed(0)
    model = tiny(dropout=0.5)
    features = torch.randn(8, *model.feature_shape)
    assert not torch.equal(model.embed(features), model.embed(features))
    model.eval()
    assert torch.equal(model.embed(features), model.embed(features))


@pytest.mark.parametrize("name", ["iresnet18", "mobilefacenet", "mobilenet_v1", "mobilenet_v2", "tiny"])
def test_autocast_keeps_the_last_projection_in_float32(name: str) -> None:
    torch.manual_seed(0)
    model = build_model(name, embedding_dim=8, input_size=32).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        full = model(images)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = model(images)
    assert mixed.dtype == torch.float32
    # bf16 has 8 bits: 2^-8 a rounding, over up to 40 layers; a wrong path would give unrelated vectors.
    assert functional.cosine_similarity(full, mixed).min() > 0.98


def test_tiny_stays_small_and_channels_last() -> None:
    for size, dim in ((32, 128), (112, 512)):  # the ends of its range
        model = build_model("tiny", embedding_dim=dim, input_size=size)
        assert 0.3e6 < sum(p.numel() for p in model.parameters()) < 1e6
    assert model.forward_features(torch.zeros(2, 3, 112, 112)).is_contiguous(memory_format=torch.channels_last)


# --- preprocessing


def test_preprocessing_values() -> None:
    images = torch.tensor([0, 255, 51], dtype=torch.uint8).view(1, 1, 1, 3)
    torch.testing.assert_close(Preprocessing()(images).flatten(), torch.tensor([-1.0, 1.0, -0.6]))
    bgr = Preprocessing(color_order="BGR")(images)
    assert bgr.shape == (1, 3, 1, 1)
    torch.testing.assert_close(bgr.flatten(), torch.tensor([-0.6, 1.0, -1.0]))
    imagenet = build_model("mobilenet_v2", input_size=32).preprocessing
    expected = torch.tensor([(0 - 0.485) / 0.229, (1 - 0.456) / 0.224, (0.2 - 0.406) / 0.225])
    torch.testing.assert_close(imagenet(images[0]).flatten(), expected)
    assert tiny().preprocessing == Preprocessing()
    assert tiny(preprocessing=imagenet).preprocessing == imagenet


def test_preprocessing_refuses() -> None:
    with pytest.raises(TypeError, match="uint8"):
        Preprocessing()(torch.zeros(1, 4, 4, 3))
    with pytest.raises(ValueError, match=r"\(B, H, W, 3\)"):
        Preprocessing()(torch.zeros(1, 3, 4, 4, dtype=torch.uint8))
    with pytest.raises(ValueError, match="std"):
        Preprocessing(std=(0.5, 0.0, 0.5))


# --- errors


@pytest.mark.parametrize(
    ("name", "options", "error", "words"),
    [
        ("resnet50", {}, ValueError, r"build_model: expected name in \['iresnet18'.*'tiny'\], got 'resnet50'"),
        ("tiny", {"drop": 0.1}, ValueError, r"expected options of tiny in \['dropout', 'preprocessing', 'widths'\]"),
        ("iresnet18", {"depth": 50}, ValueError, "expected options of iresnet18"),
        ("tiny", {"input_size": 8}, ValueError, "TinyNet: expected input_size of at least 16"),
        ("tiny", {"input_size": 56.0}, TypeError, "expected input_size as one int"),
        ("tiny", {"embedding_dim": 0}, ValueError, "expected embedding_dim of at least 1"),
        ("tiny", {"embedding_dim": 8.0}, TypeError, "expected embedding_dim as an int"),
        ("tiny", {"widths": (8, 8)}, ValueError, "expected widths of four"),
        ("iresnet18", {"dropout": 1.0}, ValueError, r"IResNet: expected dropout in \[0, 1\)"),
        ("mobilefacenet", {"blocks": (0, 1, 1, 1)}, ValueError, "expected blocks of four"),
        ("mobilefacenet", {"scale": 0}, ValueError, "expected scale"),
        ("mobilenet_v1", {"width": 0.0}, ValueError, "expected width"),
    ],
)
def test_build_model_refuses(name: str, options: dict[str, object], error: type[Exception], words: str) -> None:
    with torch.device("meta"), pytest.raises(error, match=words):
        build_model(name, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(2, 3, 56, 56), (2, 1, 32, 32), (3, 32, 32)])  # other size, grey, no batch
def test_forward_refuses_other_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"TinyNet: expected images of shape \(B, 3, 32, 32\), got"):
        tiny()(torch.zeros(shape))
    with pytest.raises(TypeError, match="floating"):
        tiny()(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


# --- state and loading


def test_state_dict_round_trip_and_deepcopy() -> None:
    model = tiny()
    images = torch.randn(4, 3, 32, 32)
    model(images)  # moves the running statistics
    model.eval()
    torch.manual_seed(1)
    other = build_model("tiny", embedding_dim=8, input_size=32).eval()
    assert not torch.equal(other(images), model(images))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(images), model(images))
    twin = copy.deepcopy(model)
    assert torch.equal(twin(images), model(images))
    assert twin.preprocessing == model.preprocessing
    with torch.no_grad():
        twin.get_parameter("fc.weight").zero_()
    assert model.get_parameter("fc.weight").abs().sum() > 0


@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod."])  # bare, DDP, DDP of a compiled model
@pytest.mark.parametrize("nest", [None, "state_dict_backbone", "state_dict"])  # bare, arcface_torch's checkpoint, common
def test_load_strips_wrappers(tmp_path: Path, prefix: str, nest: str | None) -> None:
    source, target = tiny(), build_model("tiny", embedding_dim=8, input_size=32)
    state = {prefix + key: value for key, value in source.state_dict().items()}
    path = tmp_path / "weights.pt"
    torch.save(state if nest is None else {"epoch": 3, nest: state}, path)
    report = load_backbone(target, path)
    assert report == LoadReport(str(path), len(state))
    assert report.complete
    assert all(torch.equal(a, b) for a, b in zip(source.state_dict().values(), target.state_dict().values(), strict=True))


def test_load_into_a_wrapped_model_and_another_dtype() -> None:
    source = tiny()
    wrapped = nn.Sequential()
    wrapped.add_module("module", build_model("tiny", embedding_dim=8, input_size=32).double())
    assert load_backbone(wrapped, source.state_dict()).complete
    assert torch.equal(wrapped.state_dict()["module.fc.weight"], source.get_parameter("fc.weight").double())


def broken_state() -> dict[str, Tensor]:
    state = dict(tiny().state_dict())
    state["extra.weight"] = torch.zeros(1)
    state["fc.weight"] = torch.zeros(9, 256)
    del state["pool.weight"]
    return state


def test_strict_load_reports_everything_and_changes_nothing() -> None:
    torch.manual_seed(1)
    model = build_model("tiny", embedding_dim=8, input_size=32)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="expected all 40 tensors of TinyNet, got state dict: 0 ") as caught:
        load_backbone(model, broken_state())
    text = str(caught.value)
    assert "1 missing (pool.weight); 1 unexpected (extra.weight); " in text
    assert "1 wrong shape (fc.weight: model (8, 256), file (9, 256))" in text
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_partial_load_warns_and_reports() -> None:
    state = broken_state()
    torch.manual_seed(1)
    model = build_model("tiny", embedding_dim=8, input_size=32)
    own = model.get_parameter("pool.weight").clone()
    with pytest.warns(UserWarning, match="partial load, state dict: 38 tensors loaded; 1 missing"):
        report = load_backbone(model, state, strict=False)
    assert report.missing == ("pool.weight",)
    assert report.unexpected == ("extra.weight",)
    assert report.wrong_shape == (("fc.weight", (8, 256), (9, 256)),)
    assert not report.complete
    assert torch.equal(model.get_parameter("stages.0.0.weight"), state["stages.0.0.weight"])
    assert torch.equal(model.get_parameter("pool.weight"), own)


def test_long_reports_are_cut() -> None:
    with pytest.raises(ValueError, match=r"40 missing \(.*, and 32 more\); 1 unexpected \(a\)"):
        load_backbone(tiny(), {"a": torch.zeros(1)}, strict=False)  # nothing fits: an error even when not strict


class _Pickled:
    """A class a weights file has no business with."""


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("content", ["code", "list", "numbers", "empty", "text"])
def test_load_refuses_files_that_are_not_weights(tmp_path: Path, content: str) -> None:
    path = tmp_path / "weights.pt"
    if content == "text":
        path.write_text("not a checkpoint")
    elif content == "code":
        path.write_bytes(pickle.dumps(_Pickled()))
    else:
        torch.save({"list": [torch.zeros(1)], "numbers": {"epoch": 3}, "empty": {}}[content], path)
    with pytest.raises(ValueError, match="load_backbone: expected"):
        load_backbone(tiny(), path)


def test_load_refuses_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_backbone(tiny(), tmp_path / "absent.pt")
    with pytest.raises(TypeError, match="path_or_state"):
        load_backbone(tiny(), 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="each key once"):
        load_backbone(tiny(), {"fc.weight": torch.zeros(1), "module.fc.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="meta"):
        load_backbone(on_meta("tiny", 8, 32), tiny().state_dict())


def test_load_reads_safetensors(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    source, target = tiny(), TinyNet(embedding_dim=8, input_size=32)
    safetensors.save_file({key: value.contiguous() for key, value in source.state_dict().items()}, tmp_path / "w.safetensors")
    assert load_backbone(target, tmp_path / "w.safetensors").complete
    assert torch.equal(target.get_parameter("fc.weight"), source.get_parameter("fc.weight"))


# --- published weights on real faces


def decoded_faces(folder: Path, count: int) -> tuple[list[str], Tensor]:
    """Names and uint8 images (count, 112, 112, 3) of the first images of LFW fold 5, JPEG decoded."""
    image = pytest.importorskip("PIL.Image")
    # Project test data of plain lists, bytes and bools; the data package holds the restricted reader for strangers' files.
    encoded, _ = pickle.loads((folder / "lfw_fold05.bin").read_bytes())
    lines = (folder / "lfw_fold05.tsv").read_text().splitlines()
    names = [name for line in lines for name in line.split("\t")[:2]]
    pictures = [np.asarray(image.open(io.BytesIO(data)).convert("RGB")) for data in encoded[:count]]
    return names[:count], torch.from_numpy(np.stack(pictures))


def test_published_weights_reproduce_stored_embeddings() -> None:
    data = data_dir()
    weights = data / "weights" / "mobilefacenet_foamliu.pt"
    stored_path = data / "embeddings" / "lfw_fold05_mobilefacenet128.npz"
    for path in (weights, stored_path, data / "lfw112" / "lfw_fold05.bin"):
        if not path.is_file():
            pytest.skip(f"{path.name} not found in the real data")
    model = build_model("mobilenet_v2", embedding_dim=128).eval()
    assert load_backbone(model, weights) == LoadReport(str(weights), 307)
    names, images = decoded_faces(data / "lfw112", 12)  # six genuine pairs
    with np.load(stored_path) as stored:
        rows = {str(name): row for row, name in enumerate(stored["names"])}
        chosen = [rows[name] for name in names]
        clean, down4 = (torch.from_numpy(stored[key][chosen].astype(np.float32)) for key in ("clean", "down4"))
    coarse = functional.avg_pool2d(images.permute(0, 3, 1, 2).float(), 28)
    blurred = functional.interpolate(coarse, size=(112, 112), mode="bicubic").round().clamp(0, 255).to(torch.uint8)
    with torch.no_grad():
        embeddings, blurred_embeddings = (model(model.preprocessing(x)) for x in (images, blurred.permute(0, 2, 3, 1)))
    # The stored rows differ by about 1.5 grey levels of pixel noise a pixel (as if taken before the JPEG round trip): cosines of
    # 0.998 to 0.999 on clean images. The area mean of the 4x4 images removes that noise and leaves a sharp test of the network:
    # ReLU for ReLU6 or another BN eps costs 0.002 to 0.016 already on clean images.
    assert functional.cosine_similarity(embeddings, clean).min() > 0.997
    assert functional.cosine_similarity(blurred_embeddings, down4).min() > 0.9998
    assert (embeddings.norm(dim=1) / clean.norm(dim=1) - 1).abs().max() < 0.02
    unit = functional.normalize(embeddings)
    cosine = unit @ unit.T
    genuine = cosine[torch.arange(0, 12, 2), torch.arange(1, 12, 2)]
    strangers = cosine[0::2, 0::2][~torch.eye(6, dtype=torch.bool)]
    assert genuine.mean() > 0.4
    assert strangers.abs().mean() < 0.2
