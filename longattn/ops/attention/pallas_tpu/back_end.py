"""Exact attention by Pallas kernels for TPUs: arrays in the kernels' layout, what is refused, and the gradient's rule.

XLA moves heads before tokens (it may fold that into the operation before), sums delta, and makes the lists of blocks;
all of it is linear in the sequence but the lists, of one number per pair of blocks.

A bias is read in blocks, filled up to whole ones; one number for all keys of a query is added outside, to lse. Its
gradient is the plain XLA back end's.

Not supported, with the reason in the error: float16 and float64, a `BlockSparse` at given positions, or of
blocks that are no multiple of 128, jvp and second derivatives.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool

from longattn.ops import dispatch
from longattn.ops.attention import xla
from longattn.ops.attention.contract import Options, Visibility
from longattn.ops.attention.pallas_tpu import blocks
from longattn.ops.attention.pallas_tpu.backward import NO_KEY, backward
from longattn.ops.attention.pallas_tpu.call import LANES, LOG2E, Call, unit
from longattn.ops.attention.pallas_tpu.forward import forward
from longattn.ops.attention.pallas_tpu.tuning import PASSES, Pass, Tuning, choose, limit
from longattn.shapes import Key, Out, Query, Statistic, Value

BOUND = 80.0  # 2^80 times any sum of values, and 2^-80 times any value, are far from float32's limits
_ROWS = 16  # rows of bfloat16 in a register: copies begin and end at multiples of it


def check(q: Any, k: Any, v: Any, visibility: Visibility, options: Options) -> None:
    """Raises NotImplementedError with the reason where the kernels cannot serve the call."""
    dispatch.require_tpu(q.dtype)
    if sum(leaf.ndim == 4 for leaf in jax.tree.leaves(visibility.mask)) > 1:
        raise NotImplementedError(f"the mask {visibility.mask} has more than one BlockSparse")
    if (sparse := blocks.block_sparse(visibility.mask)) is not None:
        if sparse.block_size % LANES:
            raise NotImplementedError(f"BlockSparse.block_size={sparse.block_size} is no multiple of {LANES}")
        if not options.in_order:
            raise NotImplementedError("a BlockSparse is read at positions in order, not at given ones")
    if min(*q.shape, *k.shape, *v.shape):
        for which in PASSES:
            _call(which, q, k, v, visibility, options, options.out_dtype)


def _call(which: Pass, q: Array, k: Array, v: Array, visibility: Visibility, options: Options, out_dtype: Any) -> Call:
    (B, T, H, D), (S, K), V = q.shape, k.shape[1:3], v.shape[3]
    numbers = (() if options.in_order else ("positions",)) + (() if visibility.q_segments is None else ("segments",))
    bias = visibility.bias is not None and visibility.bias.shape[3] > 1
    added = _bias_type(visibility.bias).itemsize if bias and visibility.bias.shape[2] > 1 else 0  # bytes for each logit
    sizes = getattr(options.tuning or Tuning(), which)
    sizes = sizes or choose(which, visibility.mask, numbers, T, S, D, V, q.dtype.itemsize, added)
    leaves = jax.tree.leaves(visibility.mask)
    sparse = next((i for i, leaf in enumerate(leaves) if leaf.ndim == 4), None)
    if (of := blocks.block_sparse(visibility.mask)) is not None:  # of one mind about a tile
        sizes = replace(
            sizes, tile_q=math.gcd(sizes.tile_q, of.block_size), tile_k=math.gcd(sizes.tile_k, of.block_size)
        )
    patterns = None
    if not numbers and not leaves:
        patterns = blocks.patterns(visibility.mask, sizes.block_q, sizes.block_k, sizes.tile_q, sizes.tile_k, T, S)
    share = 1.0 if not options.in_order or leaves else blocks.share(visibility.mask, sizes.block_q, sizes.block_k, T, S)
    if patterns is None and sizes.tiles > blocks.NUMBER + 1:
        raise NotImplementedError(
            f"{sizes} has {sizes.tiles} tiles to a block, of which a list can name {blocks.NUMBER + 1}"
        )
    return Call(
        B, H, K, T, S, D, V, sizes.block_q, sizes.block_k, sizes.tile_q, sizes.tile_k, options.scale, options.softcap,
        jnp.dtype(out_dtype), numbers, patterns, jax.tree.structure(visibility.mask), sparse, bias, share,
        limit(which, sizes, D, V, q.dtype.itemsize, len(numbers), added),
    )  # fmt: skip


def _heads_first(x: Array) -> Array:
    """[B T H ...] -> [B H T ...], filled up to whole registers: copies of a part of one are not possible."""
    x = x.swapaxes(1, 2)
    short = -x.shape[2] % _ROWS
    return jnp.pad(x, ((0, 0), (0, 0), (0, short), (0, 0))) if short else x


def _numbers(n: Call, visibility: Visibility, side: str, length: int | None) -> Array | None:
    """int32 [B numbers T], or filled up to `length`."""
    if not n.numbers:
        return None
    rows = [getattr(visibility, f"{side}_{name}") for name in n.numbers]
    rows = [jnp.broadcast_to(x, (n.B, x.shape[1])) for x in rows]
    x = jnp.stack(rows, 1)
    return x if length is None else jnp.pad(x, ((0, 0), (0, 0), (0, length - x.shape[2])), mode="edge")


def _bias_type(bias: Array) -> Any:
    """What the kernels read it as; of one row, where that is little, float32."""
    return jnp.dtype(jnp.bfloat16 if bias.dtype == jnp.bfloat16 and bias.shape[2] > 1 else jnp.float32)


def _bias(n: Call, visibility: Visibility) -> Array | None:
    """What the kernels add to the logits, filled up to whole blocks."""
    if not n.bias:
        return None
    x = visibility.bias.astype(_bias_type(visibility.bias))
    rows = n.rows_q * n.block_q - x.shape[2] if x.shape[2] > 1 else 0
    return jnp.pad(x, ((0, 0), (0, 0), (0, rows), (0, n.rows_k * n.block_k - x.shape[3])))


def _per_query(n: Call, visibility: Visibility) -> Array | None:
    """A bias of one number for all keys of a query, in the call's unit: [B|1 T|1 H|1]."""
    if visibility.bias is None or n.bias:
        return None
    return visibility.bias[..., 0].swapaxes(1, 2).astype(jnp.float32) * (1 / n.unit)


def _walk(n: Call, visibility: Visibility, options: Options, own: Sequence[Array], by_key: bool) -> tuple[Array, Array]:
    leaves = [
        x[:, None, None] for x in jax.tree.leaves(visibility.mask) if x.ndim == 1
    ]  # one number per sequence: [B 1 1]
    with jax.named_scope("order"):
        return blocks.walk(
            visibility, n.patterns, (n.block_q, n.block_k), (n.tile_q, n.tile_k), n.T, n.S, options.in_order,
            [*own, *leaves], by_key,
        )  # fmt: skip


def _bounded(n: Call, q: Array, k: Array, bias: Array | None) -> Bool[Array, "B H rows"]:
    """Whether no logit in a row of blocks can leave [-BOUND, BOUND] in base 2, by Cauchy and Schwarz. [B H T D]

    A bias of -inf hides a key, which no bound is needed for.
    """
    length = lambda x: jnp.sqrt(jnp.square(x.astype(jnp.float32)).sum(-1))
    queries = jnp.pad(length(q), ((0, 0), (0, 0), (0, n.rows_q * n.block_q - q.shape[2])))
    queries = queries.reshape(n.B, n.H, n.rows_q, n.block_q).max(-1)
    keys = jnp.repeat(length(k).max(-1), n.H // n.K, axis=1)
    most = queries * keys[..., None] * n.scale
    most = most if n.softcap is None else jnp.minimum(most, n.softcap)
    if bias is not None:
        size = jnp.abs(bias.astype(jnp.float32))
        size = jnp.where(bias == -jnp.inf, 0.0, size).max(-1)
        most = most + (size.reshape(*size.shape[:2], n.rows_q, -1).max(-1) if size.shape[2] > 1 else size)
    return most * LOG2E <= BOUND


def _forward(q: Array, k: Array, v: Array, visibility: Visibility, options: Options) -> tuple[Array, Array]:
    (B, T, H, _), S, V = q.shape, k.shape[1], v.shape[3]
    if 0 in (B, T, H, S, V):
        zero = 0.0 * jnp.sum(q, dtype=jnp.float32)  # of the inputs' type over a mesh
        return (
            jnp.broadcast_to(zero, (B, T, H, V)).astype(options.out_dtype),
            jnp.broadcast_to(zero - jnp.inf, (B, T, H)),
        )
    n = _call("forward", q, k, v, visibility, options, options.out_dtype)
    q, k, v = (_heads_first(x) for x in (q, k, v))
    bias = _bias(n, visibility)
    walk, _ = _walk(n, visibility, options, [_bounded(n, q, k, bias)], by_key=False)
    numbers = _numbers(n, visibility, "q", None), _numbers(n, visibility, "k", n.rows_k * n.block_k)
    out, lse = forward(n, *dispatch.vary_together((walk, q, k, v, *numbers, bias)))
    out, lse = out.swapaxes(1, 2), lse.swapaxes(1, 2)
    if (added := _per_query(n, visibility)) is not None:
        lse = lse + added
        out = jnp.where((lse == -jnp.inf)[..., None], jnp.zeros_like(out), out)
    return out, lse


def _backward(
    q: Array, k: Array, v: Array, visibility: Visibility, out: Array, lse: Array, do: Array, dlse: Array, options: Options,
    out_dtype: Any,
) -> tuple[Array, Array, Array]:  # fmt: skip
    if 0 in (*q.shape[:3], k.shape[1], v.shape[3]):
        return tuple(jnp.zeros_like(x, out_dtype) for x in (q, k, v))
    n = _call("backward", q, k, v, visibility, options, out_dtype)
    T, length = n.T, n.rows_q * n.block_q
    empty = lse == -jnp.inf
    delta = jnp.where(empty, 0.0, (do.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1) - dlse)
    added = _per_query(n, visibility)
    lse = jnp.where(empty, NO_KEY, lse if added is None else lse - added)
    fill = lambda x, value: jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, length - T)), constant_values=value)
    stats = jnp.stack([fill(lse, NO_KEY), fill(delta, 0.0)], 2)
    q, k, v, do = (_heads_first(x) for x in (q, k, v, do.astype(q.dtype)))
    walk, visited = _walk(n, visibility, options, [], by_key=True)
    numbers = _numbers(n, visibility, "k", None), _numbers(n, visibility, "q", length)
    arrays = walk, q, k, v, do, stats, *numbers, _bias(n, visibility)
    dq, dk, dv = backward(n, *dispatch.vary_together(arrays))
    dq = jnp.where(jnp.repeat(visited, n.block_q, -1)[:, :, None, :T], dq[..., :T] * n.scale, 0.0)
    return dq.transpose(0, 3, 1, 2).astype(out_dtype), dk.swapaxes(1, 2), dv.swapaxes(1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(
    q: Array, k: Array, v: Array, bias: Array | None, visibility: Visibility, options: Options
) -> tuple[Array, Array]:
    return _attend_forward(q, k, v, bias, visibility, options)[0]


def _attend_forward(q: Array, k: Array, v: Array, bias: Array | None, visibility: Visibility, options: Options) -> Any:
    visibility = visibility._replace(bias=bias)
    out, lse = dispatch.fold_vmap(functools.partial(_forward, options=options), q, k, v, visibility, shared=3)
    out, lse = checkpoint_name(out, "attention_out"), checkpoint_name(lse, "attention_lse")
    return (out, lse * unit(options.scale, options.softcap)), (q, k, v, visibility, out, lse)


def _attend_backward(options: Options, residuals: Any, cotangents: tuple[Array, Array]) -> Any:
    def gradients(
        q: Array, k: Array, v: Array, visibility: Visibility, out: Array, lse: Array, do: Array, dlse: Array
    ) -> Any:
        kernels = functools.partial(_backward, options=options, out_dtype=q.dtype)
        found = dispatch.fold_vmap(kernels, q, k, v, visibility, out, lse, do, dlse, shared=3)
        if visibility.bias is None:
            return *found, None
        natural = lse * unit(options.scale, options.softcap)
        dbias = xla.backward_bias(q, k, v, visibility, out, natural, do, dlse, replace(options, tuning=None))
        return *found, dbias.astype(visibility.bias.dtype)

    return *dispatch.once(gradients, *residuals, *cotangents), None


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
    """dq, dk, dv from these keys in float32, given the global out and lse."""
    gradient = functools.partial(_backward, options=options, out_dtype=jnp.float32)
    lse = lse / unit(options.scale, options.softcap)
    return dispatch.fold_vmap(gradient, q, k, v, visibility, out, lse, do, dlse, shared=3)
