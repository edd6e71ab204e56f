"""Forward pass: online softmax over the visible tiles.

    S = scale * q k^T;  m' = max(m, rowmax S);  P = exp(S - m');  l' = e^(m - m') l + rowsum P;  O' = e^(m - m') O + P v
    out = O / l;  lse = m + log l

Algorithm 1 of arXiv:2205.14135 in the loop order of arXiv:2307.08691 (queries outside, keys inside). Memory is O(T).
For each tile of queries, the tiles of keys are sorted by `mask.kind`: full ones run without a mask, partial ones with
it, empty ones are skipped.

Where |q| |k| bounds every logit of a tile of queries by `SAFE`, m stays 0: exp needs no maximum subtracted, which saves
passes over the tile. v^T has a row of ones below it, so the last row of O is the sum l.
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
    at,
    filled,
    key_tiles,
    loop_index,
    make_side,
    queries_of,
    query_tiles,
    unstacked,
)

SAFE = 30.0  # exp(30) = 1e13 times a sum of values, and exp(-30) times a value, stay far from float32's limits


class _Tiles(NamedTuple):
    queries: Array  # [groups Jq B K R D]
    keys: Array  # [groups Jk B K S D]
    values: Array  # [groups Jk B K V+1 S], transposed, a row of ones last
    side: Side
    small: Array | None  # bool [groups Jq], whether no maximum is needed; None where that is never so


def is_small(queries: Array, keys: Array, n: Layout, options: Options) -> Array:
    """Returns bool [groups Jq]: whether no logit of a tile of queries can leave [-SAFE, SAFE], by Cauchy-Schwarz."""

    def longest(x: Array, axes: tuple[int, ...]) -> Array:
        return jnp.sqrt(jnp.max(jnp.sum(jnp.square(x.astype(n.dtype)), -1), axes))

    bound = longest(queries, (2, 3, 4)) * longest(keys, (1, 2, 3, 4))[:, None]
    return bound * (1.0 if n.operand == n.dtype else options.scale) <= SAFE


def _sums(x: _Tiles, g: Array, i: Array, n: Layout, options: Options) -> tuple[Array, Array]:
    """Returns O [B K V+1 R] and m [B K R] of tile i of queries in group g."""
    q = at(x.queries, g, i)
    with jax.named_scope("order"):
        tiles, full, seen = ordered_tiles(x.side, g, i, n)

    def logits(j: Array, masked: bool) -> Array:
        with jax.named_scope("logits"):
            s, visible, _ = tile_logits(q, at(x.keys, g, j), x.side, g, i, j, masked, n, options)
            return s if visible is None else jnp.where(visible, s, -jnp.inf)

    def add(acc: Array, p: Array, j: Array) -> Array:
        with jax.named_scope("values"):
            return acc + dot("BKVS,BKSR->BKVR", at(x.values, g, j), p, n)

    def bounded(masked: bool) -> Callable[[Array, Array], Array]:
        def step(j: Array, acc: Array) -> Array:
            s = logits(j, masked)
            with jax.named_scope("softmax"):
                p = exp(s)
            return add(acc, p, j)

        return step

    def online(masked: bool) -> Callable[[Array, tuple[Array, Array]], tuple[Array, Array]]:
        def step(j: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            acc, m = carry
            s = logits(j, masked)
            with jax.named_scope("softmax"):
                new = jnp.maximum(m, s.max(2))
                base = jnp.where(new == -jnp.inf, 0.0, new)
                acc, p = acc * exp(m - base)[:, :, None], exp(s - base[:, :, None])
            return add(acc, p, j), new

        return step

    shape = (n.B, n.K, n.V + 1, n.G * n.block_q)
    acc, m = filled(shape, n.dtype, q), filled((*shape[:2], shape[3]), n.dtype, q, -jnp.inf)
    if x.small is None:
        return over_tiles((tiles, full, seen), online, (acc, m))
    # Trip counts choose, not a cond: under vmap a cond would compute both sides.
    safe = at(x.small, g, i)
    tiles_if = lambda chosen: (tiles, jnp.where(chosen, full, 0), jnp.where(chosen, seen, 0))
    acc = over_tiles(tiles_if(safe), bounded, acc)
    return over_tiles(tiles_if(~safe), online, (acc, jnp.where(safe, 0.0, m)))


def forward(
    q: Array, k: Array, v: Array, bias: Array | None, visibility: Visibility, options: Options, n: Layout
) -> tuple[Array, Array]:
    """Returns out [B T H V] in options.out_dtype and lse [B T H] in the statistics' dtype."""
    B, T, H, V = *q.shape[:3], n.V
    if 0 in (B, T, H, n.S):
        out = filled((B, T, H, V), options.out_dtype, q)
        return out, filled((B, T, H), n.dtype, q, -jnp.inf)
    side = make_side(bias, visibility, n)
    k, v = finite.keys_and_values(k, v)
    queries, keys = query_tiles(scaled(q, n, options), n), key_tiles(k.astype(n.operand), n)
    ones = jnp.ones((*v.shape[:3], 1), n.operand)
    values = key_tiles(jnp.concatenate([v.astype(n.operand), ones], -1), n).swapaxes(-1, -2)
    # A bias has no bound, and exp overflows float16 beyond 11.
    small = None if bias is not None or n.operand == jnp.float16 else is_small(queries, keys, n, options)
    tiles = _Tiles(queries, keys, values, side, small)

    def row(_: None, index: tuple[Array, Array]) -> tuple[None, tuple[Array, Array]]:
        acc, m = _sums(tiles, *index, n, options)
        total = acc[:, :, -1]
        empty = total == 0
        total = jnp.where(empty, 1.0, total)
        out = (acc[:, :, :-1] / total[:, :, None]).astype(options.out_dtype)
        return None, (out.swapaxes(2, 3), jnp.where(empty, -jnp.inf, m + jnp.log(total)))

    _, (out, lse) = lax.scan(row, None, loop_index(n))
    return queries_of(unstacked(out, n), n), queries_of(unstacked(lse, n), n)
