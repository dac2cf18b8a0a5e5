"""Backbones: images (B, 3, H, W) -> un-normalised embeddings (B, D), with the layer names of the weights people already have.

    model = build_model("iresnet50", embedding_dim=512)
    report = load_backbone(model, "backbone.pth")        # strict: raises with the full report, never half a model
    images = model.preprocessing(uint8_images)           # (B, H, W, 3) uint8 RGB -> what the network was trained on
    embeddings = model(images)                           # (B, 512)

Every model is a `Backbone`: `forward(x) = embed(forward_features(x))`, so an attention branch can read the last feature map.
"""

from .backbone import Backbone, Preprocessing
from .card import ModelCard, load_model, read_card, save_model
from .iresnet import IResNet
from .loading import LoadReport, load_backbone
from .mobilefacenet import MobileFaceNet
from .mobilenet import MobileNetV1, MobileNetV2
from .onnx_export import export_onnx, onnx_errors
from .onnx_file import OnnxModel, import_onnx, load_onnx, save_onnx_card
from .registry import build_model, model_names
from .tiny import TinyNet

__all__ = [
    "Backbone",
    "IResNet",
    "LoadReport",
    "MobileFaceNet",
    "MobileNetV1",
    "MobileNetV2",
    "ModelCard",
    "OnnxModel",
    "Preprocessing",
    "TinyNet",
    "build_model",
    "export_onnx",
    "import_onnx",
    "load_backbone",
    "load_model",
    "load_onnx",
    "model_names",
    "onnx_errors",
    "read_card",
    "save_model",
    "save_onnx_card",
]
