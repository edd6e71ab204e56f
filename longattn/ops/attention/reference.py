"""Scaled dot-product attention as written in section 3.2.1 of arXiv:1706.03762: the whole [B H T S] matrix at once.

    out = softmax(softcap * tanh(scale * q k^T / softcap) + bias, over visible keys) v
    lse = log(sum(exp(logits), over visible keys))

It takes O(T S) memory, so it is used by name only: to test other back ends, for jvp and for second derivatives.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.lax import Precision
from jaxtyping import Array

from longattn.ops.attention import finite
from longattn.ops.attention.contract import Bias, Options, Visibility
from longattn.shapes import Key, Logits, Out, Query, Statistic, Value, statistics_dtype


def check(*call: object) -> None:
    """Accepts every valid call; there is nothing to plan."""


def _spoilt(x: Array) -> Array:
    """Returns which tokens hold something that is not finite, [B H T] of [B T H D]."""
    return ~jnp.isfinite(x).all(-1).transpose(0, 2, 1)


def _logits(q: Array, k: Array, v: Array, bias: Array | None, visibility: Visibility, options: Options) -> Logits:
    """Returns the logits: -inf at hidden keys, NaN where a query, a key or its value is not finite.

    Query head h reads key head h // G.
    """
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    spoilt = _spoilt(q)[:, :, :, None] | (_spoilt(k) | _spoilt(v))[:, :, None, :]
    logits = options.scale * jnp.einsum("BTHD,BSHD->BHTS", finite.only(q), finite.only(k), precision=Precision.HIGHEST)
    if options.softcap is not None:
        logits = options.softcap * jnp.tanh(logits / options.softcap)
    if bias is not None:
        logits = logits + bias.astype(logits.dtype)
    logits = jnp.where(spoilt, jnp.nan, 0.0) + logits  # added, so that gradients pass
    visible = visibility.rule(visibility.q_positions[:, None, :, None], visibility.k_positions[:, None, None, :])
    if visibility.q_segments is not None:
        assert visibility.k_segments is not None  # both are given, or neither
        visible = visible & (visibility.q_segments[:, None, :, None] == visibility.k_segments[:, None, None, :])
    return jnp.where(visible, logits, -jnp.inf)


def attend(
    q: Query, k: Key, v: Value, bias: Bias | None, visibility: Visibility, options: Options, plan: None
) -> tuple[Out, Statistic]:
    """Returns out [B T H V] and lse [B T H]; zeros and -inf where no key is visible."""
    q, k, v = (x.astype(statistics_dtype(x.dtype)) for x in (q, k, v))
    with jax.named_scope("logits"):
        logits = _logits(q, k, v, bias, visibility, options)
    with jax.named_scope("softmax"):
        m = jax.lax.stop_gradient(jnp.max(logits, axis=-1, initial=-jnp.inf))
        m = jnp.where(m == -jnp.inf, 0.0, m)
        P = jnp.exp(logits - m[..., None])
        total = jnp.sum(P, axis=-1)
        empty = total == 0
        total = jnp.where(empty, 1.0, total)
        P = jnp.where(logits == -jnp.inf, 0.0, P / total[..., None])
        lse = jnp.where(empty, -jnp.inf, m + jnp.log(total)).transpose(0, 2, 1)
    with jax.named_scope("values"):
        v = jnp.repeat(v, q.shape[2] // v.shape[2], axis=2)
        out = jnp.einsum("BHTS,BSHV->BTHV", P, finite.only(v), precision=Precision.HIGHEST)
        # Cotangents of rows that are empty, or NaN, stop here: dv would be their product with P, 0 at hidden keys.
        rest = jnp.where(jnp.isnan(lse), jnp.nan, 0.0)[..., None]
        out = jnp.where(jnp.isfinite(lse)[..., None], out, rest)
    return out.astype(options.out_dtype), lse


def backward_partial(
    q: Query, k: Key, v: Value, bias: Bias | None, visibility: Visibility, out: Out, lse: Statistic, do: Out,
    dlse: Statistic, options: Options, plan: None,
) -> tuple[Query, Key, Value]:  # fmt: skip
    """Returns dq, dk, dv from these keys, given the global out and lse.

    P = exp(logits - lse);  dS = P (do v^T - rowsum(do out) + dlse)
    """
    q, k, v, out, do = (x.astype(statistics_dtype(x.dtype)) for x in (q, k, v, out, do))
    whole, empty = jnp.isfinite(lse), lse == -jnp.inf
    do, out = (jnp.where(whole[..., None], x, 0.0) for x in (do, out))
    dlse, lse = jnp.where(whole, dlse, 0.0), jnp.where(empty, 0.0, lse)
    logits, pull = jax.vjp(lambda q, k: _logits(q, k, v, bias, visibility, options), q, k)
    repeated, gather = jax.vjp(lambda v: jnp.repeat(v, q.shape[2] // v.shape[2], axis=2), finite.only(v))
    delta = jnp.sum(do * out, axis=-1)
    lse, dlse, delta, empty = (jnp.transpose(x, (0, 2, 1))[..., None] for x in (lse, dlse, delta, empty))
    P = jnp.where(empty | (logits == -jnp.inf), 0.0, jnp.exp(logits - lse))
    dP = jnp.einsum("BTHV,BSHV->BHTS", do, repeated, precision=Precision.HIGHEST)
    dq, dk = pull(P * (dP - delta + dlse))
    return dq, dk, *gather(jnp.einsum("BHTS,BTHV->BSHV", P, do, precision=Precision.HIGHEST))
