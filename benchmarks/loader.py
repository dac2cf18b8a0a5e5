"""What a data worker costs beside decoding: the training loader's workers against pure decoding of the same images.

python -m benchmarks.loader train.rec          # your own .rec
python -m benchmarks.loader train.rec --store  # and keeps the table in results/<device>/loader.json and loader.md
python -m benchmarks.loader                    # 400 images made on the spot

Inside every worker blocks of batches take turns: eight are loaded (all a worker does for them: index, read, decode, augment, send, wake
up), then the same images are decoded by one bare `simplejpeg.decode_jpeg(data, "RGB")` each, the bytes already in memory. Both
are CPU time of the same process over the same bytes, so other work on the machine touches both; the share is the median of the
blocks' ratios. "decode_image" is this package's decoder, which looks at the header first.
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from recog_fast.data import (
    Augmentation,
    RecordDataset,
    SyntheticIdentities,
    convert_dataset,
    decode_image,
    write_identities,
)
from recog_fast.training.batches import StepImages, as_it_is
from recog_fast.training.config import DataConfig, TrainConfig
from recog_fast.training.data import TrainingImages, step_loader

from . import machine

BLOCK = 8  # batches
AUGMENTATIONS = {
    "none": Augmentation(flip=0.0),
    "flip (default)": Augmentation(),
    "QAFace (crop, low resolution 0.2 each)": Augmentation(crop=0.2, low_resolution=0.2),
    "everything at 0.2": Augmentation(
        affine=0.2, crop=0.2, light=0.2, occlusion=0.2, motion=0.2, blur=0.2, low_resolution=0.2
    ),
}


def made(folder: Path, people: int = 40) -> Path:
    """A small .rec of drawn people, 112 x 112 JPEG."""
    import PIL.Image

    def encoded(image: Any) -> bytes:
        buffer = io.BytesIO()
        PIL.Image.fromarray(image).save(buffer, "JPEG", quality=95)
        return buffer.getvalue()

    drawn = SyntheticIdentities(num_identities=people, images_per_identity=10, size=112)
    images = (drawn[i] for i in range(len(drawn)))
    write_identities(folder / "made.rec", ((label, encoded(image)) for image, label in images))
    return folder / "made.rec"


def _cpu_seconds(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


class Probe(StepImages):
    """Training images whose worker also decodes every block of batches alone; `times` (workers, blocks, 3) of seconds of CPU a
    block: loading, bare decoding, decode_image. The first block warms up: imports, first pages."""

    def __init__(self, images: TrainingImages, pool: Any, workers: int, blocks: int) -> None:
        super().__init__(images, pool)
        self.source: Any = images.splits[0]
        self.times = torch.zeros(workers, blocks, 3, dtype=torch.float64).share_memory_()
        self.block, self.began, self.keys = -1, time.process_time(), list[tuple[int, int]]()
        self.batches = 0

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> Any:
        if self.batches == BLOCK:
            self._finish(time.process_time() - self.began)
        self.batches += 1
        self.keys += keys
        return super().__getitems__(keys)

    def _finish(self, loading: float) -> None:
        split = self.source
        data = [split.source.encoded(int(split.indices[i]))[0] for _, i in self.keys]
        worker = torch.utils.data.get_worker_info()
        if 0 <= self.block < self.times.shape[1]:
            self.times[worker.id if worker else 0, self.block] = torch.tensor([loading, *self._decoding(data)])
        self.block, self.batches = self.block + 1, 0
        self.keys.clear()
        del data
        self.began = time.process_time()

    def _decoding(self, data: list[bytes]) -> list[float]:
        import simplejpeg  # type: ignore[import-untyped, unused-ignore]

        def bare() -> None:
            for encoded in data:
                simplejpeg.decode_jpeg(encoded, "RGB")

        def whole() -> None:
            for encoded in data:
                decode_image(encoded)

        return [_cpu_seconds(bare), _cpu_seconds(whole)]


def measured(kind: str, path: Path, augment: Augmentation, workers: int, blocks: int = 12, rows: int = 64) -> dict[str, Any]:
    """CPU microseconds of an image and the share of the decode rate, medians and quartiles over the blocks of all workers."""
    with tempfile.TemporaryDirectory() as output:
        data = DataConfig(kind=kind, path=str(path), size=112)  # type: ignore[arg-type]
        config = TrainConfig(data=data, augment=augment, batch_size=rows, num_workers=workers, output=output)
        images = TrainingImages(config)
        position, plain = step_loader(images, config, pin_memory=False)
        probe = Probe(images, position.pool, workers, blocks)
        loader: DataLoader[Any] = DataLoader(
            probe, batch_sampler=position, num_workers=workers, prefetch_factor=plain.prefetch_factor,
            collate_fn=as_it_is, persistent_workers=True, generator=torch.Generator(),
        )  # fmt: skip
        while not bool((probe.times[:, -1] > 0).all()):
            for _ in position.track(loader):
                pass
    times = probe.times.reshape(-1, 3).numpy()
    per_image = np.median(times, axis=0) / (rows * BLOCK) * 1e6
    shares = np.quantile(times[:, 1:] / times[:, :1], [0.25, 0.5, 0.75], axis=0)
    return {
        "blocks": len(times), "loading_us": round(float(per_image[0]), 1), "decode_us": round(float(per_image[1]), 1),
        "images_a_second": round(1e6 / float(per_image[0])),
        "share_of_bare_decoding": [round(float(v), 3) for v in shares[:, 0]],
        "share_of_decode_image": [round(float(v), 3) for v in shares[:, 1]],
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| source | augmentation | workers | us an image | of them decoding | images/s a worker | share of bare decoding (quartiles) | of decode_image |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        low, middle, high = row["share_of_bare_decoding"]
        lines.append(
            f"| {row['source']} | {row['augmentation']} | {row['workers']} | {row['loading_us']} | {row['decode_us']} | "
            f"{row['images_a_second']} | **{middle:.0%}** ({low:.0%} to {high:.0%}) | {row['share_of_decode_image'][1]:.0%} |"
        )
    return "\n".join(lines)


def main(rec: Path, workers: Sequence[int], blocks: int, place: Path) -> list[dict[str, Any]]:
    """Every augmentation from the .rec, and the same images from a folder and a tar with the default one."""
    source = RecordDataset(rec, decode=False)
    cases = [("rec", rec, name, count) for count in workers for name in AUGMENTATIONS]
    for kind, target in (("folder", place / "folder"), ("tar", place / "images.tar")):
        convert_dataset(source, target, kind, verify=False)
        cases.append((kind, target, "flip (default)", workers[0]))
    rows = []
    for kind, path, name, count in cases:
        found = {"source": kind, "augmentation": name, "workers": count, **measured(kind, path, AUGMENTATIONS[name], count, blocks)}
        rows.append(found)
        print(table([found]).splitlines()[-1], flush=True)
    return rows


def store(rows: list[dict[str, Any]], images: int, size: int) -> Path:
    """results/<device>/loader.json and loader.md."""
    folder = machine.RESULTS / machine.slug()
    folder.mkdir(parents=True, exist_ok=True)
    content = {"environment": machine.describe(), "commit": machine.commit(), "images": images, "bytes": size, "rows": rows}
    (folder / "loader.json").write_text(json.dumps(content, indent=1) + "\n")
    head = f"{images} images, {size // images} bytes an image, batches of 64; CPU time (benchmarks/loader.py)"
    (folder / "loader.md").write_text(f"# The training loader's workers\n\n{head}\n\n{table(rows)}\n")
    return folder / "loader.md"


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("rec", nargs="?", type=Path)
    parser.add_argument("--blocks", type=int, default=12, help="of eight batches a worker")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--store", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        rec = options.rec or made(Path(scratch))
        found = main(rec, options.workers, options.blocks, Path(scratch))
        if options.store:
            print(store(found, len(RecordDataset(rec)), rec.stat().st_size))
