"""Strategies that exchange whole shards at once, before and after one local attention.

`all_gather`: every device gathers all keys and values and attends with its own queries (section 3.3.2 of
arXiv:2407.21783). Per device and layer, in units of S K D elements of k and as many of v, P devices on the axis:

    forward     (P - 1) / P of k and of v received by all-gather
    backward    as much again, for the gathered k and v are not kept, and (P - 1) / P of dk and of dv sent by
                reduce-scatter, in float32

So between forward and backward a device holds its own S / P keys, but within a layer all S of them: one layer's keys
and values limit the longest sequence. Under a causal mask the devices' work differs, unless the layout balances it.

`ulysses`: an all-to-all gives each device whole sequences of H / P heads, and another brings the outputs back
(DeepSpeed-Ulysses, arXiv:2309.14509). In units of T H D elements, as if K = H and V = D:

    forward     (P - 1) / P^2 each of q, k, v and out
    backward    as much each of dout, dq, dk and dv; q, k and v are kept as they were exchanged

H is filled up to a multiple of P with heads of zeros, which cost as much as others. Where K is no multiple of P, a
device gets the key/value heads that its queries read, so that some are sent to several devices and their gradients
are summed, in float32, where they came from. Two more numbers per query and head go along (lse; and back).

`usp`: ulysses along the second of two axes, and a ring along the first, of T / P2 tokens (arXiv:2405.07719). The layout
is the ring's: each of its parts lies in order on the devices along the second axis.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from longattn import shapes
from longattn.mask import Mask
from longattn.ops.attention import attend_partial, attention_with_lse, backward_partial
from longattn.ops.attention.contract import Visibility
from longattn.parallel import ring
from longattn.parallel.layout import SequenceLayout, names_of
from longattn.parallel.strategy import Call, Strategy, without_out


def _attended(q: Array, k: Array, v: Array, call: Call, **options: Any) -> tuple[Array, Array]:
    if call.out_dtype == q.dtype.name:
        return attention_with_lse(q, k, v, **options)
    return tuple(attend_partial(q, k, v, **options))


# ---- keys gathered


def _own_rows(q: Array, visibility: Visibility, call: Call) -> dict[str, Any]:
    """The keyword arguments of the local attention over all keys, for the queries of this device."""
    device, (B, n) = lax.axis_index(call.axis), q.shape[:2]
    mine = lambda x: lax.dynamic_slice_in_dim(x, device * n, n, 1)
    rows = lambda x: jnp.broadcast_to(x, (B, x.shape[1]))
    positions = None
    if not call.in_order or call.devices > 1:
        positions = rows(mine(visibility.q_positions)), rows(visibility.k_positions)
    segments = None if visibility.q_segments is None else (mine(visibility.q_segments), visibility.k_segments)
    return call.options(visibility.mask, positions, segments)


def _gathered(k: Array, v: Array, axis: Any) -> tuple[Array, Array]:
    with jax.named_scope("gather"):
        return tuple(lax.all_gather(x, axis, axis=1, tiled=True) for x in (k, v))


def _gather_forward(q: Array, k: Array, v: Array, bias: Array | None, visibility: Visibility, call: Call) -> Any:
    """Attention of this device's queries over the keys of all devices on `call.axis`."""
    whole = _gathered(k, v, call.axis)
    return *_attended(q, *whole, call, bias=bias, **_own_rows(q, visibility, call)), (q, k, v, bias)


def _gather_backward(
    kept: Any, out: Array, lse: Array, do: Array, dlse: Array, visibility: Visibility, call: Call
) -> Any:
    """Its gradients."""
    q, k, v, bias = kept
    whole_k, whole_v = _gathered(k, v, call.axis)
    options = _own_rows(q, visibility, call)
    if bias is None:
        dq, dk, dv = backward_partial(q, whole_k, whole_v, out, lse, do, dlse, **options)
        dbias = None
    else:  # partial gradients leave the bias out: another forward pass, of float32 inputs, gives all four in float32
        wide = shapes.statistics_dtype(q.dtype)
        operands = [x.astype(wide) for x in (q, whole_k, whole_v, bias)]
        _, pull = jax.vjp(lambda q, k, v, bias: attention_with_lse(q, k, v, bias=bias, **options), *operands)
        dq, dk, dv, dbias = pull((do.astype(wide), dlse))
    # Summed in float32 over the devices, rounded once.
    with jax.named_scope("scatter"):
        dk, dv = (lax.psum_scatter(x, call.axis, scatter_dimension=1, tiled=True) for x in (dk, dv))
    return dq, dk, dv, dbias


ALL_GATHER = Strategy(_gather_forward, _gather_backward, bias=True)


# ---- heads exchanged for tokens


@dataclass(frozen=True)
class Heads:
    """Which heads which of P devices gets."""

    H: int
    P: int
    each: int  # query heads of a device, those filled in too
    keys: tuple[int, ...]  # the key/value heads that are sent, as many to each device


def heads(H: int, K: int, P: int) -> Heads:
    """Of H query and K key/value heads: each device's queries and the fewest keys that they read, equal in number."""
    each, G = -(-H // P), H // K
    if H % P == 0 and each % G == 0:
        return Heads(H, P, each, tuple(range(K)))
    if H % P == 0 and G % each == 0:  # all queries of a device read one
        return Heads(H, P, each, tuple(device * each // G for device in range(P)))
    return Heads(H, P, each, tuple(min(h, H - 1) // G for h in range(each * P)))  # one for each query head


class _Exchange:
    """The way of arrays between [B t H ...], all heads of a part of the tokens, and [B T h ...]."""

    def __init__(self, axis: str, heads: Heads, layout: SequenceLayout):
        self.axis, self.heads, self.layout = axis, heads, layout

    def _there(self, x: Array) -> Array:
        with jax.named_scope("exchange"):
            x = lax.all_to_all(x, self.axis, split_axis=2, concat_axis=1, tiled=True)
        return self.layout.restore(x, self.heads.P)

    def _back(self, x: Array) -> Array:
        x = self.layout.permute(x, self.heads.P)
        with jax.named_scope("exchange"):
            return lax.all_to_all(x, self.axis, split_axis=1, concat_axis=2, tiled=True)

    def queries(self, x: Array, fill: float = 0.0) -> Array:
        more = self.heads.each * self.heads.P - self.heads.H
        pad = [(0, 0), (0, 0), (0, more)] + [(0, 0)] * (x.ndim - 3)
        return self._there(jnp.pad(x, pad, constant_values=fill) if more else x)

    def keys(self, x: Array) -> Array:
        whole = self.heads.keys == tuple(range(x.shape[2]))
        return self._there(x if whole else x[:, :, np.array(self.heads.keys)])

    def from_queries(self, x: Array) -> Array:
        return self._back(x)[:, :, : self.heads.H]

    def from_keys(self, x: Array, K: int, dtype: Any) -> Array:
        """Gradients [B S k D] of the heads sent, summed to those of the K heads."""
        if self.heads.keys == tuple(range(K)):
            return self._back(x.astype(dtype))
        x = self._back(x)
        zeros = jnp.zeros_like(x, shape=(*x.shape[:2], K, x.shape[3]))
        return zeros.at[:, :, np.array(self.heads.keys)].add(x)

    def mask(self, mask: Mask) -> Mask:
        """Its array leaves [B H ...] for this device's heads."""
        n, device = self.heads.each, lax.axis_index(self.axis)

        def mine(x: Array) -> Array:
            if x.ndim < 4 or x.shape[1] == 1:
                return x
            x = jnp.pad(x, ((0, 0), (0, n * self.heads.P - self.heads.H), (0, 0), (0, 0)))
            return lax.dynamic_slice_in_dim(x, device * n, n, 1)

        return jax.tree.map(mine, mask)


def _axes(call: Call) -> tuple[Call, str, int]:
    """The call of the ring, or of one device where there is none; the axis of the all-to-all and its size."""
    alone = dataclasses.replace(call, sizes=(1,), layout=SequenceLayout())
    return alone if len(call.sizes) == 1 else call.outer, names_of(call.axis)[-1], call.sizes[-1]


def _exchange(H: int, K: int, visibility: Visibility, call: Call) -> tuple[_Exchange, Visibility, Call]:
    """The exchange, and ids, positions and call of the attention within."""
    inner, axis, P = _axes(call)
    alone = len(call.sizes) == 1
    x = _Exchange(axis, heads(H, K, P), call.layout if alone else SequenceLayout())
    if alone:  # sequences are whole and in order again
        ids = {name: None if y is None else call.layout.restore(y, P) for name, y in visibility._asdict().items()
               if name.endswith(("positions", "segments"))}  # fmt: skip
        visibility = visibility._replace(**ids)
    return x, visibility._replace(mask=x.mask(visibility.mask)), inner


def _whole(q: Array, visibility: Visibility, call: Call) -> dict[str, Any]:
    """The keyword arguments of the local attention over whole sequences."""
    rows = lambda x: jnp.broadcast_to(x, (q.shape[0], x.shape[1]))
    positions = None if call.in_order else (rows(visibility.q_positions), rows(visibility.k_positions))
    segments = None if visibility.q_segments is None else (visibility.q_segments, visibility.k_segments)
    return call.options(visibility.mask, positions, segments)


def _heads_forward(q: Array, k: Array, v: Array, bias: None, visibility: Visibility, call: Call) -> Any:
    """Attention of this device's queries over the keys of all devices on `call.axis`."""
    x, visibility, inner = _exchange(q.shape[2], call.K, visibility, call)
    q_heads, k_heads, v_heads = x.queries(q), x.keys(k), x.keys(v)
    if inner.devices == 1:
        out, lse = _attended(q_heads, k_heads, v_heads, inner, **_whole(q_heads, visibility, inner))
        kept = q_heads, k_heads, v_heads
    else:
        out, lse, kept = ring.forward(q_heads, k_heads, v_heads, None, visibility, inner)
    return x.from_queries(out), x.from_queries(lse), kept


def _heads_backward(
    kept: Any, out: Array, lse: Array, do: Array, dlse: Array, visibility: Visibility, call: Call
) -> Any:
    """Its gradients."""
    q, k, v = kept
    x, visibility, inner = _exchange(out.shape[2], call.K, visibility, call)
    do, lse, dlse = x.queries(do), x.queries(lse, -jnp.inf), x.queries(without_out(out, do, dlse))
    zeros = jnp.zeros_like(do)
    if inner.devices == 1:
        dq, dk, dv = backward_partial(q, k, v, zeros, lse, do, dlse, **_whole(q, visibility, inner))
    else:
        dq, dk, dv, _ = ring.backward((q, k, v), zeros, lse, do, dlse, visibility, inner)
    return x.from_queries(dq.astype(q.dtype)), *(x.from_keys(y, call.K, q.dtype) for y in (dk, dv)), None


ULYSSES = USP = Strategy(_heads_forward, _heads_backward)
