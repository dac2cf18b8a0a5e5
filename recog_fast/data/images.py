"""Encoded images to uint8 RGB arrays, and the base of every dataset that decodes them."""

from __future__ import annotations

import functools
import io
import operator
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

Image = NDArray[np.uint8]

# Above these a file is refused as corrupt: a few forged header bytes must not be able to ask for gigabytes.
MAX_PIXELS = 1 << 26
MAX_ENCODED_BYTES = 1 << 28
# The best the codecs do, on flat images: PNG's deflate packs 1032 bytes of eight 1-bit pixels into one, JPEG an 8x8 block
# into a bit.
_PIXELS_PER_BYTE, _PIXELS_PER_JPEG_BYTE = 8 * 1032, 8 * 64
_FEW_PIXELS = 1 << 16


_FORMATS = (
    (b"\xff\xd8", "JPEG", ".jpg"), (b"\x89PNG", "PNG", ".png"), (b"GIF8", "GIF", ".gif"), (b"BM", "BMP", ".bmp"),
    (b"RIFF", "WebP", ".webp"), (b"II*\0", "TIFF", ".tif"), (b"MM\0*", "TIFF", ".tif"),
    *((b"P%d" % k, "PNM", ".pgm") for k in range(1, 7)),
)  # fmt: skip


def image_format(data: bytes) -> tuple[str, str]:
    """(name, file suffix) of an encoded image by its first bytes; "unknown" for none of them, with a suffix that every source looks for:
    what decodes an image goes by its bytes, and an image that nobody can decode must not get lost in a conversion."""
    return next(((name, suffix) for magic, name, suffix in _FORMATS if data.startswith(magic)), ("unknown", ".jpg"))


class CorruptImage(ValueError):
    """An image that cannot be read or decoded; `.source` names the file or record, `.index` its place in the dataset
    (-1: none)."""

    def __init__(self, source: str, index: int = -1, reason: str = "") -> None:
        # torch rebuilds a worker's exception from its message alone: that then comes as `source`.
        text = f"decode_image: expected a readable image, got {reason} in {source} (index {index})"
        super().__init__(text if reason else source)
        self.source, self.index, self.reason = source, index, reason

    def __reduce__(self) -> tuple[Any, ...]:
        # DataLoader workers send exceptions through pickle.
        return type(self), (self.source, self.index, self.reason)


def decode_image(data: bytes, source: str = "bytes", index: int = -1) -> Image:
    """Decode JPEG, PNG, PGM, BMP, ... -> (H, W, 3) uint8 RGB.

    JPEG goes through simplejpeg (bit-identical to Pillow, twice as fast), everything else and what it refuses through
    Pillow. Grey, palette and 1-bit images are spread over three channels; alpha is dropped; 16-bit grey keeps its high
    byte; EXIF rotation is ignored. Raises CorruptImage for anything else, above 2^26 pixels, and for more pixels than so
    few bytes can hold.
    """
    if not data:
        raise CorruptImage(source, index, "0 bytes")
    if data[:2] == b"\xff\xd8":
        image = _decode_jpeg(data, source, index)
        if image is not None:
            return image
    return _decode_pillow(data, source, index)


def _decode_jpeg(data: bytes, source: str, index: int) -> Image | None:
    """The image, or None where simplejpeg is absent or refuses (CMYK, warnings): Pillow then decides."""
    try:
        import simplejpeg  # type: ignore[import-untyped, unused-ignore]
    except ImportError:
        return None
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
        _check_size(width, height, len(data), _PIXELS_PER_JPEG_BYTE, source, index)
        if colorspace in ("CMYK", "YCCK"):
            return None
        image: Image = simplejpeg.decode_jpeg(data, colorspace="RGB")
        return image
    except CorruptImage:
        raise
    except ValueError:
        return None


def _check_size(width: int, height: int, size: int, per_byte: int, source: str, index: int) -> None:
    """Refuse a header that asks for more memory than its file can fill, before anything is taken."""
    if width * height > min(MAX_PIXELS, max(_FEW_PIXELS, per_byte * size)):
        raise CorruptImage(source, index, f"{width} x {height} pixels in {size} bytes")


def _decode_pillow(data: bytes, source: str, index: int) -> Image:
    import PIL.Image

    try:
        with PIL.Image.open(io.BytesIO(data)) as opened:
            width, height = opened.size
            per_byte = _PIXELS_PER_JPEG_BYTE if opened.format == "JPEG" else _PIXELS_PER_BYTE
            _check_size(width, height, len(data), per_byte, source, index)
            if opened.mode.startswith("I;16"):
                high = (np.asarray(opened).astype(np.uint16) >> 8).astype(np.uint8)
                return np.repeat(high[:, :, None], 3, axis=2)
            return np.array(opened.convert("RGB"))
    except CorruptImage:
        raise
    except PIL.UnidentifiedImageError as error:
        raise CorruptImage(source, index, "no image file of a known format") from error
    except Exception as error:  # on broken files Pillow's plug-ins raise almost any type
        raise CorruptImage(source, index, f"{type(error).__name__}: {error}") from error


@functools.cache
def _jpeg_decoder() -> Any:
    """simplejpeg.decode_jpeg, None where it is not installed."""
    try:
        import simplejpeg
    except ImportError:
        return None
    return simplejpeg.decode_jpeg


def _jpeg_components(data: bytes | memoryview) -> int:
    """Colour components by a JPEG's frame header, 0 where there is none: simplejpeg's own header costs three times as much."""
    at, last = 2, len(data) - 10
    while at <= last and data[at] == 0xFF:
        marker = data[at + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return data[at + 9]
        at += 2 + (data[at + 2] << 8) + data[at + 3]
    return 0


def decode_jpeg_into(data: bytes | memoryview, out: Image, mirror: bool = False) -> bool:
    """Decode a JPEG of exactly out's (H, W, 3) into it, left and right swapped with `mirror`; the pixels of `decode_image`.

    False, and anything in `out`, for whatever else: another size or format, CMYK, a broken file, no simplejpeg. Nothing is
    allocated by what the file's header says.
    """
    decode = _jpeg_decoder()
    if decode is None or len(data) < 2 or data[0] != 0xFF or data[1] != 0xD8:
        return False
    if _jpeg_components(data) not in (1, 3):
        return False  # CMYK is Pillow's
    try:
        if not mirror:
            return bool(decode(data, "RGB", buffer=out).shape == out.shape)
        # Reversing the bytes of a row of B, G, R gives the mirrored row in R, G, B; eight bytes at a time, a sixth of the cost of
        # whole pixels.
        turned: Image = decode(data, "BGR", buffer=np.empty_like(out))
        if turned.shape != out.shape:
            return False
        words = (">u8", "<u8") if out.shape[1] % 8 == 0 else ("u1", "u1")
        out.reshape(len(out), -1).view(words[1])[...] = turned.reshape(len(out), -1).view(words[0])[:, ::-1]
        return True
    except ValueError:
        return False


def put_image(image: Image, out: Image, mirror: bool = False) -> None:
    """`image`, resized to out's sides by `resize_image` and mirrored, into `out` (H, W, 3)."""
    resized = resize_image(image, (out.shape[0], out.shape[1]))
    out[...] = resized[:, ::-1] if mirror else resized


def read_many(dataset: Any, indices: Sequence[int], rows: Sequence[Image], mirrored: Sequence[bool]) -> list[int]:
    """Images `indices` (N,) of any dataset of (image, label), resized to the sides of `rows`, N arrays (H, W, 3), and
    mirrored where wanted, into these; returns the labels.

    The pixels are those of `put_image(dataset[index][0], row, mirror)`; sources with a `read_many` of their own decode in
    place. Raises CorruptImage for the first image that cannot be read; rows may then hold anything.
    """
    own = getattr(dataset, "read_many", None)
    if own is not None:
        found: list[int] = own(indices, rows, mirrored)
        return found
    labels = []
    for index, row, mirror in zip(indices, rows, mirrored, strict=True):
        image, label = dataset[index]
        put_image(image, row, mirror)
        labels.append(int(label))
    return labels


def resize_image(image: Image, size: int | tuple[int, int]) -> Image:
    """Resize (H, W, 3) uint8 to (size, size) or size = (height, width): box mean where both sides shrink, bilinear
    otherwise.

    Raises ValueError for a size below 1.
    """
    height, width = (size, size) if isinstance(size, int) else size
    if height < 1 or width < 1:
        raise ValueError(f"resize_image: expected size >= 1, got {size}")
    if image.shape[:2] == (height, width):
        return image
    import PIL.Image

    shrinks = height <= image.shape[0] and width <= image.shape[1]
    method = PIL.Image.Resampling.BOX if shrinks else PIL.Image.Resampling.BILINEAR
    return np.array(PIL.Image.fromarray(image).resize((width, height), method))


def images_to_tensor(images: Image) -> Tensor:
    """(H, W, 3) or (N, H, W, 3) uint8 -> (3, H, W) or (N, 3, H, W) float32 in [-1, 1]: (x / 255 - 0.5) / 0.5
    (InsightFace's input).

    Raises ValueError for another shape or dtype.
    """
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or images.shape[-1] != 3:
        raise ValueError(
            f"images_to_tensor: expected images (H, W, 3) or (N, H, W, 3) uint8, got {images.shape} {images.dtype}"
        )
    channels_first = np.ascontiguousarray(np.moveaxis(images, -1, -3))
    return (torch.from_numpy(channels_first).float() / 255.0 - 0.5) / 0.5


class LabelledImages(Protocol):
    """What every dataset of this package offers."""

    @property
    def num_classes(self) -> int: ...

    @property
    def paths(self) -> Sequence[str]: ...

    @property
    def labels(self) -> NDArray[np.int64]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Any, int]: ...


class EncodedDataset(Dataset[tuple[Any, int]]):
    """A dataset of encoded images: subclasses give `encoded(i) -> (bytes, label)`, `source(i) -> name for errors` and
    `__len__`.

    Items are (image (H, W, 3) uint8 RGB, label), with decode=False (bytes, label). A broken image raises CorruptImage.
    """

    decode: bool = True

    def encoded(self, index: int) -> tuple[bytes, int]:
        """The image's file bytes and its label."""
        raise TypeError(f"{type(self).__name__} does not define encoded()")

    def source(self, index: int) -> str:
        """Where image `index` comes from, for messages."""
        raise TypeError(f"{type(self).__name__} does not define source()")

    def __len__(self) -> int:
        raise TypeError(f"{type(self).__name__} does not define __len__()")

    def __getitem__(self, index: int) -> tuple[Any, int]:
        index = checked_index(index, len(self))
        data, label = self.encoded(index)
        return (decode_image(data, self.source(index), index) if self.decode else data), label

    def stored(self, indices: Sequence[int]) -> Iterator[tuple[bytes | memoryview, int]]:
        """`encoded` of several images, for a reader that is done with one before the next: they may lie in the file's memory map."""
        return (self.encoded(index) for index in indices)

    def read_many(self, indices: Sequence[int], rows: Sequence[Image], mirrored: Sequence[bool]) -> list[int]:
        """See `images.read_many`."""
        labels = []
        for index, row, mirror, (data, label) in zip(indices, rows, mirrored, self.stored(indices), strict=True):
            if not decode_jpeg_into(data, row, mirror):
                put_image(decode_image(bytes(data), self.source(index), index), row, mirror)
            labels.append(label)
        return labels

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        return (self[i] for i in range(len(self)))


def checked_index(index: int, length: int) -> int:
    """`index` as 0 <= index < length, negative ones counted from the end; IndexError outside."""
    place = operator.index(index)
    if not -length <= place < length:
        raise IndexError(f"expected an index below {length}, got {index}")
    return place % length
