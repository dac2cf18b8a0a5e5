"""`make demo`: drawn people, two minutes of training through the native kernels, and a page that shows how it went.

    recog-fast demo                                # runs/demo/report.html and results.json
    recog-fast demo --quick                        # a run of seconds that only shows that every part works
    recog-fast demo --identities 1000 --epochs 12 --output runs/larger

Three groups of people that share no one: the network trains on the first, the accuracy curve comes from the second, the
numbers of the report from the third, at full size and taken down to 16x16 and 8x8 and up again. The same network before
training stands beside every number.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

import recog_fast as rf
from recog_fast import data as sources
from recog_fast import evaluation
from recog_fast.evaluation import Gallery, GalleryItem, strip
from recog_fast.recognizability import RecognizabilityModel
from recog_fast.sharding import one_process
from recog_fast.terminal.console import only_json, print_json
from recog_fast.training.config import DataConfig, RecognizabilityConfig, TrainConfig
from recog_fast.training.data import TrainingImages
from recog_fast.training.demo_quality import quality_report
from recog_fast.training.demo_size import Size, size_of
from recog_fast.training.findings import Findings
from recog_fast.training.loop import train
from recog_fast.training.measure import Network, confusions, measure_pairs
from recog_fast.training.methods import apply_method
from recog_fast.training.model import build_backbone
from recog_fast.training.run_report import FINDINGS, costs, environment, report_run, versions
from recog_fast.training.saved import load_quality_model, load_run
from recog_fast.training.unknown import max_probabilities, unknown_statistics
from recog_fast.training.verification import PairSet

Images = NDArray[np.uint8]  # (N, S, S, 3)
Results = dict[str, evaluation.VerificationResult]

# Test people are numbered from here, unlabelled ones beyond: no training set is that large.
FIRST_TEST_IDENTITY = 1 << 20
FIRST_STRANGER = 1 << 21
FOLDS = 10
# Name -> size the pictures are taken down to and up again; 0: not at all.
CONDITIONS = {"full size": 0, "16x16": 16, "8x8": 8}


@dataclass(frozen=True)
class TestSet:
    """Drawn people the network never sees, as pairs: pair k is images first[k], second[k]."""

    images: Images
    first: NDArray[np.int64]  # (P,)
    second: NDArray[np.int64]  # (P,)
    same: NDArray[np.bool_]  # (P,)
    people: int
    quality: NDArray[np.float32]  # (N,) of the drawing
    sharpest: NDArray[np.int64]  # a picture each of six people, of the best true quality

    @property
    def owners(self) -> NDArray[np.int64]:
        """(N,) whose picture each is."""
        return np.repeat(np.arange(self.people), len(self.images) // self.people)

    @property
    def pairs(self) -> PairSet:
        """As the training script's verification has them."""
        return PairSet("drawn people", list(self.images), self.first, self.second, self.same)


def run(options: argparse.Namespace) -> int:
    """Runs the demo; returns 0, also when a signal stopped the training, which leaves no report.

    Raises ImportError at once, not after the training, where matplotlib is missing.
    """
    one_process("demo")
    evaluation.require_plots()
    size, seed = size_of(options), options.seed
    config = demo_config(size, options.output, seed, options.threads)
    if options.threads:
        torch.set_num_threads(options.threads)
    # Only what an earlier demo wrote: the training script refuses to start over beside old checkpoints.
    shutil.rmtree(Path(config.output) / "checkpoints", ignore_errors=True)
    began = time.monotonic()
    with only_json(options.json):
        print(f"demo: drawing {size.test_identities} test people", flush=True)
        test = draw_test_set(size, seed)
        torch.manual_seed(seed)
        untrained = evaluate(build_backbone(config), test)
        trained = train(config)
    if not trained.finished:
        print(f"recog-fast demo: stopped by a signal at step {trained.step}; no report", file=sys.stderr)
        if options.json:
            print_json({"finished": False, "step": trained.step, "output": options.output, "report": None})
        return 0
    with only_json(options.json):
        model, _ = load_quality_model(config.output)
        network = Network(model.backbone, model.branches, 100)
        found = measure_pairs(network, test.pairs, [down for down in CONDITIONS.values() if down], seed, test.owners)
        found.baseline = untrained
        quality = measure_quality(config, model, test, seed)
        found.galleries += galleries(config, test)
        seconds = time.monotonic() - began
        report = write_results(config, size, test, found, quality, seconds)
    if options.json:
        print_json({"finished": True, "report": report, **json.loads((options.output / "results.json").read_text(encoding="utf-8"))})
    else:
        print(_in_words(found.results, untrained, quality, seconds, report))
    return 0


def _in_words(trained: Results, untrained: Results, quality: dict[str, Any], seconds: float, report: Path) -> str:
    lines = [f"{'':20}{'accuracy':>10}{'EER':>8}{'untrained':>12}"]
    lines += [f"{name:20}{result.accuracy:>10.1%}{result.eer:>8.1%}{untrained[name].accuracy:>12.1%}" for name, result in trained.items()]
    fnmr = ", ".join(f"{n} {c['0.0']:.2f} -> {c['0.4']:.2f}" for n, c in quality["fnmr_after_rejecting"].items())
    lines.append(f"FNMR at FMR 1e-2 of the mix, all pairs, then without the worst 40 %: {fnmr}")
    return "\n".join([*lines, f"demo: {seconds:.0f} s; open {report}"])


def demo_config(size: Size, output: Path, seed: int, threads: int = 0) -> TrainConfig:
    """The settings of the training run; `output/training/config.yaml` holds them for `recog-fast train`."""
    drawn = {"num_identities": size.identities + size.holdout, "images_per_identity": size.images, "seed": seed}
    nobody = {
        "num_identities": size.strangers,
        "images_per_identity": size.images // 2,
        "first_identity": FIRST_STRANGER,
        "seed": seed,
    }
    config = TrainConfig(
        method="qaface+uir+ri",
        data=DataConfig(kind="synthetic", size=size.pixels, cache=True, holdout_classes=size.holdout, options=drawn),
        unlabelled=DataConfig(kind="synthetic", size=size.pixels, cache=True, options=nobody),
        # The literal scale 1 makes the prototype almost the sample (docs/math.md 2).
        memory={"inject_scale": 0.176, "start_epoch": size.epochs / 4},
        # The index is learned by a network that already recognises people.
        recognizability=RecognizabilityConfig(ui_images=200, start=size.epochs / 2),
        augment=sources.Augmentation(flip=0.5, crop=0.2, low_resolution=0.2, smallest=8),
        network="tiny",
        embedding_size=size.embedding_size,
        margin={"name": "ArcFace", "m": 0.3},
        margin_ramp=size.epochs / 2,
        scale=32.0,
        batch_size=size.batch_size,
        num_epoch=size.epochs,
        lr=0.1,
        lr_schedule="polynomial_smooth",
        warmup_epoch=size.epochs / 16,
        num_workers=0,
        num_threads=threads,
        frequent=10,
        keep_last=1,
        seed=seed,
        val_targets=["holdout"],
        val_sizes=[16, 8],
        val_pairs=min(size.test_pairs, 600),
        output=str(output / "training"),
    )
    return apply_method(config)


def draw_test_set(size: Size, seed: int) -> TestSet:
    """Pairs of `size.test_identities` people, ten folds that share no one, half of each the same person."""
    people = sources.SyntheticIdentities(
        size.test_identities, size.images, size=size.pixels, seed=seed, first_identity=FIRST_TEST_IDENTITY
    )
    first, second, same = people.verification_pairs(size.test_pairs, seed=seed, folds=FOLDS)
    best = people.quality.reshape(size.test_identities, size.images).argmax(axis=1)
    sharpest = (np.arange(size.test_identities) * size.images + best)[
        np.linspace(0, size.test_identities - 1, 6).astype(int)
    ]
    images = people.render_all(workers=torch.get_num_threads())
    return TestSet(images, first, second, same, size.test_identities, people.quality, sharpest)


def evaluate(backbone: nn.Module, test: TestSet) -> Results:
    """Verification of the test pairs under every condition; each picture is embedded once (flip sum)."""
    results = {}
    for name, down in CONDITIONS.items():
        images = degraded(test.images, down)
        embeddings = evaluation.embed_images(backbone, images, batch_size=100)
        results[name] = evaluation.verification_result(
            embeddings[test.first],
            embeddings[test.second],
            test.same,
            folds=FOLDS,
            form=evaluation.post_processing(flip=True, normalize=True),
        )
    return results


def measure_quality(
    config: TrainConfig, model: RecognizabilityModel, test: TestSet, seed: int
) -> dict[str, Any]:
    """`quality_report` and what is known of strangers' p_max."""
    levels = {name: degraded(test.images, down) for name, down in CONDITIONS.items()}
    report = quality_report(model, levels, test.owners, test.quality, seed)
    _, backbone, head = load_run(config.output)
    report["strangers"] = unknown_statistics(max_probabilities(backbone, head, test.images, 100), head)
    return report


def degraded(images: Images, down: int) -> Images:
    """Every picture taken down to `down` x `down` and up again; unchanged for 0."""
    return np.stack([sources.degradations.down_up(image, down) for image in images]) if down else images


def galleries(config: TrainConfig, test: TestSet) -> list[Gallery]:
    """What the network confuses and looks at, what it trains on, and what the low resolutions look like."""
    _, backbone, head = load_run(config.output)
    images = TrainingImages(dataclasses.replace(config, data=dataclasses.replace(config.data, cache=False), unlabelled=None))
    options = config.data.options
    each = min(6, options["images_per_identity"])
    people = sources.SyntheticIdentities(12, each, size=config.data.size, seed=options["seed"])
    shown = people.render_all()
    sheet = [GalleryItem(strip(list(shown[each * k : each * (k + 1)])), f"person {k}") for k in range(12)]
    samples = test.images[test.sharpest]
    levels = [GalleryItem(strip(list(degraded(samples, down))), name) for name, down in CONDITIONS.items()]
    return [
        *confusions(Network(backbone), head, images.clean, images.labels, config.seed),
        Gallery("Drawn people", "Pose, light, expression, occlusion, blur and resolution change; the person does not.", sheet),
        Gallery("Three resolutions", "Six sharp test pictures as the network sees them under each condition.", levels),
    ]


def write_results(
    config: TrainConfig, size: Size, test: TestSet, found: Findings, quality: dict[str, Any], seconds: float
) -> Path:
    """Writes results.json, findings.npz and report.html beside the training folder; returns the report's path."""
    output = Path(config.output).parent
    backends = rf.backends()
    numbers: dict[str, Any] = {
        "trained": {name: result.summary() for name, result in found.results.items()},
        "untrained": {name: result.summary() for name, result in found.baseline.items()},
        "quality": quality,
        "seconds": round(seconds, 1),
        "config": dataclasses.asdict(config),
        "backends": backends,
        "versions": versions(),
    }
    partial = output / "results.json.partial"
    partial.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    partial.replace(output / "results.json")
    parameters = sum(p.numel() for p in build_backbone(config).parameters())
    found.title = "recog_fast demo"
    found.summary = (
        f"A network of {parameters / 1e6:.2f} M parameters learned {size.identities:,} drawn people from {size.images} "
        f"pictures of each ({size.pixels}x{size.pixels} pixels), from random weights, and is tested on {test.people} "
        "people it has never seen. It trained margin softmax with a quality-aware memory (QAFace), unlabelled pictures of "
        f"{size.strangers} strangers (UIR) and, from the middle on, a head for the quality of a picture (RI). "
        f"Everything, drawing included, took {_duration(seconds)}."
    )
    _, backbone, head = load_run(config.output)
    found.facts = costs(config, backbone, head, size.identities * size.images) | environment()
    found.save(output / FINDINGS)
    return report_run(output)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} seconds" if seconds < 100 else f"{seconds / 60:.1f} minutes"
