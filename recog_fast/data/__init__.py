"""Sources of labelled images: files of other libraries, folders and lists, synthetic identities; augmentation and
resumable sampling.

Every source is a `torch.utils.data.Dataset` of (image uint8 (H, W, 3) RGB, label int) with `.num_classes`, `.paths`,
`.labels`. Names are imported on first use, so that importing the package costs neither Pillow nor simplejpeg.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import degradations as degradations
    from .archives import TarDataset as TarDataset
    from .archives import ZipDataset as ZipDataset
    from .augment import Augmentation as Augmentation
    from .augment import Augmented as Augmented
    from .bins import read_bin as read_bin
    from .check import DataReport as DataReport
    from .check import check_dataset as check_dataset
    from .check import plot_class_sizes as plot_class_sizes
    from .convert import convert_dataset as convert_dataset
    from .datasets import FolderDataset as FolderDataset
    from .datasets import ListDataset as ListDataset
    from .images import CorruptImage as CorruptImage
    from .images import decode_image as decode_image
    from .images import images_to_tensor as images_to_tensor
    from .images import resize_image as resize_image
    from .mixed import MixedDataset as MixedDataset
    from .mixed import StreamBatches as StreamBatches
    from .names import MadeNames as MadeNames
    from .opening import open_dataset as open_dataset
    from .opening import register_source as register_source
    from .protocols import read_ijb_landmarks as read_ijb_landmarks
    from .protocols import read_ijb_media as read_ijb_media
    from .protocols import read_ijb_pairs as read_ijb_pairs
    from .protocols import read_survface_pairs as read_survface_pairs
    from .protocols import read_tinyface as read_tinyface
    from .record_dataset import RecordDataset as RecordDataset
    from .records import pack_record as pack_record
    from .records import read_records as read_records
    from .records import unpack_record as unpack_record
    from .records import write_identities as write_identities
    from .records import write_records as write_records
    from .sampler import ResumableBatches as ResumableBatches
    from .synthetic import SyntheticIdentities as SyntheticIdentities
    from .wrappers import Resized as Resized
    from .wrappers import SkipCorrupt as SkipCorrupt
    from .wrappers import class_subset as class_subset

_HOME = {
    "Augmentation": "augment",
    "Augmented": "augment",
    "CorruptImage": "images",
    "DataReport": "check",
    "FolderDataset": "datasets",
    "ListDataset": "datasets",
    "MadeNames": "names",
    "MixedDataset": "mixed",
    "RecordDataset": "record_dataset",
    "Resized": "wrappers",
    "ResumableBatches": "sampler",
    "SkipCorrupt": "wrappers",
    "StreamBatches": "mixed",
    "SyntheticIdentities": "synthetic",
    "TarDataset": "archives",
    "ZipDataset": "archives",
    "check_dataset": "check",
    "class_subset": "wrappers",
    "convert_dataset": "convert",
    "decode_image": "images",
    "images_to_tensor": "images",
    "open_dataset": "opening",
    "pack_record": "records",
    "plot_class_sizes": "check",
    "read_bin": "bins",
    "read_ijb_landmarks": "protocols",
    "read_ijb_media": "protocols",
    "read_ijb_pairs": "protocols",
    "read_records": "records",
    "read_survface_pairs": "protocols",
    "read_tinyface": "protocols",
    "register_source": "opening",
    "resize_image": "images",
    "unpack_record": "records",
    "write_identities": "records",
    "write_records": "records",
}

__all__ = ["degradations", *_HOME]


def __getattr__(name: str) -> Any:
    if name == "degradations":
        return importlib.import_module(".degradations", __name__)
    if name in _HOME:
        return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
