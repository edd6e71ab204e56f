"""A training step's peak device memory, against what `longattn plan` predicts."""

from __future__ import annotations

import math
import time
from typing import Any

import jax
import jax.numpy as jnp

from longattn.aot import train_step
from longattn.bench.bringup.options import BringupOptions
from longattn.bench.bringup.report import Report
from longattn.config import ByteLM, Config, Model
from longattn.cost import hardware, topology
from longattn.ops import dispatch
from longattn.train import step as steps
from longattn.train.compilation import program_bytes
from longattn.train.data import Batch

# The step needs more memory than the numerics part, so that the peak is its own, and it fits a chip of 16 GB.
_LARGE = Config(model=Model(N=8, E=1024, F=2816, H=8, K=4, D=128), data=ByteLM(T=4096, B=2))
_SMALL = Config(model=Model(N=2, E=64, F=128, H=2, K=1, D=32), data=ByteLM(T=128, B=2))


def run(options: BringupOptions, report: Report) -> None:
    """Adds one row: bytes that plan predicts, that the device's compiler reserves, and the device's measured peak."""
    config = _SMALL if options.small else _LARGE
    m, d = config.model, config.data
    step = f"train step, N {m.N} E {m.E} F {m.F} H {m.H} K {m.K} D {m.D} {m.dtype}, B {d.B} T {d.T:,}"
    row: dict[str, Any] = {"step": step}
    report.part("memory")["rows"].append(row)
    report.at("compiling and running a training step")
    row |= _measured(config)
    report.write()
    report.at("plan's compiler")
    row |= _predicted(config, max(1.0, report.deadline - time.monotonic()))
    both = row["measured_bytes"], row["predicted_bytes"]
    row["ratio"] = both[0] / both[1] if all(both) else None


def _measured(config: Config) -> dict[str, Any]:
    step: Any = steps.train_step(config)
    compiled = step.lower(steps.state_shapes(config), steps.batch_shapes(config)).compile()
    needs = compiled.memory_analysis()
    reserved = needs and program_bytes(needs)
    before = _stats()
    state = steps.init_state(config, 0)
    ids = jnp.zeros((config.data.B, config.data.T), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(config.data.T, dtype=jnp.int32), ids.shape)
    batch = Batch(tokens=ids, segment_ids=ids, positions=positions, weights=jnp.ones(ids.shape, jnp.float32))
    for _ in range(2):
        state, metrics = compiled(state, batch)
    jax.block_until_ready(state)
    after, reason = _stats(), None
    if not after:
        reason = "this device keeps no account of its memory"
    elif after["peak_bytes_in_use"] <= before["peak_bytes_in_use"]:
        reason = f"what ran before held more: {before['peak_bytes_in_use']:,} bytes"
    loss = float(metrics["loss"])
    wrong = {} if math.isfinite(loss) else {"outcome": "failed", "reason": f"the loss of the step is {loss}"}
    return {
        "compiled_bytes": reserved,
        "measured_bytes": None if reason else after["peak_bytes_in_use"],
        "held_before_bytes": before.get("bytes_in_use"),
        "measured_reason": reason,
        **wrong,
    }


def _stats() -> dict[str, int]:
    """Returns the device's memory statistics, or {} if they have no peak."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats if "peak_bytes_in_use" in stats else {}


def _predicted(config: Config, timeout: float) -> dict[str, Any]:
    """Returns plan's bytes for this chip. Plan compiles for a slice, of which the step uses one device."""
    kind = dispatch.target().kind
    chip = hardware.chip_of(kind)
    known = (*hardware.TENSOR_CORES, *hardware.GPUS)
    if chip is None or chip.name not in known:
        return {"predicted_bytes": None, "predicted_reason": f"plan knows {', '.join(known)}, this is {kind}"}
    core = hardware.TENSOR_CORES.get(chip.name)
    where = topology.parse(core.topology if core else f"{chip.name}:1")
    try:
        facts = train_step.facts(config, where, timeout, train_step.cache_folder())
    except ValueError as error:  # no compiler is installed
        facts = {"reason": str(error)}
    return {"predicted_bytes": facts.get("hbm_bytes"), "predicted_reason": facts.get("reason")}
