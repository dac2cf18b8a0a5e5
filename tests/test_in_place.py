"""Batches decoded in place: the pixels are those of decoding, resizing and mirroring image by image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from recog_fast.data import CorruptImage, FolderDataset, RecordDataset, SkipCorrupt, resize_image, write_identities
from recog_fast.data.images import read_many


@pytest.mark.parametrize("side", [16, 20])
def test_reading_into_memory_gives_the_same_pixels(tmp_path: Path, side: int) -> None:
    """JPEG of the size wanted decode in place, everything else by `decode_image` and `resize_image`: grey, CMYK, PNG, other sides,
    a JPEG of as many pixels in another shape; both mirrorings (16 x 3 bytes are whole words of eight, 20 x 3 are not)."""
    rng = np.random.default_rng(0)
    cases = [("JPEG", "RGB", (16, 16)), ("JPEG", "L", (20, 20)), ("JPEG", "CMYK", (16, 16)), ("PNG", "RGB", (20, 20)),
             ("JPEG", "RGB", (8, 32)), ("JPEG", "RGB", (20, 20)), ("JPEG", "RGB", (40, 40)), ("JPEG", "RGB", (4, 4))]  # fmt: skip
    for k, (kind, mode, (height, width)) in enumerate(cases):
        folder = tmp_path / f"p{k}"
        folder.mkdir()
        picture = PIL.Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).convert(mode)
        picture.save(folder / f"{k}.{kind.lower()}", kind)
    dataset = FolderDataset(tmp_path)
    write_identities(tmp_path / "all.rec", [(k, dataset.encoded(k)[0]) for k in range(len(cases))])
    for source in (dataset, RecordDataset(tmp_path / "all.rec")):
        for mirror in (False, True):
            out = np.empty((len(cases), side, side, 3), np.uint8)
            labels = read_many(source, range(len(cases)), list(out), [mirror] * len(cases))
            expected = np.stack([resize_image(image, side) for image, _ in source])
            assert np.array_equal(out, expected[:, :, ::-1] if mirror else expected) and labels == list(range(len(cases)))
    (tmp_path / "p5" / "5.jpeg").write_bytes(dataset.encoded(5)[0][:300])
    with pytest.raises(CorruptImage, match=r"5\.jpeg \(index 5\)"):
        read_many(dataset, [4, 5], list(out[:2]), [False, False])
    skipping = SkipCorrupt(dataset, tmp_path / "quarantine.jsonl")
    assert read_many(skipping, [4, 5], list(out[:2]), [False, True]) == [4, 6] and len(skipping.corrupt()) == 1
    assert np.array_equal(out[1], resize_image(dataset[6][0], side)[:, ::-1])
