"""Learning-rate schedules: pure functions of the optimizer step, so resuming needs no state."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence


def polynomial(step: int, *, base: float, warmup: int, total: int) -> float:
    """InsightFace's schedule (arcface_torch PolyScheduler, power 1), quirk included.

    lr(0) = base; base k / warmup for 1 <= k < warmup; then base (total - k) / (total - warmup), which is base at k = warmup
    and 0 at k = total. Step 0 runs at the FULL base rate, as arcface_torch does; `polynomial_smooth` is without that jump.

    Raises ValueError for a negative step or base, or unless 0 <= warmup < total.
    """
    _check("polynomial", step, base, warmup, total)
    if step == 0:
        return base
    if step < warmup:
        return base * step / warmup
    return base * max(0, total - step) / (total - warmup)


def polynomial_smooth(step: int, *, base: float, warmup: int, total: int, power: float = 1.0) -> float:
    """Warm-up base (k + 1) / warmup for k < warmup, then base ((total - k) / (total - warmup))^power: no step runs at rate 0.

    Raises ValueError as `polynomial` does.
    """
    _check("polynomial_smooth", step, base, warmup, total)
    if step < warmup:
        return base * (step + 1) / warmup
    return float(base * (max(0, total - step) / (total - warmup)) ** power)


def cosine(step: int, *, base: float, warmup: int, total: int) -> float:
    """Warm-up base (k + 1) / warmup for k < warmup, then base (1 + cos(pi (k - warmup) / (total - warmup))) / 2.

    Raises ValueError as `polynomial` does.
    """
    _check("cosine", step, base, warmup, total)
    if step < warmup:
        return base * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / (total - warmup))
    return base * 0.5 * (1.0 + math.cos(math.pi * progress))


def multistep(
    step: int, *, base: float, warmup: int, total: int, milestones: Sequence[int], gamma: float = 0.1
) -> float:
    """Warm-up base (k + 1) / warmup for k < warmup, then base gamma^(number of milestones <= k); milestones in steps, ascending.

    Raises ValueError as `polynomial` does, and for milestones that are not ascending.
    """
    _check("multistep", step, base, warmup, total)
    if list(milestones) != sorted(milestones):
        raise ValueError(f"multistep: expected ascending milestones, got {list(milestones)}")
    if step < warmup:
        return base * (step + 1) / warmup
    return float(base * gamma ** bisect_right(milestones, step))


def ramp(step: int, length: int) -> float:
    """Share of a value that grows linearly from 0 at step 0 to 1 at step `length`; 1 when length is 0."""
    return 1.0 if length <= 0 else min(1.0, step / length)


def _check(name: str, step: int, base: float, warmup: int, total: int) -> None:
    if step < 0 or base < 0:
        raise ValueError(f"{name}: expected step >= 0 and base >= 0, got {step} and {base}")
    if not 0 <= warmup < total:
        raise ValueError(f"{name}: expected 0 <= warmup < total steps, got warmup {warmup}, total {total}")
