"""Linear attention in chunks, in plain XLA, on any device: products within a chunk, a state from one chunk to the next.

With S the state before a chunk, g_i the sum of log_decay over the chunk's tokens up to i, and L_ij = exp(g_i - g_j):

    A  = beta_i (k_i . k_j) L_ij below the diagonal                     the delta rule only; else U = v
    U  = (I + A)^-1 diag(beta) (v - e^g k S)
    o  = scale (e^g q S + [(q_i . k_j) L_ij on and below the diagonal] U)
    S' = e^(g_C) S + (e^(g_C - g) k)^T U

Section 3.3 of arXiv:2412.06464 with the plus sign of its A, and for decays per channel arXiv:2510.26692, where g is a
vector and L_ij lies inside of the product over D. Time is O(T C + T D V / C) per head, memory O(T).

No exponent is ever positive, and none is a difference of sums, so any decay is exact to rounding: sums over (j, i] are
summed as they are. For decays per channel the pairs (i, j) are split by the highest bit in which they differ: their
sum is the one over (m, i] plus the one over (j, m], with m the middle of the block of 2^b tokens that holds both, and
each goes to its own factor. That is the secondary chunking of section 4.3 of arXiv:2312.06635, carried to the end.

The backward pass goes through the chunks in reverse and differentiates one span of them at a time, from the state that
was saved before it (`linear_state`): one state per `SPAN` tokens or per chunk, whichever is longer.

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
from longattn.ops.linear.spec import Beta, Decay, Ids, Key, Out, Query, Spec, State, Value

SPAN = 256  # tokens


@dataclass(frozen=True)
class Tuning:
    """It changes the result by rounding only."""

    chunk: int = 64  # tokens, a power of two

    def __post_init__(self) -> None:
        if self.chunk < 1 or self.chunk & (self.chunk - 1):
            raise ValueError(f"{self.chunk=} must be a power of two")


def check(*call: object) -> None:
    """Accepts every valid call."""


class _Layout(NamedTuple):
    """Static sizes. Heads h = (K G): the K ones have q and k of their own."""

    T: int
    K: int
    G: int
    C: int  # tokens of a chunk
    M: int  # chunks of a span
    J: int  # spans
    scale: float
    dtype: Any  # of states and accumulators
    precision: Precision  # of products


class _Tokens(NamedTuple):
    """What is read token by token: arrays [B T ...], cut into [J M B C ...]."""

    q: Array
    k: Array
    v: Array
    log_decay: Array | None
    beta: Array | None
    segments: Array | None  # as the number of starts since the chunk began


def _layout(q: Array, k: Array, v: Array, log_decay: Array | None, spec: Spec) -> _Layout:
    T, Hq, Hk = q.shape[1], q.shape[2], k.shape[2]
    H = max(Hq, Hk, v.shape[2])
    K = H if log_decay is not None and log_decay.ndim == 4 else math.lcm(Hq, Hk)
    C = min((spec.tuning or Tuning()).chunk, 1 << (T - 1).bit_length())
    M = min(max(SPAN // C, 1), -(-T // C))
    full = q.dtype in (jnp.float32, jnp.float64)
    precision = Precision.HIGHEST if full else Precision.DEFAULT
    return _Layout(T, K, H // K, C, M, -(-T // (M * C)), spec.scale, shapes.statistics_dtype(q.dtype), precision)


def _cut(x: Array | None, n: _Layout) -> Array | None:
    """[B T ...] -> [J M B C ...]; zeros fill the last span: they write nothing."""
    if x is None:
        return None
    x = jnp.pad(x, [(0, 0), (0, n.J * n.M * n.C - n.T)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(x.shape[0], n.J, n.M, n.C, *x.shape[2:]), 0, 2)


def _join(x: Array | None, n: _Layout) -> Array | None:
    """[J M B C ...] -> [B T ...]."""
    if x is None:
        return None
    x = jnp.moveaxis(x, 2, 0)
    return x.reshape(x.shape[0], -1, *x.shape[4:])[:, : n.T]


def _tokens(q: Any, k: Any, v: Any, log_decay: Any, beta: Any, segment_ids: Any, n: _Layout) -> _Tokens:
    starts = None
    if segment_ids is not None:
        starts = jnp.diff(segment_ids, axis=1, prepend=segment_ids[:, :1]) != 0
        starts = jnp.cumsum(_cut(starts.astype(jnp.int32), n), axis=3)
    return _Tokens(*(_cut(x, n) for x in (q, k, v, log_decay, beta)), starts)


# ---- one chunk


def _heads(x: Array, n: _Layout, grouped: bool = True) -> Array:
    """[B C h ...] -> [B K G C ...], or [B K C ...] of q and k; the copies are no longer than a chunk."""
    K, G = n.K, n.G if grouped else 1
    x = jnp.repeat(x.astype(n.dtype).swapaxes(1, 2), K * G // x.shape[2], axis=1)
    return x.reshape(x.shape[0], K, G, *x.shape[2:]) if grouped else x


def _sums(a: Array) -> list[tuple[Array, Array]]:
    """For blocks of 1, 2, 4 ... C of a [... C D]: sums from the block's first to each token, and from after it on."""
    C, D = a.shape[-2:]
    p, s, h, found = a, jnp.zeros_like(a), 1, [(a, jnp.zeros_like(a))]
    while h < C:
        p, s = (x.reshape(*a.shape[:-2], C // (2 * h), 2, h, D) for x in (p, s))
        left, right = p[..., 0, :, :], p[..., 1, :, :]
        s = jnp.stack([s[..., 0, :, :] + right[..., -1:, :], s[..., 1, :, :]], -3).reshape(a.shape)
        p = jnp.stack([left, right + left[..., -1:, :]], -3).reshape(a.shape)
        h *= 2
        found.append((p, s))
    return found


def _quadrants(corner: Any, diagonal: Array, C: int) -> Array:
    """Lower-triangular [... C C] from its diagonal blocks [... C 1 1], joined by corner(blocks of each half) below."""
    x, h = diagonal, 1
    while h < C:
        x = x.reshape(*x.shape[:-3], C // (2 * h), 2, h, h)
        a, b = x[..., 0, :, :], x[..., 1, :, :]
        c = corner(h, a, b)
        x = jnp.concatenate([jnp.concatenate([a, jnp.zeros_like(c)], -1), jnp.concatenate([c, b], -1)], -2)
        h *= 2
    return x[..., 0, :, :]


@jax.custom_vjp
def _solve(A: Array, R: Array) -> Array:
    """(I + A)^-1 R, for A strictly lower triangular."""
    return _inverse(A) @ R


def _inverse(A: Array) -> Array:
    C = A.shape[-1]

    def corner(h: int, a: Array, b: Array) -> Array:
        blocks = A.reshape(*A.shape[:-2], C // (2 * h), 2, h, C // (2 * h), 2, h)
        c = jnp.moveaxis(jnp.diagonal(blocks[..., 1, :, :, 0, :], axis1=-4, axis2=-2), -1, -3)
        product = functools.partial(jnp.matmul, precision=Precision.HIGHEST)
        return -product(product(b, c), a)

    return _quadrants(corner, jnp.ones((*A.shape[:-2], C, 1, 1), A.dtype), C)


def _solve_forward(A, R):
    X = _inverse(A)
    U = jnp.matmul(X, R, precision=Precision.HIGHEST)
    return U, (X, U)


def _solve_backward(residuals, dU):
    X, U = residuals
    dR = jnp.matmul(X.swapaxes(-1, -2), dU, precision=Precision.HIGHEST)
    return -jnp.matmul(dR, U.swapaxes(-1, -2), precision=Precision.HIGHEST), dR


_solve.defvjp(_solve_forward, _solve_backward)


def _chunk(S: Array, x: _Tokens, n: _Layout) -> tuple[Array, Array]:
    """The state after a chunk [B K G D V], and its output [B C H V]."""
    dot = functools.partial(jnp.einsum, precision=n.precision)
    q, k, v = _heads(x.q, n, False) * n.scale, _heads(x.k, n, False), _heads(x.v, n)
    lower = jnp.tri(n.C, dtype=bool)
    visible, from_state, to_state = lower[None, None, None], True, True
    if x.segments is not None:
        ids = x.segments[:, None, None]
        visible = visible & (ids[..., :, None] == ids[..., None, :])
        from_state, to_state = ids == 0, ids == ids[..., -1:]

    if x.log_decay is None or x.log_decay.ndim == 3:
        if x.log_decay is None:
            L, e_in, e_out = visible, from_state, to_state
        else:
            a = _heads(x.log_decay, n)
            sums = jnp.einsum(
                "IT,BKGTJ->BKGIJ",
                lower.astype(a.dtype),
                jnp.where(lower.T[None, None, None], 0.0, a[..., None]),
                precision=Precision.HIGHEST,
            )
            p = sums[..., 0] + a[..., :1]
            L = jnp.where(visible, jnp.exp(jnp.where(visible, sums, 0.0)), 0)
            e_in, e_out = jnp.where(from_state, jnp.exp(p), 0), jnp.where(to_state, jnp.exp(sums[..., -1, :]), 0)
        pairs = lambda y: (
            jnp.where(L, dot("BKID,BKJD->BKIJ", y, k)[:, :, None], 0)
            if L.dtype == bool
            else L * dot("BKID,BKJD->BKIJ", y, k)[:, :, None]
        )
        w = lambda e, y: y if e is True else jnp.where(e[..., None], y, 0) if e.dtype == bool else e[..., None] * y
        read = lambda y, S: w(e_in, dot("BKID,BKGDV->BKGIV", y, S))
        write = lambda U: dot("BKID,BKGIV->BKGDV", k, w(e_out, U))
        keep = None if e_in is True else e_in[..., -1:, None]
    else:
        a = _heads(x.log_decay, n)[:, :, 0]
        levels = [(jnp.exp(p), jnp.exp(s)) for p, s in _sums(a)]
        e_in, e_out = levels[-1]
        if from_state is not True:
            e_in, e_out = (
                jnp.where(from_state[:, :, 0, :, None], e_in, 0),
                jnp.where(to_state[:, :, 0, :, None], e_out, 0),
            )

        def pairs(y):
            def corner(h, left, right):
                p, s = levels[h.bit_length() - 1]
                half = lambda z, i: z.reshape(*z.shape[:2], n.C // (2 * h), 2, h, z.shape[-1])[:, :, :, i]
                return dot("BKNID,BKNJD->BKNIJ", half(y * p, 1), half(k * s, 0))

            P = _quadrants(corner, jnp.sum(y * k, -1)[..., None, None], n.C)[:, :, None]
            return jnp.where(visible, P, 0)

        read = lambda y, S: dot("BKID,BKGDV->BKGIV", y * e_in, S)
        write = lambda U: dot("BKID,BKGIV->BKGDV", k * e_out, U)
        keep = e_in[:, :, None, -1, :, None]
    if x.beta is not None:
        beta = _heads(x.beta, n)[..., None]
        A = jnp.where(jnp.tri(n.C, k=-1, dtype=bool)[None, None, None], beta * pairs(k), 0)
        v = _solve(A, beta * (v - read(k, S)))
    out = read(q, S) + dot("BKGIJ,BKGJV->BKGIV", pairs(q), v)
    if keep is not None:
        S = jnp.where(keep, S, 0.0) if keep.dtype == bool else keep * S
    S = S + write(v)
    out = out.reshape(out.shape[0], -1, *out.shape[3:]).swapaxes(1, 2)
    return S, out


# ---- all chunks


def _span(S: Array, tokens: _Tokens, n: _Layout) -> tuple[Array, Array]:
    """The state after a span of M chunks, and its output [M B C H V]."""
    return lax.scan(functools.partial(_chunk, n=n), S, tokens)


def _forward(q, k, v, log_decay, beta, initial_state, segment_ids, spec):
    """out, the final state, and the state before every span [J B K G D V]."""
    n = _layout(q, k, v, log_decay, spec)
    tokens = _tokens(q, k, v, log_decay, beta, segment_ids, n)
    S = jnp.zeros((q.shape[0], n.K, n.G, q.shape[3], v.shape[3]), n.dtype)
    if initial_state is None:
        S = lax.pcast(S, tuple(jax.typeof(q).manual_axis_type.varying), to="varying")
    else:
        S = initial_state.reshape(S.shape)

    def step(S, tokens):
        after, out = _span(S, tokens, n)
        return after, (out.astype(spec.out_dtype), S)

    S, (out, states) = lax.scan(step, S, tokens)
    return _join(out, n), S.reshape(S.shape[0], -1, *S.shape[3:]), states


def _backward(q, k, v, log_decay, beta, initial_state, segment_ids, states, do, dS, spec):
    n = _layout(q, k, v, log_decay, spec)
    *tokens, segments = _tokens(q, k, v, log_decay, beta, segment_ids, n)
    do = _cut(do, n)

    def step(dS, x):
        S, tokens, segments, do = x
        _, pull = jax.vjp(lambda S, tokens: _span(S, _Tokens(*tokens, segments), n), S, tokens)
        return pull((dS, do.astype(n.dtype)))

    dS, grads = lax.scan(step, dS.reshape(states.shape[1:]), (states, tokens, segments, do), reverse=True)
    return *(_join(x, n) for x in grads), None if initial_state is None else dS.reshape(initial_state.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(7,))
def _attend(q, k, v, log_decay, beta, initial_state, segment_ids, spec):
    return _forward(q, k, v, log_decay, beta, initial_state, segment_ids, spec)[:2]


def _attend_forward(q, k, v, log_decay, beta, initial_state, segment_ids, spec):
    out, S, states = _forward(q, k, v, log_decay, beta, initial_state, segment_ids, spec)
    states = checkpoint_name(states, "linear_state")
    return (out, S), (q, k, v, log_decay, beta, initial_state, segment_ids, states)


def _attend_backward(spec, residuals, cotangents):
    grads = dispatch.once(functools.partial(_backward, spec=spec), *residuals, *cotangents)
    return *grads, None


_attend.defvjp(_attend_forward, _attend_backward)


def attend(
    q: Query,
    k: Key,
    v: Value,
    log_decay: Decay | None,
    beta: Beta | None,
    initial_state: State | None,
    segment_ids: Ids | None,
    spec: Spec,
) -> tuple[Out, State]:
    return _attend(q, k, v, log_decay, beta, initial_state, segment_ids, spec)
