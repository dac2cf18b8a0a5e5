"""What a data worker costs beside decoding, in CPU time (wall time would measure the machine's other work).

python -m benchmarks.loader train.rec          # the same table for your own .rec
python -m benchmarks.loader                    # 400 images made on the spot
"""

from __future__ import annotations

import gc
import resource
import sys
import tempfile
import time
from pathlib import Path

from recog_fast.data import Augmentation, RecordDataset, SyntheticIdentities, decode_image, write_identities
from recog_fast.training.config import DataConfig, TrainConfig
from recog_fast.training.data import TrainingImages, step_loader


def made(folder: Path, people: int = 40) -> Path:
    """A small .rec of drawn people, 112 x 112 JPEG."""
    import io

    import PIL.Image

    def encoded(image: object) -> bytes:
        buffer = io.BytesIO()
        PIL.Image.fromarray(image).save(buffer, "JPEG", quality=95)  # type: ignore[arg-type]
        return buffer.getvalue()

    drawn = SyntheticIdentities(num_identities=people, images_per_identity=10, size=112)
    write_identities(
        folder / "made.rec", ((label, encoded(image)) for image, label in (drawn[i] for i in range(len(drawn))))
    )
    return folder / "made.rec"


def decoding(rec: Path, count: int = 2000) -> float:
    """CPU seconds of decoding one image, in one process."""
    raw = RecordDataset(rec, decode=False)
    data = [raw[i % len(raw)][0] for i in range(count)]
    decode_image(data[0])
    began = time.process_time()
    for encoded in data:
        decode_image(encoded)
    return (time.process_time() - began) / count


def working(rec: Path, workers: int, flip: float, epochs: int) -> tuple[float, float, int]:
    """(user, system CPU seconds of the workers, images) over whole epochs."""
    with tempfile.TemporaryDirectory() as output:
        config = TrainConfig(
            data=DataConfig(kind="rec", path=str(rec), size=112),
            augment=Augmentation(flip=flip),
            batch_size=64,
            num_workers=workers,
            output=output,
        )
        position, loader = step_loader(TrainingImages(config), config, pin_memory=False)
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        count = sum(len(batch.samples) for _ in range(epochs) for batch in position.track(loader))
        loader._iterator = None
        del loader
        gc.collect()
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime, count


def main(rec: Path) -> None:
    """The table; the cost of starting workers is taken out by the difference of two lengths."""
    alone = decoding(rec)
    print(f"decoding alone: {alone * 1e6:.0f} us of CPU an image, {1 / alone:.0f} images a second")
    for workers in (1, 2):
        for flip in (0.0, 0.5):
            short, long = (working(rec, workers, flip, epochs) for epochs in (1, 4))
            user, system = ((b - a) / (long[2] - short[2]) for a, b in zip(short[:2], long[:2], strict=True))
            print(
                f"{workers} workers, flip {flip}: {user * 1e6:.0f} us of user and {system * 1e6:.0f} us of system time an image, "
                f"{1 / (user + system):.0f} images a second and worker; {alone / (user + system):.0%} of the decode rate, "
                f"{alone / user:.0%} without the system's share"
            )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as place:
            main(made(Path(place)))
