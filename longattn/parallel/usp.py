"""USP (arXiv:2405.07719): Ulysses along the inner of two axes, a ring along the outer one.

P = P1 P2. The layout is the ring's: each of its P1 shards lies in order on the P2 devices of the inner axis. These
exchange tokens for heads, so that the ring passes T / P1 tokens of its heads from device to device.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array

from longattn.ops.attention.contract import Visibility
from longattn.parallel import ring
from longattn.parallel.layout import SequenceLayout
from longattn.parallel.strategy import Call, Gradients, Kept, Strategy, without_out
from longattn.parallel.ulysses import Exchange, heads


def _exchange(H: int, call: Call) -> Exchange:
    return Exchange(call.axis[-1], heads(H, call.K, call.sizes[-1]), SequenceLayout())


def forward(q: Array, k: Array, v: Array, bias: None, visibility: Visibility, call: Call) -> tuple[Array, Array, Kept]:
    """Returns (out, lse, kept) of this device's queries over the keys of all devices on `call.axis`."""
    x = _exchange(q.shape[2], call)
    out, lse, kept = ring.forward(x.queries(q), x.keys(k), x.keys(v), None, x.visibility(visibility), call.outer)
    return x.from_queries(out), x.from_queries(lse), kept


def backward(
    kept: Kept, out: Array, lse: Array, do: Array, dlse: Array, visibility: Visibility, call: Call
) -> Gradients:
    """Returns dq, dk, dv and no dbias for `forward`."""
    x, dtype = _exchange(out.shape[2], call), kept[0].dtype
    do, lse, dlse = x.queries(do), x.queries(lse, -jnp.inf), x.queries(without_out(out, do, dlse))
    dq, dk, dv, _ = ring.backward(kept, jnp.zeros_like(do), lse, do, dlse, x.visibility(visibility), call.outer)
    return x.from_queries(dq.astype(dtype)), *(x.from_keys(y, call.K, dtype) for y in (dk, dv)), None


USP = Strategy(
    "usp",
    "ulysses along the inner of two axes, a ring along the outer one",
    forward,
    backward,
    axes=2,
    exchanges_heads=True,
    skips=True,
)
