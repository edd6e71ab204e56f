"""Attention kernels side by side on this machine's device, under one trace."""

from longattn.analysis.compare.command import run
from longattn.analysis.compare.contestants import CONTESTANTS, RIVALS, Contestant
from longattn.analysis.compare.measurement import measure
from longattn.analysis.compare.options import CASES, CompareOptions
from longattn.analysis.compare.picture import plot
from longattn.analysis.trace import opening

__all__ = ["CASES", "CONTESTANTS", "RIVALS", "CompareOptions", "Contestant", "measure", "opening", "plot", "run"]
