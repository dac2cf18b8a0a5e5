"""Images to embeddings, and embeddings of pairs to a verification result."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from recog_fast._arguments import is_whole
from recog_fast.evaluation._arrays import BoolArray, FloatArray, booleans, both_kinds, floats, to_numpy, unit_rows
from recog_fast.evaluation.verification import equal_error_rate, tar_at_far, verification_accuracy

Image = NDArray[np.uint8]  # (H, W, 3) RGB
Prepare = Callable[[NDArray[np.uint8]], Tensor]  # (B, H, W, 3) uint8 -> (B, 3, H, W) float32

FARS: tuple[float, ...] = (1e-1, 1e-2, 1e-3)


@dataclass(frozen=True)
class VerificationResult:
    """What one pair set says about one model; `summary()` is the part that goes to JSON.

    accuracy, std   mean and standard deviation over folds of the 10-fold accuracy
    per_fold        (folds,) accuracies
    eer, threshold  equal error rate and the cosine where it is reached
    tar             TAR at each FAR of `fars`, conservative rule
    scores, same    (P,) cosines and labels, for plots and galleries
    form            post-processing of the embeddings, in words (`post_processing`)
    """

    accuracy: float
    std: float
    per_fold: FloatArray
    eer: float
    threshold: float
    fars: tuple[float, ...]
    tar: tuple[float, ...]
    scores: FloatArray
    same: BoolArray
    form: str

    def summary(self) -> dict[str, Any]:
        """Everything but the pairs themselves, as plain JSON values."""
        values = asdict(self)
        values["per_fold"] = self.per_fold.tolist()
        values["tar"] = {f"{far:g}": tar for far, tar in zip(self.fars, self.tar, strict=True)}
        values["pairs"] = {"genuine": int(self.same.sum()), "impostor": int((~self.same).sum())}
        for name in ("fars", "scores", "same"):
            del values[name]
        return values


def post_processing(flip: bool, normalize: bool) -> str:
    """The name of one of the four forms an embedding is delivered in (InsightFace's use_flip_test and
    use_norm_score)."""
    return f"{'flip summed' if flip else 'no flip'}, {'feature norm removed' if normalize else 'feature norm kept'}"


def to_input(
    images: NDArray[np.uint8],  # (B, H, W, 3) RGB
    mean: Sequence[float] = (0.5, 0.5, 0.5),
    std: Sequence[float] = (0.5, 0.5, 0.5),
    bgr: bool = False,
) -> Tensor:
    """(x / 255 - mean) / std as (B, 3, H, W) float32: what the backbones take; `partial` it for other conventions.

    `bgr` reverses the channels after normalising by RGB mean and std (AdaFace checkpoints).
    Raises ValueError for images that are not (B, H, W, 3) uint8, and a mean or std that are not three numbers, std > 0.
    """
    where = "to_input"
    pixels = np.ascontiguousarray(images) if isinstance(images, np.ndarray) else None
    if pixels is None or pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] != 3:
        got = type(images).__name__ if pixels is None else f"{pixels.dtype} {pixels.shape}"
        raise ValueError(f"{where}: expected images (B, H, W, 3) of uint8, got {got}")
    center, spread = (floats(where, name, value, 1) for name, value in (("mean", mean), ("std", std)))
    if len(center) != 3 or len(spread) != 3 or not (spread > 0).all():
        raise ValueError(f"{where}: expected mean and std of three numbers, std > 0, got {center} and {spread}")
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255.0
    x = (x - torch.tensor(center.tolist()).view(1, 3, 1, 1)) / torch.tensor(spread.tolist()).view(1, 3, 1, 1)
    return x.flip(1) if bgr else x


def resize(image: Image, size: int) -> Image:
    """(H, W, 3) uint8 -> (size, size, 3) uint8, bilinear with antialiasing; unchanged where it has that size.

    Raises TypeError for what is no array, ValueError for another shape or dtype and a size outside [1, 2^15].
    """
    if not isinstance(image, np.ndarray):
        raise TypeError(f"resize: expected image as an array (H, W, 3) uint8, got {type(image).__name__}")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"resize: expected image (H, W, 3) uint8, got {image.dtype} {image.shape}")
    if not is_whole(size, 1, 1 << 15):
        raise ValueError(f"resize: expected size as an integer in [1, 2^15], got {size!r:.80}")
    if image.shape[:2] == (size, size):
        return image
    x = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].float()
    x = F.interpolate(x, size=(size, size), mode="bilinear", antialias=True, align_corners=False)
    resized: Image = x[0].permute(1, 2, 0).round().clamp(0, 255).to(torch.uint8).numpy()
    return resized


def _preparation(model: object) -> Prepare:
    """The model's own `preprocessing` (uint8 tensor (B, H, W, 3) -> input) where it has one, else `to_input`."""
    own = getattr(model, "preprocessing", None)
    if not callable(own):
        return to_input

    def prepare(images: NDArray[np.uint8]) -> Tensor:
        x: Tensor = own(torch.from_numpy(np.ascontiguousarray(images)))
        return x

    return prepare


def embed_images(
    model: Callable[[Tensor], Tensor],  # (B, 3, H, W) float32 -> (B, D)
    images: Iterable[Image],  # an (N, H, W, 3) array, a list or a generator of (H, W, 3) uint8
    batch_size: int = 64,
    flip: bool = True,
    device: torch.device | str | None = None,
    *,
    normalize: bool = False,
    prepare: Prepare | None = None,
) -> Tensor:
    """Embeddings (N, D) float32 on the CPU, in the order of `images`.

    The four forms of post-processing (math.md section 6) are the two switches; `post_processing` names them:
    flip=True   f(x) + f(mirrored x)      flip=False   f(x)
    normalize=True   divided by its L2 norm      normalize=False   feature norm kept (templates weigh by it)
    prepare turns uint8 images into the model's input; None: the model's own `.preprocessing` where it has one (the
    backbones of recog_fast.models do), else `to_input`.
    A module runs in eval mode without gradient; every submodule's training flag is put back afterwards. device=None:
    where the module's first parameter lies. Equal sizes make a batch: a change of image size starts a new one.
    Raises TypeError for images that are not uint8, ValueError for shapes other than (H, W, 3), batch_size < 1, no
    images, or a model that gives non-finite or wrongly shaped embeddings.
    """
    where = "embed_images"
    prepare = _preparation(model) if prepare is None else prepare
    if batch_size < 1:
        raise ValueError(f"{where}: expected batch_size >= 1, got {batch_size}")
    module = model if isinstance(model, nn.Module) else None
    if device is None:
        first = next(module.parameters(), None) if module is not None else None
        device = first.device if first is not None else torch.device("cpu")
    modes = [(m, m.training) for m in module.modules()] if module is not None else []
    parts: list[Tensor] = []
    try:
        if module is not None:
            module.eval()
        with torch.inference_mode():
            for batch in _batches(where, images, batch_size):
                x = prepare(batch).to(device)
                y = model(x) + model(x.flip(3)) if flip else model(x)
                if y.ndim != 2 or len(y) != len(batch):
                    raise ValueError(
                        f"{where}: expected model outputs of shape ({len(batch)}, D), got {tuple(y.shape)}"
                    )
                parts.append(y.float().cpu())
    finally:
        for m, training in modes:
            m.training = training
    if not parts:
        raise ValueError(f"{where}: expected at least one image, got none")
    # A copy outside inference mode: the result is an ordinary tensor that autograd and in-place code accept.
    embeddings = torch.cat(parts).clone()
    bad = ~torch.isfinite(embeddings).all(dim=1)
    if bad.any():
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"{where}: expected finite embeddings, got a non-finite row for image {row} ({int(bad.sum())} such rows)"
        )
    return torch.from_numpy(unit_rows(embeddings.double().numpy())).float() if normalize else embeddings


def _batches(where: str, images: Iterable[Image], batch_size: int) -> Iterator[NDArray[np.uint8]]:
    """Stacks of at most `batch_size` images of one size, in order."""
    waiting: list[Image] = []
    for i, image in enumerate(images):
        array = to_numpy(image)
        if array.dtype != np.uint8:
            raise TypeError(
                f"{where}: expected uint8 images, got dtype {array.dtype} for image {i} (decode bytes first)"
            )
        if array.ndim != 3 or array.shape[2] != 3:
            raise ValueError(f"{where}: expected images of shape (H, W, 3), got {array.shape} for image {i}")
        if waiting and (len(waiting) == batch_size or waiting[0].shape != array.shape):
            yield np.stack(waiting)
            waiting = []
        waiting.append(array)
    if waiting:
        yield np.stack(waiting)


def verification_result(
    emb1: ArrayLike | Tensor,  # (P, D)
    emb2: ArrayLike | Tensor,  # (P, D)
    same: ArrayLike | Tensor,  # (P,) bool
    *,
    folds: int = 10,
    fars: Sequence[float] = FARS,
    form: str = "",
) -> VerificationResult:
    """Every number of the 1:1 protocol for embedded pairs: accuracy, EER, TAR at FAR (conservative), cosines as scores.

    emb1, emb2 (P, D), same (P,) bool. Raises what `verification_accuracy` and `tar_at_far` raise.
    """
    mean, std, per_fold = verification_accuracy(emb1, emb2, same, folds)
    a, b = (unit_rows(to_numpy(e).astype(np.float64)) for e in (emb1, emb2))
    mask = booleans("verification_result", "same", same, (len(a),))
    scores: FloatArray = (a * b).sum(axis=1)
    eer, threshold = equal_error_rate(scores, mask)
    targets = floats("verification_result", "fars", fars, 1)
    tar = tuple(float(t) for t in tar_at_far(scores, mask, targets))
    return VerificationResult(
        mean, std, per_fold, eer, threshold, tuple(targets.tolist()), tar, scores, mask, form
    )


def evaluate_bin(
    model: Callable[[Tensor], Tensor],
    pairs: str
    | Path
    | tuple[Sequence[Any], Sequence[bool]],  # a .bin file, or (2 P images, P same); images 2 i and 2 i + 1 make pair i
    *,
    read: Callable[[str | Path], tuple[Sequence[Any], Sequence[bool]]] | None = None,
    decode: Callable[[bytes], Image] | None = None,
    degrade: Callable[[Image], Image] | None = None,
    size: int | None = None,
    batch_size: int = 64,
    flip: bool = True,
    device: torch.device | str | None = None,
    folds: int = 10,
    fars: Sequence[float] = FARS,
    prepare: Prepare | None = None,
) -> VerificationResult:
    """LFW-style verification of a model on an InsightFace `.bin` or on images already in memory.

    read      opens a path: pass `recog_fast.data.read_bin` (a restricted unpickler); needed for a path only
    decode    bytes -> (H, W, 3) uint8 RGB; needed where images are encoded
    degrade   applied to every decoded image, e.g. down to 8x8 and back
    size      input size of the network: images of another size are resized, after `degrade`
    prepare   as in `embed_images`
    Raises ValueError for a path without `read`, encoded images without `decode`, or 2 P images that do not match P
    labels, and what `embed_images` and `verification_accuracy` raise.
    """
    where = "evaluate_bin"
    if isinstance(pairs, (str, Path)):
        if read is None:
            raise ValueError(f"{where}: expected read (e.g. recog_fast.data.read_bin) to open {pairs}, got None")
        pairs = read(pairs)
    images, labels = pairs
    same = booleans(where, "same", np.asarray(labels), (len(labels),))
    if len(images) != 2 * len(same):
        raise ValueError(
            f"{where}: expected 2 images per pair = {2 * len(same)}, got {len(images)} images for {len(same)} pairs"
        )
    both_kinds(where, same)

    def ready(image: Any) -> Image:
        if isinstance(image, (bytes, bytearray, memoryview)):
            if decode is None:
                raise ValueError(f"{where}: expected decode for encoded images, got None")
            image = decode(bytes(image))
        image = degrade(image) if degrade is not None else image
        return resize(image, size) if size is not None else image

    embeddings = embed_images(model, map(ready, images), batch_size, flip, device, prepare=prepare)
    return verification_result(
        embeddings[0::2], embeddings[1::2], same, folds=folds, fars=fars, form=post_processing(flip, True)
    )
