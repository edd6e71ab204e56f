"""Static profiles of kernels for accelerators you don't have: schedules, slots, spills and instructions."""

from longattn.aot.kernels.command import ProfileOptions, run

__all__ = ["ProfileOptions", "run"]
