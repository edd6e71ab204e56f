"""Static profiles of kernels for accelerators that are not attached: schedules, slots, spills, instructions."""

from longattn.aot.kernels.command import ProfileOptions, run

__all__ = ["ProfileOptions", "run"]
