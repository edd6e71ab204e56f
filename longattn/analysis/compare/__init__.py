"""Attention kernels, exact or linear, side by side on this machine's device, under one trace."""

from longattn.analysis.compare.command import run
from longattn.analysis.compare.contestants import CONTESTANTS, LINEAR, RIVALS, Contestant
from longattn.analysis.compare.measurement import measure
from longattn.analysis.compare.options import CASES, CompareOptions, known
from longattn.analysis.compare.picture import plot
from longattn.analysis.trace import opening

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
