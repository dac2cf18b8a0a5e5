"""ONNX for other runtimes and for InsightFace's own reader, and the check that it computes the same."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .backbone import Backbone, Preprocessing

INPUT, OUTPUT = "data", "embedding"
OPSET = 17
# InsightFace's reader takes a node of these names among the first eight as a sign that pixels are normalised inside.
_SIGNS = ("Sub", "Mul", "_minus", "_mul")


def export_onnx(
    backbone: Backbone, path: str | os.PathLike[str], *, normalize: Literal["auto", "inside", "outside"] = "auto"
) -> bool:
    """Write `backbone` as ONNX (opset 17): input "data" (batch, 3, H, W) float32 with a symbolic batch, one output
    "embedding" (batch, D), not normalised.

    normalize="outside": the input is (pixel / 255 - mean) / std in the network's colour order, and InsightFace's reader,
    which then assumes (pixel - 127.5) / 127.5 of RGB, must be right about it. "inside": the input is RGB pixels 0 .. 255, and the graph begins
    with the nodes Sub_mean and Mul_std by which that reader knows. "auto": outside where InsightFace's
    convention is the network's own. Returns whether normalisation is inside. The convention is in the file's
    metadata too. Needs onnx. Raises ImportError without it, ValueError for another `normalize`.
    """
    import onnx

    if normalize not in ("auto", "inside", "outside"):
        raise ValueError(f"export_onnx: expected normalize auto, inside or outside, got {normalize!r}")
    inside = normalize == "inside" or (normalize == "auto" and backbone.preprocessing != Preprocessing())
    first = next(backbone.parameters())
    modes = [(module, module.training) for module in backbone.modules()]
    try:
        backbone.eval()
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # the tracer's exporter is deprecated; the other one needs a further package
            torch.onnx.export(
                backbone,
                (torch.zeros(2, 3, *backbone.input_size, dtype=first.dtype, device=first.device),),
                os.fspath(path),
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_axes={INPUT: {0: "batch"}, OUTPUT: {0: "batch"}},
                opset_version=OPSET,
                dynamo=False,
            )
    finally:
        for module, training in modes:
            module.training = training
    model = onnx.load(os.fspath(path))
    for node in model.graph.node:
        if node.name.startswith(_SIGNS):
            node.name = f"node_{node.name}"
    if inside:
        _normalise_inside(model.graph, backbone.preprocessing)
    _describe(model, backbone, inside)
    onnx.checker.check_model(model)
    onnx.save(model, os.fspath(path))
    return inside


def _normalise_inside(graph: Any, pixels: Preprocessing) -> None:
    """Put (x - 255 mean) (1 / 255 std), and for BGR networks the change of colours, before everything else."""
    import onnx.helper as make
    from onnx import TensorProto, numpy_helper

    for node in graph.node:
        for k, name in enumerate(node.input):
            if name == INPUT:
                node.input[k] = "normalised"
    flip = pixels.color_order == "BGR"
    mean, std = (torch.tensor(v, dtype=torch.float64) * 255 for v in (pixels.mean, pixels.std))
    last = "scaled" if flip else "normalised"
    front = [
        make.make_node("Sub", [INPUT, "pixel_mean"], ["centred"], name="Sub_mean"),
        make.make_node("Mul", ["centred", "pixel_scale"], [last], name="Mul_std"),
    ]
    if flip:  # mean and std are listed in the network's order: they are turned round with the pixels
        mean, std = mean.flip(0), std.flip(0)
        front.append(make.make_node("Gather", ["scaled", "bgr"], ["normalised"], name="Gather_bgr", axis=1))
        graph.initializer.append(make.make_tensor("bgr", TensorProto.INT64, [3], [2, 1, 0]))
    for name, value in (("pixel_mean", mean), ("pixel_scale", 1 / std)):
        graph.initializer.append(numpy_helper.from_array(value.float().view(1, 3, 1, 1).numpy(), name))
    rest = list(graph.node)
    del graph.node[:]
    graph.node.extend([*front, *rest])


def _describe(model: Any, backbone: Backbone, inside: bool) -> None:
    from onnx import helper

    pixels = backbone.preprocessing
    helper.set_model_props(
        model,
        {
            "color_order": "RGB" if inside else pixels.color_order,
            "mean": "0,0,0" if inside else ",".join(repr(float(v)) for v in pixels.mean),
            "std": "1,1,1" if inside else ",".join(repr(float(v)) for v in pixels.std),
            "input_range": "0..255" if inside else "(pixel / 255 - mean) / std",
            "embedding": "not normalised",
        },
    )


def onnx_errors(
    path: str | os.PathLike[str], backbone: Backbone, batches: Sequence[int] = (1, 2, 17), seed: int = 0
) -> list[tuple[int, float, float]]:
    """(batch size, error of the ONNX file in onnxruntime, error of PyTorch in float32) for random pixels: the largest
    difference from the network in float64, over the largest value. Needs onnxruntime.

    Raises ValueError where the file's error is above twice PyTorch's + 1e-5, or has other than one output.
    """
    import copy

    import numpy as np
    import onnxruntime

    session = onnxruntime.InferenceSession(os.fspath(path), providers=["CPUExecutionProvider"])
    outputs = session.get_outputs()
    if len(outputs) != 1:
        raise ValueError(f"onnx_errors: expected one output in {os.fspath(path)}, got {len(outputs)}")
    inside = session.get_modelmeta().custom_metadata_map.get("input_range") == "0..255"
    network = copy.deepcopy(backbone).cpu().float().eval()
    truth_of = copy.deepcopy(network).double()
    generator = torch.Generator().manual_seed(seed)
    found = []
    for batch in batches:
        pixels = torch.randint(0, 256, (batch, *backbone.input_size, 3), generator=generator, dtype=torch.uint8)
        x = backbone.preprocessing(pixels)
        given = pixels.permute(0, 3, 1, 2).float() if inside else x
        ours = torch.from_numpy(np.asarray(session.run(None, {session.get_inputs()[0].name: given.numpy()})[0]))
        with torch.inference_mode():
            truth, plain = _forward(truth_of, backbone.preprocessing(pixels, torch.float64)), _forward(network, x)
        size = truth.abs().max().clamp_min(1e-30)
        errors = [float((y - truth).abs().max() / size) for y in (ours, plain)]
        found.append((batch, errors[0], errors[1]))
        if ours.shape != truth.shape or not errors[0] <= 2 * errors[1] + 1e-5:
            raise ValueError(
                f"onnx_errors: expected {os.fspath(path)} to err by at most twice PyTorch's {errors[1]:.1e} + 1e-5 at batch {batch}, "
                f"got {errors[0]:.1e}"
            )
    return found


def _forward(network: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = network(x)
    return y
