"""One HTML file that tells what was trained, how well it does and what it looks like; nothing in it is loaded from
elsewhere."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from recog_fast.evaluation import curves, page, plots
from recog_fast.evaluation.embed import VerificationResult
from recog_fast.evaluation.gallery import Gallery
from recog_fast.evaluation.page import Figure, Section, Tile, flatten

__all__ = ["FEW_FALSE_ACCEPTS", "Figure", "Tile", "flatten", "read_metrics", "write_report"]

Results = Mapping[str, VerificationResult]  # condition ("full size", "16x16", ...) -> result

# A rate that rests on fewer false accepts than this is marked in the table.
FEW_FALSE_ACCEPTS = 10
# More conditions than colours stay in the table.
MOST_CURVES = 5
MOST_ROWS = 40
MOST_TILES = 6
LOSS = (
    "Of the labelled rows, with all terms of the method: it may rise while the margin still grows, and jumps where a term begins "
    "(unknown identities, recognizability)."
)
INDEX = (
    "Target of the quality head (docs/math.md 4) and what it predicts. The index diversion holds a prediction below 2 some 0.3 above "
    "its target (with the usual weights); a gap that keeps growing is a sign of trouble."
)
_FOOTER = (
    "Written by recog_fast; the page holds everything it shows and asks for nothing. Face recognition works on biometric data: "
    "ask for consent, follow the law, measure errors for every group of people concerned."
)


def write_report(
    path: str | Path,
    *,
    title: str,
    results: Results | None = None,
    config: Mapping[str, Any] | None = None,
    metrics_jsonl: str | Path | plots.Metrics | None = None,
    baseline: Results | None = None,
    baseline_name: str = "untrained",
    galleries: Sequence[Gallery] = (),
    figures: Sequence[Figure] = (),
    tiles: Sequence[Tile] = (),
    missing: Sequence[str] = (),
    costs: Mapping[str, Mapping[str, Any] | None] | None = None,
    versions: Mapping[str, Any] | None = None,
    backends: Mapping[str, Any] | None = None,
    summary: str = "",
    quality_note: str = "",
) -> Path:
    """Writes a self-contained page (no script, no request, light and dark, phone, desktop and paper) and returns its path.

    results        condition -> result, in the order to show; the first one is the headline; none: the page says so
    baseline       the same conditions of an untrained (or other, `baseline_name`) network, set beside them
    metrics_jsonl  the training log: a file of one JSON object a line, or its rows; keys used: step, loss, lr,
                   target_cosine, nearest_cosine, target_probability, unknown_max_probability, feature_norm,
                   recognizability/index and /predicted, images_per_second, peak_memory_mb, val/<name>; plots without
                   data are left out
    figures        (title, how to read it, picture) of `recog_fast.evaluation.figures`, in a section "Quality", under
                   `quality_note`
    galleries      in a section "Faces"
    tiles          further headline numbers after the accuracies
    missing        what this run cannot show, and why, one sentence each
    costs          heading -> names and values, under "Throughput and memory"
    config, versions, backends  shown as tables, nested mappings with dotted names
    summary        one or two sentences under the title, plain text
    Every text is escaped. The file is replaced at once, never left half written.
    Raises ValueError for a baseline with other conditions, results at different FARs, or a log line that is no JSON
    object.
    """
    shown = dict(results or {})
    _check_comparable(shown, baseline)
    metrics = read_metrics(metrics_jsonl) if isinstance(metrics_jsonl, (str, Path)) else list(metrics_jsonl or [])
    absent = list(missing)
    if not shown:
        absent.insert(0, "No evaluation target: accuracy, ROC, DET and rejection curves are not in this page.")
    sections = [
        _verification(shown, baseline, baseline_name),
        Section("Training", "Curves over optimizer steps: the pale line is the log, the strong one its moving mean.", page.figures(_training(metrics))),
        Section("Quality", quality_note, page.figures(figures)),
        Section("Faces", "", "".join(map(page.gallery, galleries))),
        Section("Throughput and memory", "", page.columns(costs or {}) + page.figures(_costs(metrics))),
        Section("Kernels and versions", "", page.columns({"Which path ran": backends, "Versions": versions})),
        Section("Configuration", "", page.settings(config or {})),
    ]  # fmt: skip
    top = page.tiles([*_accuracies(shown, baseline, baseline_name), *tiles][:MOST_TILES])
    top += page.notice("Not in this report", absent)
    return page.write_page(
        path, title=title, sections=sections, eyebrow="recog_fast run report", lead=summary, top=top, footer=_FOOTER
    )


def _check_comparable(results: Results, baseline: Results | None) -> None:
    if baseline is not None and list(baseline) != list(results):
        raise ValueError(f"write_report: expected baseline of {list(results)}, got {list(baseline)}")
    rates = {result.fars for result in (*results.values(), *(baseline or {}).values())}
    if len(rates) > 1:
        raise ValueError(f"write_report: expected the same fars in every result, got {sorted(rates)}")


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl; blank lines are skipped, a torn last line (a run that was killed) too.

    Raises ValueError naming the line that is no JSON object.
    """
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise ValueError(
                f"read_metrics: expected a JSON object in line {number} of {path}, got {line[:60]!r}"
            ) from error
        if not isinstance(row, dict):
            raise ValueError(f"read_metrics: expected a JSON object in line {number} of {path}, got {line[:60]!r}")
        rows.append(row)
    return rows


def _verification(results: Results, baseline: Results | None, baseline_name: str) -> Section:
    if not results:
        return Section("Verification", "", "")
    first = dict(list(results.items())[:MOST_CURVES])
    beside = None if baseline is None else {name: baseline[name] for name in first}
    drawn: list[Figure] = [
        (
            "ROC",
            f"Up and to the left is better; the axis starts at one false accept. {curves.BAND}",
            curves.roc_plot(first, beside, baseline_name),
        ),
        (
            "DET",
            f"Down and to the left is better; the dotted diagonal is where the errors are equal. {curves.BAND}",
            curves.det_plot(first, beside, baseline_name),
        ),
        (
            "Cosines",
            "The less the two humps overlap, the fewer mistakes; dashed: the threshold of equal error.",
            plots.cosine_plot(first),
        ),
    ]
    rest = len(results) - len(first)
    more = page.note(f"The plots show the first {MOST_CURVES} conditions; {rest} more are in the table.") if rest else ""
    intro = "Are two pictures the same person? Pairs of people the network was not trained on."
    return Section("Verification", intro, _table(results, baseline, baseline_name) + page.figures(drawn) + more)


def _training(metrics: plots.Metrics) -> list[Figure]:
    drawn = plots.history_plot
    return [
        ("Loss", LOSS, drawn(metrics, "loss")),
        ("Target and nearest negative", "The margin pushes the two apart: the gap is what it opened.", drawn(metrics, "cosines")),
        ("Probability", "Of the true class, margin included, so it understates; of unknown people it should stay low.", drawn(metrics, "probability")),
        ("Accuracy on held-out people", "Verification while training, ten folds; the table above is the network at the end.", plots.accuracy_plot(metrics)),
        ("Recognizability index", INDEX, drawn(metrics, "index")),
        ("Feature norm", "Of the embeddings before normalisation; a sudden jump is a sign of trouble.", drawn(metrics, "norm")),
        ("Learning rate", "Of the backbone, warm-up first.", drawn(metrics, "lr")),
    ]  # fmt: skip


def _costs(metrics: plots.Metrics) -> list[Figure]:
    drawn = plots.history_plot
    return [
        ("Throughput", "Flat is good; dips are data loading, verification or other work on the machine.", drawn(metrics, "speed")),
        ("Peak memory", "Highest resident (CPU) or allocated (CUDA) memory so far; a rising line would be a leak.", drawn(metrics, "memory")),
    ]  # fmt: skip


def _percent(value: float, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f}\N{NO-BREAK SPACE}%"


def _accuracies(results: Results, baseline: Results | None, baseline_name: str) -> list[Tile]:
    made = []
    for name, result in list(results.items())[:3]:
        beside = f"\N{PLUS-MINUS SIGN}\N{NO-BREAK SPACE}{_percent(result.std)} over folds"
        if baseline is not None:
            beside = f"{baseline_name} {_percent(baseline[name].accuracy)}"
        made.append(Tile(f"Accuracy, {name}", _percent(result.accuracy), beside))
    return made


def _table(results: Results, baseline: Results | None, baseline_name: str) -> str:
    first = next(iter(results.values()))
    genuine, impostor = int(first.same.sum()), int((~first.same).sum())
    few = [far * impostor < FEW_FALSE_ACCEPTS for far in first.fars]
    marks = zip(first.fars, few, strict=True)
    head = ["Images", "Accuracy", "EER", *(f"TAR at FAR {100 * far:g}\N{NO-BREAK SPACE}%{'*' if m else ''}" for far, m in marks)]
    rows, classes = [], []
    for name, result in list(results.items())[:MOST_ROWS]:
        rows.append(_row(name, result))
        classes.append("paired" if baseline else "")
        if baseline is not None:
            rows.append(_row(baseline_name, baseline[name]))
            classes.append("baseline")
    text = (
        f"{genuine:,} genuine and {impostor:,} impostor pairs, {len(first.per_fold)} folds ({next(iter(results))}). EER: equal error "
        "rate. TAR: true accept rate at a false accept rate (FAR) never above the target; small: 95 % of the bootstrap resamples "
        f"of the pairs, which count as independent. Embeddings: {first.form}."
    )
    if any(few):
        text += f" * Rests on fewer than {FEW_FALSE_ACCEPTS} false accepts: a hint, no measurement."
    if len(results) > MOST_ROWS:
        text += f" {len(results) - MOST_ROWS} more conditions are not shown."
    return page.table(head, rows, "Verification by condition", classes) + page.note(text)


def _row(name: str, result: VerificationResult) -> list[str]:
    order = sorted(range(len(result.fars)), key=lambda i: result.fars[i])
    low, high = curves.tar_band(result.scores, result.same, np.array([result.fars[i] for i in order]))
    bands = {i: f"\n{100 * low[k]:.0f}\N{EN DASH}{100 * high[k]:.0f}" for k, i in enumerate(order)}
    rates = [_percent(tar) + bands[i] for i, tar in enumerate(result.tar)]
    return [name, f"{_percent(result.accuracy)}\n\N{PLUS-MINUS SIGN} {100 * result.std:.1f}", _percent(result.eer), *rates]
