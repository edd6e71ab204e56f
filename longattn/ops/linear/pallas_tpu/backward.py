"""The backward kernel: all gradients in one walk over the chunks in reverse, with the state's gradient in VMEM.

For each span the states before its chunks are recomputed from the one before the span, with the inverses of the delta
rule. Then each chunk is differentiated, the last first: `jax.vjp` of `chunk`, whose products and inverse have rules of
their own. Each gradient is summed in a fixed order, so it is bitwise reproducible.

`pull` gives the gradient of the initial state alone, in one walk that reads neither states nor v: a chunk is affine in
its state.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from longattn.ops.linear.pallas_tpu.call import (
    Call,
    Operand,
    Specs,
    float32,
    read_rows,
    read_starts,
    read_tokens,
    rows,
    run,
)
from longattn.ops.linear.pallas_tpu.chunk import chunk
from longattn.ops.linear.pallas_tpu.cost import Pass
from longattn.ops.linear.pallas_tpu.statics import Leaf, Tokens


class Inputs(NamedTuple):
    """Arrays, operands or refs that the backward kernels read."""

    tokens: Tokens  # see `Specs.arrays`; v is None for `pull`
    starts: Leaf  # [B JM 1 C], or None
    states: Leaf  # [B H J D V], the states before the spans; None for `pull`
    do: Leaf  # [B H T V]
    dfinal_state: Leaf  # [B H D V]


class Gradients(NamedTuple):
    """Arrays, operands or refs that the backward kernel writes."""

    tokens: Tokens  # as the inputs, but where programs share a head: then per program, float32 [B groups T size]
    initial_state: Leaf  # [B H D V]


class Scratch(NamedTuple):
    """Memory that a span of the backward kernel keeps."""

    S: Leaf  # [M+1 H D V], the states before its chunks, and after the last
    inverses: Leaf  # [M H C C] for the delta rule, else None


def _start(dS: Leaf, inputs: Inputs) -> None:
    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        dS[...] = inputs.dfinal_state[...]


def _kernel(n: Call, inputs: Inputs, outputs: Gradients, scratch: Scratch) -> None:
    t, dS = n.J - 1 - pl.program_id(1), outputs.initial_state
    _start(dS, inputs)
    _recompute(n, t, inputs, scratch)

    def differentiate(i: Array, _: None) -> None:
        c = n.M - 1 - i
        known = scratch.inverses[c] if n.delta else None
        f = lambda tokens, S: chunk(n.statics, tokens, S, read_starts(inputs.starts, c), known)[:2]
        _, transpose = jax.vjp(f, read_tokens(n, inputs.tokens, c, t), scratch.S[c])
        gradients, dS[...] = transpose((read_rows(n, inputs.do, c, t), dS[...]))
        for ref, x in zip(outputs.tokens, gradients):
            if ref is not None:
                ref[:, c if x.shape[1] == 1 else rows(n, c)] = x.astype(ref.dtype)

    lax.fori_loop(0, n.M, differentiate, None)


def _recompute(n: Call, t: Array, inputs: Inputs, scratch: Scratch) -> None:
    """Fills the scratch for span t."""
    scratch.S[0] = inputs.states[...]

    def advance(c: Array, _: None) -> None:
        tokens = read_tokens(n, inputs.tokens._replace(q=None), c, t)
        _, scratch.S[c + 1], inverse = chunk(n.statics, tokens, scratch.S[c], read_starts(inputs.starts, c))
        if n.delta:
            scratch.inverses[c] = inverse

    lax.fori_loop(0, n.recomputed, advance, None)


def _inputs(n: Call, specs: Specs, x: Inputs) -> Inputs:
    """The operands of the arrays."""
    return Inputs(
        specs.arrays(x.tokens),
        None if x.starts is None else Operand(x.starts, specs.starts()),
        None if x.states is None else Operand(x.states, specs.states()),
        Operand(x.do, specs.tokens(n.H, n.V)),
        Operand(x.dfinal_state, specs.state()),
    )


def backward(n: Call, x: Inputs) -> Gradients:
    """Returns the gradients of all arrays. Those of heads that programs share are partial sums, one per program."""
    specs = Specs(n, reverse=True)
    inputs = _inputs(n, specs, x)

    def gradient(given: Operand, heads: int) -> Operand:
        if heads * n.block_H >= n.H:
            return given
        *_, T, size = given.array.shape
        return Operand(float32(n.B, n.groups, T, size), specs.partials(size))

    q, k, v, log_decay, beta = inputs.tokens
    tokens = Tokens(gradient(q, n.Hq), gradient(k, n.Hk), gradient(v, n.Hv), log_decay, beta)
    outputs = Gradients(tokens, Operand(float32(n.B, n.H, n.D, n.V), specs.state()))
    inverses = pltpu.VMEM((n.M, n.block_H, n.C, n.C), jnp.float32) if n.delta else None
    scratch = Scratch(pltpu.VMEM((n.M + 1, n.block_H, n.D, n.V), jnp.float32), inverses)
    passes: dict[Pass, int] = {"state": n.recomputed, "gradients": n.M}
    return run(n, "longattn_linear_backward", _kernel, inputs, outputs, passes, scratch)


def _pull_kernel(n: Call, inputs: Inputs, dS: Leaf, scratch: tuple[()]) -> None:
    t = n.J - 1 - pl.program_id(1)
    tokens = inputs.tokens._replace(v=inputs.do)  # the gradient of S depends neither on v nor on S: any values do
    _start(dS, inputs)

    def transpose_chunk(i: Array, _: None) -> None:
        c = n.M - 1 - i
        f = lambda S: chunk(n.statics, read_tokens(n, tokens, c, t), S, read_starts(inputs.starts, c))[:2]
        _, transpose = jax.vjp(f, dS[...])
        (dS[...],) = transpose((read_rows(n, inputs.do, c, t), dS[...]))

    lax.fori_loop(0, n.M, transpose_chunk, None)


def pull(n: Call, x: Inputs) -> Array:
    """Returns the gradient of the initial state [B H D V]."""
    specs = Specs(n, reverse=True)
    output = Operand(float32(n.B, n.H, n.D, n.V), specs.state())
    return run(n, "longattn_linear_pull", _pull_kernel, _inputs(n, specs, x), output, {"pull": n.M})
