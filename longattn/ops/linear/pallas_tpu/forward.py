"""The forward kernel: chunk after chunk (`chunk`), with the state in VMEM from the first to the last.

The output block of the final state holds the state meanwhile. For the backward pass, the state before each span is
written too: one per 512 tokens. Without q only states are computed.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array

from longattn.ops.linear.pallas_tpu.call import (
    Call,
    Operand,
    Specs,
    float32,
    read_starts,
    read_tokens,
    rows,
    run,
)
from longattn.ops.linear.pallas_tpu.chunk import chunk
from longattn.ops.linear.pallas_tpu.cost import Pass
from longattn.ops.linear.pallas_tpu.statics import Leaf, Tokens


class Inputs(NamedTuple):
    """Arrays, operands or refs that the forward kernel reads."""

    tokens: Tokens  # see `Specs.arrays`
    starts: Leaf  # [B JM 1 C], or None
    initial_state: Leaf  # [B H D V], or None


class Outputs(NamedTuple):
    """Arrays, operands or refs that the forward kernel writes."""

    final_state: Leaf  # [B H D V]
    out: Leaf  # [B H T V]; None without q
    states: Leaf  # [B H J D V], the states before the spans; None unless they are asked for


def _kernel(n: Call, inputs: Inputs, outputs: Outputs, scratch: tuple[()]) -> None:
    t, state = pl.program_id(1), outputs.final_state

    @pl.when(t == 0)
    def _start() -> None:
        state[...] = jnp.zeros_like(state) if inputs.initial_state is None else inputs.initial_state[...]

    if outputs.states is not None:
        outputs.states[...] = state[...]

    def advance(c: Array, _: None) -> None:
        tokens, starts = read_tokens(n, inputs.tokens, c, t), read_starts(inputs.starts, c)
        out, S, _ = chunk(n.statics, tokens, state[...], starts)
        if out is not None:
            outputs.out[:, rows(n, c)] = out.astype(n.dtype)
        state[...] = S

    lax.fori_loop(0, n.M, advance, None)


def forward(n: Call, x: Inputs, save: bool) -> Outputs:
    """Runs the kernel. With `save` it returns the states before the spans."""
    specs, has_q = Specs(n, reverse=False), x.tokens.q is not None
    operand = lambda array, spec: None if array is None else Operand(array, spec)
    inputs = Inputs(specs.arrays(x.tokens), operand(x.starts, specs.starts()), operand(x.initial_state, specs.state()))
    out = jax.ShapeDtypeStruct((n.B, n.H, n.T, n.V), n.dtype)
    outputs = Outputs(
        Operand(float32(n.B, n.H, n.D, n.V), specs.state()),
        Operand(out, specs.tokens(n.H, n.V)) if has_q else None,
        Operand(float32(n.B, n.H, n.J, n.D, n.V), specs.states()) if save else None,
    )
    name = f"longattn_linear_{'forward' if has_q else 'fold'}"
    passes: dict[Pass, int] = {"out" if has_q else "state": n.M}
    return run(n, name, _kernel, inputs, outputs, passes)
