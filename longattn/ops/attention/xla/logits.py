"""One tile of logits: which tiles hold a visible pair, the products, the mask and exp."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from longattn.mask import EMPTY, FULL, PARTIAL
from longattn.ops import dispatch
from longattn.ops.attention.contract import Options
from longattn.ops.attention.xla.tiling import Layout, Side, at

_EXP2 = (1.5403530e-4, 1.3333558e-3, 9.6181291e-3, 5.5504109e-2, 2.4022651e-1, 6.9314718e-1, 1.0)  # Taylor, 2**r


def exp(x: Array) -> Array:
    """Returns exp(x) for x <= forward.SAFE; exactly 0 below -88.

    On a CPU in float32: x log2(e) = n + r with n an integer and |r| <= 1/2, and a polynomial gives 2**r. That takes
    half the instructions of the general function. Its relative error is 2e-7 for small |x|.
    """
    if x.dtype != jnp.float32 or dispatch.target().platform != "cpu":
        return jnp.exp(x)
    y = jnp.maximum(x * math.log2(math.e), -127.0)
    whole = jnp.round(y)
    r = y - whole
    p = jnp.full_like(r, _EXP2[0])
    for c in _EXP2[1:]:
        p = p * r + c
    bits = lax.bitcast_convert_type(p, jnp.int32) + lax.shift_left(
        whole.astype(jnp.int32), jnp.full_like(r, 23, jnp.int32)
    )
    return lax.bitcast_convert_type(bits, jnp.float32)


def dot(equation: str, a: Array, b: Array, n: Layout) -> Array:
    """Returns the einsum of two operands in the accumulators' dtype; wide operands are multiplied in full precision."""
    return jnp.einsum(
        equation,
        a.astype(n.operand),
        b.astype(n.operand),
        precision=lax.Precision.HIGHEST if n.operand in (jnp.float32, jnp.float64) else None,
        preferred_element_type=n.dtype,
    )


def scaled(q: Array, n: Layout, options: Options) -> Array:
    """Returns q with the scale folded in, unless that would round q to half precision once more."""
    return q.astype(n.dtype) * options.scale if n.operand == n.dtype else q


# ---- which tiles


def ordered_tiles(side: Side, g: Array, i: Array, n: Layout) -> tuple[Array, Array, Array]:
    """Returns tile i's tiles of keys, sorted by kind: full, partial, empty.

    Returns:
      The tiles' indices, the number of full ones, and the number of full and partial ones.
    """

    def bounds(x: Array) -> tuple[Array, Array]:
        return x.min(-1), x.max(-1)

    b = g // n.head_groups

    def every_key_tile(x: Array) -> tuple[Array, Array]:  # [B|1 1 1 Jk]
        x = lax.dynamic_index_in_dim(x, b if x.shape[0] > 1 else jnp.zeros_like(b), keepdims=False)
        return tuple(y.T[:, None, None, :] for y in bounds(x))

    q_lo, q_hi = (x[:, None, None, None] for x in bounds(at(side.q_positions, b, i)))
    kind = side.mask_of(g, n).kind(q_lo, q_hi, *every_key_tile(side.k_positions))
    if side.q_segments is not None:
        q_lo, q_hi = (x[:, None, None, None] for x in bounds(at(side.q_segments, b, i)))
        k_lo, k_hi = every_key_tile(side.k_segments)
        same = jnp.where((q_lo == q_hi) & (k_lo == k_hi) & (q_lo == k_lo), FULL, PARTIAL)
        kind = jnp.minimum(kind, jnp.where((q_hi < k_lo) | (k_hi < q_lo), EMPTY, same).astype(kind.dtype))
    kind = jnp.broadcast_to(kind, (*kind.shape[:3], n.Jk)).reshape(-1, n.Jk)
    full, empty = (kind == FULL).all(0), (kind == EMPTY).all(0)
    if n.Jk * n.block_k > n.S:
        full = full & (jnp.arange(n.Jk) < n.Jk - 1)
    rank = jnp.where(empty, 2, jnp.where(full, 0, 1))
    order = jnp.argsort(rank, stable=True).astype(jnp.int32)
    return order, (rank == 0).sum(dtype=jnp.int32), (rank < 2).sum(dtype=jnp.int32)


def over_tiles[Carry](
    order: tuple[Array, Array, Array], step: Callable[[bool], Callable[[Array, Carry], Carry]], carry: Carry
) -> Carry:
    """Runs `step(masked)(j, carry)` over the full tiles of `ordered_tiles`, then over the partial ones."""
    tiles, full, seen = order
    carry = lax.fori_loop(0, full, lambda t, c: step(False)(tiles[t], c), carry)
    return lax.fori_loop(full, seen, lambda t, c: step(True)(tiles[t], c), carry)


# ---- one tile


def _by_key_head(x: Array, n: Layout) -> Array:
    """[B|1 H|1 S|1 block_q|1] -> [B|1 K|1 S|1 G|1 block_q|1], which broadcasts to `n.tile`."""
    b, h, keys, queries = x.shape
    if h == 1:
        return x.reshape(b, 1, keys, 1, queries)
    return jnp.moveaxis(x.reshape(b, n.K, n.G, keys, queries), 2, 3)


def _visible(side: Side, g: Array, i: Array, j: Array, n: Layout) -> Array:
    """Returns which pairs of tile (i, j) are visible, broadcastable to `n.tile`."""

    def pair(q: Array, k: Array) -> tuple[Array, Array]:
        return at(q, g // n.head_groups, i)[:, None, None, :], at(k, g // n.head_groups, j)[:, None, :, None]

    visible = side.mask_of(g, n)(*pair(side.q_positions, side.k_positions))
    if side.q_segments is not None:
        q, k = pair(side.q_segments, side.k_segments)
        visible = visible & (q == k)
    if n.Jk * n.block_k > n.S:
        inside = j * n.block_k + jnp.arange(n.block_k, dtype=jnp.int32) < n.S
        visible = visible & inside[None, None, :, None]
    return _by_key_head(visible, n)


def tile_logits(
    q: Array, k: Array, side: Side, g: Array, i: Array, j: Array, masked: bool, n: Layout, options: Options
) -> tuple[Array, Array | None, Array | None]:
    """Returns the logits [B K S R] of tile (i, j), its visible pairs, and the slope of the soft cap.

    Args:
      q, k: one tile of each, [B K R D] and [B K S D].
      masked: whether the visible pairs are needed; None stands for them otherwise.
    """
    s = dot("BKSD,BKRD->BKSR", k, q, n)
    if n.operand != n.dtype:
        s = s * options.scale  # otherwise q holds it
    slope = None
    if options.softcap is not None:
        t = jnp.tanh(s / options.softcap)
        s, slope = options.softcap * t, 1 - t * t
    if side.bias is not None:
        bias = lax.dynamic_slice(side.bias, *side.bias_slice(g, i, j, n)).swapaxes(2, 3)
        s = (s.reshape(n.tile) + _by_key_head(bias, n).astype(s.dtype)).reshape(s.shape)
    if not masked:
        return s, None, slope
    visible = jnp.broadcast_to(_visible(side, g, i, j, n), n.tile).reshape(s.shape)
    return s, visible, slope
