"""What a report shows of a trained network, kept in one file so that the page can be made again without the data."""

from __future__ import annotations

import dataclasses
import json
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recog_fast.evaluation import Gallery, GalleryItem, QualityComparison, VerificationResult

Floats = NDArray[np.float64]
_ARRAYS = ("per_fold", "scores", "same")
_PLAIN = ("missing", "facts", "title", "summary", "rejected")
FORMAT = 1


@dataclass
class Findings:
    """What was measured of a run's network; `save` and `load` keep it beside the run.

    results     condition -> verification, the headline first; baseline: of another network, or none
    quality     measure (feature norm, ...) -> condition -> (M,) values
    rejection   error-versus-reject curves, and which pairs they are of
    galleries   pictures, already chosen
    missing     what could not be measured and why, one sentence each
    facts       heading -> name -> text: costs, versions, ...
    title, summary  of the page; empty: made from the settings
    """

    results: dict[str, VerificationResult] = field(default_factory=dict)
    baseline: dict[str, VerificationResult] = field(default_factory=dict)
    quality: dict[str, dict[str, Floats]] = field(default_factory=dict)
    rejection: QualityComparison | None = None
    rejected: str = ""
    galleries: list[Gallery] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    facts: dict[str, dict[str, str]] = field(default_factory=dict)
    title: str = ""
    summary: str = ""

    def save(self, path: Path) -> None:
        """Writes everything to `path` (.npz, no pickles); replaced at once."""
        arrays: dict[str, Any] = {}
        described: dict[str, Any] = {"format": FORMAT, **{name: getattr(self, name) for name in _PLAIN}}
        for kind in ("results", "baseline"):
            described[kind] = {}
            for i, (name, result) in enumerate(getattr(self, kind).items()):
                fields = {f.name: getattr(result, f.name) for f in dataclasses.fields(result)}
                arrays |= {f"{kind}/{i}/{key}": fields.pop(key) for key in _ARRAYS}
                described[kind][name] = fields
        described["quality"] = {measure: list(groups) for measure, groups in self.quality.items()}
        for i, groups in enumerate(self.quality.values()):
            arrays |= {f"quality/{i}/{j}": values for j, values in enumerate(groups.values())}
        if self.rejection is not None:
            curves = {measure: curve.tolist() for measure, curve in self.rejection.curves.items()}
            described["rejection"] = {**dataclasses.asdict(self.rejection), "reject": self.rejection.reject.tolist(), "curves": curves}
        described["galleries"] = []
        for i, shown in enumerate(self.galleries):
            items = [[item.caption, item.detail, item.tone] for item in shown.items]
            described["galleries"].append([shown.title, shown.note, items])
            arrays |= {f"gallery/{i}/{j}": item.image for j, item in enumerate(shown.items)}
        partial = path.with_name(path.name + ".partial")
        with partial.open("wb") as file:
            np.savez_compressed(file, described=np.frombuffer(json.dumps(described).encode(), np.uint8), **arrays)
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> Findings:
        """Reads what `save` wrote. Raises FileNotFoundError, and ValueError for a file that is none or of another format."""
        if not path.is_file():
            raise FileNotFoundError(f"report: no findings file {path}")
        try:
            with np.load(path, allow_pickle=False) as stored:
                return _read(stored)
        except (OSError, KeyError, TypeError, zipfile.BadZipFile, ValueError) as error:
            raise ValueError(f"report: expected {path} to hold the findings of a run, got {type(error).__name__}: {error}") from error


def _read(stored: Any) -> Findings:
    described = json.loads(bytes(stored["described"]).decode())
    if described["format"] != FORMAT:
        raise ValueError(f"expected format {FORMAT}, got {described['format']}")
    found = Findings(**{name: described[name] for name in _PLAIN})
    for kind, into in (("results", found.results), ("baseline", found.baseline)):
        for i, (name, fields) in enumerate(described[kind].items()):
            arrays = {key: stored[f"{kind}/{i}/{key}"] for key in _ARRAYS}
            into[name] = VerificationResult(**{**fields, **arrays, "fars": tuple(fields["fars"]), "tar": tuple(fields["tar"])})
    for i, (measure, groups) in enumerate(described["quality"].items()):
        found.quality[measure] = {group: stored[f"quality/{i}/{j}"] for j, group in enumerate(groups)}
    if "rejection" in described:
        own = described["rejection"]
        curves = {measure: np.asarray(curve, np.float64) for measure, curve in own["curves"].items()}
        found.rejection = QualityComparison(own["protocol"], np.asarray(own["reject"]), curves, own["areas"], tuple(own["warnings"]))
    for i, (title, note, items) in enumerate(described["galleries"]):
        made = [GalleryItem(stored[f"gallery/{i}/{j}"], *texts) for j, texts in enumerate(items)]
        found.galleries.append(Gallery(title, note, made))
    return found
