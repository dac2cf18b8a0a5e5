"""One HTML file that tells what was trained, how well it does and what it looks like; nothing in it is loaded from
elsewhere."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from recog_fast.evaluation import plots
from recog_fast.evaluation._style import stylesheet
from recog_fast.evaluation.embed import VerificationResult
from recog_fast.evaluation.gallery import Gallery, GalleryItem, png_data_uri

Figure = tuple[str, str, plots.Picture | None]  # title, what to see in it, the plot
Results = Mapping[str, VerificationResult]  # condition ("full size", "16x16", ...) -> result

# The browser itself then refuses scripts and requests, whatever a text on the page tries.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

# A rate that rests on fewer false accepts than this is marked in the table.
FEW_FALSE_ACCEPTS = 10


def write_report(
    path: str | Path,
    *,
    title: str,
    results: Results,
    config: Mapping[str, Any] | None = None,
    metrics_jsonl: str | Path | plots.Metrics | None = None,
    baseline: Results | None = None,
    baseline_name: str = "untrained",
    galleries: Sequence[Gallery] = (),
    figures: Sequence[Figure] = (),
    versions: Mapping[str, Any] | None = None,
    backends: Mapping[str, Any] | None = None,
    summary: str = "",
) -> Path:
    """Writes a self-contained page (no script, no request, light and dark, phone and desktop) and returns its path.

    results        condition -> result, in the order to show; the first one is the headline
    baseline       the same conditions of an untrained (or other, `baseline_name`) network, set beside them
    metrics_jsonl  the training log: a file of one JSON object a line, or its rows; keys used: step, loss,
                   target_cosine, nearest_cosine, target_probability, val/<name>; plots without data are left out
    figures        (title, what to see in it, picture) of `recog_fast.evaluation.figures`, in a section "Quality"
    config, versions, backends  shown as tables, nested mappings with dotted names
    summary        one or two sentences under the title, plain text
    Every text is escaped. The file is replaced at once, never left half written.
    Raises ValueError for empty results, a baseline with other conditions, results at different FARs, or a log line that
    is no JSON object.
    """
    if not results:
        raise ValueError("write_report: expected at least one result, got none")
    if baseline is not None and list(baseline) != list(results):
        raise ValueError(f"write_report: expected baseline of {list(results)}, got {list(baseline)}")
    rates = {result.fars for result in (*results.values(), *(baseline or {}).values())}
    if len(rates) > 1:
        raise ValueError(f"write_report: expected the same fars in every result, got {sorted(rates)}")
    metrics = read_metrics(metrics_jsonl) if isinstance(metrics_jsonl, (str, Path)) else list(metrics_jsonl or [])
    verification = _tiles(results, baseline, baseline_name) + _table(results, baseline, baseline_name)
    sections = [
        _section("Verification", verification + _figures(_evaluation_plots(results, baseline, baseline_name))),
        _section("Training", _figures(_training_plots(metrics))),
        _section("Quality", _figures(list(figures))),
        _section("Pictures", "".join(map(_gallery, galleries))),
        _section("Kernels and versions", _columns({"Which path ran": backends, "Versions": versions})),
        _section("Configuration", _settings(config or {})),
    ]
    lead = f"<p class=lead>{escape(summary)}</p>" if summary else ""
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f"<title>{escape(title)}</title>\n<style>{stylesheet(plots.LIGHT, plots.DARK)}</style>\n</head>\n<body>\n"
        f"<header><h1>{escape(title)}</h1>{lead}</header>\n<main>\n{''.join(sections)}</main>\n"
        "<footer>Written by recog_fast. Face recognition works on biometric data: ask for consent, follow the law, "
        "measure errors for every group of people concerned.</footer>\n</body>\n</html>\n"
    )
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".partial")
    partial.write_text(page, encoding="utf-8")
    partial.replace(target)
    return target


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


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested mappings as dotted names -> text."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = "none" if value is None else str(value)
    return flat


def _evaluation_plots(results: Results, baseline: Results | None, baseline_name: str) -> list[Figure]:
    return [
        (
            "ROC",
            "Up and to the left is better; the axis starts at one false accept.",
            plots.roc_plot(results, baseline, baseline_name),
        ),
        ("Cosines", "The less the two humps overlap, the fewer mistakes.", plots.cosine_plot(results)),
    ]


def _training_plots(metrics: plots.Metrics) -> list[Figure]:
    return [
        ("Loss", "Of the labelled rows; it may rise while the margin still grows.", plots.loss_plot(metrics)),
        ("Target and nearest negative", "The margin pushes the two apart.", plots.cosines_plot(metrics)),
        ("Probability of the true class", "With the margin, so it understates.", plots.probability_plot(metrics)),
        ("Accuracy on held-out people", "10 folds.", plots.accuracy_plot(metrics)),
    ]


def _section(heading: str, body: str) -> str:
    return f"<section><h2>{escape(heading)}</h2>\n{body}</section>\n" if body else ""


def _percent(value: float, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f}&nbsp;%"


def _tiles(results: Results, baseline: Results | None, baseline_name: str) -> str:
    tiles = []
    for name, result in results.items():
        beside = f"&plusmn; {_percent(result.std)} over folds"
        if baseline is not None:
            beside = f"{escape(baseline_name)} {_percent(baseline[name].accuracy)}"
        tiles.append(
            f"<div class=tile><div class=label><span>Accuracy,</span> <span>{escape(name)}</span></div>"
            f"<div class=number>{_percent(result.accuracy)}</div><div class=beside>{beside}</div></div>"
        )
    return f"<div class=tiles>{''.join(tiles)}</div>\n"


def _table(results: Results, baseline: Results | None, baseline_name: str) -> str:
    first = next(iter(results.values()))
    genuine, impostor = int(first.same.sum()), int((~first.same).sum())
    few = [far * impostor < FEW_FALSE_ACCEPTS for far in first.fars]
    heads = "".join(
        f"<th scope=col>TAR at FAR {100 * far:g}&nbsp;%{'<sup>*</sup>' if mark else ''}</th>"
        for far, mark in zip(first.fars, few, strict=True)
    )
    rows = []
    for name, result in results.items():
        rows.append(_row(name, result, " class=paired" if baseline else ""))
        if baseline is not None:
            rows.append(_row(baseline_name, baseline[name], " class=baseline"))
    note = (
        f"{genuine:,} genuine and {impostor:,} impostor pairs, {len(first.per_fold)} folds. EER: equal error rate. "
        f"TAR: true accept rate at a false accept rate (FAR) never above the target. Embeddings: {escape(first.form)}."
    )
    hint = (
        f"<br><sup>*</sup> Rests on fewer than {FEW_FALSE_ACCEPTS} false accepts: a hint, no measurement."
        if any(few)
        else ""
    )
    return (
        "<div class=scroll><table><thead><tr><th scope=col>Images</th><th scope=col>Accuracy</th><th scope=col>EER</th>"
        f"{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>\n<p class=note>{note}{hint}</p>\n"
    )


def _row(name: str, result: VerificationResult, attributes: str) -> str:
    cells = [
        f"{_percent(result.accuracy)} <small>&plusmn; {100 * result.std:.1f}</small>",
        _percent(result.eer),
        *map(_percent, result.tar),
    ]
    return f"<tr{attributes}><th scope=row>{escape(name)}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _figures(figures: list[Figure]) -> str:
    drawn = "".join(
        f"<figure><figcaption><b>{escape(title)}</b> {escape(note)}</figcaption>"
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{picture.dark}">'
        f'<img src="{picture.light}" alt="{escape(picture.alt)}"></picture></figure>\n'
        for title, note, picture in figures
        if picture is not None
    )
    return f"<div class=figures>\n{drawn}</div>\n" if drawn else ""


def _gallery(gallery: Gallery) -> str:
    if not gallery.items:
        return ""
    items = "".join(
        f'<figure class=item><img src="{png_data_uri(item.image)}" alt="{escape(item.caption)}">'
        f"<figcaption>{escape(item.caption)}{_decision(item)}</figcaption></figure>\n"
        for item in gallery.items
    )
    kind = "gallery wide" if gallery.wide else "gallery"
    return (
        f"<h3>{escape(gallery.title)}</h3><p class=note>{escape(gallery.note)}</p>\n"
        f'<div class="{kind}">\n{items}</div>\n'
    )


def _decision(item: GalleryItem) -> str:
    """The second line of a caption; colour is never the only sign."""
    if not item.detail and not item.tone:
        return ""
    sign = {"right": " &#10003;&nbsp;right", "wrong": " &#10007;&nbsp;wrong", "": ""}[item.tone]
    return f'<span class="detail">{escape(item.detail)}<b class="{item.tone}">{sign}</b></span>'


def _columns(tables: Mapping[str, Mapping[str, Any] | None]) -> str:
    filled = {name: flatten(values) for name, values in tables.items() if values}
    body = "".join(f"<div><h3>{escape(name)}</h3>{_pairs(values)}</div>" for name, values in filled.items())
    return f"<div class=columns>{body}</div>\n" if body else ""


def _settings(config: Mapping[str, Any]) -> str:
    flat = flatten(config)
    if not flat:
        return ""
    return f"<details><summary>{len(flat)} settings of this run</summary>{_pairs(flat)}</details>\n"


def _pairs(values: Mapping[str, str]) -> str:
    return f"<dl>{''.join(f'<dt>{escape(k)}</dt><dd>{escape(v)}</dd>' for k, v in values.items())}</dl>"
