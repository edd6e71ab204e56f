"""Comparison of attention kernels, exact or linear, on this machine's device, under one profiler trace."""

from longattn.bench.compare.command import run
from longattn.bench.compare.measurement import measure
from longattn.bench.compare.options import CASES, CompareOptions, known
from longattn.bench.compare.peers import CONTESTANTS, LINEAR, RIVALS, Contestant
from longattn.bench.compare.picture import plot
from longattn.bench.trace import opening

__all__ = [
    "CASES",
    "CONTESTANTS",
    "LINEAR",
    "RIVALS",
    "CompareOptions",
    "Contestant",
    "known",
    "measure",
    "opening",
    "plot",
    "run",
]
