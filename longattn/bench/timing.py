"""Wall-clock timing: calls taken in turns, ratios of medians with intervals, and exponents fitted to them."""

from __future__ import annotations

import contextlib
import math
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


APART = 2**28  # bytes: a call with more scratch memory is timed after the others, by itself
SETTLED = 0.75  # share of a candidate's usual CPU use below which a call counts as disturbed
CHECKED = 0.01  # seconds: the CPU use of shorter calls says nothing
PAUSES = (0.1, 0.3, 1.0)  # seconds to wait before a disturbed call is repeated


def interleave(
    fns: Mapping[str, Callable[[], Any]], repeats: int, *, warm: int = 1, pause: float = 0.02
) -> dict[str, list[float]]:
    """Returns the seconds of each call, by candidate: as `turns`, without the numbers of the calls."""
    return {name: [s for _, s in kept] for name, kept in turns(fns, repeats, warm=warm, pause=pause).items()}


def turns(
    fns: Mapping[str, Callable[[], Any]], repeats: int, *, warm: int = 1, pause: float = 0.02
) -> dict[str, list[tuple[int, float]]]:
    """Returns (number of the call, its seconds) of `repeats` calls of each candidate, after `warm` untimed ones.

    The candidates take turns, and the order rotates, so that no candidate always follows the same one. `pause` seconds
    before each call let the threads of the previous one go to sleep. A call ends when its arrays are ready; a `Seconds`
    result is taken as is.

    On a CPU, the call after one that allocates gigabytes runs on fewer cores for a while. So compiled candidates with
    more than `APART` bytes of scratch come after all others, one after the other. A call that uses less than `SETTLED`
    of the CPU time per second that its candidate used before is disturbed: it is repeated after each of `PAUSES`, until
    it is not. A candidate gets at most `repeats` repetitions, so that a busy machine cannot hold it for ever. Calls are
    numbered from 0 by candidate, untimed and repeated ones included.
    """
    on_cpu = jax.default_backend() == "cpu"
    large = [name for name, fn in fns.items() if on_cpu and _scratch(fn) > APART]
    groups = [[name for name in fns if name not in large], *([name] for name in large)]
    kept: dict[str, list[tuple[int, float]]] = {name: [] for name in fns}
    for names in filter(None, groups):
        calls = dict.fromkeys(names, 0)
        usual = dict.fromkeys(names, 0.0)  # CPU seconds per second
        spare = dict.fromkeys(names, repeats)

        def call(name: str, calls: dict[str, int] = calls) -> tuple[float, float]:
            start, cpu = time.perf_counter(), time.process_time()
            result = jax.block_until_ready(fns[name]())
            took = time.perf_counter() - start
            calls[name] += 1
            if isinstance(result, Seconds):
                return float(result), math.inf
            return took, (time.process_time() - cpu) / took if on_cpu and took >= CHECKED else math.inf

        for name in names:
            for _ in range(warm):
                _, use = call(name)
                usual[name] = max(usual[name], use if use < math.inf else 0.0)
        for i in range(repeats):
            for name in names[i % len(names) :] + names[: i % len(names)]:
                time.sleep(pause)
                took, use = call(name)
                for wait in PAUSES:
                    if use >= SETTLED * usual[name] or not spare[name]:
                        break
                    spare[name] -= 1
                    time.sleep(wait)
                    took, use = call(name)
                usual[name] = max(usual[name], use if use < math.inf else 0.0)
                kept[name].append((calls[name] - 1, took))
    return kept


def _scratch(fn: Any) -> int:
    """Returns the scratch bytes of a compiled program, or of a partial call of one; 0 if unknown."""
    memory = getattr(getattr(fn, "func", fn), "memory_analysis", lambda: None)()
    return 0 if memory is None else int(memory.temp_size_in_bytes)


def two_speeds(samples: Samples) -> bool:
    """Returns whether samples fall into two separate groups, so that a median says which group is larger and no more.

    The largest gap between neighbours in order must be over 20% of the value and three times the spread within either
    side, and each side must hold a quarter of the samples and at least two.
    """
    x = np.sort(np.log(np.asarray(samples, float)))
    if len(x) < 4:
        return False
    i = int(np.argmax(np.diff(x))) + 1
    gap, spread = x[i] - x[i - 1], max(x[i - 1] - x[0], x[-1] - x[i])
    return min(i, len(x) - i) >= max(2, len(x) / 4) and bool(gap > max(np.log(1.2), 3 * spread))


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
