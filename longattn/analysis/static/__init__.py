"""What compilers say of kernels for accelerators that are not there: schedules, slots, spills, instructions."""

from longattn.analysis.static.command import ProfileOptions, run

__all__ = ["ProfileOptions", "run"]
