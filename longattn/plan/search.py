"""The longest sequence, the largest batch, the smallest machine that still fits: bisection over compiled programs."""

from __future__ import annotations

from collections.abc import Callable

Fits = Callable[[int], bool]


def largest(fits: Fits, start: int, unit: int, limit: int) -> tuple[int | None, int | None]:
    """(a multiple of `unit` that fits, a larger one that does not), at most a sixteenth or one unit apart.

    From `start`, best a good guess, it goes up or down by an eighth, then by ever more, until the answer changes, and
    then bisects. None: not even one unit fits, or even `limit` does. What is larger is taken to need more.

    Args:
      fits: whether this number fits.
      start: the first to try.
      unit: the numbers tried are multiples of it.
      limit: the largest to try.
    """
    most = max(1, limit // unit)
    low, high, at, step = 0, None, min(max(1, start // unit), most), 1.125
    while not (low and high) and low < most and high != 1:  # in units: `low` fits, `high` does not
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
    """The first of 0 .. n - 1 that fits, where all after it do too; None where not even the last does."""
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
