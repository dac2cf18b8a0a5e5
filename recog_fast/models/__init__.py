"""Backbones: images (B, 3, H, W) -> un-normalised embeddings (B, D), with the layer names of the weights people already have.

    model = build_model("iresnet50", embedding_dim=512)
    report = load_backbone(model, "backbone.pth")        # strict: raises with the full report, never half a model
    images = model.preprocessing(uint8_images)           # (B, H, W, 3) uint8 RGB -> what the network was trained on
    embeddings = model(images)                           # (B, 512)

Every model is a `Backbone`: `forward(x) = embed(forward_features(x))`, so an attention branch can read the last feature map.
"""

from .backbone import Backbone, Preprocessing
from .iresnet import IResNet
from .loading import LoadReport, load_backbone
from .mobilefacenet import MobileFaceNet
from .mobilenet import MobileNetV1, MobileNetV2
from .registry import build_model, model_names
from .tiny import TinyNet

__all__ = [
    "Backbone",
    "IResNet",
    "LoadReport",
    "MobileFaceNet",
    "MobileNetV1",
    "MobileNetV2",
    "Preprocessing",
    "TinyNet",
    "build_model",
    "load_backbone",
    "model_names",
]
