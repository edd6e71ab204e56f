"""Strategies that exchange whole shards at once, before and after one local attention.

`all_gather`: every device gathers all keys and values and attends with its own queries (section 3.3.2 of
arXiv:2407.21783). Per device and layer, in units of S K D elements of k and as many of v, P devices on the axis:

    forward     (P - 1) / P of k and of v received by all-gather
    backward    as much again, for the gathered k and v are not kept, and (P - 1) / P of dk and of dv sent by
                reduce-scatter, in float32

So between forward and backward a device holds its own S / P keys, but within a layer all S of them: one layer's keys
and values limit the longest sequence. Under a causal mask the devices' work differs: the last one has most.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from longattn import shapes
from longattn.ops.attention import attend_partial, attention_with_lse, backward_partial
from longattn.ops.attention.spec import Extras
from longattn.parallel.spec import Call
from longattn.shapes import Key, Out, Query, Statistic, Value


def all_gather(q: Query, k: Key, v: Value, extras: Extras, call: Call) -> tuple[Out, Statistic]:
    """Attention of this device's queries over the keys of all devices on `call.axis`."""
    return _all_gather(q, k, v, extras.bias, extras._replace(bias=None), call)


def _gathered(k: Array, v: Array, axis: str) -> tuple[Array, Array]:
    with jax.named_scope("gather"):
        return tuple(lax.all_gather(x, axis, axis=1, tiled=True) for x in (k, v))


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _all_gather(
    q: Array, k: Array, v: Array, bias: Float[Array, "..."] | None, extras: Extras, call: Call
) -> tuple[Array, Array]:
    k, v = _gathered(k, v, call.axis)
    options = call.options(extras, q.shape[0])
    if call.out_dtype == q.dtype.name:
        return attention_with_lse(q, k, v, bias=bias, **options)
    return tuple(attend_partial(q, k, v, bias=bias, **options))


def _all_gather_forward(q: Array, k: Array, v: Array, bias: Any, extras: Extras, call: Call) -> Any:
    out, lse = _all_gather(q, k, v, bias, extras, call)
    out, lse = checkpoint_name(out, "attention_out"), checkpoint_name(lse, "attention_lse")
    return (out, lse), (q, k, v, bias, extras, out, lse)


def _all_gather_backward(call: Call, residuals: Any, cotangents: tuple[Array, Array]) -> Any:
    q, k, v, bias, extras, out, lse = residuals
    # Without the barrier XLA may find that these keys were gathered before, and keep all of them until now.
    k, v, do, dlse = lax.optimization_barrier((k, v, *cotangents))
    whole_k, whole_v = _gathered(k, v, call.axis)
    options = call.options(extras, q.shape[0])
    if bias is None:
        dq, dk, dv = backward_partial(q, whole_k, whole_v, out, lse, do, dlse, **options)
        dbias = None
    else:  # partial gradients leave the bias out: another forward pass, of float32 inputs, gives all four in float32
        wide = shapes.statistics_dtype(q.dtype)
        operands = [x.astype(wide) for x in (q, whole_k, whole_v, bias)]
        _, pull = jax.vjp(lambda q, k, v, bias: attention_with_lse(q, k, v, bias=bias, **options), *operands)
        dq, dk, dv, dbias = pull((do.astype(wide), dlse))
        dbias = dbias.astype(bias.dtype)
    # Summed in float32 over the devices, rounded once.
    with jax.named_scope("scatter"):
        dk, dv = (lax.psum_scatter(x, call.axis, scatter_dimension=1, tiled=True) for x in (dk, dv))
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), dbias, None


_all_gather.defvjp(_all_gather_forward, _all_gather_backward)
