"""Kernels on a chip that they have not run on: are they right, how fast, within how much memory."""

from longattn.bench.bringup.command import run
from longattn.bench.bringup.options import BringupOptions

__all__ = ["BringupOptions", "run"]
