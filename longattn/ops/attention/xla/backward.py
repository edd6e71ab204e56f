"""Backward pass: recomputes P from the saved out and lse, tile by tile.

    P = exp(S - lse);  dS = P (do v^T - rowsum(do out) + dlse);  dv = P^T do;  dk = scale dS^T q;  dq = scale dS k

Algorithm 2 of arXiv:2307.08691. Queries are the outer loop, so dk and dv are carried as whole arrays.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from longattn.ops.attention import finite
from longattn.ops.attention.contract import Options, Visibility
from longattn.ops.attention.xla.logits import dot, exp, ordered_tiles, over_tiles, scaled, tile_logits
from longattn.ops.attention.xla.tiling import (
    Layout,
    Side,
    add_at,
    at,
    filled,
    key_tiles,
    keys_of,
    loop_index,
    make_side,
    queries_of,
    query_tiles,
    unstacked,
)

_NO_KEY = 1e30  # stands for the lse of a row that sees no key: P = exp(S - 1e30) = 0

_Sums = tuple[Array, Array, Array | None]  # dk, dv, dbias
_Carry = tuple[Array, Array, Array, Array | None]  # dq, dk, dv, dbias


class _Tiles(NamedTuple):
    queries: Array  # [groups Jq B K R D]
    cotangents: Array  # do, [groups Jq B K R V]
    delta: Array  # rowsum(do out) - dlse, [groups Jq B K R]
    lse: Array  # [groups Jq B K R]
    keys: Array  # [groups Jk B K S D]
    values: Array  # [groups Jk B K S V]
    side: Side


def _add_to_bias(dbias: Array, ds: Array, side: Side, g: Array, i: Array, j: Array, n: Layout) -> Array:
    """Returns dbias with dS of tile (i, j) added, summed over the axes along which the bias is broadcast."""
    starts, sizes = side.bias_slice(g, i, j, n)
    x = jnp.moveaxis(ds.reshape(n.tile), 2, 4)
    x = x.reshape(n.B, n.K * n.G, n.block_q, n.block_k)
    x = x.sum([axis for axis in range(4) if sizes[axis] == 1 < x.shape[axis]], keepdims=True)
    return lax.dynamic_update_slice(dbias, lax.dynamic_slice(dbias, starts, sizes) + x, starts)


def _row(x: _Tiles, sums: _Sums, g: Array, i: Array, n: Layout, options: Options) -> tuple[_Sums, Array]:
    """Returns (dk, dv, dbias) with tile i of queries in group g added, and this tile's dq [B K R D]."""
    q, do = at(x.queries, g, i), at(x.cotangents, g, i)
    delta, lse = at(x.delta, g, i)[:, :, None], at(x.lse, g, i)[:, :, None]

    def tile(masked: bool) -> Callable[[Array, _Carry], _Carry]:
        def step(j: Array, carry: _Carry) -> _Carry:
            dq, dk, dv, dbias = carry
            k = at(x.keys, g, j)
            with jax.named_scope("logits"):
                s, visible, slope = tile_logits(q, k, x.side, g, i, j, masked, n, options)
            with jax.named_scope("softmax"):
                p = exp(s - lse)
                if visible is not None:
                    p = jnp.where(visible, p, 0.0)
            with jax.named_scope("dp"):
                dp = dot("BKSV,BKRV->BKSR", at(x.values, g, j), do, n)
            with jax.named_scope("ds"):
                ds = p * (dp - delta)
            if dbias is not None:
                dbias = _add_to_bias(dbias, ds, x.side, g, i, j, n)
            if slope is not None:
                ds = ds * slope
            with jax.named_scope("dq"):
                dq = dq + dot("BKDS,BKSR->BKDR", k.swapaxes(2, 3), ds, n)
            with jax.named_scope("dk"):
                dk = add_at(dk, dot("BKSR,BKRD->BKSD", ds, q, n), g, j)
            with jax.named_scope("dv"):
                dv = add_at(dv, dot("BKSR,BKRV->BKSV", p, do, n), g, j)
            return dq, dk, dv, dbias

        return step

    dq = filled((n.B, n.K, n.D, n.G * n.block_q), n.dtype, q)
    with jax.named_scope("order"):
        order = ordered_tiles(x.side, g, i, n)
    dq, dk, dv, dbias = over_tiles(order, tile, (dq, *sums))
    return (dk, dv, dbias), dq.swapaxes(2, 3)


def backward(
    q: Array, k: Array, v: Array, bias: Array | None, visibility: Visibility, out: Array, lse: Array, do: Array,
    dlse: Array, options: Options, n: Layout,
) -> tuple[Array, Array, Array, Array | None]:  # fmt: skip
    """Returns dq, dk, dv and dbias in the statistics' dtype, given the global out and lse."""
    if 0 in (*q.shape[:3], n.S):
        dq, dk, dv = (filled(x.shape, n.dtype, q) for x in (q, k, v))
        return dq, dk, dv, None if bias is None else filled(bias.shape, n.dtype, q)
    side = make_side(bias, visibility, n)
    q, k, v, do, delta, lse = finite.factors(q, k, v, out, lse, do, dlse, n.dtype)
    tiles = _Tiles(
        queries=query_tiles(scaled(q, n, options), n),
        cotangents=query_tiles(do.astype(n.operand), n),
        delta=query_tiles(delta, n),
        lse=query_tiles(jnp.where(lse == -jnp.inf, _NO_KEY, lse), n, _NO_KEY),
        keys=key_tiles(k.astype(n.operand), n),
        values=key_tiles(v.astype(n.operand), n),
        side=side,
    )
    sums = (
        filled(tiles.keys.shape, n.dtype, q),
        filled(tiles.values.shape, n.dtype, q),
        None if side.bias is None else filled(side.bias.shape, n.dtype, q),
    )
    row = lambda sums, index: _row(tiles, sums, index[0], index[1], n, options)
    (dk, dv, dbias), dq = lax.scan(row, sums, loop_index(n))
    dq = queries_of(unstacked(dq, n), n) * options.scale
    if n.operand != n.dtype:
        dk = dk * options.scale  # otherwise q held it
    if bias is not None:
        dbias = lax.slice(dbias, (0,) * 4, bias.shape)
    return dq, keys_of(dk, n), keys_of(dv, n), dbias
