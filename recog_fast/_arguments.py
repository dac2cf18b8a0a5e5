"""What an argument is, whatever was given: questions that never raise. Who asks writes the message."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from typing import Any


def is_number(value: Any, low: float = -math.inf, high: float = math.inf, *, above: bool = False, below: bool = False) -> bool:
    """A finite real number (or a 0-dim array or tensor) in [low, high]; above, below: not at that end."""
    if isinstance(value, str | bytes | bytearray) or getattr(value, "ndim", 0) != 0:
        return False
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return False
    return math.isfinite(number) and low <= number <= high and not (above and number == low) and not (below and number == high)


def is_whole(value: Any, low: float = -math.inf, high: float = math.inf) -> bool:
    """An integer in [low, high], no bool."""
    if isinstance(value, bool):
        return False
    try:
        return low <= operator.index(value) <= high
    except (TypeError, ValueError, RuntimeError):
        return False


def is_choice(value: Any, choices: Iterable[Any]) -> bool:
    """One of the choices: the same object, or an equal string."""
    return any(value is one or (isinstance(value, str) and isinstance(one, str) and value == one) for one in choices)


def are_numbers(value: Any, count: int, low: float = -math.inf, high: float = math.inf, *, above: bool = False) -> bool:
    """A tuple or list of `count` numbers as `is_number` takes them."""
    return isinstance(value, tuple | list) and len(value) == count and all(is_number(one, low, high, above=above) for one in value)


def are_whole(value: Any, count: int | None, low: float = -math.inf) -> bool:
    """A tuple or list of `count` integers (None: one or more), each at least `low`."""
    right = isinstance(value, tuple | list) and (len(value) > 0 if count is None else len(value) == count)
    return right and all(is_whole(one, low) for one in value)


def refusal(error: Exception) -> str:
    """What torch.load refused, without its advice to execute the file."""
    reason = (str(error) or "an empty file").rpartition("WeightsUnpickler error:")[2].strip()
    return reason.partition("\n")[0].partition(" Please use")[0]
