"""Pictures of images for the report: data URIs, strips, galleries of the pairs a model is surest and least sure
of."""

from __future__ import annotations

import base64
import importlib.util
import io
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from recog_fast.evaluation._arrays import IntArray
from recog_fast.evaluation.embed import VerificationResult

Image = NDArray[np.uint8]  # (H, W, 3) RGB


@dataclass(frozen=True)
class GalleryItem:
    """One picture (H, W, 3) uint8 RGB with a caption and a second line; `tone` marks a right or a wrong decision."""

    image: Image
    caption: str
    detail: str = ""
    tone: Literal["", "right", "wrong"] = ""


@dataclass(frozen=True)
class Gallery:
    """A titled group of pictures; `note` says how they were chosen. A page sets wide ones in fewer columns."""

    title: str
    note: str
    items: Sequence[GalleryItem]


def png_data_uri(image: Image) -> str:
    """(H, W, 3) uint8 RGB -> a PNG data URI, lossless. Written out (signature, IHDR, IDAT, IEND): needs no image
    library.

    Raises ValueError for another shape or dtype.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"png_data_uri: expected image uint8 of shape (H, W, 3), got {image.dtype} {image.shape}")
    height, width, _ = image.shape
    # Filter 1 (difference to the pixel on the left) halves the size of smooth pictures against filter 0.
    left = np.concatenate([np.zeros_like(image[:, :1]), image[:, :-1]], axis=1)
    rows = np.concatenate([np.ones((height, 1), np.uint8), (image - left).reshape(height, -1)], axis=1)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows.tobytes(), 9)) + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + body).decode()


def image_data_uri(image: Image, largest: int = 192, quality: int = 85) -> str:
    """(H, W, 3) uint8 RGB -> a small WebP (or JPEG) data URI, at most `largest` rows high; PNG at its own size where Pillow
    is missing.

    Raises ValueError for another shape or dtype.
    """
    if importlib.util.find_spec("PIL") is None:
        return png_data_uri(image)
    from PIL import Image as Pillow
    from PIL import features

    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"image_data_uri: expected image uint8 of shape (H, W, 3), got {image.dtype} {image.shape}")
    picture = Pillow.fromarray(np.ascontiguousarray(image))
    if picture.height > largest:
        picture = picture.resize((max(1, round(picture.width * largest / picture.height)), largest), Pillow.Resampling.LANCZOS)
    kind = "webp" if features.check("webp") else "jpeg"
    out = io.BytesIO()
    picture.save(out, format=kind, quality=quality)
    return f"data:image/{kind};base64," + base64.b64encode(out.getvalue()).decode()


def strip(images: Sequence[Image]) -> Image:
    """n images (H, W, 3) of one size side by side, (H, n W, 3). Raises ValueError for none, and for sizes that differ."""
    if not images:
        raise ValueError("strip: expected at least one image, got none")
    return np.concatenate(list(images), axis=1)


def pair_galleries(
    images: Sequence[Image],  # 2 P images; 2 i and 2 i + 1 make pair i
    result: VerificationResult,
    count: int = 6,
) -> list[Gallery]:
    """The pairs to look at: same people least alike, different people most alike, and the surest right decisions.

    images: 2 P of (H, W, 3) uint8, those of a pair of one size. Raises ValueError for another number of them than `result` has pairs for.
    """
    if len(images) != 2 * len(result.same):
        raise ValueError(f"pair_galleries: expected {2 * len(result.same)} images, got {len(images)}")
    genuine, impostor = np.flatnonzero(result.same), np.flatnonzero(~result.same)
    genuine = genuine[np.argsort(result.scores[genuine], kind="stable")]
    impostor = impostor[np.argsort(-result.scores[impostor], kind="stable")]
    surest = np.concatenate([genuine[::-1][: count - count // 2], impostor[::-1][: count // 2]])

    def gallery(title: str, note: str, rows: IntArray) -> Gallery:
        return Gallery(title, note, [_pair(images, result, int(row)) for row in rows])

    return [
        gallery("Same person, least alike", "The genuine pairs with the lowest cosines.", genuine[:count]),
        gallery("Different people, most alike", "The impostor pairs with the highest cosines.", impostor[:count]),
        gallery("Surest and right", "Highest cosines of the same person, lowest of different people.", surest),
    ]


def _pair(images: Sequence[Image], result: VerificationResult, row: int) -> GalleryItem:
    same, score = bool(result.same[row]), float(result.scores[row])
    right = (score >= result.threshold) == same
    return GalleryItem(
        strip([images[2 * row], images[2 * row + 1]]),
        "same person" if same else "different people",
        f"cosine {score:.2f}".replace("-", "\N{MINUS SIGN}"),
        "right" if right else "wrong",
    )
