"""Keeps what is not finite to those who see it.

Within a chunk, what a token does not see is multiplied by 0, and 0 times NaN is NaN. So a back end is given finite
arrays, and its results become NaN afterwards, head by head, at the tokens that see something else: forward those after
it in its segment, backward those before it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool

from longattn.ops.linear.contract import Arrays, Options, Out, State


def _bad(x: Array) -> Bool[Array, "B T h"]:
    """Returns the tokens and heads where x [B T h ...] is not finite."""
    bad = ~jnp.isfinite(x)
    return bad.any(-1) if bad.ndim == 4 else bad


def _any(H: int, *arrays: Array | None) -> Bool[Array, "B T H"]:
    """Returns the tokens and heads where one of the arrays [B T h ...] is not finite, H of them."""
    found = [_bad(x) for x in arrays if x is not None]
    return functools.reduce(jnp.logical_or, [jnp.repeat(bad, H // bad.shape[2], axis=2) for bad in found])


def _zero[A: Array | None](x: A) -> A:
    """Returns x with zeros in the tokens and heads that are not finite."""
    return x if x is None else jnp.where(jnp.expand_dims(_bad(x), range(3, x.ndim)), 0, x)


def _finite(x: Arrays) -> Arrays:
    """Returns the arrays with zeros in the tokens and heads that are not finite, and in such states."""
    tokens = {name: _zero(getattr(x, name)) for name in ("q", "k", "v", "log_decay", "beta")}
    return x._replace(initial_state=None if x.initial_state is None else _zero_state(x.initial_state), **tokens)


def _bad_state(S: Array) -> Bool[Array, "B H"]:
    return ~jnp.isfinite(S).all((-1, -2))


def _zero_state(S: Array) -> Array:
    return jnp.where(_bad_state(S)[..., None, None], 0, S)


def _nan_state(where: Bool[Array, "B H"], S: Array) -> Array:
    return jnp.where(where[..., None, None], jnp.nan, S)


def _nan[A: Array | None](where: Bool[Array, "B T H"], x: A) -> A:
    """Returns x [B T h ...] with NaN in these heads; a head of x that several of them share has the NaN of all."""
    if x is None:
        return x
    where = where.reshape(*where.shape[:2], x.shape[2], -1).any(-1)
    return jnp.where(jnp.expand_dims(where, range(3, x.ndim)), jnp.nan, x)


class _Sight(NamedTuple):
    """Tokens and heads [B T H] by what they have and what they see."""

    starts: Array | None  # [B T 1]: a segment begins with it
    own: Array  # its k, v, decay or beta is not finite
    sees: Array  # it sees something that is not finite, itself included


def _after(bad: Array, starts: Array | None, at_first: Array | None) -> Bool[Array, "B T H"]:
    """Returns the tokens that see a bad one: it, and those after it in its segment.

    Args:
      at_first: heads [B H] that bring something bad to the first token, or None.
    """
    if at_first is not None:
        bad = jnp.concatenate([bad[:, :1] | at_first[:, None], bad[:, 1:]], 1)
    t = jnp.arange(1, bad.shape[1] + 1, dtype=jnp.int32)[None, :, None]
    first = 1 if starts is None else lax.cummax(jnp.where(starts, t, 1), 1)
    return lax.cummax(jnp.where(bad, t, 0), 1) >= first


def _before(bad: Array, starts: Array | None, at_last: Array) -> Bool[Array, "B T H"]:
    """Returns the tokens that a bad one sees, itself included: from the last token on, `_after`."""
    if starts is not None:  # there, a segment begins with its last token
        starts = jnp.concatenate([starts[:, 1:], jnp.zeros_like(starts[:, :1])], 1)[:, ::-1]
    return _after(bad[:, ::-1], starts, at_last)[:, ::-1]


def _sight(x: Arrays) -> _Sight:
    own = _any(x.H, x.k, x.v, x.log_decay, x.beta)
    starts = None
    if x.segment_ids is not None:
        starts = (jnp.diff(x.segment_ids, axis=1, prepend=x.segment_ids[:, :1]) != 0)[..., None]
    given = None if x.initial_state is None else _bad_state(x.initial_state)
    return _Sight(starts, own, _after(own, starts, given))


def _receives(x: Arrays, starts: Array | None, do: Out, dS: State) -> Bool[Array, "B T H"]:
    """Returns the tokens and heads that something not finite reaches from those after them, going backward."""
    through = [x.log_decay, *([x.k, x.beta] if x.beta is not None else [])]  # a key with beta erases
    return _before(_any(x.H, x.q, do, *through), starts, _bad_state(dS))


def attend(inner: Callable[[Arrays, Options, Any], tuple[Out, State]]) -> Callable[..., tuple[Out, State]]:
    """Decorates the `attend` of a back end, whose products then have finite factors.

    A query that is not finite is left where no gradient is asked for: its own row alone is made of it.
    """

    @functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
    def kept(x: Arrays, options: Options, plan: Any) -> tuple[Out, State]:
        sees = _sight(x).sees
        out, S = inner(_finite(x)._replace(q=x.q), options, plan)
        return _nan(sees, out), _nan_state(sees[:, -1], S)

    def forward(x: Arrays, options: Options, plan: Any) -> tuple[tuple[Out, State], Any]:
        sight = _sight(x)
        (out, S), transpose = jax.vjp(lambda x: inner(x, options, plan), _finite(x))
        results = _nan(sight.sees | _any(x.H, x.q), out), _nan_state(sight.sees[:, -1], S)
        if x.initial_state is not None:  # over a mesh it arrived: kept as states are, the exchange does not run again
            sight = sight._replace(sees=checkpoint_name(sight.sees, "linear_state"))
        return results, (x._replace(initial_state=None), sight, transpose)

    def backward(options: Options, plan: Any, residuals: Any, cotangents: tuple[Out, State]) -> tuple[Arrays]:
        x, sight, transpose = residuals
        do, dS = cotangents
        (d,) = transpose((_zero(do), _zero_state(dS)))
        received = _receives(x, sight.starts, do, dS)
        token = received | sight.own
        if x.beta is not None:  # what a token writes depends on what its key reads
            token |= sight.sees
        gradients = Arrays(
            q=_nan(sight.sees | _any(x.H, do), d.q),
            k=_nan(token, d.k),
            v=_nan(token, d.v),
            log_decay=_nan(received | sight.sees, d.log_decay),
            beta=_nan(token, d.beta),
            initial_state=None if d.initial_state is None else _nan_state(received[:, 0], d.initial_state),
        )
        return (gradients,)

    kept.defvjp(forward, backward)
    return functools.wraps(inner)(lambda x, options, plan: kept(x, options, plan))


def fold(inner: Callable[[Arrays, Options, Any], State]) -> Callable[..., State]:
    """Decorates the `fold` of a back end."""

    @functools.wraps(inner)
    def kept(x: Arrays, options: Options, plan: Any) -> State:
        return _nan_state(_sight(x).sees[:, -1], inner(_finite(x), options, plan))

    return kept


def pull(inner: Callable[[Arrays, Out, State, Options, Any], State]) -> Callable[..., State]:
    """Decorates the `pull` of a back end."""

    @functools.wraps(inner)
    def kept(x: Arrays, do: Out, dfinal_state: State, options: Options, plan: Any) -> State:
        received = _receives(x, _sight(x).starts, do, dfinal_state)
        return _nan_state(received[:, 0], inner(_finite(x), _zero(do), _zero_state(dfinal_state), options, plan))

    return kept
