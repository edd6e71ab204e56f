"""Static time of a contestant's kernels: the compiler's schedule at the chip's clock."""

from __future__ import annotations

from longattn.aot.kernels import tpu
from longattn.aot.kernels.cases import CASES
from longattn.bench.compare.options import CompareOptions
from longattn.cost import hardware


def static_seconds(name: str, options: CompareOptions, device: hardware.Device) -> tuple[float | None, str]:
    """Returns the static seconds of one call, or None and the reason."""
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
