"""Counts the bytes that devices along the sequence send each other in one layer's attention, in compiled programs.

Forward and backward pass are compiled for the CPU devices of this process; a collective counts as often as its loop
runs. They are two programs, as in a scan over layers: in a single one, XLA may notice that the first hop back equals
the first hop forward, and keep its keys. The local attention is the reference, which makes programs small and does not
change the messages. XLA for CPUs sends bfloat16 as float32, and other dtypes as they are.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from longattn import parallel
from longattn.aot import hlo
from longattn.aot.schedule import Rates, walk
from longattn.cost.sequence.problem import Problem, Way, check
from longattn.parallel.layout import SequenceLayout

SCOPES = (
    "hop", "behind", "home", "keys", "queries", "results", "gradients", "gather", "scatter", "exchange",
)  # fmt: skip
_ANY_RATES = Rates(flops=1.0, hbm=1.0, link=1.0, network=1.0, node=2**30)  # only the counts are used


def measured(problem: Problem, way: Way) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Returns, for the forward and the backward pass, the bytes that each device receives [P] by scope.

    Messages outside every scope count as "ids". Raises ValueError if this process has too few devices, and what
    `problem.check` raises.
    """
    check(problem, way)
    if jax.device_count() < way.P:
        raise ValueError(f"{way.P} devices must be there, not {jax.device_count()}: set jax_num_cpu_devices")
    names = ("seq",) if len(way.sizes) == 1 else ("ring", "seq")
    devices = np.array(jax.devices()[: way.P]).reshape(way.sizes)
    mesh = Mesh(devices, names, axis_types=(AxisType.Auto,) * len(names))
    sharding = NamedSharding(mesh, PartitionSpec(None, names))
    shape = lambda *sizes, dtype=problem.dtype: jax.ShapeDtypeStruct(
        (problem.B, problem.T, *sizes), dtype, sharding=sharding
    )
    q, k, v, do = (
        shape(heads, size)
        for heads, size in (
            (problem.H, problem.D), (problem.heads, problem.D), (problem.heads, problem.values),
            (problem.H, problem.values),
        )
    )  # fmt: skip
    ids = {name: shape(dtype="int32") for name in ("segment_ids", "positions") if problem.ids}

    def attend(q: Any, k: Any, v: Any, ids: Any) -> Any:
        return parallel.attention(
            q, k, v, mesh=mesh, axis=names if len(names) > 1 else "seq", strategy=way.strategy,
            layout=SequenceLayout(way.layout), mask=problem.mask, implementation="reference", **ids,
        )  # fmt: skip

    def forward(q: Any, k: Any, v: Any, ids: Any) -> Any:
        return jax.vjp(lambda q, k, v: attend(q, k, v, ids), q, k, v)

    forward_program = _compiled(forward, q, k, v, ids)
    pull = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        jax.eval_shape(forward, q, k, v, ids),
        forward_program.output_shardings,
    )[1]
    backward_program = _compiled(lambda pull, do: pull(do), pull, do)
    return _received(forward_program, way.P), _received(backward_program, way.P)


def _compiled(function: Any, *arguments: Any) -> Any:
    options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # the program never runs
    return jax.jit(function).lower(*arguments).compile(compiler_options=options)


def _received(compiled: Any, P: int) -> dict[str, np.ndarray]:
    totals = walk(hlo.parse(compiled.as_text()), _ANY_RATES)
    found: dict[str, np.ndarray] = {}
    for (what, _), runs in totals.collectives.items():
        scope = next((part for part in reversed(what.scope.split("/")) if part in SCOPES), "ids")
        received = found.setdefault(scope, np.zeros(P))
        if what.pairs:
            np.add.at(received, [to for _, to in what.pairs], runs * what.bytes)
        else:
            received += runs * what.bytes
    return found
