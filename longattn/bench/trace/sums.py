"""Time per execution of a program, by kernel and by scope."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from longattn.bench.trace.scope import Phase, Scope
from longattn.bench.trace.timeline import Execution, Kernel


@dataclass(frozen=True)
class Spread:
    """A median over repetitions and the quartiles around it."""

    median: float
    low: float  # first quartile
    high: float  # third quartile

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
        return cls(float(middle), float(low), float(high))


@dataclass(frozen=True)
class Part:
    """The cost of one kernel or scope in one execution, as medians over the executions."""

    name: str
    phase: Phase
    seconds: float  # summed over its calls
    calls: float
    scope: str


def kernels(executions: Sequence[Execution]) -> list[Part]:
    """Returns the kernels, most expensive first."""
    return _parts(executions, lambda kernel: (kernel.name, kernel.scope.phase, str(kernel.scope)))


def scopes(executions: Sequence[Execution], rename: Callable[[Scope], str] = str) -> list[Part]:
    """Returns the scopes, most expensive first. `rename` may join several into one."""
    return _parts(executions, lambda kernel: (rename(kernel.scope), kernel.scope.phase, rename(kernel.scope)))


def _parts(executions: Sequence[Execution], key: Callable[[Kernel], tuple[str, Phase, str]]) -> list[Part]:
    seconds: dict[Any, list[float]] = {}
    calls: dict[Any, list[int]] = {}
    for i, execution in enumerate(executions):
        for kernel in execution.kernels:
            at = key(kernel)
            seconds.setdefault(at, [0.0] * len(executions))[i] += kernel.seconds
            calls.setdefault(at, [0] * len(executions))[i] += 1
    parts = [
        Part(name, phase, float(np.median(s)), float(np.median(calls[name, phase, scope])), scope)
        for (name, phase, scope), s in seconds.items()
    ]
    return sorted(parts, key=lambda part: -part.seconds)
