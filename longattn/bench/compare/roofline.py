"""What a contestant's device time is held against: the roofline, and the schedule of its kernels' compiler.

FLOPs and bytes are its problem's. Peaks are the vendor's for listed chips, in bfloat16; on a CPU the float32 peak is a
matrix product measured here and the bandwidth is not known.
"""

from __future__ import annotations

from longattn.aot.kernels import tpu
from longattn.aot.kernels.cases import CASES
from longattn.bench.compare.options import CompareOptions
from longattn.cost import hardware


def static_seconds(name: str, options: CompareOptions, device: hardware.Device) -> tuple[float | None, str]:
    """Seconds of the compiler's own schedule at the chip's clock, for one call; or None and why."""
    case, problem = options.known[name].case, options.given(name)
    if case is None or device.chip is None or device.chip.name not in hardware.TENSOR_CORES:
        return None, ""
    if problem.dtype != "bfloat16":
        return None, f"static cycles are known for bfloat16, dtype is {problem.dtype}"
    wanted = [case, f"{case}_backward"] if options.what == "forward_backward" else [case]
    seconds = 0.0
    for one in wanted:
        if one not in CASES:
            return None, f"there is no case {one}"
        try:
            row = tpu.profile(one, device.chip.name, problem.shape())
        except (ValueError, NotImplementedError) as error:
            return None, str(error)
        if "reason" in row:
            return None, row["reason"]
        seconds += options.B * row["cycles"] / hardware.tpu_clock(device.chip.name)
    return seconds, ""
