"""The kernels' cost, for XLA's scheduler and for readers of compiled programs.

Products are counted in the kernels' own equations for one chunk and head, times the chunks and heads. They include the
products of second pieces, those of the inverse, and what the backward pass recomputes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.interpreters import partial_eval

from longattn.ops.linear.pallas_tpu.chunk import chunk
from longattn.ops.linear.pallas_tpu.statics import Statics, Tokens

# What a kernel does with a chunk: `forward`; the same without q; `backward`; `pull`.
Pass = Literal["out", "state", "gradients", "pull"]


@functools.lru_cache(maxsize=1024)
def chunk_cost(n: Statics, D: int, V: int, what: Pass) -> tuple[int, int]:
    """Returns (FLOPs of matrix products, exponentials) of a pass over one chunk of one head."""
    array = lambda *shape: jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    g = {"none": None, "scalar": array(1, n.C), "vector": array(n.C, D)}[n.decay]
    t = Tokens(
        None if what == "state" else array(n.C, D), array(n.C, D), array(n.C, V), g, array(1, n.C) if n.delta else None
    )
    S, out, known = array(D, V), array(n.C, V), None
    if n.delta and what == "gradients":
        known = array(n.C, n.C)  # the backward kernel has the inverse from its pass over the span

    def run(t: Tokens, S: Any, known: Any, do: Any) -> Any:
        forward = lambda t, S: chunk(n, t, S, None, known)[:2]
        if what == "pull":
            return jax.vjp(functools.partial(forward, t), S)[1]((do, S))
        if what == "gradients":
            return jax.vjp(forward, t, S)[1]((do, S))
        return forward(t, S)

    traced = jax.make_jaxpr(run)(t, S, known, out).jaxpr
    needed, _ = partial_eval.dce_jaxpr(traced, [True] * len(traced.outvars))
    return _count(needed)


def _count(jaxpr: Any) -> tuple[int, int]:
    """(FLOPs of matrix products, exponentials) of a jaxpr, inner ones included."""
    flops = exponentials = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (summed, _), _ = equation.params["dimension_numbers"]
            lhs = equation.invars[0].aval.shape
            flops += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(lhs[i] for i in summed)
        elif equation.primitive.name in ("exp", "exp2"):
            exponentials += math.prod(equation.outvars[0].aval.shape)
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(inner, "eqns"):
                more = _count(getattr(inner, "jaxpr", inner))
                flops, exponentials = flops + more[0], exponentials + more[1]
    return flops, exponentials


def estimate(n: Statics, D: int, V: int, runs: Mapping[Pass, int], arrays: Iterable[Any]) -> pl.CostEstimate:
    """Returns the cost of a kernel that moves each array once.

    Args:
      runs: over how many chunks it makes each pass, all heads and sequences together.
      arrays: its inputs and outputs.
    """
    costs = [(times, chunk_cost(n, D, V, what)) for what, times in runs.items()]
    flops, exponentials = (sum(times * cost[i] for times, cost in costs) for i in range(2))
    moved = sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in arrays)
    return pl.CostEstimate(flops=flops, transcendentals=exponentials, bytes_accessed=moved)
