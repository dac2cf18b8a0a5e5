"""`report.html` of a training run, from what the run left in its folder.

config.yaml, metrics.jsonl and the last checkpoint are the training's; findings.npz is what `measure_run` found out about the
network, so that the page can be made again where neither data nor weights are.
"""

from __future__ import annotations

import dataclasses
import platform
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import recog_fast as rf
from recog_fast import evaluation
from recog_fast.checkpoint import latest_checkpoint
from recog_fast.counting import Progress
from recog_fast.evaluation import figures, write_report
from recog_fast.evaluation.page import Figure, Tile
from recog_fast.evaluation.report import read_metrics
from recog_fast.training.config import TrainConfig, read_config
from recog_fast.training.data import TrainingImages
from recog_fast.training.findings import Findings
from recog_fast.training.measure import (
    NORM,
    Network,
    condition,
    confusions,
    measure_images,
    measure_pairs,
    verification,
)
from recog_fast.training.methods import apply_method
from recog_fast.training.saved import load_quality_model, load_run
from recog_fast.training.verification import pair_sets

FINDINGS, PAGE = "findings.npz", "report.html"
_SAMPLE = 400  # training pictures looked at where there is no evaluation target
_UNREADABLE = (OSError, ValueError, RuntimeError, KeyError, LookupError, ImportError)


def report_run(path: str | Path, measure: bool | None = None, progress: Progress | None = None) -> Path:
    """Writes RUN/report.html and returns its path.

    measure  True: measure the last checkpoint's network now; False: only what is stored; None: measure where nothing newer
             than the last checkpoint is stored
    progress  called with (parts measured, all of them) while it measures
    What cannot be had (no target, data gone, no checkpoint yet) is named in the page instead of failing it.
    Raises FileNotFoundError for a folder without config.yaml or metrics.jsonl, ValueError for files that are none,
    ImportError without matplotlib.
    """
    place = Path(path)
    # The demo's folder holds its training run's, and findings of its own.
    demo = not (place / "config.yaml").is_file() and (place / FINDINGS).is_file()
    run = place / "training" if demo else place
    for name in ("config.yaml", "metrics.jsonl"):
        if not (run / name).is_file():
            raise FileNotFoundError(f"report: expected the output folder of a training run, with {name}, got {run}")
    if demo and measure:
        raise ValueError(f"report: expected a training run to measure again, got the demo's folder {place}: `recog-fast demo` makes it anew")
    evaluation.require_plots()
    config = apply_method(read_config(run / "config.yaml"))
    metrics = read_metrics(run / "metrics.jsonl")
    stored, checkpoint = place / FINDINGS, latest_checkpoint(run / "checkpoints")
    if measure is None:
        measure = not demo and checkpoint is not None and (
            not stored.is_file() or stored.stat().st_mtime < (checkpoint / "manifest.json").stat().st_mtime
        )
    if measure:
        found = measure_run(run, config, progress)
        found.save(stored)
    elif stored.is_file():
        found = Findings.load(stored)
    else:
        found = Findings(missing=["Pictures, quality and verification: nothing was measured and there is no checkpoint to measure."])
    return write_run_page(place / PAGE, found, config, metrics, name=place.resolve().name)


def measure_run(run: Path, config: TrainConfig, progress: Progress | None = None) -> Findings:
    """Everything the data and the last checkpoint give; what fails is named in `missing`."""
    found = Findings()
    try:
        _, backbone, head = load_run(run)
        branches = None if config.recognizability is None else load_quality_model(run)[0].branches
    except _UNREADABLE as error:
        found.missing.append(f"Pictures, quality and verification: no network to measure ({_short(error)}).")
        found.facts = environment()
        return found
    device = torch.device("cuda" if config.device in ("auto", "cuda") and torch.cuda.is_available() else "cpu")
    network = Network(backbone.to(device), None if branches is None else branches.to(device))
    head.to(device)
    with tempfile.TemporaryDirectory() as scratch:
        # Looking at the data again adds nothing to the run's own list of unreadable images.
        quiet = dataclasses.replace(config, output=scratch, data=dataclasses.replace(config.data, cache=False), unlabelled=None)
        try:
            images: TrainingImages | None = TrainingImages(quiet)
        except _UNREADABLE as error:
            images = None
            found.missing.append(f"Confusions, attention maps and pairs of held-out people: the training data cannot be opened ({_short(error)}).")
        parts = len(config.val_targets) + 1
        _targets(found, network, quiet, images, lambda done: None if progress is None else progress(done, parts))
        if images is not None:
            try:
                found.galleries += confusions(network, head, images.clean, images.labels, config.seed)
            except _UNREADABLE as error:
                found.missing.append(f"Confusions and attention maps: {_short(error)}.")
    if progress is not None:
        progress(parts, parts)
    found.facts = costs(config, backbone, head, None if images is None else len(images)) | environment()
    return found


def _targets(
    found: Findings, network: Network, config: TrainConfig, images: TrainingImages | None, measured: Callable[[int], None]
) -> None:
    """Adds the evaluation targets: the first one in full, of the others the verification."""
    for done, target in enumerate(config.val_targets):
        measured(done)
        try:
            if images is None and target == "holdout":
                raise ValueError("held-out people are part of the training data")
            (pairs,) = pair_sets(dataclasses.replace(config, val_targets=[target]), images)  # type: ignore[arg-type]
            first = not found.results
            many = len(config.val_targets) > 1
            if first:
                made = measure_pairs(network, pairs, config.val_sizes, config.seed)
                found.quality, found.galleries = made.quality, made.galleries
                found.rejection, found.rejected = made.rejection, made.rejected
                found.missing += made.missing
                found.results |= {f"{pairs.name}, {name}" if many else name: r for name, r in made.results.items()}
            else:
                found.results[f"{pairs.name}, {condition(0)}"] = verification(network.embed(pairs.images).flipped, pairs)
        except _UNREADABLE as error:
            found.missing.append(f"Evaluation target {target}: {_short(error)}.")
    measured(len(config.val_targets))
    if found.results:
        return
    if not config.val_targets:
        found.missing.append("This run had no val_targets; norms and recognizability are those of training pictures, which flatter the network.")
    if images is not None and len(images):
        try:
            drawn = np.random.default_rng((config.seed, 0x7A)).permutation(len(images))[:_SAMPLE]
            clean = [images.clean(int(i)) for i in drawn]
            made = measure_images(network, clean, {condition(0): network.embed(clean, mirrored=False)}, config.seed)
            found.quality, found.galleries = made.quality, made.galleries
        except _UNREADABLE as error:
            found.missing.append(f"Quality: {_short(error)}.")


def costs(config: TrainConfig, backbone: torch.nn.Module, head: Any, images: int | None) -> dict[str, dict[str, str]]:
    """Sizes of the model, by its tensors."""
    parameters = sum(p.numel() for p in backbone.parameters())
    weight = sum(p.numel() * p.element_size() for p in head.parameters())
    size = {
        "classes": f"{head.num_classes:,}",
        "training images": "unknown" if images is None else f"{images:,}",
        "images of a step": f"{config.batch_size * config.gradient_acc:,}",
        "embedding size": f"{head.embedding_dim:,}",
        "backbone": f"{config.network}, {parameters / 1e6:.2f} M parameters",
        "class weight": f"{weight / 1e6:,.1f} MB, {head.num_classes:,} x {head.embedding_dim:,}",
    }
    return {"Size": size}


def environment() -> dict[str, dict[str, str]]:
    """Which kernels run here, and versions of what computes."""
    return {"Which path ran": dict(rf.backends()), "Versions": versions()}


def versions() -> dict[str, str]:
    """Versions of what computes."""
    return {
        "recog_fast": rf.__version__,
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
    }


def write_run_page(
    path: Path, found: Findings, config: TrainConfig, metrics: list[dict[str, Any]], *, name: str = ""
) -> Path:
    """The page of what was found, of the log and of the settings."""
    rest = {name: values for name, values in found.facts.items() if name not in ("Which path ran", "Versions")}
    steps = [row for row in metrics if "loss" in row]
    return write_report(
        path,
        title=found.title or f"Training run: {name}",
        summary=found.summary or _summary(config, steps),
        results=found.results,
        baseline=found.baseline or None,
        metrics_jsonl=metrics,
        figures=quality_figures(found),
        quality_note=_quality_note(found),
        galleries=found.galleries,
        tiles=_tiles(steps),
        missing=found.missing,
        costs=rest | {"Speed": _speed(steps)},
        versions=found.facts.get("Versions"),
        backends=found.facts.get("Which path ran"),
        config=dataclasses.asdict(config),
    )


def quality_figures(found: Findings) -> list[Figure]:
    """Histograms by condition and the rejection curves."""
    made: list[Figure] = []
    for measure, groups in found.quality.items():
        reading = "Separate humps: the norm tells how much the network sees; equal ones: it says nothing here."
        if measure != NORM:
            reading = "The further right, the easier to recognize; pictures beyond recognition should stay left of all others."
        made.append((measure[0].upper() + measure[1:], reading, figures.quality_histograms({"end": groups}, measure)))
    if found.rejection is not None:
        reading = f"The faster a curve falls, the better its quality measure; random is what rejecting without looking gives. Of {found.rejected}."
        made.append(("Error versus reject", reading, figures.erc_plot(found.rejection)))
    return made


def _quality_note(found: Findings) -> str:
    if not found.quality:
        return ""
    return (
        "How recognizable are single pictures? Feature norm: |f(x)|. ERS: 1 - cosine to the centre of pictures beyond recognition "
        "(training-free). Learned quality: the recognizability index's own head, where the run trained one."
    )


def _summary(config: TrainConfig, steps: list[dict[str, Any]]) -> str:
    done = f"{int(steps[-1]['step']):,} optimizer steps" if steps else "no logged step yet"
    margin = config.margin.get("name", "?")
    return f"{config.network} with {margin} (method {config.method}) on {config.data.kind} data: {done} of {config.batch_size * config.gradient_acc:,} images."


def _tiles(steps: list[dict[str, Any]]) -> list[Tile]:
    shown = (("loss", "Training loss", "{:.3g}"), ("target_cosine", "Target cosine", "{:.2f}"), ("images_per_second", "Images per second", "{:,.0f}"))
    made = []
    for key, label, form in shown:
        values = [row[key] for row in steps if isinstance(row.get(key), (int, float))]
        if values:
            # A speed does not settle as the others do: the same median as under Throughput.
            whole = key == "images_per_second"
            last = values if whole else values[-max(1, len(values) // 20) :]
            when = "median of the whole log" if whole else "median at the end of the log"
            made.append(Tile(label, form.format(float(np.median(last))).replace("-", "\N{MINUS SIGN}"), when))
    return made


def _speed(steps: list[dict[str, Any]]) -> dict[str, str]:
    rates = [row["images_per_second"] for row in steps if isinstance(row.get("images_per_second"), (int, float))]
    peaks = [row["peak_memory_mb"] for row in steps if isinstance(row.get("peak_memory_mb"), (int, float))]
    found = {}
    if rates:
        low, middle, high = np.percentile(rates, [10, 50, 90])
        found["images per second"] = f"median {middle:,.0f} (10 % to 90 % of the log: {low:,.0f} to {high:,.0f})"
    if peaks:
        found["peak memory of the process"] = f"{max(peaks):,.0f} MB"
    return found


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split()).rstrip(".")
    return (text[:200] or type(error).__name__).replace("report: ", "", 1)
