"""Compiling ahead of time, and refusing a program that needs more memory than there is."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np

from longattn.config import Config
from longattn.environment import available_memory
from longattn.models.context import Context
from longattn.train.step import State, batch_shapes, train_step


def compile_step(config: Config, shapes: State, context: Context | None = None) -> Any:
    """Compiles the training step. Raises ValueError if it needs more memory than there is."""

    def bytes_per_device(a: Any) -> int:
        return math.prod(a.sharding.shard_shape(a.shape) if a.sharding else a.shape) * a.dtype.itemsize

    held = sum(map(bytes_per_device, jax.tree.leaves(shapes)))
    itemsize = np.dtype(config.model.dtype).itemsize
    # Even full rematerialisation keeps the input of each layer. A step that cannot hold even those is refused before
    # it is traced: compiling it would take hours.
    mesh = config.mesh
    tokens = config.data.B * config.data.T // config.optimiser.accumulate // (mesh.data * mesh.fsdp * mesh.P)
    refuse_beyond_memory(config, held + tokens * config.model.E * itemsize * (config.model.N + 1))
    return compile_program(config, train_step(config, context), shapes, batch_shapes(config))


def compile_program(config: Config, jitted: Any, *shapes: Any) -> Any:
    """Compiles a function for arguments of these shapes. Raises ValueError if it needs more memory than there is."""
    try:
        compiled = jitted.lower(*shapes).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise ValueError(too_large(config, "more memory than the device has")) from error
    m = compiled.memory_analysis()
    if m is not None:
        refuse_beyond_memory(config, program_bytes(m))
    return compiled


def program_bytes(analysis: Any) -> int:
    """Returns the bytes of device memory that a program needs, from `memory_analysis()` on the default device.

    XLA for TPUs counts on-chip memory in `temp_size_in_bytes`, and bytes that its buffer assignment does not have:
    arguments, temporaries and results came to a third more than the buffers take. There the peak counts. The gaps
    between buffers are not in it, but the compiler refuses by itself what does not fit with them.
    """
    if jax.local_devices()[0].platform == "tpu":
        return analysis.peak_memory_in_bytes
    outputs = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return analysis.argument_size_in_bytes + analysis.temp_size_in_bytes + outputs


def refuse_beyond_memory(config: Config, needed: int) -> None:
    """Raises ValueError if `needed` bytes on each of the config's devices are more than is available."""
    if jax.local_devices()[0].platform == "cpu":
        needed *= min(config.mesh.size, jax.local_device_count())  # they share the host's memory
    available = available_memory()
    if available is not None and needed > available:
        raise ValueError(too_large(config, f"{needed / 2**30:.1f} GiB and {available / 2**30:.1f} GiB are available"))


def too_large(config: Config, needs: str) -> str:
    """Returns the error message for a step that does not fit, with the remedies."""
    return (
        f"data.T={config.data.T} with data.B={config.data.B} needs {needs}; lower T or B, "
        "or in training raise --optimiser.accumulate or choose --model.remat full"
    )
