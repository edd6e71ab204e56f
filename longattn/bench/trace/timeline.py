"""Executions of compiled programs on the devices, and their ops, in time.

Times are nanoseconds of the trace's own clock; names with `seconds` are in seconds. On a CPU several threads work on
one execution. It lasts from its first op to its completion, is busy while any thread is inside an op, and sums the
seconds of ops over threads.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from longattn.bench.trace.scope import Scope


class Kernel(NamedTuple):
    """One run of one op."""

    name: str  # the HLO instruction's; on a GPU the kernel's
    scope: Scope
    start: float
    end: float
    seconds: float  # less the ops inside it on the same line


@dataclass(frozen=True)
class Execution:
    """One run of a compiled program on one device."""

    program: str  # such as "jit__train_step"
    device: str  # such as "/device:TPU:0"
    start: float
    end: float
    kernels: tuple[Kernel, ...]  # by start

    @property
    def seconds(self) -> float:
        """Seconds from its first op to its completion."""
        return (self.end - self.start) * 1e-9

    @property
    def busy(self) -> float:
        """Seconds during which at least one op ran."""
        return busy((self,), self.start, self.end)


@dataclass(frozen=True)
class Trace:
    """The programs that ran during a trace."""

    executions: tuple[Execution, ...]  # by start
    unknown_seconds: float  # of device events that name no program, as in replayed CUDA graphs

    def of(self, program: str) -> tuple[Execution, ...]:
        """Returns the executions of the programs with that name."""
        return tuple(e for e in self.executions if e.program == program)

    def busiest(self) -> str:
        """Returns the program that kept devices busy longest. Raises ValueError for a trace without programs."""
        total: dict[str, float] = defaultdict(float)
        for execution in self.executions:
            total[execution.program] += execution.busy
        if not total:
            raise ValueError("the trace holds no execution of a compiled program: record one while the device works")
        return max(total, key=lambda name: total[name])


def busy(executions: Iterable[Execution], start: float, end: float) -> float:
    """Returns the seconds between `start` and `end` during which at least one op of one device ran."""
    total, until = 0.0, start
    near = (e for e in executions if e.start < end and e.end > start)
    for kernel in sorted((k for e in near for k in e.kernels), key=lambda k: k.start):
        total += max(0.0, min(kernel.end, end) - max(kernel.start, until))
        until = max(until, kernel.end)
    return total * 1e-9
