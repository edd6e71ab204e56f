"""Bisects over programs for the longest sequence, the largest batch or the smallest machine that fits."""

from __future__ import annotations

from collections.abc import Callable

from longattn.config import Config
from longattn.cost import step
from longattn.cost.topology import Topology

TILE = 128  # searches try multiples of this length on each device
LONGEST = 2**27  # tokens; searches stop here
Fits = Callable[[int], bool]


def largest(fits: Fits, start: int, unit: int, limit: int, *, exact: bool = False) -> tuple[int | None, int | None]:
    """Returns (a multiple of `unit` that fits, a larger one that does not), at most a sixteenth or one unit apart.

    Assumes that larger numbers need more. From `start` it moves up or down by an eighth, then by growing factors, until
    the answer changes; then it bisects.

    Args:
      fits: returns whether a number fits.
      start: the first number to try, best a good guess.
      unit: only multiples of it are tried.
      limit: the largest number to try.
      exact: whether the two are one unit apart, where `fits` costs little.

    Returns:
      None in the first place if not even one unit fits, in the second if `limit` still fits.
    """
    most = max(1, limit // unit)
    low, high, at, step = 0, None, min(max(1, start // unit), most), 1.125  # in units: `low` fits, `high` does not
    while not (low and high) and low < most and high != 1:
        if fits(at * unit):
            low = at
            at = min(max(at + 1, round(at * step)), most)
        else:
            high = at
            at = max(1, min(at - 1, round(at / step)))
        step **= 2
    while high is not None and low and high - low > (1 if exact else max(1, low // 16)):
        middle = (low + high) // 2
        if fits(middle * unit):
            low = middle
        else:
            high = middle
    return (low * unit or None), (None if high is None else high * unit)


def by_formula(config: Callable[[int], Config], where: Topology, start: int, unit: int, limit: int) -> int | None:
    """Returns the largest multiple of `unit` whose `config` fits the memory of `where` by formula; None if none does.

    Raises NotImplementedError for a model whose memory no formula knows.
    """
    fits = lambda n: step.memory(config(n), where)["total"] <= where.hbm_bytes
    return largest(fits, start, unit, limit, exact=True)[0]


def smallest(fits: Fits, n: int) -> int | None:
    """Returns the first of 0 .. n - 1 that fits, assuming all after it do too; None if not even the last fits."""
    if not fits(n - 1):
        return None
    low, high = -1, n - 1  # low does not fit, high does
    while high - low > 1:
        middle = (low + high) // 2
        if fits(middle):
            high = middle
        else:
            low = middle
    return high
