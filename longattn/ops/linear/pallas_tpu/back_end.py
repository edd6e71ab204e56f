"""Linear attention by Pallas kernels for TPUs: arrays in the kernels' layout, what is refused, the gradient's rule.

XLA moves heads before tokens (it may fold this into the operation before) and sums partial gradients of heads that
programs share. Arrays of tokens are not padded to whole chunks; scalars per token and head are.
Scalars are [B H JM 1 C], for J spans of M chunks of C tokens.

Not supported, with the reason in the error: float16 and float64, jvp and second derivatives.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

from longattn.ops import dispatch
from longattn.ops.linear import finite
from longattn.ops.linear.contract import Arrays, Options, Out, State
from longattn.ops.linear.pallas_tpu import backward as backward_kernels
from longattn.ops.linear.pallas_tpu import forward as forward_kernel
from longattn.ops.linear.pallas_tpu.call import Call, plan_call
from longattn.ops.linear.pallas_tpu.statics import Tokens
from longattn.ops.linear.pallas_tpu.tuning import Problem


def check(x: Arrays, options: Options) -> Call:
    """Returns the plan of a call. Raises NotImplementedError with the reason where the kernels cannot serve it."""
    dispatch.require_tpu(x.k.dtype)
    (B, T, Hk, D), (Hv, V) = x.k.shape, x.v.shape[2:]
    Hq = x.H if x.q is None else x.q.shape[2]
    if x.q is None:
        assert x.initial_state is not None  # the contract of `fold`
        V = x.initial_state.shape[3]
    decay = "none" if x.log_decay is None else "scalar" if x.log_decay.ndim == 3 else "vector"
    problem = Problem(B, x.H, Hq, Hk, Hv, T, D, V, decay, x.beta is not None, x.k.dtype)
    return plan_call(problem, options.scale, options.tuning)


# ---- the kernels' layout


def _scalars(n: Call, x: Array) -> Array:
    """[B T H] -> [B H JM 1 C], padded with zeros."""
    x = jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, n.J * n.span - n.T)))
    return x.reshape(n.B, n.H, -1, 1, n.C)


def _per_token(n: Call, x: Array) -> Array:
    """[B H JM 1 C] -> [B T H]."""
    return x.reshape(n.B, n.H, -1)[..., : n.T].swapaxes(1, 2)


def _starts(n: Call, ids: Array | None) -> Array | None:
    """The number of segments started within a token's chunk, up to the token: ids [B T] -> float32 [B JM 1 C]."""
    if ids is None:
        return None
    began = jnp.diff(ids, axis=1, prepend=ids[:, :1]) != 0
    began = jnp.pad(began, ((0, 0), (0, n.J * n.span - n.T))).reshape(n.B, -1, 1, n.C)
    return jnp.cumsum(began.astype(jnp.float32), axis=3)


def _tokens(n: Call, x: Arrays) -> Tokens:
    """The arrays in the layout of `Specs.arrays`."""
    q, k, v = (None if y is None else y.swapaxes(1, 2) for y in (x.q, x.k, x.v))
    g = x.log_decay
    if g is not None:
        g = _scalars(n, g) if n.decay == "scalar" else g.swapaxes(1, 2)
    return Tokens(q, k, v, g, None if x.beta is None else _scalars(n, x.beta))


def _over_batch(f: Callable[..., Any], x: Arrays, *arrays: Array) -> Any:
    """Calls f(x, *arrays), with vmap's axis folded into B."""
    whole = lambda k, x, *arrays: f(x._replace(k=k), *arrays)  # the first argument has to be an array [B ...]
    return dispatch.fold_vmap(whole, x.k, x._replace(k=None), *arrays)


def _sized(n: Call, x: Arrays) -> Call:
    """The plan for the arrays' batch, into which vmap may have folded an axis."""
    return dataclasses.replace(n, B=x.k.shape[0])


def _forward(x: Arrays, n: Call, save: bool = False) -> forward_kernel.Outputs:
    n = _sized(n, x)
    inputs = forward_kernel.Inputs(_tokens(n, x), _starts(n, x.segment_ids), x.initial_state)
    return forward_kernel.forward(n, dispatch.vary_together(inputs), save)


def _out_and_state(x: Arrays, n: Call, out_dtype: str) -> tuple[Array, Array]:
    found = _forward(x, n)
    return found.out.swapaxes(1, 2).astype(out_dtype), found.final_state


def _with_states(x: Arrays, n: Call, out_dtype: str) -> tuple[Array, Array, Array]:
    found = _forward(x, n, save=True)
    return found.out.swapaxes(1, 2).astype(out_dtype), found.final_state, found.states


def _backward(x: Arrays, states: Array, do: Array, dfinal_state: Array, n: Call) -> Arrays:
    n = _sized(n, x)
    inputs = backward_kernels.Inputs(_tokens(n, x), _starts(n, x.segment_ids), states, do.swapaxes(1, 2), dfinal_state)
    found = backward_kernels.backward(n, dispatch.vary_together(inputs))

    def whole(d: Array, y: Array) -> Array:
        """The gradient of y, with the partial sums of programs added up."""
        heads = y.shape[2]
        if d.shape[1] != heads:
            d = d.reshape(n.B, heads, -1, *d.shape[2:]).sum(2)
        return d.swapaxes(1, 2).astype(y.dtype)

    dq, dk, dv, dg, dbeta = found.tokens
    dq, dk, dv = (whole(d, y) for d, y in ((dq, x.q), (dk, x.k), (dv, x.v)))
    if dg is not None:
        dg = _per_token(n, dg) if n.decay == "scalar" else dg.swapaxes(1, 2)
    return Arrays(dq, dk, dv, dg, None if dbeta is None else _per_token(n, dbeta), found.initial_state)


def _fold(x: Arrays, n: Call) -> Array:
    assert x.initial_state is not None  # the contract of `fold`
    v = jnp.pad(x.v, [(0, 0)] * 3 + [(0, x.initial_state.shape[3] - x.v.shape[3])])
    return _forward(x._replace(v=v), n).final_state


def _pull(x: Arrays, do: Array, dfinal_state: Array, n: Call) -> Array:
    n = _sized(n, x)
    tokens = _tokens(n, x._replace(v=None))
    inputs = backward_kernels.Inputs(tokens, _starts(n, x.segment_ids), None, do.swapaxes(1, 2), dfinal_state)
    return backward_kernels.pull(n, dispatch.vary_together(inputs))


# ---- the gradient's rule


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _attend(x: Arrays, n: Call, out_dtype: str) -> tuple[Array, Array]:
    return _over_batch(functools.partial(_out_and_state, n=n, out_dtype=out_dtype), x)


def _attend_forward(x: Arrays, n: Call, out_dtype: str) -> Any:
    f = functools.partial(_over_batch, functools.partial(_with_states, n=n, out_dtype=out_dtype))
    out, final_state, states = dispatch.once(f, x)
    given = x.initial_state is not None
    return (out, final_state), (x._replace(initial_state=None), given, checkpoint_name(states, "linear_state"))


def _attend_backward(n: Call, out_dtype: str, residuals: Any, cotangents: tuple[Array, Array]) -> tuple[Arrays]:
    x, given, states = residuals
    f = functools.partial(_over_batch, functools.partial(_backward, n=n))
    gradients = dispatch.once(f, x, states, *cotangents)
    return (gradients if given else gradients._replace(initial_state=None),)


_attend.defvjp(_attend_forward, _attend_backward)


@finite.attend
def attend(x: Arrays, options: Options, plan: Call) -> tuple[Out, State]:
    """Returns out [B T H V] in options.out_dtype and the state after the last token [B H D V]."""
    return _attend(x, plan, options.out_dtype)


@finite.fold
def fold(x: Arrays, options: Options, plan: Call) -> State:
    """Returns the state after the last token; zeros are written into its columns after V."""
    return _over_batch(functools.partial(_fold, n=plan), x)


@finite.pull
def pull(x: Arrays, do: Out, dfinal_state: State, options: Options, plan: Call) -> State:
    """Returns the gradient of the state before the first token."""
    return _over_batch(functools.partial(_pull, n=plan), x._replace(initial_state=None), do, dfinal_state)
