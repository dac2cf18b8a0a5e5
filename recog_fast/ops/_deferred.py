"""A small report that a device writes and the host reads later, without waiting."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class DeferredReport:
    """Host copy of a small integer tensor: `poll` sees on CPU at once what was posted, on CUDA when it has arrived."""

    def __init__(self) -> None:
        self._host: Tensor | None = None
        self._event: torch.cuda.Event | None = None

    def post(self, report: Tensor) -> None:
        """Starts a copy of `report` to the host; a graph capture cannot hold one, so nothing is posted inside it."""
        if report.device.type != "cuda":
            self._host, self._event = report.cpu().clone(), None
            return
        if torch.cuda.is_current_stream_capturing():
            return
        host = torch.empty(report.shape, dtype=report.dtype, pin_memory=True)
        host.copy_(report, non_blocking=True)
        self._host, self._event = host, torch.cuda.Event()
        self._event.record()

    def poll(self, *, wait: bool) -> list[int] | None:
        """The values last posted, once; None when there is nothing new or (wait=False) it has not arrived."""
        if self._host is None:
            return None
        if self._event is not None:
            if torch.cuda.is_current_stream_capturing():
                return None
            if wait:
                self._event.synchronize()
            elif not self._event.query():
                return None
        values: list[int] = self._host.tolist()
        self._host = self._event = None
        return values

    def __getstate__(self) -> dict[str, Any]:
        """A copy starts with nothing in flight: events cannot be pickled."""
        return {"_host": None, "_event": None}
