"""Linear attention in chunks, in plain XLA, on any device: products within a chunk, a state from one to the next.

`chunk` has the mathematics of one chunk. Time is O(T (C + D V / C)) per head, memory O(T).

Forward, token by token of a coarser time:
    1. T is cut into J spans of M chunks of C tokens; zeros fill the last one.
    2. A scan over spans saves the state before each (`linear_state`): one state per `SPAN` tokens, or per chunk if that
       is more. Within a span a scan over its chunks hands on the state, and writes the output.
Backward, from the last span to the first, with dS the gradient of the state after it:
    3. The states before the span's chunks are computed again from the saved one; nothing reads q for that.
    4. From the last chunk to the first, the chunk is differentiated: dS and do give the gradients of what it reads, and
       dS of the state before it.
    5. What is left of dS before the first span is the gradient of the initial state.

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
from longattn.ops.linear.chunk import Sizes, Tokens, chunk
from longattn.ops.linear.contract import Beta, Decay, Ids, Key, Options, Out, Query, State, Value, WideState

SPAN = 256  # tokens: with D = V = 128 the saved states of a head are half as large as its q, k and v in bfloat16


@dataclass(frozen=True)
class Tuning:
    """It changes the result by rounding only."""

    chunk: int = 32  # tokens, a power of two; on a CPU 32 is fastest for head sizes of 64 and 128, delta rule or not

    def __post_init__(self) -> None:
        if self.chunk < 1 or self.chunk & (self.chunk - 1):
            raise ValueError(f"chunk={self.chunk} must be a power of two, such as 32")


def check(*call: object) -> None:
    """Accepts every valid call."""


_Arrays = tuple[Array | None, ...]  # q, k, v, log_decay, beta, segment_ids


class _Layout(NamedTuple):
    """Static sizes of a call: J spans of M chunks."""

    T: int
    J: int
    M: int
    sizes: Sizes


def _layout(arrays: _Arrays, options: Options, H: int | None = None) -> _Layout:
    """`H` is for calls without q, whose heads may be more than those of k and v."""
    q, k, v, log_decay = arrays[:4]
    heads = [x.shape[2] for x in (q, k) if x is not None]
    T, H = k.shape[1], H or max(*heads, v.shape[2])
    by_channel = log_decay is not None and log_decay.ndim == 4
    K = H if by_channel else math.lcm(*heads)
    C = min((options.tuning or Tuning()).chunk, 1 << (T - 1).bit_length())
    J = -(-T // max(SPAN, C))
    full = k.dtype in (jnp.float32, jnp.float64)
    precision = Precision.HIGHEST if full else Precision.DEFAULT
    sizes = Sizes(K, H // K, C, options.scale, shapes.statistics_dtype(k.dtype), precision)
    return _Layout(T, J, -(-T // (J * C)), sizes)


def _cut(x: Array | None, n: _Layout) -> Array | None:
    """[B T ...] -> [J M B C ...]. The zeros after the last token write nothing and keep the state."""
    if x is None:
        return None
    x = jnp.pad(x, [(0, 0), (0, n.J * n.M * n.sizes.C - n.T)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(x.shape[0], n.J, n.M, n.sizes.C, *x.shape[2:]), 0, 2)


def _join(x: Array | None, n: _Layout) -> Array | None:
    """[J M B C ...] -> [B T ...]."""
    if x is None:
        return None
    x = jnp.moveaxis(x, 2, 0)
    return x.reshape(x.shape[0], n.J * n.M * n.sizes.C, *x.shape[4:])[:, : n.T]


def _tokens(arrays: _Arrays, n: _Layout) -> Tokens:
    q, k, v, log_decay, beta, ids = arrays
    starts = None
    if ids is not None:
        starts = (jnp.diff(ids, axis=1, prepend=ids[:, :1]) != 0).astype(jnp.int32)
        starts = jnp.cumsum(_cut(starts, n), axis=3)
    return Tokens(_cut(q, n), _cut(k, n), _cut(v, n), _cut(log_decay, n), _cut(beta, n), starts)


def _forward(arrays: _Arrays, S: Array | None, options: Options) -> tuple[Array, Array, Array]:
    """out, the state after the last token, and those before the spans [J B K G D V]."""
    q, v, n = arrays[0], arrays[2], _layout(arrays, options)
    K, G = n.sizes[:2]
    if S is None:
        S = jnp.zeros((q.shape[0], K * G, q.shape[3], v.shape[3]), n.sizes.dtype)
        S = lax.pcast(S, tuple(jax.typeof(q).manual_axis_type.varying), to="varying")

    def one(S: Array, x: Tokens) -> tuple[Array, Array]:
        S, out = chunk(S, x, n.sizes)
        return S, out.astype(options.out_dtype)

    def span(S: Array, x: Tokens) -> tuple[Array, tuple[Array, Array]]:
        after, out = lax.scan(one, S, x)
        return after, (out, S)

    after, (out, states) = lax.scan(span, S.reshape(S.shape[0], K, G, *S.shape[2:]), _tokens(arrays, n))
    return _join(out, n), after.reshape(S.shape), states


def _backward(arrays: _Arrays, states: Array, do: Array, dS: Array, options: Options) -> tuple[_Arrays, Array]:
    """The gradients of q, k, v, log_decay and beta, and of the state before the first token."""
    n = _layout(arrays, options)

    def one(dS: Array, given: tuple[Array, Tokens, Array]) -> tuple[Array, Tokens]:
        S, x, do = given
        differentiable, starts = x._replace(starts=None), x.starts
        _, pull = jax.vjp(lambda S, x: chunk(S, x._replace(starts=starts), n.sizes), S, differentiable)
        return pull((dS, do.astype(dS.dtype)))

    def span(dS: Array, given: tuple[Array, Tokens, Array]) -> tuple[Array, Tokens]:
        S, x, do = given
        with jax.named_scope("states"):
            _, before = lax.scan(lambda S, x: (chunk(S, x, n.sizes)[0], S), S, x._replace(q=None))
        return lax.scan(one, dS, (before, x, do), reverse=True)

    given = states, _tokens(arrays, n), _cut(do, n)
    before, gradients = lax.scan(span, dS.reshape(states.shape[1:]), given, reverse=True)
    return tuple(_join(x, n) for x in gradients[:5]), before.reshape(dS.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _attend(arrays: _Arrays, initial_state: Array | None, options: Options) -> tuple[Array, Array]:
    return _forward(arrays, initial_state, options)[:2]


def _attend_forward(arrays: _Arrays, initial_state: Array | None, options: Options) -> Any:
    out, final_state, states = _forward(arrays, initial_state, options)
    return (out, final_state), (arrays, initial_state is not None, checkpoint_name(states, "linear_state"))


def _attend_backward(options: Options, residuals: Any, cotangents: tuple[Array, Array]) -> Any:
    arrays, given, states = residuals
    gradients, dS = dispatch.once(functools.partial(_backward, options=options), arrays, states, *cotangents)
    return (*gradients, None), dS if given else None


_attend.defvjp(_attend_forward, _attend_backward)


def fold(
    k: Key, v: Value, log_decay: Decay | None, beta: Beta | None, initial_state: WideState, segment_ids: Ids | None,
    options: Options,
) -> WideState:  # fmt: skip
    """The state after the last token; into columns of it beyond v's zeros are written."""
    arrays, S = (None, k, v, log_decay, beta, segment_ids), initial_state
    n = _layout(arrays, options, S.shape[1])

    def one(S: Array, x: Tokens) -> tuple[Array, None]:
        v = jnp.pad(x.v, [(0, 0)] * 3 + [(0, S.shape[-1] - x.v.shape[-1])])
        return chunk(S, x._replace(v=v), n.sizes)[0], None

    def span(S: Array, x: Tokens) -> tuple[Array, None]:
        return lax.scan(one, S, x)

    with jax.named_scope("fold"):
        after, _ = lax.scan(span, S.reshape(S.shape[0], *n.sizes[:2], *S.shape[2:]), _tokens(arrays, n))
    return after.reshape(S.shape)


def pull(
    q: Query, k: Key, v: Value, log_decay: Decay | None, beta: Beta | None, segment_ids: Ids | None, do: Out,
    dfinal_state: State, options: Options,
) -> State:  # fmt: skip
    """The gradient of the state before the first token."""
    arrays, dS = (q, k, v, log_decay, beta, segment_ids), dfinal_state
    n = _layout(arrays, options)

    def one(dS: Array, given: tuple[Tokens, Array]) -> tuple[Array, None]:
        x, do = given
        _, pull = jax.vjp(lambda S: chunk(S, x, n.sizes), dS)  # a chunk is affine in S: any state in its place will do
        return pull((dS, do.astype(dS.dtype)))[0], None

    def span(dS: Array, given: tuple[Tokens, Array]) -> tuple[Array, None]:
        return lax.scan(one, dS, given, reverse=True)

    given = _tokens(arrays, n), _cut(do, n)
    with jax.named_scope("pull"):
        before, _ = lax.scan(span, dS.reshape(dS.shape[0], *n.sizes[:2], *dS.shape[2:]), given, reverse=True)
    return before.reshape(dS.shape)


def attend(
    q: Query, k: Key, v: Value, log_decay: Decay | None, beta: Beta | None, initial_state: State | None,
    segment_ids: Ids | None, options: Options,
) -> tuple[Out, State]:  # fmt: skip
    """out [B T H V] in options.out_dtype and the state after the last token [B H D V]."""
    return _attend((q, k, v, log_decay, beta, segment_ids), initial_state, options)
