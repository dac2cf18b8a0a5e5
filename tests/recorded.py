"""A stand-in for CUDA graphs on CPU tensors: it remembers the function and runs it again, on the inputs and Python values of the capture."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


class Recorded:
    """What a graph does: operands that are no input of the loop stay those of the capture."""

    def record(self, function: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """Of what in-place changes `function` makes, a capture makes none: replays do. Here it runs at the first replay."""
        self._function = function
        self._outputs: tuple[Tensor, ...] | None = None
        return Deferred(self)

    def replay(self) -> None:
        self._outputs = self._function()

    def outputs(self) -> tuple[Tensor, ...]:
        assert self._outputs is not None
        return self._outputs

    def release(self) -> None:
        pass


class Deferred(tuple[Tensor, ...]):
    """The results of the latest replay."""

    _recorded: Recorded

    def __new__(cls, recorded: Recorded) -> Deferred:
        made = super().__new__(cls)
        made._recorded = recorded
        return made

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter(self._recorded.outputs())
