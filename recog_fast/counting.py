"""Loops that tell how far they are, by a plain callback; every layer may import it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Progress = Callable[[int, int], None]  # (done, total); total 0: nobody knows
T = TypeVar("T")


def counted(items: Iterable[T], total: int, progress: Progress | None) -> Iterator[T]:
    """The items as they are; progress(done, total) is called at the start and after each. None: nobody listens."""
    if progress is None:
        yield from items
        return
    progress(0, total)
    for done, item in enumerate(items, 1):
        yield item
        progress(done, total)
