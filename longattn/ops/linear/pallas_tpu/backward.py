"""The backward kernel: all gradients in one walk over the chunks in reverse, the state's gradient in fast memory.

Of each span the states before its chunks are computed again from the one before it, with the inverses of the delta
rule; then each chunk, the last first, is differentiated (`jax.vjp` of `chunk`, whose products and inverse have rules
of their own). Each gradient is summed in one order: it is the same bit for bit every time.

`pull` is the part that gives the gradient of the initial state alone, in one walk that reads neither states nor v:
a chunk is affine in its state.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from longattn.ops.linear.pallas_tpu.call import Call, Part, Parts, float32, read, run, starts, tokens
from longattn.ops.linear.pallas_tpu.chunk import chunk
from longattn.ops.linear.pallas_tpu.cost import Pass
from longattn.ops.linear.pallas_tpu.forward import inputs


def _kernel(n: Call, refs: Mapping[str, Any]) -> None:
    step, dS, S, inverses = pl.program_id(1), refs["dinitial_state"], refs["S"], refs.get("inverses")
    span = n.spans - 1 - step

    @pl.when(step == 0)
    def _start() -> None:
        dS[...] = refs["dfinal_state"][...]

    S[0] = refs["states"][...]

    def advance(c: Array, _: None) -> None:
        _, S[c + 1], inverse = chunk(n.statics, tokens(n, refs, c, span, queries=False), S[c], starts(refs, c))
        if n.delta:
            inverses[c] = inverse

    lax.fori_loop(0, n.again, advance, None)

    def differentiate(i: Array, _: None) -> None:
        c = n.span - 1 - i
        known = inverses[c] if n.delta else None
        f = lambda t, S: chunk(n.statics, t, S, starts(refs, c), known)[:2]
        _, pull = jax.vjp(f, tokens(n, refs, c, span), S[c])
        (do,) = read(n, refs, c, span, "do")
        gradients, dS[...] = pull((do, dS[...]))
        rows = pl.ds(pl.multiple_of(c * n.chunk, n.chunk), n.chunk)
        for name, x in gradients._asdict().items():
            if x is not None:
                ref = refs[f"d{name}"]
                ref[:, c if x.shape[1] == 1 else rows] = x.astype(ref.dtype)

    lax.fori_loop(0, n.span, differentiate, None)


def backward(n: Call, arrays: Mapping[str, Array]) -> dict[str, Array]:
    """dq, dk, dv, dg, dbeta as the inputs, dinitial_state [B H D V].

    Where programs share a head of q, k or v, its gradient comes as their shares, float32 [B groups T size].

    Args:
      arrays: as of `forward.inputs`, and states [B H spans D V], do [B H T V], dfinal_state [B H D V].
    """
    parts = Parts(n, reverse=True)
    given = inputs(n, parts, arrays)
    made: dict[str, Part] = {}
    for name, heads in (("q", n.Hq), ("k", n.Hk), ("v", n.Hv)):
        x, options = given[name]
        if heads * n.block_h >= n.H:
            made[f"d{name}"] = x, options
        else:
            made[f"d{name}"] = float32((n.B, n.groups, *x.shape[2:])), parts.shares(x.shape[3])
    made |= {f"d{name}": given[name] for name in ("g", "beta") if name in given}
    made["dinitial_state"] = float32((n.B, n.H, n.D, n.V)), parts.state()
    given |= {
        "states": (arrays["states"], parts.states()),
        "do": (arrays["do"], parts.tokens(n.H, n.V)),
        "dfinal_state": (arrays["dfinal_state"], parts.state()),
    }
    scratch = {"S": pltpu.VMEM((n.span + 1, n.block_h, n.D, n.V), jnp.float32)}
    if n.delta:
        scratch["inverses"] = pltpu.VMEM((n.span, n.block_h, n.chunk, n.chunk), jnp.float32)
    passes: dict[Pass, int] = {"state": n.again, "gradients": n.span}
    return run(n, "longattn_linear_backward", _kernel, given, made, scratch, passes)


def _pull_kernel(n: Call, refs: Mapping[str, Any]) -> None:
    refs = {**refs, "v": refs["do"]}  # neither v nor S matters to the gradient of S: anything will do
    step, dS = pl.program_id(1), refs["dinitial_state"]
    span = n.spans - 1 - step

    @pl.when(step == 0)
    def _start() -> None:
        dS[...] = refs["dfinal_state"][...]

    def transpose(i: Array, _: None) -> None:
        c = n.span - 1 - i
        f = lambda S: chunk(n.statics, tokens(n, refs, c, span), S, starts(refs, c))[:2]
        _, pull = jax.vjp(f, dS[...])
        (do,) = read(n, refs, c, span, "do")
        (dS[...],) = pull((do, dS[...]))

    lax.fori_loop(0, n.span, transpose, None)


def pull(n: Call, arrays: Mapping[str, Array]) -> Array:
    """dinitial_state [B H D V].

    Args:
      arrays: as of `forward.inputs` without v, and do [B H T V], dfinal_state [B H D V].
    """
    parts = Parts(n, reverse=True)
    given = inputs(n, parts, arrays)
    given |= {
        "do": (arrays["do"], parts.tokens(n.H, n.V)),
        "dfinal_state": (arrays["dfinal_state"], parts.state()),
    }
    made: dict[str, Part] = {"dinitial_state": (float32((n.B, n.H, n.D, n.V)), parts.state())}
    return run(n, "longattn_linear_pull", _pull_kernel, given, made, {}, {"pull": n.span})["dinitial_state"]
