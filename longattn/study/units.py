"""Units of work (the smallest resumable pieces of a study), and the intervals of their numbers."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from longattn.study.store import Number

# 97.5% points of Student's t for 1, 2, ... degrees of freedom, for two-sided 95% intervals over a few seeds.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


class Clock:
    """A unit's deadline, and a callback for its progress."""

    def __init__(self, seconds: float, report: Callable[[float], None] = lambda fraction: None):
        self.deadline = time.monotonic() + seconds
        self.report = report

    @property
    def left(self) -> float:
        """Seconds left; negative after the deadline."""
        return self.deadline - time.monotonic()

    @property
    def over(self) -> bool:
        return self.left < 0


@dataclass(frozen=True)
class Unit:
    """Work that yields numbers; it is either done or not."""

    key: str
    work: Callable[[Clock], Iterable[Number]]
    weight: float = 1.0  # expected share of the part's time, relative to the other units
    always: bool = False  # done even after the budget is spent


def t_interval(values: Sequence[float]) -> tuple[float, float]:
    """Returns the 95% interval of the mean of a few independent values; (-inf, inf) for a single one."""
    n = len(values)
    if n < 2:
        return -math.inf, math.inf
    half = (_T95[n - 2] if n - 2 < len(_T95) else 1.96) * float(np.std(values, ddof=1)) / math.sqrt(n)
    mean = float(np.mean(values))
    return mean - half, mean + half


def wilson(hits: float, n: float) -> tuple[float, float]:
    """Returns the 95% interval of a share after Wilson (1927), which is meaningful at 0 and 1 too."""
    z = 1.96
    p, scale = hits / n, 1 + z**2 / n
    middle, half = (p + z**2 / (2 * n)) / scale, z / scale * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return max(0.0, min(p, middle - half)), min(1.0, max(p, middle + half))  # keeps p inside despite rounding


def share_interval(hits: Sequence[float], n: float) -> tuple[float, float]:
    """Returns the 95% interval of a share measured with several seeds: `hits` of `n` questions each.

    Each end is the wider one of the interval over seeds (if there are several) and the interval over questions.
    """
    low, high = wilson(sum(hits), n * len(hits))
    if len(hits) > 1:
        t_low, t_high = t_interval([h / n for h in hits])
        low, high = max(0.0, min(low, t_low)), min(1.0, max(high, t_high))
    return low, high
