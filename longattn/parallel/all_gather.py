"""All-gathered keys (section 3.3.2 of arXiv:2407.21783): every device attends with its own queries to all keys.

Per device and layer, in units of S K D elements of k and as many of v, P devices on the axis:

    forward     (P - 1) / P of k and of v received by all-gather
    backward    the same again, since the gathered k and v are not kept, and (P - 1) / P of dk and of dv sent by
                reduce-scatter, in float32

Between forward and backward a device holds its own S / P keys, but within a layer it holds all S of them: one layer's
keys and values limit the longest sequence. Under a causal mask the devices' work differs unless the layout balances it.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from longattn import shapes
from longattn.ops.attention import attention_with_lse, backward_partial
from longattn.ops.attention.contract import Visibility
from longattn.parallel.layout import Axis
from longattn.parallel.strategy import Call, Gradients, Kept, Strategy, attended


def _own_rows(q: Array, visibility: Visibility, call: Call) -> dict[str, Any]:
    """The keyword arguments of the local attention of this device's queries over all keys."""
    device, (B, n) = lax.axis_index(call.axis), q.shape[:2]
    mine = lambda x: lax.dynamic_slice_in_dim(x, device * n, n, 1)
    rows = lambda x: jnp.broadcast_to(x, (B, x.shape[1]))
    positions = None
    if not call.in_order or call.P > 1:
        positions = rows(mine(visibility.q_positions)), rows(visibility.k_positions)
    segments = None if visibility.q_segments is None else (mine(visibility.q_segments), visibility.k_segments)
    return call.options(visibility.mask, positions, segments)


def _gathered(k: Array, v: Array, axis: Axis) -> tuple[Array, Array]:
    with jax.named_scope("gather"):
        return tuple(lax.all_gather(x, axis, axis=1, tiled=True) for x in (k, v))


def forward(
    q: Array, k: Array, v: Array, bias: Array | None, visibility: Visibility, call: Call
) -> tuple[Array, Array, Kept]:
    """Returns (out, lse, kept) of this device's queries over the keys of all devices on `call.axis`."""
    whole = _gathered(k, v, call.axis)
    return *attended(q, *whole, call, bias=bias, **_own_rows(q, visibility, call)), (q, k, v, bias)


def backward(
    kept: Kept, out: Array, lse: Array, do: Array, dlse: Array, visibility: Visibility, call: Call
) -> Gradients:
    """Returns dq, dk, dv and dbias for `forward`."""
    q, k, v, bias = kept
    whole_k, whole_v = _gathered(k, v, call.axis)
    options = _own_rows(q, visibility, call)
    if bias is None:
        dq, dk, dv = backward_partial(q, whole_k, whole_v, out, lse, do, dlse, **options)
        dbias = None
    else:  # `backward_partial` gives no dbias: another forward pass, of float32 inputs, gives all four in float32
        wide = shapes.statistics_dtype(q.dtype)
        operands = [x.astype(wide) for x in (q, whole_k, whole_v, bias)]
        _, pull = jax.vjp(lambda q, k, v, bias: attention_with_lse(q, k, v, bias=bias, **options), *operands)
        dq, dk, dv, dbias = pull((do.astype(wide), dlse))
    # Summed in float32 over the devices, rounded once.
    with jax.named_scope("scatter"):
        dk, dv = (lax.psum_scatter(x, call.axis, scatter_dimension=1, tiled=True) for x in (dk, dv))
    return dq, dk, dv, dbias


ALL_GATHER = Strategy("all_gather", "every device gathers all keys and values of a layer", forward, backward, bias=True)
