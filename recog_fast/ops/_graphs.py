"""A chunk loop as one CUDA graph: its hundreds of short kernels are launched by one call once the same loop has run before.

A loop is a function of named tensors (copied into buffers of the graph's own before each replay) whose other operands are fixed by
its key: addresses, sizes, scalars. The first run of a key is eager (it compiles kernels and chooses algorithms), the second is
captured, later ones are replays. What cannot be captured stays eager. Capturing needs the memory of one loop again, 2 to 60 MB.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

Inputs = dict[str, Tensor | None]
Body = Callable[[Inputs], tuple[Tensor, ...]]
CAPACITY = 8  # graphs kept for each stream; a head's training step needs two


class Recorder(Protocol):
    """What records a function's kernels and launches them again: a CUDA graph; a test's own."""

    def record(self, function: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """Runs `function` recording its kernels, which are not executed; its results lie where each replay writes them."""
        ...

    def replay(self) -> None:
        """Launches them on the current stream."""
        ...

    def release(self) -> None:
        """Frees the graph once the device is done with it."""
        ...


class CudaRecorder:
    """A CUDA graph in a memory pool that the graphs of one stream share: none of them runs while another does."""

    def __init__(self, pool: Any) -> None:
        self._graph, self._pool = torch.cuda.CUDAGraph(), pool

    def record(self, function: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        _clear_workspaces()
        try:
            with torch.cuda.stream(stream):
                return self._capture(function)
        finally:
            _clear_workspaces()

    def _capture(self, function: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        # thread_local: what other threads do meanwhile (a loader pinning memory) is no part of it and no error
        self._graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            results = function()
        except BaseException:
            with contextlib.suppress(RuntimeError):  # of a capture that is invalid already
                self._graph.capture_end()
            raise
        self._graph.capture_end()
        return results

    def replay(self) -> None:
        self._graph.replay()

    def release(self) -> None:
        torch.cuda.current_stream().synchronize()
        self._graph.reset()


def _clear_workspaces() -> None:
    """cuBLAS keeps a workspace for each stream: that of a capture must be the graph's own, not one another stream's GEMMs use too."""
    clear = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
    if clear is not None:
        clear()


@dataclass
class _Captured:
    inputs: Inputs
    outputs: tuple[Tensor, ...]
    recorder: Recorder


class LoopGraphs:
    """The captured loops of one stream, at most `capacity`; the one not used for longest goes first."""

    def __init__(self, recorder: Callable[[], Recorder], capacity: int = CAPACITY) -> None:
        self._recorder, self._capacity = recorder, capacity
        self._entries: OrderedDict[Hashable, _Captured | None] = OrderedDict()  # None: ran once, or cannot be captured
        self._refused: set[Hashable] = set()
        self.failure: str | None = None  # why a loop was not captured

    def run(self, key: Hashable, inputs: Inputs, body: Body) -> tuple[Tensor, ...]:
        """`body(inputs)`; key: everything the result depends on but the values of `inputs` and what lies at fixed addresses."""
        if key not in self._entries:
            self._keep(key, None)
            return body(inputs)
        self._entries.move_to_end(key)
        entry = self._entries[key]
        if entry is None:
            entry = None if key in self._refused else self._capture(key, inputs, body)
            if entry is None:
                return body(inputs)
            self._entries[key] = entry
        for name, value in inputs.items():
            own = entry.inputs[name]
            if value is not None and own is not None:
                own.copy_(value)
        entry.recorder.replay()
        return tuple(output.clone() for output in entry.outputs)

    def _capture(self, key: Hashable, inputs: Inputs, body: Body) -> _Captured | None:
        recorder = self._recorder()
        own: Inputs = {name: None if value is None else value.clone() for name, value in inputs.items()}
        try:
            return _Captured(own, recorder.record(lambda: body(own)), recorder)
        except Exception as error:  # not capturable, out of memory: eager does it
            self._refused.add(key)
            self.failure = f"{type(error).__name__}: {error}"
            return None

    def _keep(self, key: Hashable, entry: _Captured | None) -> None:
        self._entries[key] = entry
        while len(self._entries) > self._capacity:
            oldest, old = self._entries.popitem(last=False)
            self._refused.discard(oldest)
            if old is not None:
                old.recorder.release()

    def clear(self) -> None:
        """Forgets and frees every loop."""
        for entry in self._entries.values():
            if entry is not None:
                entry.recorder.release()
        self._entries.clear()
        self._refused.clear()

    @property
    def captured(self) -> int:
        """How many loops are graphs now."""
        return sum(entry is not None for entry in self._entries.values())


_STREAMS: dict[tuple[int, int], LoopGraphs] = {}
_LOCK = threading.RLock()  # backward passes come from other threads


def _wanted() -> bool:
    """RECOG_FAST_GRAPHS=0 in the environment turns graphs off (comparisons, debugging)."""
    return os.environ.get("RECOG_FAST_GRAPHS", "1") != "0"


def _graphs_here(device: torch.device) -> LoopGraphs:
    stream = torch.cuda.current_stream(device)
    place = (stream.device_index, stream.cuda_stream)
    if place not in _STREAMS:
        pool = torch.cuda.graph_pool_handle()
        _STREAMS[place] = LoopGraphs(lambda: CudaRecorder(pool))
    return _STREAMS[place]


def run_loop(key: Hashable, inputs: Inputs, body: Body, like: Tensor) -> tuple[Tensor, ...]:
    """`body(inputs)` on the device of `like`: by a graph where it is CUDA and no graph is being captured around us."""
    if not like.is_cuda or not _wanted() or torch.cuda.is_current_stream_capturing():
        return body(inputs)
    with _LOCK:
        graphs = _graphs_here(like.device)
        shapes = tuple((name, None if t is None else (tuple(t.shape), t.dtype)) for name, t in inputs.items())
        return graphs.run((key, shapes), inputs, body)


def describe() -> str:
    """For `recog_fast.backends()`: graphs held, and why a loop stayed eager."""
    with _LOCK:
        failures = [graphs.failure for graphs in _STREAMS.values() if graphs.failure is not None]
        held = sum(graphs.captured for graphs in _STREAMS.values())
    state = "chunk loops run as CUDA graphs" if _wanted() else "chunk loops run kernel by kernel"
    return f"{state}, {held} held{f'; one stayed eager: {failures[-1]}' if failures else ''}"
