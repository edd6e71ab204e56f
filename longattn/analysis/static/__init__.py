"""What compilers say of kernels for accelerators that are not there: schedules, slots, spills, instructions."""

from longattn.analysis.static.command import ProfileOptions, run
from longattn.analysis.static.gpu_command import GpuProfileOptions
from longattn.analysis.static.gpu_command import run as run_gpu

__all__ = ["GpuProfileOptions", "ProfileOptions", "run", "run_gpu"]
