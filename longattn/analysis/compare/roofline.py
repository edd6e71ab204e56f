"""What a contestant's device time is held against.

Roofline: FLOPs are those of the visible pairs, without recomputation; bytes are the least that must cross device
memory, each argument read and each result written once (the backward pass reads q, k, v, out and its cotangent again).
Peaks are the vendor's for listed chips, in bfloat16; on a CPU the float32 peak is a matrix product measured here and
the bandwidth is not known.
"""

from __future__ import annotations

import jax.numpy as jnp

from longattn.analysis import bench, hardware
from longattn.analysis.cases import CASES
from longattn.analysis.compare.contestants import CONTESTANTS, blocks
from longattn.analysis.compare.options import CompareOptions
from longattn.analysis.static import tpu


def minimal_bytes(options: bench.AttentionOptions, T: int, what: str) -> int:
    """The least that crosses device memory: each argument read once, each result written once, per pass."""
    item = jnp.dtype(options.dtype).itemsize
    q, kv = (options.B * T * heads * options.D * item for heads in (options.H, options.heads))
    forward = 2 * q + 2 * kv  # q, out; k, v
    backward = 4 * q + 4 * kv  # q, out, do, dq; k, v, dk, dv
    return forward + (backward if what == "forward_backward" else 0)


def static_seconds(name: str, options: CompareOptions, device: hardware.Device) -> tuple[float | None, str]:
    """Seconds of the compiler's own schedule at the chip's clock, for one call; or None and why."""
    case = CONTESTANTS[name].case
    if case is None or device.chip is None or device.chip.name not in hardware.TENSOR_CORES:
        return None, ""
    if options.dtype != "bfloat16":
        return None, f"static cycles are known for bfloat16, dtype is {options.dtype}"
    wanted = [case, f"{case}_backward"] if options.what == "forward_backward" else [case]
    seconds = 0.0
    for one in wanted:
        if one not in CASES:
            return None, f"there is no case {one}"
        try:
            row = tpu.profile(one, device.chip.name, blocks(options.problem))
        except (ValueError, NotImplementedError) as error:
            return None, str(error)
        if "reason" in row:
            return None, row["reason"]
        seconds += options.B * row["cycles"] / hardware.tpu_clock(device.chip.name)
    return seconds, ""
