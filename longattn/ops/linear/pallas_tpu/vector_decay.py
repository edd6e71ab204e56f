"""Decays per channel within a chunk: sums of log_decay between tokens, and the pairs of tokens with their decays.

The pairs (i, j) are split by the highest bit in which i and j differ, section 4.3 of arXiv:2312.06635 carried to the
end. Level h = 1, 2, 4 ... has the pairs within blocks of 2 h tokens of which i is in the right half and j in the left.
With m the last token of the left half, the decay e^g(j, i] is e^g(j, m] e^g(m, i]: each token has its own factor.

Exponents are in base 2. R and L are the rows and columns of any matrix.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike
from jaxtyping import Array

from longattn.ops.linear.pallas_tpu.products import SUBLANES, blocks, dot, highest_bit, indices, product
from longattn.ops.linear.pallas_tpu.statics import Statics

LOG2E = math.log2(math.e)

# ---- exponents


@jax.custom_vjp
def _base_2(g: Array) -> Array:
    """log_decay as exponents of 2, for `exp`. The gradient passes unscaled: the factors of both functions cancel."""
    return g * LOG2E


_base_2.defvjp(lambda g: (_base_2(g), None), lambda _, ct: (ct,))


@jax.custom_vjp
def exp(exponent: Array) -> Array:
    """2^exponent, with the gradient for log_decay: see `_base_2`."""
    return jnp.exp2(exponent)


exp.defvjp(lambda exponent: (jnp.exp2(exponent),) * 2, lambda decay, ct: (ct * decay,))


def _sums_of_eight(C: int) -> Array:
    """Matrix [1 5C C] of the sums that `_within_eight` takes: 1 where a token sums another one."""
    i, j = indices(C)
    up, near = i >= j, i ^ j
    chosen = [(near < h) & (up == (i & h != 0)) for h in (1, 2, 4)]
    chosen += [(near < SUBLANES) & up, (near < SUBLANES) & ~up]
    return jnp.concatenate([jnp.where(x, 1.0, 0.0) for x in chosen], axis=1).astype(jnp.bfloat16)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _within_eight(g: Array, dtype: DTypeLike) -> list[Array]:
    """Sums g [H C D] within blocks of 8 tokens: for levels 1, 2 and 4, up to each token, and after it; [H C D] each.

    Eight tokens are the sublanes of one register, so rotations and selections do it without a product.
    """
    roll = lambda x, shift: pltpu.roll(x, shift % SUBLANES, 1)
    before = g.reshape(-1, SUBLANES, g.shape[2])
    after = jnp.zeros_like(before)
    row = lax.broadcasted_iota(jnp.int32, (1, SUBLANES, 1), 1)
    levels, h = [], 1
    while h < SUBLANES:
        right = row & h != 0
        levels.append(jnp.where(right, before, after))
        total, bit = before, 1
        while bit < h:  # every row of a half gets the value of the half's last row
            total = jnp.where(row & bit != 0, total, roll(total, -bit))
            bit *= 2
        other = roll(total, h) if 2 * h == SUBLANES else jnp.where(right, roll(total, h), roll(total, -h))
        before, after = before + jnp.where(right, other, 0.0), after + jnp.where(right, 0.0, other)
        h *= 2
    return [x.reshape(g.shape) for x in (*levels, before, after)]


def _within_eight_backward(dtype: DTypeLike, _: Any, cts: list[Array]) -> tuple[Array]:
    """One product for all heads side by side: in the backward pass the matrix units have time for it."""
    H, C, D = cts[0].shape
    side_by_side = jnp.concatenate(list(jnp.concatenate(cts, axis=1)), axis=1)[None]
    found = product(_sums_of_eight(C), side_by_side, "TN", dtype)[0]
    return (jnp.stack([found[:, h * D : (h + 1) * D] for h in range(H)]),)


_within_eight.defvjp(lambda g, dtype: (_within_eight(g, dtype), None), _within_eight_backward)


def exponents(g: Array, dtype: DTypeLike) -> tuple[list[Array], Array, Array]:
    """Sums log_decay [H C D] per level, up to each token of the chunk, and after it.

    At level h a token of a right half has the sum from the half's start to itself, g(m, i], and a token of a left half
    the sum after itself to the half's end, g(j, m].
    """
    C, h = g.shape[1], SUBLANES
    g = _base_2(g)
    *levels, before, after = _within_eight(g, dtype)
    before, after = blocks(before, h), blocks(after, h)
    totals = [jnp.sum(x, axis=1, keepdims=True) for x in blocks(g, h)]
    while h < C:
        pairs = range(0, len(totals), 2)
        levels.append(jnp.concatenate([x for p in pairs for x in (after[p], before[p + 1])], axis=1))
        before = [jnp.concatenate([before[p], before[p + 1] + totals[p]], axis=1) for p in pairs]
        after = [jnp.concatenate([after[p] + totals[p + 1], after[p + 1]], axis=1) for p in pairs]
        totals = [totals[p] + totals[p + 1] for p in pairs]
        h *= 2
    return levels, before[0], after[0]


# ---- rows of right and left halves; below 8 rows a block is less than a register, and all rows are kept


def _right(x: Array, h: int) -> Array:
    """The right halves of blocks of 2 h rows [H R/2 L]; below 8, all rows."""
    return x if h < SUBLANES else jnp.concatenate(blocks(x, h)[1::2], axis=1)


def _put_right(x: Array, rows: Array, h: int) -> Array:
    """x with its right halves replaced by `rows`, which have the shape of `_right`."""
    if h < SUBLANES:
        return rows
    parts = blocks(x, h)
    parts[1::2] = blocks(rows, h)
    return jnp.concatenate(parts, axis=1)


def _halves(left: Array, right: Array, h: int) -> Array:
    """[H R L] whose left halves of blocks of 2 h rows come from `left`, and whose right halves from `right`."""
    if h < SUBLANES:
        return jnp.where(lax.broadcasted_iota(jnp.int32, (1, left.shape[1], 1), 1) & h != 0, right, left)
    return _put_right(left, _right(right, h), h)


# ---- pairs


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def pairs(n: Statics, q: Array | None, k: Array, levels: list[Array]) -> tuple[Array | None, Array | None]:
    """Returns q k^T with decays, lower triangular, and for the delta rule k k^T, strictly lower: [H C C] each.

    Args:
      levels: exponents of each level, as `exponents` returns them.

    Both results are 0 above the diagonal, and so must be their cotangents. Without the delta rule only q meets k: at
    each level one array holds the queries of the right halves and the keys of the left ones.
    """
    return _pairs_forward(n, q, k, levels)[0]


def _pairs_forward(n: Statics, q: Array | None, k: Array, levels: list[Array]) -> Any:
    i, j = indices(n.C)
    bit = jnp.where(i > j, highest_bit(n.C), 0)
    qk = None if q is None else jnp.where(i == j, dot(q, k, "NT", n.dtype), 0.0)
    found = [qk] * (q is not None) + [jnp.zeros((k.shape[0], n.C, n.C), jnp.float32)] * n.delta
    decays = [jnp.exp2(x) for x in levels]
    for level, decay in enumerate(decays):
        h = 1 << level
        left, right = _sides(n, q, k, decay, h)
        products = product(right, left, "NT", n.dtype)
        mask = _right(bit, h) == h
        for m, rows in enumerate(blocks(products, products.shape[1] // len(found))):
            found[m] = _put_right(found[m], jnp.where(mask, rows, _right(found[m], h)), h)
    return (None if q is None else found[0], found[-1] if n.delta else None), (q, k, decays)


def _sides(n: Statics, q: Array | None, k: Array, decay: Array, h: int) -> tuple[Array, Array]:
    """Decayed rows of a level: all tokens' [H C D], whose left halves count, and the right halves that meet them.

    For the delta rule the right halves are q's, where there is q, above k's.
    """
    left = (k if n.delta else _halves(k, q, h)) * decay
    if h >= 2 * SUBLANES:
        left = left.astype(n.dtype)
    if not n.delta:
        return left, _right(left, h)
    right = [_right(left, h)]
    if q is not None:
        right.insert(0, (_right(q, h) * _right(decay, h)).astype(left.dtype))
    return left, jnp.concatenate(right, axis=1)


def _pairs_backward(n: Statics, residuals: Any, cts: tuple[Array | None, Array | None]) -> Any:
    q, k, decays = residuals
    i, j = indices(n.C)
    bit = highest_bit(n.C)
    dq, dk, dlevels = None, 0.0, []
    if q is not None:
        diagonal = jnp.where(i == j, cts[0], 0.0)
        dq, dk = product(diagonal, k, "NN", n.dtype), product(diagonal, q, "TN", n.dtype)
    if n.delta:
        bit = jnp.where(i > j, bit, 0)
        level_backward = functools.partial(_delta_level_backward, n, q, k, cts, bit)
    else:  # one product with the pairs and their transpose gives a level's gradients of queries and of keys
        assert cts[0] is not None  # without the delta rule only queries make pairs
        both = (cts[0] + cts[0].swapaxes(1, 2)).astype(n.dtype)
        level_backward = functools.partial(_level_backward, n, q, k, both, bit)
    for level, decay in enumerate(decays):
        dq, dk, dlevel = level_backward(decay, 1 << level, dq, dk)
        dlevels.append(dlevel)
    return dq, dk, dlevels


def _level_backward(
    n: Statics, q: Array, k: Array, both: Array, bit: Array, decay: Array, h: int, dq: Array, dk: Array
) -> tuple[Array, Array, Array]:
    """Adds the gradients of level h to dq and dk, and returns the exponents' too; without the delta rule.

    Args:
      both: cotangents of q k^T plus their transpose.
      bit: `highest_bit`.
    """
    left, _ = _sides(n, q, k, decay, h)
    d = product(jnp.where(bit == h, both, 0), left, "NN", n.dtype) * decay
    dlevel = d * _halves(k, q, h)
    if h < SUBLANES:  # the other line would serve, for 3% more cycles
        of_q = _halves(jnp.zeros_like(d), d, h)
        return dq + of_q, dk + (d - of_q), dlevel
    return _halves(dq, dq + d, h), _halves(dk + d, dk, h), dlevel


def _delta_level_backward(
    n: Statics, q: Array | None, k: Array, cts: tuple[Array | None, Array], bit: Array, decay: Array, h: int,
    dq: Array | None, dk: Array | float,
) -> tuple[Array | None, Array, Array]:  # fmt: skip
    """Adds the gradients of level h to dq and dk, and returns the exponents' too; with the delta rule.

    Args:
      cts: cotangents of q k^T, None without q, and of k k^T.
      bit: `highest_bit` below the diagonal, else 0.
    """
    left, right = _sides(n, q, k, decay, h)
    mask = _right(bit, h) == h
    masked = [jnp.where(mask, _right(x, h), 0.0) for x in cts if x is not None]
    masked = jnp.concatenate(masked, axis=1).astype(n.dtype)
    *of_q, of_k = blocks(product(masked, left, "NN", n.dtype), mask.shape[1])
    d = product(masked, right, "TN", n.dtype)  # zeros in the right halves, as of_k has them in the left ones
    d = (d + of_k if h < SUBLANES else _put_right(d, of_k, h)) * decay
    dk, dlevel = dk + d, d * k
    for x in of_q:
        x = x * _right(decay, h)
        dq = _put_right(dq, _right(dq, h) + x, h)
        dlevel = _put_right(dlevel, _right(dlevel, h) + x * _right(q, h), h)
    return dq, dk, dlevel


pairs.defvjp(_pairs_forward, _pairs_backward)
