"""Linear attention by Pallas kernels for TPUs: arrays in the kernels' layout, what is refused, the gradient's rule.

XLA moves heads before tokens (it may fold that into the operation before) and sums the gradients of what several
programs share. A sequence whose length is no multiple of a chunk is not filled up, but for the numbers per token and
head.

Not supported, with the reason in the error: float16 and float64, jvp and second derivatives.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

from longattn.ops import dispatch
from longattn.ops.linear.contract import Beta, Decay, Ids, Key, Options, Out, Query, State, Value, WideState
from longattn.ops.linear.pallas_tpu.backward import backward
from longattn.ops.linear.pallas_tpu.backward import pull as pull_kernel
from longattn.ops.linear.pallas_tpu.call import Call
from longattn.ops.linear.pallas_tpu.forward import forward
from longattn.ops.linear.pallas_tpu.tuning import choose


def check(
    q: Any, k: Any, v: Any, log_decay: Any, beta: Any, initial_state: Any, segment_ids: Any, options: Options
) -> None:
    """Raises NotImplementedError with the reason where the kernels cannot serve the call."""
    dispatch.require_tpu(q.dtype)
    if min(q.shape):
        _call(q, k, v, log_decay, beta, options)


def _call(q: Any, k: Any, v: Any, log_decay: Any, beta: Any, options: Options) -> Call:
    (B, T, Hq, D), Hk, (Hv, V) = q.shape, k.shape[2], v.shape[2:]
    H = max(Hq, Hk, Hv)
    decay = "none" if log_decay is None else "scalar" if log_decay.ndim == 3 else "vector"
    delta = beta is not None
    sizes = choose(options.tuning, B, H, (Hq, Hk, Hv), T, D, V, q.dtype.itemsize, decay, delta)
    chunk, span, block_h, vmem_bytes = sizes
    return Call(B, H, Hq, Hk, Hv, T, D, V, chunk, span, block_h, decay, delta, options.scale, q.dtype, vmem_bytes)


# ---- the kernels' layout


def _numbers(n: Call, x: Array) -> Array:
    """[B T H] -> [B H chunks 1 C], filled up with zeros."""
    x = jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, n.spans * n.rows - n.T)))
    return x.reshape(n.B, n.H, -1, 1, n.chunk)


def _of_numbers(n: Call, x: Array) -> Array:
    """The inverse of `_numbers`."""
    return x.reshape(n.B, n.H, -1)[..., : n.T].swapaxes(1, 2)


def _starts(n: Call, ids: Array) -> Array:
    """Of ids [B T], how many segments began since the chunk's begin: float32 [B chunks 1 C]."""
    began = jnp.diff(ids, axis=1, prepend=ids[:, :1]) != 0
    began = jnp.pad(began, ((0, 0), (0, n.spans * n.rows - n.T))).reshape(n.B, -1, 1, n.chunk)
    return jnp.cumsum(began.astype(jnp.float32), axis=3)


def _arrays(
    n: Call, q: Array | None, k: Array, v: Array | None, log_decay: Array | None, beta: Array | None, ids: Array | None
) -> Any:
    """What all kernels read, by name."""
    found = {name: x.swapaxes(1, 2) for name, x in (("q", q), ("k", k), ("v", v)) if x is not None}
    if log_decay is not None:
        found["g"] = _numbers(n, log_decay) if n.decay == "scalar" else log_decay.swapaxes(1, 2)
    if beta is not None:
        found["beta"] = _numbers(n, beta)
    if ids is not None:
        found["starts"] = _starts(n, ids)
    return found


def _forward(
    q: Array, k: Array, v: Array, log_decay: Array | None, beta: Array | None, state: Array | None, ids: Array | None,
    options: Options, save: bool,
) -> tuple[Array, ...]:  # fmt: skip
    n = _call(q, k, v, log_decay, beta, options)
    arrays = _arrays(n, q, k, v, log_decay, beta, ids) | ({} if state is None else {"initial_state": state})
    found = forward(n, dispatch.vary_together(arrays), save)
    out = found["out"].swapaxes(1, 2).astype(options.out_dtype), found["final_state"]
    return (*out, found["states"]) if save else out


def _backward(
    q: Array, k: Array, v: Array, log_decay: Array | None, beta: Array | None, ids: Array | None, states: Array,
    do: Array, dstate: Array, options: Options,
) -> tuple[Array | None, ...]:  # fmt: skip
    n = _call(q, k, v, log_decay, beta, options)
    arrays = _arrays(n, q, k, v, log_decay, beta, ids)
    arrays |= {"states": states, "do": do.swapaxes(1, 2), "dfinal_state": dstate}
    found = backward(n, dispatch.vary_together(arrays))

    def whole(name: str, x: Array) -> Array:
        """The gradient as its input x is, the shares of programs summed."""
        d, heads = found[name], x.shape[2]
        if d.shape[1] != heads:
            d = d.reshape(n.B, heads, -1, *d.shape[2:]).sum(2)
        return d.swapaxes(1, 2).astype(x.dtype)

    dq, dk, dv = (whole(name, x) for name, x in (("dq", q), ("dk", k), ("dv", v)))
    dg = None
    if log_decay is not None:
        dg = _of_numbers(n, found["dg"]) if n.decay == "scalar" else found["dg"].swapaxes(1, 2)
    dbeta = None if beta is None else _of_numbers(n, found["dbeta"])
    return dq, dk, dv, dg, dbeta, found["dinitial_state"]


def _fold(
    k: Array, v: Array, log_decay: Array | None, beta: Array | None, state: Array, ids: Array | None, options: Options
) -> Array:
    q = jax.ShapeDtypeStruct((*k.shape[:2], state.shape[1], k.shape[3]), k.dtype)  # for its heads
    v = jnp.pad(v, [(0, 0)] * 3 + [(0, state.shape[3] - v.shape[3])])
    n = _call(q, k, v, log_decay, beta, options)
    arrays = _arrays(n, None, k, v, log_decay, beta, ids) | {"initial_state": state}
    return forward(n, dispatch.vary_together(arrays), save=False)["final_state"]


def _pull(
    q: Array, k: Array, v: Array, log_decay: Array | None, beta: Array | None, ids: Array | None, do: Array,
    dstate: Array, options: Options,
) -> Array:  # fmt: skip
    n = _call(q, k, v, log_decay, beta, options)
    arrays = _arrays(n, q, k, None, log_decay, beta, ids) | {"do": do.swapaxes(1, 2), "dfinal_state": dstate}
    return pull_kernel(n, dispatch.vary_together(arrays))


# ---- the rules


@functools.partial(jax.custom_vjp, nondiff_argnums=(7,))
def _attend(
    q: Array, k: Array, v: Array, log_decay: Array | None, beta: Array | None, state: Array | None, ids: Array | None,
    options: Options,
) -> tuple[Array, Array]:  # fmt: skip
    return dispatch.fold_vmap(
        functools.partial(_forward, options=options, save=False), q, k, v, log_decay, beta, state, ids
    )


def _attend_forward(
    q: Array, k: Array, v: Array, log_decay: Array | None, beta: Array | None, state: Array | None, ids: Array | None,
    options: Options,
) -> Any:  # fmt: skip
    f = functools.partial(dispatch.fold_vmap, functools.partial(_forward, options=options, save=True))
    out, final, states = dispatch.once(f, q, k, v, log_decay, beta, state, ids)
    return (out, final), (q, k, v, log_decay, beta, ids, state is not None, checkpoint_name(states, "linear_state"))


def _attend_backward(options: Options, residuals: Any, cotangents: tuple[Array, Array]) -> Any:
    *arrays, given, states = residuals
    gradient = functools.partial(dispatch.fold_vmap, functools.partial(_backward, options=options))
    *gradients, dstate = dispatch.once(gradient, *arrays, states, *cotangents)
    return *gradients, dstate if given else None, None


_attend.defvjp(_attend_forward, _attend_backward)


def attend(
    q: Query, k: Key, v: Value, log_decay: Decay | None, beta: Beta | None, initial_state: State | None,
    segment_ids: Ids | None, options: Options,
) -> tuple[Out, State]:  # fmt: skip
    """out [B T H V] and the state after the last token [B H D V]."""
    return _attend(q, k, v, log_decay, beta, initial_state, segment_ids, options)


def fold(
    k: Key, v: Value, log_decay: Decay | None, beta: Beta | None, initial_state: WideState, segment_ids: Ids | None,
    options: Options,
) -> WideState:  # fmt: skip
    """The state after the last token; into columns of it beyond v's zeros are written."""
    f = functools.partial(_fold, options=options)
    return dispatch.fold_vmap(f, k, v, log_decay, beta, initial_state, segment_ids)


def pull(
    q: Query, k: Key, v: Value, log_decay: Decay | None, beta: Beta | None, segment_ids: Ids | None, do: Out,
    dfinal_state: State, options: Options,
) -> State:  # fmt: skip
    """The gradient of the state before the first token."""
    f = functools.partial(_pull, options=options)
    return dispatch.fold_vmap(f, q, k, v, log_decay, beta, segment_ids, do, dfinal_state)
