"""Bisects over compiled programs for the longest sequence, the largest batch or the smallest machine that fits."""

from __future__ import annotations

from collections.abc import Callable

Fits = Callable[[int], bool]


def largest(fits: Fits, start: int, unit: int, limit: int) -> tuple[int | None, int | None]:
    """Returns (a multiple of `unit` that fits, a larger one that does not), at most a sixteenth or one unit apart.

    Assumes that larger numbers need more. From `start` it moves up or down by an eighth, then by growing factors, until
    the answer changes; then it bisects.

    Args:
      fits: returns whether a number fits.
      start: the first number to try, best a good guess.
      unit: only multiples of it are tried.
      limit: the largest number to try.

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
    while high is not None and low and high - low > max(1, low // 16):
        middle = (low + high) // 2
        if fits(middle * unit):
            low = middle
        else:
            high = middle
    return (low * unit or None), (None if high is None else high * unit)


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
