"""Bring-up of a chip that the kernels have never run on: correctness, memory and time."""

from longattn.bench.bringup.command import run
from longattn.bench.bringup.options import BringupOptions

__all__ = ["BringupOptions", "run"]
