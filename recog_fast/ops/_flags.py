"""Bad rows of a batch on CUDA: found on the device, left out of everything, reported when the host next comes by (no step waits)."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ._deferred import DeferredReport

BAD_LABEL = -2  # a row with it takes no part: loss 0, gradient 0, in no mean


def defers(tensor: Tensor) -> bool:
    """Whether looking at this tensor's values would make the host wait for a device."""
    return tensor.is_cuda


@dataclass
class RowFlags:
    """What the batches since the last report had of labels outside [-1, C) and of non-finite embeddings.

    `screen` only launches kernels, so a CUDA graph can hold it; each replay then adds to the report, which `raise_noted` of the next
    eager call reads. The report of a call is read at the call after it: by then the device is past that batch's first kernels,
    so the host waits for at most the step before.
    """

    where: str
    _report: Tensor | None = None  # (5,) int64: bad labels, first row, its label, non-finite rows, first row
    _classes: int = 0
    _deferred: DeferredReport = field(default_factory=DeferredReport)

    def screen(self, embeddings: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
        """(labels (N,) with -2 in bad rows and in non-finite ones, mask (N,) of the non-finite rows)."""
        spoiled = ~torch.isfinite(embeddings).all(dim=1)
        bad = (labels < -1) | (labels >= classes)
        if labels.numel():
            self._note(bad, spoiled, labels)
            self._classes = classes
        return torch.where(bad | spoiled, BAD_LABEL, labels), spoiled

    def _note(self, bad: Tensor, spoiled: Tensor, labels: Tensor) -> None:
        if self._report is None or self._report.device != labels.device:
            self._report = torch.zeros(5, dtype=torch.int64, device=labels.device)
        rows = [mask.to(torch.int8).argmax().reshape(1) for mask in (bad, spoiled)]  # the first of the largest
        now = torch.cat([bad.sum().reshape(1), rows[0], labels.gather(0, rows[0]), spoiled.sum().reshape(1), rows[1]])
        before, report = self._report.clone(), self._report
        for first, last in ((0, 3), (3, 5)):  # the first bad row stays until it is reported; counts add up
            report[first:last] = torch.where(before[first] > 0, before[first:last], now[first:last])
            report[first] = before[first] + now[first]
        self._deferred.post(report)

    def raise_noted(self, *, fresh: bool = False) -> None:
        """ValueError about the rows noted so far; the report then starts anew. fresh: also what graphs replayed since."""
        if fresh and self._report is not None:
            self._deferred.post(self._report)
        report = self._deferred.poll(wait=True)
        if report is None or not (report[0] or report[3]):
            return
        assert self._report is not None
        self._report.zero_()
        labels, row, label, spoiled, other = report
        said = []
        if labels:
            said.append(f"labels in [-1, C) = [-1, {self._classes}), got {label} in row {row} ({labels} bad rows, which had no part in it)")
        if spoiled:
            said.append(f"finite embeddings, got a non-finite value in row {other} ({spoiled} bad rows, whose loss is nan and gradient 0)")
        raise ValueError(f"{self.where}: in an earlier call: expected {'; expected '.join(said)}")

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles start with nothing noted."""
        return {"where": self.where, "_report": None, "_classes": 0, "_deferred": DeferredReport()}


@dataclass
class HostCount:
    """The value of a 0-dim integer tensor, known on the host: read from the device only after somebody else wrote it."""

    _known: tuple[int, int, int] | None = None  # address, version, value

    def of(self, tensor: Tensor) -> int:
        """The value."""
        if not defers(tensor):
            return int(tensor)
        key = tensor.data_ptr(), tensor._version
        if self._known is None or self._known[:2] != key:
            self._known = *key, int(tensor)
        return self._known[2]

    def advance(self, tensor: Tensor) -> None:
        """Adds 1, without waiting where the value was known."""
        known = defers(tensor) and self._known is not None and self._known[:2] == (tensor.data_ptr(), tensor._version)
        tensor += 1
        self._known = (tensor.data_ptr(), tensor._version, self._known[2] + 1) if known and self._known is not None else None

    def forget(self) -> None:
        """After writes that move no version (CUDA graphs)."""
        self._known = None


_FUNCTIONAL: dict[tuple[torch.device, int], RowFlags] = {}
_LOCK = threading.Lock()


def flags_of(device: torch.device, where: str) -> RowFlags:
    """The flags that calls without a head share, one set for each stream of a device."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    with _LOCK:
        return _FUNCTIONAL.setdefault((device, stream), RowFlags(where))
