"""Compiles one attention over a mesh, forward and backward, and reports which of its transfers overlap with work.

`python -m longattn.aot.overlap v5p:2x2x4 ring zigzag --T 524288` prints a row per kind of transfer in the compiler's
schedule: how often it runs, how often attention's kernel runs meanwhile, and how long devices wait for it. The machine
need not be attached. A kernel's own time is not known here: a transfer beside one counts as hidden.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console

from longattn import parallel
from longattn.aot import compilers, hlo, train_step
from longattn.aot.schedule import walk
from longattn.cost import topology
from longattn.display import plain_table, seconds_text
from longattn.models.transformer import REMAT


def compiled(
    where: topology.Topology, strategy: str, layout: str, T: int, H: int, K: int, D: int, timeout: float = 1800.0
) -> dict[str, Any]:
    """Compiles causal attention of one bfloat16 sequence over all devices of a machine, in a process of its own.

    Args:
      where: the machine.
      strategy, layout: as for `longattn.parallel.attention`, a strategy of one axis.
      T: tokens.
      H, K, D: query heads, key/value heads and head size.
      timeout: seconds for the compiler.

    Returns:
      "collectives" (as in a plan's row), "exposed" (seconds), and the numbers of "instructions" and "kernels"; or
      "reason", if there is no program.
    """
    request = {"topology": where.name, "strategy": strategy, "layout": layout, "T": T, "H": H, "K": K, "D": D}
    return compilers.call("longattn.aot.overlap:layer", request, compilers.environment_of(where), timeout)


def layer(request: Mapping[str, Any]) -> dict[str, Any]:
    """Answers a request of `compiled`, in the child process."""
    where = topology.parse(request["topology"])
    devices = compilers.devices_of(where)
    mesh = parallel.make_mesh(seq=len(devices), devices=devices)
    sharding = NamedSharding(mesh, P(None, "seq"))
    attend = functools.partial(
        parallel.attention, mesh=mesh, strategy=request["strategy"], layout=parallel.SequenceLayout(request["layout"])
    )

    attend = jax.checkpoint(attend, policy=REMAT["attention"])  # as in training: the passes share no transfer

    def both(q: Any, k: Any, v: Any, do: Any, fill: Any) -> Any:
        out, pull = jax.vjp(attend, q, k, v)
        return out, pull(do)

    array = lambda heads: jax.ShapeDtypeStruct((1, request["T"], heads, request["D"]), jnp.bfloat16, sharding=sharding)
    q, k = array(request["H"]), array(request["K"])
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        step = jax.jit(both, out_shardings=sharding, keep_unused=True)
        lowered = step.trace(q, k, k, q, train_step.filler(where, mesh)).lower()  # saves compiling kernels
    with tempfile.TemporaryDirectory(prefix="longattn_overlap_") as folder:
        _, text, _ = train_step.compiled_text(lowered, Path(folder), filled=True)
    program, rates = hlo.parse(text), train_step.published_rates(where, mesh)
    totals = walk(program, rates)
    return {
        "collectives": train_step.collectives(totals, rates, mesh),
        "exposed": totals.exposed,
        "instructions": sum(len(c.instructions) for c in program.computations.values()),
        "kernels": sum("longattn_attention" in i.scope for c in program.computations.values() for i in c.instructions
                       if i.opcode == "custom-call"),
    }  # fmt: skip


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("topology")
    parser.add_argument("strategy", choices=[s.name for s in parallel.STRATEGIES.values() if s.axes == 1])
    parser.add_argument("layout", nargs="?", default="contiguous")
    for name, default in (("T", 524_288), ("H", 32), ("K", 8), ("D", 128)):
        parser.add_argument(f"--{name}", type=int, default=default)
    o = parser.parse_args()
    answer = compiled(topology.parse(o.topology), o.strategy, o.layout, o.T, o.H, o.K, o.D)
    if "reason" in answer:
        parser.error(answer["reason"])
    table = plain_table(f"{o.strategy}, {o.layout}, T {o.T:,} on {o.topology}: {answer['instructions']:,} instructions")
    for heading in ("transfer", "kind", "asynchronous", "runs", "beside attention", "at link rate", "waited for"):
        table.add_column(heading)
    for c in answer["collectives"]:
        table.add_row(
            c["scope"], c["kind"], "yes" if c["asynchronous"] else "no", f"{c['runs']:.0f}",
            f"{c['beside_attention']:.0f}", seconds_text(c["seconds"]), seconds_text(c["exposed_seconds"]),
        )  # fmt: skip
    Console(width=150).print(table)


if __name__ == "__main__":
    _main()
