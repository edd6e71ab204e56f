"""Linear attention in chunks, in plain XLA, on any device: products within a chunk, a state from one to the next.

`chunk` has the mathematics of one chunk. Time is O(T (C + D V / C)) per head, memory O(T).

T is cut into J spans of M chunks of C tokens; zeros fill the last span.
Forward, from the first span to the last:
    1. The state before each span is saved (`linear_state`): one per `SPAN` tokens, or per chunk if that is more.
    2. A scan over the span's chunks hands on the state and writes the output.
Backward, from the last span to the first, with dS the gradient of the state after it:
    3. The states before the span's chunks are recomputed from the saved one; nothing reads q for that.
    4. From the last chunk to the first, the chunk is differentiated: dS and do give the gradients of the chunk's
       arrays and of the state before it.
    5. The last dS is the gradient of the initial state.

Heads are [K G]: G heads share the products of q and k (see `chunk.Sizes`).
Not supported: jvp and second derivatives (the reference has them).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.lax import Precision
from jaxtyping import Array

from longattn import shapes
from longattn.ops import dispatch
from longattn.ops.linear import finite
from longattn.ops.linear.chunk import Sizes, Tokens, chunk
from longattn.ops.linear.contract import Arrays, Options, Out, State

SPAN = 256  # tokens: with D = V = 128 the saved states of a head are half as large as its q, k and v in bfloat16


@dataclass(frozen=True)
class Tuning:
    """Block sizes; they change the result by rounding only."""

    chunk: int = 32  # tokens, a power of two; on a CPU 32 is fastest for head sizes of 64 and 128, delta rule or not

    def __post_init__(self) -> None:
        if self.chunk < 1 or self.chunk & (self.chunk - 1):
            raise ValueError(f"chunk={self.chunk} must be a power of two, such as 32")


class Plan(NamedTuple):
    """Static sizes of a call."""

    T: int
    J: int  # spans
    M: int  # chunks of a span
    sizes: Sizes
    out_dtype: str


def check(x: Arrays, options: Options) -> Plan:
    """Accepts every valid call, and returns its plan."""
    T, H, full = x.k.shape[1], x.H, x.k.dtype in (jnp.float32, jnp.float64)
    by_channel = x.log_decay is not None and x.log_decay.ndim == 4
    K = H if by_channel else math.lcm(*(y.shape[2] for y in (x.q, x.k) if y is not None))
    C = min((options.tuning or Tuning()).chunk, 1 << (T - 1).bit_length())
    J = -(-T // max(SPAN, C))
    precision = Precision.HIGHEST if full else Precision.DEFAULT
    sizes = Sizes(K, H // K, C, options.scale, shapes.statistics_dtype(x.k.dtype), precision)
    return Plan(T, J, -(-T // (J * C)), sizes, options.out_dtype)


def _cut(y: Array | None, n: Plan) -> Array | None:
    """[B T ...] -> [J M B C ...]. The zeros after the last token write nothing and keep the state."""
    if y is None:
        return None
    y = jnp.pad(y, [(0, 0), (0, n.J * n.M * n.sizes.C - n.T)] + [(0, 0)] * (y.ndim - 2))
    return jnp.moveaxis(y.reshape(y.shape[0], n.J, n.M, n.sizes.C, *y.shape[2:]), 0, 2)


def _join(y: Array | None, n: Plan) -> Array | None:
    """[J M B C ...] -> [B T ...]."""
    if y is None:
        return None
    y = jnp.moveaxis(y, 2, 0)
    return y.reshape(y.shape[0], n.J * n.M * n.sizes.C, *y.shape[4:])[:, : n.T]


def _tokens(x: Arrays, n: Plan) -> Tokens:
    """The arrays in spans and chunks [J M B C ...]."""
    starts = None
    if x.segment_ids is not None:
        starts = (jnp.diff(x.segment_ids, axis=1, prepend=x.segment_ids[:, :1]) != 0).astype(jnp.int32)
        starts = jnp.cumsum(_cut(starts, n), axis=3)
    q, k, v, log_decay, beta = (_cut(y, n) for y in (x.q, x.k, x.v, x.log_decay, x.beta))
    return Tokens(q, k, v, log_decay, beta, starts)


def _grouped(S: Array, n: Plan) -> Array:
    """[B H D V] -> [B K G D V]."""
    return S.reshape(S.shape[0], n.sizes.K, n.sizes.G, *S.shape[2:])


def _forward(x: Arrays, n: Plan) -> tuple[Array, Array, Array]:
    """Returns out, the state after the last token, and those before the spans [J B K G D V]."""
    assert x.q is not None  # only `fold` is called without
    S = x.initial_state
    if S is None:
        S = jnp.zeros((x.q.shape[0], x.H, x.q.shape[3], x.v.shape[3]), n.sizes.dtype)
        S = lax.pcast(S, tuple(jax.typeof(x.q).manual_axis_type.varying), to="varying")

    def one(S: Array, t: Tokens) -> tuple[Array, Array]:
        S, out = chunk(S, t, n.sizes)
        assert out is not None  # the tokens have queries
        return S, out.astype(n.out_dtype)

    def span(S: Array, t: Tokens) -> tuple[Array, tuple[Array, Array]]:
        after, out = lax.scan(one, S, t)
        return after, (out, S)

    after, (out, states) = lax.scan(span, _grouped(S, n), _tokens(x, n))
    return _join(out, n), after.reshape(S.shape), states


def _backward(x: Arrays, states: Array, do: Array, dS: Array, n: Plan) -> Arrays:
    """Returns the gradients of all arrays of floats, the state before the first token included."""

    def one(dS: Array, given: tuple[Array, Tokens, Array]) -> tuple[Array, Tokens]:
        S, t, do = given
        differentiable, starts = t._replace(starts=None), t.starts
        _, transpose = jax.vjp(lambda S, t: chunk(S, t._replace(starts=starts), n.sizes), S, differentiable)
        return transpose((dS, do.astype(dS.dtype)))

    def span(dS: Array, given: tuple[Array, Tokens, Array]) -> tuple[Array, Tokens]:
        S, t, do = given
        with jax.named_scope("states"):
            _, before = lax.scan(lambda S, t: (chunk(S, t, n.sizes)[0], S), S, t._replace(q=None))
        return lax.scan(one, dS, (before, t, do), reverse=True)

    given = states, _tokens(x, n), _cut(do, n)
    before, gradients = lax.scan(span, _grouped(dS, n), given, reverse=True)
    dq, dk, dv, dlog_decay, dbeta = (_join(y, n) for y in gradients[:5])
    return Arrays(dq, dk, dv, dlog_decay, dbeta, before.reshape(dS.shape))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _attend(x: Arrays, n: Plan) -> tuple[Array, Array]:
    return _forward(x, n)[:2]


def _attend_forward(x: Arrays, n: Plan) -> Any:
    out, final_state, states = _forward(x, n)
    given = x.initial_state is not None
    return (out, final_state), (x._replace(initial_state=None), given, checkpoint_name(states, "linear_state"))


def _attend_backward(n: Plan, residuals: Any, cotangents: tuple[Array, Array]) -> tuple[Arrays]:
    x, given, states = residuals
    gradients = dispatch.once(functools.partial(_backward, n=n), x, states, *cotangents)
    return (gradients if given else gradients._replace(initial_state=None),)


_attend.defvjp(_attend_forward, _attend_backward)


@finite.attend
def attend(x: Arrays, options: Options, plan: Plan) -> tuple[Out, State]:
    """Returns out [B T H V] in options.out_dtype and the state after the last token [B H D V]."""
    return _attend(x, plan)


@finite.fold
def fold(x: Arrays, options: Options, plan: Plan) -> State:
    """Returns the state after the last token; zeros are written into its columns after V."""
    S, n = x.initial_state, plan
    assert S is not None  # the contract of `fold`

    def one(S: Array, t: Tokens) -> tuple[Array, None]:
        v = jnp.pad(t.v, [(0, 0)] * 3 + [(0, S.shape[-1] - t.v.shape[-1])])
        return chunk(S, t._replace(v=v), n.sizes)[0], None

    def span(S: Array, t: Tokens) -> tuple[Array, None]:
        return lax.scan(one, S, t)

    with jax.named_scope("fold"):
        after, _ = lax.scan(span, _grouped(S, n), _tokens(x, n))
    return after.reshape(S.shape)


@finite.pull
def pull(x: Arrays, do: Out, dfinal_state: State, options: Options, plan: Plan) -> State:
    """Returns the gradient of the state before the first token."""
    dS, n = dfinal_state, plan

    def one(dS: Array, given: tuple[Tokens, Array]) -> tuple[Array, None]:
        t, do = given
        _, transpose = jax.vjp(lambda S: chunk(S, t, n.sizes), dS)  # a chunk is affine in S: the point does not matter
        return transpose((dS, do.astype(dS.dtype)))[0], None

    def span(dS: Array, given: tuple[Tokens, Array]) -> tuple[Array, None]:
        return lax.scan(one, dS, given, reverse=True)

    with jax.named_scope("pull"):
        before, _ = lax.scan(span, _grouped(dS, n), (_tokens(x, n), _cut(do, n)), reverse=True)
    return before.reshape(dS.shape)
