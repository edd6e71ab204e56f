"""Blockwise exact attention in plain XLA, on any device: online softmax over the visible blocks, with its own backward.

    S = scale * q k^T;  m' = max(m, rowmax S);  P = exp(S - m');  l' = e^(m - m') l + rowsum P;  O' = e^(m - m') O + P v
    out = O / l;  lse = m + log l

Algorithm 1 of arXiv:2205.14135 in the loop order of arXiv:2307.08691 (queries outside, keys inside); the backward pass
recomputes P = exp(S - lse) from the saved out and lse. Memory is O(T). Per block of queries the blocks of keys are
sorted by `mask.kind`: full ones run without a mask, partial ones with it, empty ones not at all.

Where |q| |k| bounds every logit of a tile of queries by `SAFE`, exp needs no maximum to be subtracted: m stays 0, which
saves its passes over the tile.

Tiles stand transposed, S^T [keys, queries]: reductions over keys then run along vectors, the statistics of a row lie
beside each other, and every product is one of the two forms (NN, NT) that CPU libraries run fastest. A row of ones
under v^T makes the last row of O the sum l.

Not supported: jvp and second derivatives (the reference has them).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from longattn import shapes
from longattn.mask import EMPTY, FULL, PARTIAL, Mask
from longattn.ops import dispatch
from longattn.ops.attention.contract import Options, Visibility
from longattn.shapes import Key, Out, Query, Statistic, Value

SAFE = 30.0  # exp(30) = 1e13 times any sum of values, and exp(-30) times any value, are far from float32's limits


@dataclass(frozen=True)
class Tuning:
    """Tile sizes. They change the result by rounding only."""

    block_q: int = 256  # queries of a tile
    block_k: int = 256  # keys of a tile
    heads: int | None = None  # key/value heads computed at once, a divisor of K; None is all

    def __post_init__(self) -> None:
        if self.block_q < 1 or self.block_k < 1 or (self.heads is not None and self.heads < 1):
            raise ValueError(f"{self} must have sizes of at least 1")


def default_tuning(B: int, T: int, S: int, K: int, G: int) -> Tuning:
    """Tiles of 256 x 256 over as many heads as keep the logits of B sequences to 2**19; 512 x 512 over few heads.

    A step of fewer logits spends its time waking the other threads; one of more waits for memory, and a larger tile
    computes what the mask hides.
    """
    few = max(B, 1) * K * G <= 2 and min(T, S) >= 2048
    bq, bk = (max(min(512 if few else 256, x), 1) for x in (T, S))
    fit = max(2**19 // (max(B, 1) * G * bq * bk), 1)
    return Tuning(bq, bk, max(h for h in range(1, K + 1) if K % h == 0 and h <= fit))


def check(*call: object) -> None:
    """Accepts every valid call."""


class _Layout(NamedTuple):
    """Static sizes. The outer loop walks over groups of sequences and heads; a tile holds one group at once."""

    sequences: int  # groups of sequences
    groups: int  # groups of heads
    inner: int  # sequences in a group
    T: int
    S: int
    K: int  # key/value heads in a group
    G: int
    D: int
    V: int
    Jq: int
    Jk: int
    bq: int
    bk: int
    operand: Any  # dtype of the products' operands
    dtype: Any  # of statistics and accumulators


def _layout(q: Array, k: Array, v: Array, visibility: Visibility, options: Options) -> _Layout:
    (B, T, H, D), (S, K), V = q.shape, k.shape[1:3], v.shape[3]
    # Sequences of one tile share it, so that steps of the loop are not idle. Longer ones do not: each walks over the
    # tiles that its own segments show, not over those of its neighbours.
    fit = 2**17 // max(H * T * S, 1) if max(T, S) <= 256 else 1
    inner = max(b for b in range(1, max(B, 1) + 1) if max(B, 1) % b == 0 and (b == 1 or b <= fit))
    tuning = options.tuning or default_tuning(inner, T, S, K, H // K)
    bq, bk, heads = tuning.block_q, tuning.block_k, tuning.heads or K
    if K % heads:
        raise ValueError(f"{tuning}: heads must divide the {K=} key/value heads")
    dtype = shapes.statistics_dtype(q.dtype)
    # A CPU widens half-precision operands anyway, so there the tiles of P keep their precision too.
    operand = dtype if dispatch.target().platform == "cpu" else q.dtype
    J = -(-T // bq), -(-S // bk)
    return _Layout(B // inner, K // heads, inner, T, S, heads, H // K, D, V, *J, bq, bk, operand, dtype)


def _tiles(x: Array, n: _Layout, block: int, value: float = 0.0, edge: bool = False) -> Array:
    """[B T ...] -> [sequences J inner block ...], padded with `value` or with the last row."""
    B, T = x.shape[:2]
    J = -(-T // block)
    pad = [(0, 0), (0, J * block - T)] + [(0, 0)] * (x.ndim - 2)
    if J * block > T:
        x = jnp.pad(x, pad, mode="edge") if edge else jnp.pad(x, pad, constant_values=value)
    inner = min(n.inner, B)
    return x.reshape(B // inner, inner, J, block, *x.shape[2:]).swapaxes(1, 2)


def _group(x: Array, n: _Layout) -> Array:
    """[sequences J inner (groups K) ...] -> [outer J inner K ...], outer = (sequences groups)."""
    x = jnp.moveaxis(x.reshape(*x.shape[:3], n.groups, n.K, *x.shape[4:]), 3, 1)
    return x.reshape(-1, *x.shape[2:])


def _ungroup(x: Array, n: _Layout) -> Array:
    """The inverse of `_group`."""
    x = jnp.moveaxis(x.reshape(n.sequences, n.groups, *x.shape[1:]), 1, 3)
    return x.reshape(*x.shape[:3], n.groups * n.K, *x.shape[5:])


def _queries(x: Array, n: _Layout, value: float = 0.0) -> Array:
    """[B T H ...] -> [outer Jq inner K (G bq) ...]: the G query heads of a key head stand in one row of a tile."""
    x = _tiles(x, n, n.bq, value)
    x = x.reshape(*x.shape[:4], n.groups * n.K, n.G, *x.shape[5:])
    x = jnp.moveaxis(x, 3, 5)
    return _group(x.reshape(*x.shape[:4], n.G * n.bq, *x.shape[6:]), n)


def _unqueries(x: Array, n: _Layout) -> Array:
    """[outer Jq inner K (G bq) ...] -> [B T H ...]."""
    x = _ungroup(x, n)
    x = x.reshape(*x.shape[:4], n.G, n.bq, *x.shape[5:])
    x = jnp.moveaxis(x, (2, 5), (1, 3))  # sequences inner Jq bq K G ...
    return x.reshape(n.sequences * n.inner, n.Jq * n.bq, n.groups * n.K * n.G, *x.shape[6:])[:, : n.T]


def _keys(x: Array, n: _Layout) -> Array:
    """[B S K ...] -> [outer Jk inner K bk ...]."""
    return _group(jnp.moveaxis(_tiles(x, n, n.bk), 3, 4), n)


def _unkeys(x: Array, n: _Layout) -> Array:
    """[outer Jk inner K bk D] -> [B S K D]."""
    x = jnp.moveaxis(_ungroup(x, n), (2, 4), (1, 3))  # sequences inner Jk bk K D
    return x.reshape(n.sequences * n.inner, n.Jk * n.bk, n.groups * n.K, x.shape[-1])[:, : n.S]


def _zeros(shape: tuple[int, ...], dtype: Any, like: Array, value: float = 0.0) -> Array:
    """A loop carry's first value, varying over the mesh axes that `like` varies over."""
    x = jnp.full(shape, value, dtype)
    axes = tuple(jax.typeof(like).manual_axis_type.varying)
    return lax.pcast(x, axes, to="varying") if axes else x


def _dot(equation: str, a: Array, b: Array, n: _Layout) -> Array:
    return jnp.einsum(
        equation,
        a.astype(n.operand),
        b.astype(n.operand),
        precision=lax.Precision.HIGHEST if n.operand in (jnp.float32, jnp.float64) else None,
        preferred_element_type=n.dtype,
    )


_EXP2 = (1.5403530e-4, 1.3333558e-3, 9.6181291e-3, 5.5504109e-2, 2.4022651e-1, 6.9314718e-1, 1.0)  # of 2**r, Taylor


def _exp(x: Array) -> Array:
    """exp(x) for x <= SAFE; exactly 0 below -88.

    On a CPU in float32 by 2**n * 2**r, x log2(e) = n + r with n an integer, |r| <= 1/2, and a polynomial for 2**r
    (relative error 2e-7 where the result matters): half the instructions of the general function.
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


class _Side(NamedTuple):
    """The side arrays in tiles: positions and segments [sequences|1 J inner|1 block]."""

    mask: Mask
    q_positions: Array
    k_positions: Array
    q_segments: Array | None
    k_segments: Array | None
    bias: Array | None  # [#B #H #(Jq bq) #(Jk bk)]


def _side(visibility: Visibility, n: _Layout) -> _Side:
    def ids(x: Array | None, block: int) -> Array | None:
        return None if x is None else _tiles(x, n, block, edge=True)

    bias = visibility.bias
    if bias is not None:
        T, S = n.Jq * n.bq - n.T, n.Jk * n.bk - n.S
        pads = [(0, 0), (0, 0), (0, T if bias.shape[2] > 1 else 0), (0, S if bias.shape[3] > 1 else 0)]
        bias = jnp.pad(bias, pads)
    return _Side(
        visibility.mask,
        ids(visibility.q_positions, n.bq),
        ids(visibility.k_positions, n.bk),
        ids(visibility.q_segments, n.bq),
        ids(visibility.k_segments, n.bk),
        bias,
    )


def _at(x: Array, o: Array, i: Array) -> Array:
    """Tile i of group o of [outer J ...], or of the only group."""
    o = o if x.shape[0] > 1 else jnp.zeros_like(o)
    return lax.dynamic_slice(x, (o, i) + (jnp.zeros_like(o),) * (x.ndim - 2), (1, 1, *x.shape[2:]))[0, 0]


def _mask(side: _Side, o: Array, n: _Layout) -> Mask:
    """The mask of group o: its leaves lead with the batch, and with the heads where there is a second axis."""

    def leaf(x: Array) -> Array:
        if n.sequences > 1 and x.shape[0] > 1:
            x = lax.dynamic_slice_in_dim(x, o // n.groups * n.inner, n.inner)
        if x.ndim > 1 and x.shape[1] > 1:
            x = lax.dynamic_slice_in_dim(x, o % n.groups * (n.K * n.G), n.K * n.G, axis=1)
        return x

    return jax.tree.map(leaf, side.mask)


def _order(side: _Side, o: Array, i: Array, n: _Layout) -> tuple[Array, Array, Array]:
    """Tiles of keys for tile i of queries, full ones first, then partial ones; the number of each."""

    def bounds(x: Array) -> tuple[Array, Array]:
        return x.min(-1), x.max(-1)

    b = o // n.groups

    def row(x: Array) -> tuple[Array, Array]:  # every tile of keys: [inner|1 1 1 Jk]
        x = lax.dynamic_index_in_dim(x, b if x.shape[0] > 1 else jnp.zeros_like(b), keepdims=False)
        return tuple(y.T[:, None, None, :] for y in bounds(x))

    q_lo, q_hi = (x[:, None, None, None] for x in bounds(_at(side.q_positions, b, i)))
    kind = _mask(side, o, n).kind(q_lo, q_hi, *row(side.k_positions))
    if side.q_segments is not None:
        q_lo, q_hi = (x[:, None, None, None] for x in bounds(_at(side.q_segments, b, i)))
        k_lo, k_hi = row(side.k_segments)
        same = jnp.where((q_lo == q_hi) & (k_lo == k_hi) & (q_lo == k_lo), FULL, PARTIAL)
        kind = jnp.minimum(kind, jnp.where((q_hi < k_lo) | (k_hi < q_lo), EMPTY, same).astype(kind.dtype))
    kind = jnp.broadcast_to(kind, (*kind.shape[:3], n.Jk)).reshape(-1, n.Jk)
    full, empty = (kind == FULL).all(0), (kind == EMPTY).all(0)
    if n.Jk * n.bk > n.S:
        full = full & (jnp.arange(n.Jk) < n.Jk - 1)
    rank = jnp.where(empty, 2, jnp.where(full, 0, 1))
    order = jnp.argsort(rank, stable=True).astype(jnp.int32)
    return order, (rank == 0).sum(dtype=jnp.int32), (rank < 2).sum(dtype=jnp.int32)


def _heads(x: Array, n: _Layout) -> Array:
    """[b|1 H|1 bk|1 bq|1] -> [b|1 K|1 bk|1 G|1 bq|1], which broadcasts to a tile."""
    b, h, bk, bq = x.shape
    if h == 1:
        return x.reshape(b, 1, bk, 1, bq)
    return jnp.moveaxis(x.reshape(b, n.K, n.G, bk, bq), 2, 3)


def _visible(side: _Side, o: Array, i: Array, j: Array, n: _Layout) -> Array:
    """Visible pairs of tile (i, j), to broadcast to [inner K bk G bq]."""

    def pair(q: Array, k: Array) -> tuple[Array, Array]:
        return _at(q, o // n.groups, i)[:, None, None, :], _at(k, o // n.groups, j)[:, None, :, None]

    visible = _mask(side, o, n)(*pair(side.q_positions, side.k_positions))
    if side.q_segments is not None:
        q, k = pair(side.q_segments, side.k_segments)
        visible = visible & (q == k)
    if n.Jk * n.bk > n.S:
        visible = visible & (j * n.bk + jnp.arange(n.bk, dtype=jnp.int32) < n.S)[None, None, :, None]
    return _heads(visible, n)


def _bias_slice(side: _Side, o: Array, i: Array, j: Array, n: _Layout) -> tuple[tuple[Array, ...], tuple[int, ...]]:
    """Where tile (i, j) stands in the bias: starts and sizes."""
    firsts = (o // n.groups * n.inner, o % n.groups * (n.K * n.G), i * n.bq, j * n.bk)
    sizes = (n.inner, n.K * n.G, n.bq, n.bk)
    many = [size > 1 for size in side.bias.shape]
    return tuple(x if m else jnp.zeros_like(o) for x, m in zip(firsts, many)), tuple(
        x if m else 1 for x, m in zip(sizes, many)
    )


def _logits(
    qb: Array, kb: Array, side: _Side, o: Array, i: Array, j: Array, masked: bool, n: _Layout, options: Options
) -> tuple[Array, Array | None, Array | None]:
    """S^T of a tile [inner K bk (G bq)], the visible pairs where masked, and the slope of the soft cap."""
    s = _dot("bkcd,bkrd->bkcr", kb, qb, n)
    if n.operand != n.dtype:
        s = s * options.scale  # else it is already in q
    slope = None
    if options.softcap is not None:
        t = jnp.tanh(s / options.softcap)
        s, slope = options.softcap * t, 1 - t * t
    tile = (n.inner, n.K, n.bk, n.G, n.bq)
    if side.bias is not None:
        bias = lax.dynamic_slice(side.bias, *_bias_slice(side, o, i, j, n)).swapaxes(2, 3)
        s = (s.reshape(tile) + _heads(bias, n).astype(s.dtype)).reshape(s.shape)
    if not masked:
        return s, None, slope
    visible = jnp.broadcast_to(_visible(side, o, i, j, n), tile).reshape(s.shape)
    return s, visible, slope


def _scaled(q: Array, n: _Layout, options: Options) -> Array:
    """q with the scale folded in, where its dtype bears it without another rounding to half precision."""
    return q.astype(n.dtype) * options.scale if n.operand == n.dtype else q


def _walk(order: tuple[Array, Array, Array], tile: Any, carry: Any) -> Any:
    """`tile(masked)(j, carry)` over the full, then the partial tiles of keys of an `_order`."""
    tiles, full, seen = order
    carry = lax.fori_loop(0, full, lambda t, c: tile(False)(tiles[t], c), carry)
    return lax.fori_loop(full, seen, lambda t, c: tile(True)(tiles[t], c), carry)


def _small(queries: Array, keys: Array, n: _Layout, options: Options) -> Array:
    """Whether no logit of a tile of queries can leave [-SAFE, SAFE], by Cauchy and Schwarz: bool [outer Jq]."""

    def longest(x: Array, axes: tuple[int, ...]) -> Array:
        return jnp.sqrt(jnp.max(jnp.sum(jnp.square(x.astype(n.dtype)), -1), axes))

    bound = longest(queries, (2, 3, 4)) * longest(keys, (1, 2, 3, 4))[:, None]
    return bound * (1.0 if n.operand == n.dtype else options.scale) <= SAFE


def _index(n: _Layout) -> tuple[Array, Array]:
    """(group, tile of queries) of every step of the outer loop."""
    steps = jnp.arange(n.sequences * n.groups * n.Jq, dtype=jnp.int32)
    return steps // n.Jq, steps % n.Jq


def _split(x: Array, n: _Layout) -> Array:
    """What the outer loop stacked, [(outer Jq) ...] -> [outer Jq ...]."""
    return x.reshape(-1, n.Jq, *x.shape[1:])


def _forward(
    q: Array, k: Array, v: Array, bias: Array | None, visibility: Visibility, options: Options
) -> tuple[Array, Array]:
    n = _layout(q, k, v, visibility, options)
    visibility = visibility._replace(bias=bias)
    B, T, H, V = *q.shape[:3], n.V
    if 0 in (B, T, H, n.S):
        out = _zeros((B, T, H, V), options.out_dtype, q)
        return out, _zeros((B, T, H), n.dtype, q, -jnp.inf)
    side = _side(visibility, n)
    queries, keys = _queries(_scaled(q, n, options), n), _keys(k.astype(n.operand), n)
    ones = jnp.ones((*v.shape[:3], 1), n.operand)
    values = _keys(jnp.concatenate([v.astype(n.operand), ones], -1), n).swapaxes(-1, -2)  # [outer Jk inner K V+1 bk]

    # A bias has no bound, and exp overflows float16 beyond 11.
    small = None if side.bias is not None or n.operand == jnp.float16 else _small(queries, keys, n, options)

    def row(_: None, index: tuple[Array, Array]) -> tuple[None, tuple[Array, Array]]:
        o, i = index
        qb = _at(queries, o, i)
        with jax.named_scope("order"):
            tiles, full, seen = _order(side, o, i, n)

        def logits(j: Array, masked: bool) -> Array:
            with jax.named_scope("logits"):
                s, visible, _ = _logits(qb, _at(keys, o, j), side, o, i, j, masked, n, options)
                return s if visible is None else jnp.where(visible, s, -jnp.inf)

        def add(acc: Array, p: Array, j: Array) -> Array:
            with jax.named_scope("values"):
                return acc + _dot("bkvc,bkcr->bkvr", _at(values, o, j), p, n)

        def bounded(masked: bool) -> Any:
            def step(j: Array, acc: Array) -> Array:
                s = logits(j, masked)
                with jax.named_scope("softmax"):
                    p = _exp(s)
                return add(acc, p, j)

            return step

        def online(masked: bool) -> Any:
            def step(j: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
                acc, m = carry
                s = logits(j, masked)
                with jax.named_scope("softmax"):
                    new = jnp.maximum(m, s.max(2))
                    base = jnp.where(new == -jnp.inf, 0.0, new)
                    acc, p = acc * _exp(m - base)[:, :, None], _exp(s - base[:, :, None])
                return add(acc, p, j), new

            return step

        shape = (n.inner, n.K, n.V + 1, n.G * n.bq)
        acc, m = _zeros(shape, n.dtype, q), _zeros((*shape[:2], shape[3]), n.dtype, q, -jnp.inf)
        if small is None:
            acc, m = _walk((tiles, full, seen), online, (acc, m))
        else:
            # Trip counts choose, not a cond: under vmap a cond would compute both sides.
            safe = _at(small, o, i)
            part = lambda chosen: (tiles, jnp.where(chosen, full, 0), jnp.where(chosen, seen, 0))
            acc = _walk(part(safe), bounded, acc)
            acc, m = _walk(part(~safe), online, (acc, jnp.where(safe, 0.0, m)))
        total = acc[:, :, -1]
        empty = total == 0
        total = jnp.where(empty, 1.0, total)
        out = (acc[:, :, :-1] / total[:, :, None]).astype(options.out_dtype)
        return None, (out.swapaxes(2, 3), jnp.where(empty, -jnp.inf, m + jnp.log(total)))

    _, (out, lse) = lax.scan(row, None, _index(n))
    return _unqueries(_split(out, n), n), _unqueries(_split(lse, n), n)


def _backward(
    q: Array, k: Array, v: Array, bias: Array | None, visibility: Visibility, out: Array, lse: Array, do: Array, dlse: Array,
    options: Options,
) -> tuple[Array, Array, Array, Array | None]:  # fmt: skip
    """dq, dk, dv, dbias in the statistics' dtype: dS = P (do v^T - rowsum(do out) + dlse)."""
    n = _layout(q, k, v, visibility, options)
    visibility = visibility._replace(bias=bias)
    if 0 in (*q.shape[:3], n.S):
        zeros = [None if x is None else _zeros(x.shape, n.dtype, q) for x in (q, k, v, bias)]
        return tuple(zeros)
    side = _side(visibility, n)
    empty = lse == -jnp.inf
    delta = jnp.where(empty, 0.0, (do.astype(n.dtype) * out.astype(n.dtype)).sum(-1) - dlse)
    queries, cotangents = _queries(_scaled(q, n, options), n), _queries(do.astype(n.operand), n)
    deltas = _queries(delta, n)
    shifts = _queries(jnp.where(empty, 1e30, lse), n, 1e30)  # P = exp(S - 1e30) = 0 in rows without a key
    keys, values = _keys(k.astype(n.operand), n), _keys(v.astype(n.operand), n)

    def row(carry: Any, index: tuple[Array, Array]) -> tuple[Any, Array]:
        o, i = index
        qb, db = _at(queries, o, i), _at(cotangents, o, i)
        delta, shift = _at(deltas, o, i)[:, :, None], _at(shifts, o, i)[:, :, None]

        def tile(masked: bool) -> Any:
            def step(j: Array, carry: Any) -> Any:
                dq, dk, dv, dbias = carry
                kb = _at(keys, o, j)
                with jax.named_scope("logits"):
                    s, visible, slope = _logits(qb, kb, side, o, i, j, masked, n, options)
                with jax.named_scope("softmax"):
                    p = _exp(s - shift)
                    if visible is not None:
                        p = jnp.where(visible, p, 0.0)
                with jax.named_scope("dp"):
                    dp = _dot("bkcv,bkrv->bkcr", _at(values, o, j), db, n)
                with jax.named_scope("ds"):
                    ds = p * (dp - delta)
                if dbias is not None:
                    starts, sizes = _bias_slice(side, o, i, j, n)
                    x = jnp.moveaxis(ds.reshape(n.inner, n.K, n.bk, n.G, n.bq), 2, 4)
                    x = x.reshape(n.inner, n.K * n.G, n.bq, n.bk)
                    x = x.sum([axis for axis in range(4) if sizes[axis] == 1 < x.shape[axis]], keepdims=True)
                    dbias = lax.dynamic_update_slice(dbias, lax.dynamic_slice(dbias, starts, sizes) + x, starts)
                if slope is not None:
                    ds = ds * slope
                with jax.named_scope("dq"):
                    dq = dq + _dot("bkdc,bkcr->bkdr", kb.swapaxes(2, 3), ds, n)
                with jax.named_scope("dk"):
                    dk = _add(dk, _dot("bkcr,bkrd->bkcd", ds, qb, n), o, j)
                with jax.named_scope("dv"):
                    dv = _add(dv, _dot("bkcr,bkrv->bkcv", p, db, n), o, j)
                return dq, dk, dv, dbias

            return step

        dq = _zeros((n.inner, n.K, n.D, n.G * n.bq), n.dtype, q)
        with jax.named_scope("order"):
            order = _order(side, o, i, n)
        dq, *carry = _walk(order, tile, (dq, *carry))
        return tuple(carry), dq.swapaxes(2, 3)

    carry = (
        _zeros(keys.shape, n.dtype, q),
        _zeros(values.shape, n.dtype, q),
        None if bias is None else _zeros(side.bias.shape, n.dtype, q),
    )
    (dk, dv, dbias), dq = lax.scan(row, carry, _index(n))
    dq = _unqueries(_split(dq, n), n) * options.scale
    if n.operand != n.dtype:
        dk = dk * options.scale  # q came unscaled

    if dbias is not None:
        dbias = lax.slice(dbias, (0,) * 4, bias.shape)
    return dq, _unkeys(dk, n), _unkeys(dv, n), dbias


def _add(x: Array, tile: Array, o: Array, j: Array) -> Array:
    """x[o, j] += tile, in place inside a loop."""
    starts = (o, j) + (jnp.zeros_like(j),) * tile.ndim
    return lax.dynamic_update_slice(x, (_at(x, o, j) + tile)[None, None], starts)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(
    q: Array, k: Array, v: Array, bias: Array | None, visibility: Visibility, options: Options
) -> tuple[Array, Array]:
    return _forward(q, k, v, bias, visibility, options)


def _attend_forward(q: Array, k: Array, v: Array, bias: Array | None, visibility: Visibility, options: Options) -> Any:
    out, lse = _forward(q, k, v, bias, visibility, options)
    out, lse = checkpoint_name(out, "attention_out"), checkpoint_name(lse, "attention_lse")
    return (out, lse), (q, k, v, bias, visibility, out, lse)


def _attend_backward(options: Options, residuals: Any, cotangents: tuple[Array, Array]) -> Any:
    q, k, v, bias, visibility, out, lse = residuals
    grads = dispatch.once(
        functools.partial(_backward, options=options), q, k, v, bias, visibility, out, lse, *cotangents
    )
    return *(None if x is None else g.astype(x.dtype) for x, g in zip((q, k, v, bias), grads, strict=True)), None


_attend.defvjp(_attend_forward, _attend_backward)


def attend(q: Query, k: Key, v: Value, visibility: Visibility, options: Options) -> tuple[Out, Statistic]:
    """out [B T H V] in options.out_dtype and lse [B T H]; zeros and -inf where no key is visible."""
    return _attend(q, k, v, visibility.bias, visibility._replace(bias=None), options)


def backward_partial(
    q: Query,
    k: Key,
    v: Value,
    visibility: Visibility,
    out: Out,
    lse: Statistic,
    do: Out,
    dlse: Statistic,
    options: Options,
) -> tuple[Query, Key, Value]:
    """dq, dk, dv from these keys, given the global out and lse."""
    return _backward(q, k, v, visibility.bias, visibility._replace(bias=None), out, lse, do, dlse, options)[:3]


def backward_bias(
    q: Query,
    k: Key,
    v: Value,
    visibility: Visibility,
    out: Out,
    lse: Statistic,
    do: Out,
    dlse: Statistic,
    options: Options,
) -> Float[Array, "#B #H #T #S"]:
    """The gradient of the bias, given out and lse, for back ends that lack it."""
    return _backward(q, k, v, visibility.bias, visibility._replace(bias=None), out, lse, do, dlse, options)[3]
