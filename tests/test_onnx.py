"""ONNX: one output, a symbolic batch, the same numbers, and pixels as InsightFace's reader will send them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models_for_tests import BGR, tiny

from recog_fast.models import build_model, export_onnx, onnx_errors


def insightface_reads(path: Path) -> tuple[float, float]:
    """(input mean, input std) InsightFace's reader concludes from the names of the first eight nodes."""
    import onnx

    names = [node.name for node in onnx.load(str(path)).graph.node[:8]]
    sub = any(name.startswith(("Sub", "_minus")) for name in names)
    mul = any(name.startswith(("Mul", "_mul")) for name in names)
    return (0.0, 1.0) if sub and mul else (127.5, 127.5)


@pytest.mark.parametrize(
    ("name", "normalize"),
    [*((name, n) for name in ("tiny", "mobilenet_v2") for n in ("auto", "inside", "outside")), ("iresnet18", "inside")],
)
def test_onnx(tmp_path: Path, name: str, normalize: Any) -> None:
    """One output, a symbolic batch, the same numbers at batch 1, 2, 17, and pixels as InsightFace's reader will send them."""
    onnx = pytest.importorskip("onnx")
    ort = pytest.importorskip("onnxruntime")
    backbone = tiny() if name == "tiny" else build_model(name, embedding_dim=8, input_size=32)
    inside = export_onnx(backbone, tmp_path / "m.onnx", normalize=normalize)
    assert inside == (normalize == "inside" or (normalize == "auto" and name == "mobilenet_v2"))
    graph = onnx.load(str(tmp_path / "m.onnx")).graph
    assert [value.name for value in graph.input] == ["data"] and [value.name for value in graph.output] == ["embedding"]
    assert [d.dim_param or d.dim_value for d in graph.input[0].type.tensor_type.shape.dim] == ["batch", 3, 32, 32]
    errors = onnx_errors(tmp_path / "m.onnx", backbone)
    assert [batch for batch, _, _ in errors] == [1, 2, 17]
    if name == "mobilenet_v2" and normalize == "outside":
        return  # its pixels are not InsightFace's: only "inside" tells that reader
    mean, std = insightface_reads(tmp_path / "m.onnx")
    pixels = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    sent = (pixels.permute(0, 3, 1, 2).float() - mean) / std
    found = ort.InferenceSession(str(tmp_path / "m.onnx")).run(None, {"data": sent.numpy()})[0]
    with torch.no_grad():
        truth = backbone.eval()(backbone.preprocessing(pixels))
    # 2^-24 times the ~50 layers, of the largest number: another pixel convention is off by tenths
    assert (torch.from_numpy(found) - truth).abs().max() <= 1e-3 * truth.abs().max()


def test_onnx_of_a_bgr_network(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    ort = pytest.importorskip("onnxruntime")
    backbone = tiny(preprocessing=BGR).train()
    assert export_onnx(backbone, tmp_path / "m.onnx") and backbone.training
    onnx_errors(tmp_path / "m.onnx", backbone, batches=(3,))
    pixels = torch.randint(0, 256, (1, 32, 32, 3), dtype=torch.uint8)
    found = ort.InferenceSession(str(tmp_path / "m.onnx")).run(
        None, {"data": pixels.permute(0, 3, 1, 2).float().numpy()}
    )[0]
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), backbone.eval()(BGR(pixels)), rtol=1e-4, atol=1e-4)
    backbone.fc.weight.data += 0.01
    with pytest.raises(ValueError, match="to err by at most twice PyTorch's"):
        onnx_errors(tmp_path / "m.onnx", backbone)
    with pytest.raises(ValueError, match="normalize auto, inside or outside"):
        export_onnx(backbone, tmp_path / "m.onnx", normalize="no")  # type: ignore[arg-type]
