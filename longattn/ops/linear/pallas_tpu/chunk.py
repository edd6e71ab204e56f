"""One chunk of C tokens of H heads, [H C D], and their states [H D V]: the body of every kernel, as plain functions.

With S the state before the chunk, and g(j, i] the sum of log_decay over the tokens after j up to i (0 is before all),

    A_ij = beta_i (k_i . k_j) e^g(j, i], below the diagonal                         the delta rule; else U = v
    U    = (I + A)^-1 beta (v - e^g(0, i] k S)
    o    = scale * (e^g(0, i] q S + P U),  P_ij = (q_i . k_j) e^g(j, i], on and below the diagonal
    S'   = e^g(0, C] S + (e^g(j, C] k)^T U

Section 2 of arXiv:2312.06635 and section 3.3 of arXiv:2412.06464. Exponents are sums of log_decay over the tokens
between two others, never differences of sums, so none is positive and any decay is exact.

Every operation is one over all heads. Their chains of products do not depend on each other, so the compiler fills the
waiting times of one with another: Gated DeltaNet on v6e took a fifth of the cycles of heads in turn.

Float32 inputs have full products. With bfloat16 inputs, the factors of the state are given as two bfloat16 pieces;
without the delta rule the final state is within 3e-6 of the exact one. The pairs of a chunk, and most factors in the
gradients, are rounded: errors stay below twice those of a recurrence whose factors are all rounded.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array

from longattn.ops.linear.pallas_tpu import vector_decay
from longattn.ops.linear.pallas_tpu.products import dot, indices, inverse, product
from longattn.ops.linear.pallas_tpu.statics import Statics, Tokens


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _between(g: Array, dtype: DTypeLike) -> Array:
    """The sums g(j, i] of a row [H 1 C], as [H C C]; 0 where j >= i."""
    i, j = indices(g.shape[-1])
    return _sum_below(jnp.where(i >= j, g, 0.0), "NN", dtype)


def _sum_below(x: Array, form: str, dtype: DTypeLike) -> Array:
    """x [H C C] times the matrix of ones strictly below the diagonal, or times its transpose for "NT"."""
    i, j = indices(x.shape[-1])
    ones = jnp.broadcast_to((i > j).astype(jnp.bfloat16), x.shape)
    return product(x, ones, form, dtype, (2, 1))


def _between_backward(dtype: DTypeLike, _: Any, ct: Array) -> tuple[Array]:
    i, j = indices(ct.shape[-1])
    return (jnp.sum(jnp.where(i >= j, _sum_below(ct, "NT", dtype), 0.0), axis=1, keepdims=True),)


_between.defvjp(lambda g, dtype: (_between(g, dtype), None), _between_backward)


def _column(row: Array, mask: Array) -> Array:
    """Sums a row [H 1 C] for each token over the tokens that the mask [1 C C] shows it: [H C 1]."""
    return jnp.sum(jnp.where(mask, row, 0.0), axis=2, keepdims=True)


def _per_head(x: Array | None, H: int) -> Array | None:
    """[heads C D] -> [H C D]: each head's own copy."""
    if x is None or x.shape[0] == H:
        return x
    return jnp.broadcast_to(x[:, None], (x.shape[0], H // x.shape[0], *x.shape[1:])).reshape(H, *x.shape[1:])


class _Factors(NamedTuple):
    """The factors of a chunk's products, decays included, [H ...]. Those of q are None without q."""

    qk: Array | None  # [C C], P before the mask, without scale outside of q
    kk: Array | None  # [C C], k_i . k_j with its decay, for the delta rule
    q_in: Array | None  # [C D], e^g(0, i] q, which meets S
    k_in: Array  # [C D], e^g(0, i] k, which meets S
    k_out: Array  # [C D], e^g(j, C] k, which S' receives
    kept: Array | None  # [D 1] or [1 1], e^g(0, C]; None is 1


def _undecayed(n: Statics, q: Array | None, k: Array, q_pieces: int) -> _Factors:
    qk = None if q is None else dot(q, k, "NT", n.dtype, (q_pieces, 1))
    kk = dot(k, k, "NT", n.dtype) if n.delta else None
    return _Factors(qk, kk, q, k, k, None)


def _decayed_by_head(n: Statics, q: Array | None, k: Array, g: Array, q_pieces: int) -> _Factors:
    """The factors for log_decay g [H 1 C]."""
    i, j = indices(n.C)
    qk, kk, *_ = _undecayed(n, q, k, q_pieces)
    between = jnp.exp(_between(g, n.dtype))
    qk, kk = (None if x is None else x * between for x in (qk, kk))
    since, until = jnp.exp(_column(g, i >= j)), jnp.exp(_column(g, i < j))
    kept = jnp.exp(jnp.sum(g, axis=2, keepdims=True))
    return _Factors(qk, kk, None if q is None else q * since, k * since, k * until, kept)


def _decayed_by_channel(n: Statics, q: Array | None, k: Array, g: Array) -> _Factors:
    """The factors for log_decay g [H C D]."""
    levels, before, after = vector_decay.exponents(g, n.dtype)
    since, until = vector_decay.exp(before), vector_decay.exp(after)
    d, e = indices(g.shape[2])
    kept = jnp.exp(_column(jnp.sum(g, axis=1, keepdims=True), d == e))
    qk, kk = (None, None) if q is None and not n.delta else vector_decay.pairs(n, q, k, levels)
    return _Factors(qk, kk, None if q is None else q * since, k * since, k * until, kept)


def chunk(
    n: Statics, t: Tokens, S: Array, starts: Array | None = None, known: Array | None = None
) -> tuple[Array | None, Array, Array | None]:
    """Returns out [H C V] if there is q, the next state [H D V], and for the delta rule (I + A)^-1; all float32.

    Args:
      n, t, S: the static arguments, the tokens, the state before them.
      starts: float32 [1 1 C], the number of segments started within the chunk, up to each token.
      known: (I + A)^-1 [H C C], where it was computed before.
    """
    q, k, v = (_per_head(x, S.shape[0]) for x in (t.q, t.k, t.v))
    q_pieces = k_pieces = v_pieces = 1  # one bfloat16 piece for numbers that are as exact as the inputs
    if q is not None and n.scale != 1.0:
        q, q_pieces = q * n.scale, 1 if math.frexp(n.scale)[0] == 0.5 else 2  # a power of 2 rounds nothing
    if n.decay == "none":
        x = _undecayed(n, q, k, q_pieces)
    elif n.decay == "scalar":
        x = _decayed_by_head(n, q, k, t.log_decay, q_pieces)
    else:
        x = _decayed_by_channel(n, q, k, t.log_decay)
    if n.decay != "none":
        q_pieces = k_pieces = 2
    i, j = indices(n.C)
    on_or_below, below, passed = i >= j, i > j, S
    q_in, k_in, k_out = x.q_in, x.k_in, x.k_out
    if starts is not None:
        own, last = _column(starts, i == j), starts[:, :, n.C - 1 :]
        on_or_below, below = (mask & (own == starts) for mask in (on_or_below, below))
        q_in, k_in = (None if y is None else jnp.where(own == 0.0, y, 0.0) for y in (q_in, k_in))
        k_out, passed = jnp.where(own == last, k_out, 0.0), jnp.where(last == 0.0, S, 0.0)
    solution, U = None, v
    if n.delta:
        beta, v_pieces = _column(t.beta, i == j), 2
        solution = inverse(jnp.where(below, x.kk, 0.0) * beta, known, n.dtype)
        U = dot(solution, beta * (v - dot(k_in, S, "NN", n.dtype, (k_pieces, 2, 2))), "NN", n.dtype, (2, 2, 2))
    out = None
    if q is not None:
        P = jnp.where(on_or_below, x.qk, 0.0)
        out = dot(q_in, S, "NN", n.dtype, (q_pieces, 2)) + dot(P, U, "NN", n.dtype)
    passed = passed if x.kept is None else x.kept * passed
    return out, passed + dot(k_out, U, "TN", n.dtype, (k_pieces, v_pieces)), solution
