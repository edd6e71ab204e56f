"""What compilers say of kernels for accelerators that are not there: schedules, slots, spills, instructions."""

from longattn.aot.kernels.command import ProfileOptions, run

__all__ = ["ProfileOptions", "run"]
