"""Wall-clock timing: calls taken in turns, ratios of medians with intervals, and exponents fitted to them."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from scipy.special import stdtrit


class Seconds(float):
    """The result of a candidate that times itself, such as a worker in another process."""


def interleave(
    fns: Mapping[str, Callable[[], Any]], repeats: int, *, warm: int = 1, pause: float = 0.02
) -> dict[str, list[float]]:
    """Returns the seconds of each call, by candidate: `repeats` rounds in turns, after `warm` untimed calls of each.

    The order rotates, so that no candidate always follows the same one. `pause` seconds before each call let the
    threads of the previous one go to sleep. A call ends when its arrays are ready; a `Seconds` result is taken as is.
    """
    for fn in fns.values():
        for _ in range(warm):
            jax.block_until_ready(fn())
    names = list(fns)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i in range(repeats):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            time.sleep(pause)
            start = time.perf_counter()
            result = jax.block_until_ready(fns[name]())
            took = time.perf_counter() - start
            seconds[name].append(float(result) if isinstance(result, Seconds) else took)
    return seconds


@dataclass(frozen=True)
class Interval:
    """A number and its 95% interval, nan if unknown."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f} {self.high:.2f}]"


Samples = Sequence[float] | np.ndarray


def ratio(a: Samples, b: Samples, draws: int = 2000) -> Interval:
    """Returns median(a) / median(b) of samples taken in turns, with a bootstrap interval over the rounds."""
    x, y = np.asarray(a), np.asarray(b)
    rounds = np.random.default_rng(0).integers(0, len(x), (draws, len(x)))
    spread = np.median(x[rounds], 1) / np.median(y[rounds], 1)
    low, high = np.quantile(spread, [0.025, 0.975])
    return Interval(float(np.median(x) / np.median(y)), float(low), float(high))


def fit_exponent(sizes: Samples, values: Samples | Sequence[Samples], draws: int = 2000) -> Interval:
    """Returns the exponent e of value ~ size**e, by least squares of the logarithms.

    Several samples per size give a fit of their medians, with a bootstrap interval over the samples. One value per size
    gives the regression's own interval (Student's t), nan for two sizes.

    Raises:
      ValueError: for fewer than two sizes, or values that are not positive.
    """
    x, samples = np.log(np.asarray(sizes, float)), [np.atleast_1d(np.asarray(v, float)) for v in values]
    if len(x) < 2 or len(x) != len(samples) or any((v <= 0).any() for v in samples):
        raise ValueError(f"{sizes=} must be at least two, with a positive value each: {values=}")
    x = x - x.mean()

    def slope(y: np.ndarray) -> Any:
        return np.log(y) @ x / (x @ x)

    medians = np.array([np.median(v) for v in samples])
    value = float(slope(medians))
    if all(len(v) > 1 for v in samples):
        rng = np.random.default_rng(0)
        drawn = np.stack([np.median(rng.choice(v, (draws, len(v))), 1) for v in samples], 1)
        low, high = np.quantile(slope(drawn), [0.025, 0.975])
        return Interval(value, float(low), float(high))
    if len(x) == 2:
        return Interval(value, float("nan"), float("nan"))
    rest = np.log(medians) - np.log(medians).mean() - value * x
    half = float(stdtrit(len(x) - 2, 0.975) * np.sqrt(rest @ rest / (len(x) - 2) / (x @ x)))
    return Interval(value, value - half, value + half)


def temp_bytes(fn: Callable[..., Any], *shapes: Any) -> int:
    """Returns the compiled program's scratch memory: bytes besides arguments and results, as XLA reports them.

    shapes: arrays or ShapeDtypeStructs. fn may be jitted already. Nothing runs.
    """
    jitted = fn if hasattr(fn, "lower") else jax.jit(fn)
    return int(jitted.lower(*shapes).compile().memory_analysis().temp_size_in_bytes)


@contextlib.contextmanager
def cores(n: int) -> Iterator[int]:
    """Keeps this process, its threads and its children on at most n cores; yields how many they have."""
    if not hasattr(os, "sched_setaffinity"):
        yield os.cpu_count() or 1
        return
    before = os.sched_getaffinity(0)

    def pin(to: set[int]) -> None:
        for thread in os.listdir("/proc/self/task"):
            with contextlib.suppress(OSError):  # it may have ended
                os.sched_setaffinity(int(thread), to)

    pin(set(sorted(before)[:n]))
    try:
        yield min(n, len(before))
    finally:
        pin(before)
