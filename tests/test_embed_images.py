"""From images to embeddings and to a verification result: post-processing forms, input conventions, real faces."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from paths import data_dir
from torch import nn

from recog_fast.evaluation import embed_images, evaluate_bin, post_processing, resize, to_input, verification_result

rng = np.random.default_rng(0)


class Mean(nn.Module):
    """(B, 3, H, W) -> the four corners of channel 0; dropout shows whether eval mode was set."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)
        self.frozen = nn.BatchNorm2d(3).eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        corners: torch.Tensor = self.dropout(self.frozen(x)[:, 0, [0, 0, -1, -1], [0, -1, 0, -1]])
        return corners


def faces(n: int, size: int = 8) -> np.ndarray:
    return rng.integers(0, 256, (n, size, size, 3), dtype=np.uint8)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_embed_images_four_forms(batch_size: int) -> None:
    images = faces(7)
    model = Mean().train()
    model.frozen.eval()
    x = to_input(images)
    corners = x[:, 0, [0, 0, -1, -1], [0, -1, 0, -1]] / (1 + 1e-5) ** 0.5
    both = corners + corners[:, [1, 0, 3, 2]]
    for flip, plain in ((True, both), (False, corners)):
        for normalize in (True, False):
            expected = torch.nn.functional.normalize(plain) if normalize else plain
            got = embed_images(model, images, batch_size, flip, normalize=normalize)
            torch.testing.assert_close(got, expected)
    assert model.training
    assert model.dropout.training
    assert not model.frozen.training
    assert len({post_processing(f, n) for f in (True, False) for n in (True, False)}) == 4


def test_embed_images_generator_mixed_sizes_and_plain_callables() -> None:
    images = [faces(1, size)[0] for size in (8, 8, 16, 8)]
    got = embed_images(lambda x: x.mean((2, 3)), (i for i in images), batch_size=2, flip=False)
    expected = np.stack([(i / 255 - 0.5).mean((0, 1)) / 0.5 for i in images])
    np.testing.assert_allclose(got, expected, atol=1e-5)
    got.add_(1)  # not an inference tensor


def test_to_input_conventions() -> None:
    image = np.zeros((1, 2, 2, 3), dtype=np.uint8)
    image[..., 0] = 255
    assert to_input(image)[0, :, 0, 0].tolist() == [1, -1, -1]
    assert to_input(image, bgr=True)[0, :, 0, 0].tolist() == [-1, -1, 1]
    assert to_input(image, mean=(1, 0, 0), std=(2, 1, 1))[0, :, 0, 0].tolist() == [0, 0, 0]


def test_resize() -> None:
    image = faces(1, 12)[0]
    np.testing.assert_array_equal(resize(image, 12), image)
    half = resize(image, 6)
    assert half.shape == (6, 6, 3)
    assert half.dtype == np.uint8
    assert abs(half.mean() - image.mean()) < 8
    np.testing.assert_array_equal(resize(np.full((9, 7, 3), 255, np.uint8), 16), np.full((16, 16, 3), 255, np.uint8))


def test_a_model_with_its_own_preprocessing_is_asked() -> None:
    model = nn.Flatten()
    images = faces(2)
    plain = embed_images(model, images, flip=False)
    model.preprocessing = lambda x: x.permute(0, 3, 1, 2).float()
    own = embed_images(model, images, flip=False)
    torch.testing.assert_close(plain, (own / 255 - 0.5) / 0.5)
    torch.testing.assert_close(embed_images(model, images, flip=False, prepare=to_input), plain)


def test_evaluate_bin_from_memory_file_and_bytes(tmp_path: Path) -> None:
    people = faces(20, 8)
    same = [i % 2 == 0 for i in range(40)]
    images = [im for i in range(40) for im in (people[i % 20], people[i % 20] if same[i] else people[(i + 3) % 20])]
    model: Callable[[torch.Tensor], torch.Tensor] = lambda x: x.flatten(1)  # noqa: E731
    result = evaluate_bin(model, (images, same), folds=5)
    assert result.accuracy == 1.0
    assert result.eer == 0.0
    assert result.form == "flip summed, feature norm removed"
    encoded = [im.tobytes() for im in images]

    def read(path: str | Path) -> tuple[list[bytes], list[bool]]:
        assert str(path).endswith("x.bin")
        return encoded, same

    def decode(data: bytes) -> np.ndarray:
        return np.frombuffer(data, np.uint8).reshape(8, 8, 3)

    again = evaluate_bin(model, tmp_path / "x.bin", read=read, decode=decode, folds=5, size=8)
    np.testing.assert_array_equal(again.scores, result.scores)
    black = evaluate_bin(model, (images, same), degrade=np.zeros_like, folds=5)
    assert black.accuracy == 0.5
    assert black.eer == 0.5
    json.dumps(result.summary())
    assert result.summary()["pairs"] == {"genuine": 20, "impostor": 20}


# ---- real faces


def test_real_embeddings_of_lfw_fold_5() -> None:
    case = np.load(data_dir() / "embeddings" / "lfw_fold05_mobilefacenet128.npz")
    a, b, same = case["a"], case["b"], case["same"]
    found = {k: verification_result(case[k][a], case[k][b], same) for k in ("clean", "down16", "down8", "down4")}
    accuracies = [r.accuracy for r in found.values()]
    assert accuracies == sorted(accuracies, reverse=True)
    # Measured: 0.9867, 0.8183, 0.6233, 0.5683.
    assert found["clean"].accuracy > 0.98
    assert found["clean"].tar[1] > 0.98
    assert found["down4"].accuracy < 0.6


def test_pixels_on_the_real_pair_file() -> None:
    pytest.importorskip("PIL")
    from recog_fast import data

    def centred(x: torch.Tensor) -> torch.Tensor:
        return (x - x.mean((2, 3), keepdim=True)).flatten(1)

    path = data_dir() / "lfw112" / "lfw_fold05.bin"
    result = evaluate_bin(centred, path, read=data.read_bin, decode=data.decode_image, size=16)
    assert result.same.sum() == 300
    # Better than chance, far from a trained network: cosines of 16x16 pixels.
    assert 0.5 < result.accuracy < 0.7
    assert 0.3 < result.eer < 0.5


# ---- bad input

IMAGES = np.zeros((4, 8, 8, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: embed_images(nn.Flatten(), IMAGES[:0]), "at least one image"),
        (lambda: embed_images(nn.Flatten(), IMAGES, 0), "batch_size >= 1"),
        (lambda: embed_images(nn.Flatten(), IMAGES[..., :2]), r"\(H, W, 3\), got \(8, 8, 2\) for image 0"),
        (lambda: embed_images(lambda x: x, IMAGES), r"outputs of shape \(4, D\)"),
        (lambda: embed_images(lambda x: x.flatten(1) / 0, IMAGES), "non-finite row for image 0"),
        (lambda: evaluate_bin(nn.Flatten(), "lfw.bin"), "expected read"),
        (lambda: evaluate_bin(nn.Flatten(), (IMAGES, [True])), "2 images per pair = 2, got 4"),
        (lambda: evaluate_bin(nn.Flatten(), ([b"x"] * 4, [True, False]), folds=2), "expected decode"),
        (lambda: evaluate_bin(nn.Flatten(), (IMAGES, [True, True])), "no impostor one"),
    ],
)
def test_bad_input_is_a_clear_error(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_wrong_dtype_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="uint8 images, got dtype float64 for image 0"):
        embed_images(nn.Flatten(), np.zeros((1, 8, 8, 3)))  # type: ignore[arg-type]
