"""DeepSpeed-Ulysses (arXiv:2309.14509): an all-to-all exchanges tokens for heads, another brings the outputs back.

Between the two a device attends to whole sequences with H / P heads. In units of T H D elements, as if K = H and V = D:

    forward     (P - 1) / P^2 each of q, k, v and out
    backward    the same each of dout, dq, dk and dv; q, k and v are kept as they were exchanged

H is filled up to a multiple of P with heads of zeros, which cost as much as others. Where P does not divide K, a device
gets the key/value heads that its queries read. Some of them are then sent to several devices, and their gradients are
summed in float32 where the heads came from. Statistics go along: lse forward, lse and dlse backward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array

from longattn.mask import Mask
from longattn.ops.attention import backward_partial
from longattn.ops.attention.contract import Visibility
from longattn.parallel.layout import Axis, SequenceLayout
from longattn.parallel.strategy import Call, Gradients, Kept, Strategy, attended, without_out


@dataclass(frozen=True)
class Heads:
    """Which of P devices gets which heads."""

    H: int
    P: int
    each: int  # query heads of a device, those filled in too
    keys: tuple[int, ...]  # the key/value heads that are sent, as many to each device


def heads(H: int, K: int, P: int) -> Heads:
    """Each device's share of H query heads, and the fewest key/value heads of K that serve it, equal in number."""
    each, G = -(-H // P), H // K
    if H % P == 0 and each % G == 0:
        return Heads(H, P, each, tuple(range(K)))
    if H % P == 0 and G % each == 0:  # all queries of a device read one
        return Heads(H, P, each, tuple(device * each // G for device in range(P)))
    return Heads(H, P, each, tuple(min(h, H - 1) // G for h in range(each * P)))  # one for each query head


class Exchange:
    """The all-to-alls between [B t H ...], a device's tokens of all heads, and [B T h ...], all tokens of its heads.

    Args:
      axis: the mesh axis along which tokens are exchanged for heads.
      heads: the heads of each device on it.
      layout: the order of the tokens on this axis, which the exchange undoes.
    """

    def __init__(self, axis: Axis, heads: Heads, layout: SequenceLayout):
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
        """[B T h ...] of [B t H ...], with heads of `fill` where P does not divide H."""
        more = self.heads.each * self.heads.P - self.heads.H
        pad = [(0, 0), (0, 0), (0, more)] + [(0, 0)] * (x.ndim - 3)
        return self._there(jnp.pad(x, pad, constant_values=fill) if more else x)

    def keys(self, x: Array) -> Array:
        """[B S k D] of [B s K D], the heads that this device's queries read."""
        whole = self.heads.keys == tuple(range(x.shape[2]))
        return self._there(x if whole else x[:, :, np.array(self.heads.keys)])

    def from_queries(self, x: Array) -> Array:
        """The inverse of `queries`."""
        return self._back(x)[:, :, : self.heads.H]

    def from_keys(self, x: Array, K: int, dtype: DTypeLike) -> Array:
        """Gradients [B S k D] of the heads sent, summed to those of the K heads."""
        if self.heads.keys == tuple(range(K)):
            return self._back(x.astype(dtype))
        x = self._back(x)
        zeros = jnp.zeros_like(x, shape=(*x.shape[:2], K, x.shape[3]))
        return zeros.at[:, :, np.array(self.heads.keys)].add(x)

    def visibility(self, visibility: Visibility) -> Visibility:
        """Ids and positions in the order of the exchanged tokens, and the mask of this device's heads."""
        restored: dict[str, Any] = {
            name: None if x is None else self.layout.restore(x, self.heads.P)
            for name, x in visibility._asdict().items()
            if name.endswith(("positions", "segments"))
        }
        return visibility._replace(mask=self._mask(visibility.mask), **restored)

    def _mask(self, mask: Mask) -> Mask:
        """The mask whose array leaves [B H ...] are those of this device's heads."""
        n, device = self.heads.each, lax.axis_index(self.axis)

        def mine(x: Array) -> Array:
            if x.ndim < 4 or x.shape[1] == 1:
                return x
            x = jnp.pad(x, ((0, 0), (0, n * self.heads.P - self.heads.H), (0, 0), (0, 0)))
            return lax.dynamic_slice_in_dim(x, device * n, n, 1)

        return jax.tree.map(mine, mask)


def _whole(q: Array, visibility: Visibility, call: Call) -> dict[str, Any]:
    """The keyword arguments of the local attention over whole sequences."""
    rows = lambda x: jnp.broadcast_to(x, (q.shape[0], x.shape[1]))
    positions = None if call.in_order else (rows(visibility.q_positions), rows(visibility.k_positions))
    segments = None if visibility.q_segments is None else (visibility.q_segments, visibility.k_segments)
    return call.options(visibility.mask, positions, segments)


def forward(q: Array, k: Array, v: Array, bias: None, visibility: Visibility, call: Call) -> tuple[Array, Array, Kept]:
    """Returns (out, lse, kept) of this device's queries over the keys of all devices on `call.axis`."""
    exchange = Exchange(call.axis, heads(q.shape[2], call.K, call.P), call.layout)
    kept = q, k, v = exchange.queries(q), exchange.keys(k), exchange.keys(v)
    out, lse = attended(q, k, v, call, **_whole(q, exchange.visibility(visibility), call))
    return exchange.from_queries(out), exchange.from_queries(lse), kept


def backward(
    kept: Kept, out: Array, lse: Array, do: Array, dlse: Array, visibility: Visibility, call: Call
) -> Gradients:
    """Returns dq, dk, dv and no dbias for `forward`."""
    q, k, v = kept
    x = Exchange(call.axis, heads(out.shape[2], call.K, call.P), call.layout)
    do, lse, dlse = x.queries(do), x.queries(lse, -jnp.inf), x.queries(without_out(out, do, dlse))
    options = _whole(q, x.visibility(visibility), call)
    dq, dk, dv = backward_partial(q, k, v, jnp.zeros_like(do), lse, do, dlse, **options)
    return x.from_queries(dq.astype(q.dtype)), *(x.from_keys(y, call.K, q.dtype) for y in (dk, dv)), None


ULYSSES = Strategy(
    "ulysses",
    "all-to-alls exchange tokens for heads, so that each device attends to whole sequences",
    forward,
    backward,
    even=True,
    exchanges_heads=True,
)
