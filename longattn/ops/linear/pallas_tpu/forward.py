"""The forward kernel: chunk after chunk (`chunk`), the state in fast memory from the first to the last.

The state lies where the final state leaves from. For the backward pass, the one before each span of chunks is written
too: one per 512 tokens. Without q only states are computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array

from longattn.ops.linear.pallas_tpu.call import Call, Part, Parts, float32, run, starts, tokens
from longattn.ops.linear.pallas_tpu.chunk import chunk
from longattn.ops.linear.pallas_tpu.cost import Pass


def _kernel(n: Call, refs: Mapping[str, Any]) -> None:
    span, state = pl.program_id(1), refs["final_state"]

    @pl.when(span == 0)
    def _start() -> None:
        state[...] = refs["initial_state"][...] if "initial_state" in refs else jnp.zeros_like(state)

    if "states" in refs:
        refs["states"][...] = state[...]

    def advance(c: Array, _: None) -> None:
        out, S, _ = chunk(n.statics, tokens(n, refs, c, span), state[...], starts(refs, c))
        if out is not None:
            refs["out"][:, pl.ds(pl.multiple_of(c * n.chunk, n.chunk), n.chunk)] = out.astype(n.dtype)
        state[...] = S

    lax.fori_loop(0, n.span, advance, None)


def inputs(n: Call, parts: Parts, arrays: Mapping[str, Array]) -> dict[str, Part]:
    """What all kernels read: q, k, v [B heads T size], and where given g [B H T D] or [B H chunks 1 C], beta
    [B H chunks 1 C], starts [B chunks 1 C].
    """
    numbers = parts.numbers()
    specs = {
        "q": parts.tokens(n.Hq, n.D), "k": parts.tokens(n.Hk, n.D), "v": parts.tokens(n.Hv, n.V),
        "g": parts.tokens(n.H, n.D) if n.decay == "vector" else numbers, "beta": numbers, "starts": parts.starts(),
    }  # fmt: skip
    return {name: (arrays[name], options) for name, options in specs.items() if name in arrays}


def forward(n: Call, arrays: Mapping[str, Array], save: bool) -> dict[str, Array]:
    """out [B H T V] where there is q, final_state [B H D V] and, to `save`, states [B H spans D V]: before each span.

    Args:
      arrays: as of `inputs`, and initial_state [B H D V] where there is one.
    """
    parts = Parts(n, reverse=False)
    given = inputs(n, parts, arrays)
    if "initial_state" in arrays:
        given["initial_state"] = arrays["initial_state"], parts.state()
    made: dict[str, Part] = {"final_state": (float32((n.B, n.H, n.D, n.V)), parts.state())}
    if "q" in arrays:
        made["out"] = jax.ShapeDtypeStruct((n.B, n.H, n.T, n.V), n.dtype), parts.tokens(n.H, n.V)
    if save:
        made["states"] = float32((n.B, n.H, n.spans, n.D, n.V)), parts.states()
    what: Pass = "out" if "q" in arrays else "state"
    name = f"longattn_linear_{'forward' if 'q' in arrays else 'fold'}"
    return run(n, name, _kernel, given, made, {}, {what: n.span})
