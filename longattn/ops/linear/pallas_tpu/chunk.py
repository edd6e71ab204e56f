"""One chunk of C tokens of H heads, [H C D], and their states [H D V]: what both kernels compute, as plain functions.

    G_ij = exp(sum of log_decay over (j, i]);  A = strictly lower part of beta_i (k_i . k_j) G_ij;  X = (I + A)^-1
    R = beta (v - (k G_i) S), or v without beta;  V' = X R, or R
    out = scale ((q G_i) S + (q k^T G)_lower V');  S' = G_C S + (k G_Cj)^T V'

Section 2 of arXiv:2312.06635 and section 3.3 of arXiv:2412.06464. Exponents are sums of log_decay over the tokens
between two others, never differences of sums, so that none is positive and any decay is exact.

Every operation is one of all heads: their chains of products do not depend on each other, and the compiler fills the
waiting times of one with another (Gated DeltaNet on v6e took a fifth of the cycles that heads in turn took).

Float32 inputs have full products. Of bfloat16 inputs, what the state is made of is given as two numbers of bfloat16
each; without the delta rule the final state is within 3e-6 of the exact one. The pairs of a chunk, and most factors in
the gradients, are rounded: errors stay below twice those of a recurrence whose factors are all rounded.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

LOG2E = math.log2(math.e)
SUBLANES = 8
_BASE = 16  # rows of the diagonal blocks that are inverted by a product of powers

# ---- products

_FORMS = {"NN": (2, 1), "NT": (2, 2), "TN": (1, 1)}  # which axes of [H rows columns] are summed over


def _split(x: Array, pieces: int) -> list[Array]:
    """x as a sum of numbers of bfloat16; one leaves out 2^-9 of it, two leave out 2^-17."""
    found = [x.astype(jnp.bfloat16)]
    if pieces == 2:
        found.append((x.astype(jnp.float32) - found[0].astype(jnp.float32)).astype(jnp.bfloat16))
    return found


def _product(a: Array, b: Array, form: str, dtype: Any, pieces: tuple[int, ...] = (1, 1)) -> Array:
    of_a, of_b = _FORMS[form]
    dimensions = (((of_a,), (of_b,)), ((0,), (0,)))
    multiply = functools.partial(lax.dot_general, dimension_numbers=dimensions, preferred_element_type=jnp.float32)
    if dtype == jnp.float32:
        return multiply(a.astype(dtype), b.astype(dtype), precision=lax.Precision.HIGHEST)
    (a, *rest_a), (b, *rest_b) = (_split(x, n) for x, n in zip((a, b), pieces[:2]))
    return sum([multiply(rest, b) for rest in rest_a] + [multiply(a, rest) for rest in rest_b], start=multiply(a, b))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def dot(a: Array, b: Array, form: str, dtype: Any, pieces: tuple[int, ...] = (1, 1)) -> Array:
    """A product per head in float32, of operands as they stand ("N") or transposed ("T"), [H rows columns] each.

    pieces: in bfloat16, as how many numbers each operand is given: one where it is exact; the product of both second
      ones is left out. In the gradients a is given as here where it meets the cotangent, which has as many as the third
      entry says, and all else is rounded.
    """
    return _product(a, b, form, dtype, pieces)


def _dot_forward(a: Array, b: Array, form: str, dtype: Any, pieces: tuple[int, ...]) -> Any:
    return _product(a, b, form, dtype, pieces), (a, b)


def _dot_backward(form: str, dtype: Any, pieces: tuple[int, ...], residuals: Any, ct: Array) -> tuple[Array, Array]:
    (a, b), given, of_ct = residuals, pieces[0], (*pieces, 1)[2]
    if form == "NN":
        return _product(ct, b, "NT", dtype), _product(a, ct, "TN", dtype, (given, of_ct))
    if form == "NT":
        return _product(ct, b, "NN", dtype), _product(ct, a, "TN", dtype, (of_ct, given))
    return _product(b, ct, "NT", dtype), _product(a, ct, "NN", dtype, (given, of_ct))


dot.defvjp(_dot_forward, _dot_backward)

# ---- the inverse


def _inverse(a: Array, dtype: Any) -> Array:
    """(I + a)^-1 of a strictly lower a: of diagonal blocks of 16 the product (I - d)(I + d^2)(I + d^4)(I + d^8), whose
    next factor is I, then twice the size by [[x, 0], [-y c x, y]] until it is whole. In bfloat16 one step of Newton's
    method follows, whose residual is that of the rounded x to 2^-17.
    """
    C = a.shape[-1]
    i, j = _indices(C)
    product = functools.partial(_product, form="NN", dtype=dtype)
    bit = _highest_bit(C)
    power = jnp.where(bit < _BASE, a, 0.0)
    x = jnp.where(i == j, 1.0, -power)
    for _ in range(3):
        power = product(power, power)
        x = x + product(x, power)
    size = _BASE
    while size < C:
        c = jnp.where(bit == size, a, 0.0)
        parts = _blocks(x, size)
        corner = _blocks(product(product(jnp.concatenate(parts[1::2], axis=1), c), x), size)
        parts[1::2] = [y - z for y, z in zip(parts[1::2], corner)]
        x = jnp.concatenate(parts, axis=1)
        size *= 2
    if dtype == jnp.float32:
        return x
    x = x.astype(dtype)
    one = jnp.where(i == j, 1.0, 0.0)
    return x.astype(jnp.float32) + product(x, one - _product(one + a, x, "NN", dtype, (2, 1)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def inverse(a: Array, known: Array | None, dtype: Any) -> Array:
    """(I + a)^-1, which is `known` where it was computed before."""
    return _inverse(a, dtype) if known is None else known


def _inverse_backward(dtype: Any, x: Array, ct: Array) -> Any:
    product = functools.partial(_product, dtype=dtype)
    return -product(product(x, ct, "TN"), x, "NT"), None


inverse.defvjp(lambda a, known, dtype: (inverse(a, known, dtype),) * 2, _inverse_backward)

# ---- decays


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _between(g: Array, dtype: Any) -> Array:
    """Of a row [H 1 C] the sums over (j, i], [H C C]; 0 where j >= i."""
    i, j = _indices(g.shape[-1])
    return _picked(jnp.where(i >= j, g, 0.0), "NN", dtype)


def _picked(x: Array, form: str, dtype: Any) -> Array:
    """x times the matrix of ones strictly below the diagonal, or its transpose."""
    i, j = _indices(x.shape[-1])
    ones = jnp.broadcast_to((i > j).astype(jnp.bfloat16), x.shape)
    return _product(x, ones, form, dtype, (2, 1))


def _between_backward(dtype: Any, _: Any, ct: Array) -> tuple[Array]:
    i, j = _indices(ct.shape[-1])
    return (jnp.sum(jnp.where(i >= j, _picked(ct, "NT", dtype), 0.0), axis=1, keepdims=True),)


_between.defvjp(lambda g, dtype: (_between(g, dtype), None), _between_backward)


def _indices(C: int) -> tuple[Array, Array]:
    """Row and column, [1 C C]."""
    return tuple(lax.broadcasted_iota(jnp.int32, (1, C, C), axis) for axis in (1, 2))


def _highest_bit(C: int) -> Array:
    """The highest bit in which row and column differ, [1 C C]: below it lie the blocks that hold only one of them."""
    i, j = _indices(C)
    x = i ^ j
    for shift in (1, 2, 4):
        x = x | x >> shift
    return x ^ x >> 1


def _column(row: Array, mask: Array) -> Array:
    """[H C 1]: of each token the sum of the row's numbers [H 1 C] that the mask [1 C C] shows it."""
    return jnp.sum(jnp.where(mask, row, 0.0), axis=2, keepdims=True)


def _blocks(x: Array, h: int) -> list[Array]:
    """h rows each of [H rows columns]."""
    return [x[:, r : r + h] for r in range(0, x.shape[1], h)]


@jax.custom_vjp
def _base_2(g: Array) -> Array:
    """log_decay as exponents of 2, for `_exp`. Their gradients are those of log_decay: the factors cancel."""
    return g * LOG2E


_base_2.defvjp(lambda g: (_base_2(g), None), lambda _, ct: (ct,))


@jax.custom_vjp
def _exp(exponent: Array) -> Array:
    """2^exponent; see `_base_2`."""
    return jnp.exp2(exponent)


_exp.defvjp(lambda exponent: (jnp.exp2(exponent),) * 2, lambda decay, ct: (ct * decay,))


def _spans(C: int) -> Array:
    """Ones [1 5C C] where a token sums another of its eight: for the levels of 1, 2 and 4, up to itself, after it."""
    i, j = _indices(C)
    up, near = i >= j, i ^ j
    chosen = [(near < h) & (up == (i & h != 0)) for h in (1, 2, 4)]
    chosen += [(near < SUBLANES) & up, (near < SUBLANES) & ~up]
    return jnp.concatenate([jnp.where(x, 1.0, 0.0) for x in chosen], axis=1).astype(jnp.bfloat16)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _within_eight(g: Array, dtype: Any) -> list[Array]:
    """The sums of `_spans` over g [H C D], each as g."""
    roll = lambda x, shift: pltpu.roll(x, shift % SUBLANES, 1)
    before = g.reshape(-1, SUBLANES, g.shape[2])
    after = jnp.zeros_like(before)
    row = lax.broadcasted_iota(jnp.int32, (1, SUBLANES, 1), 1)
    levels, h = [], 1
    while h < SUBLANES:
        right = row & h != 0
        levels.append(jnp.where(right, before, after))
        total, bit = before, 1
        while bit < h:  # of the half, in each of its rows: what its last row has
            total = jnp.where(row & bit != 0, total, roll(total, -bit))
            bit *= 2
        other = roll(total, h) if 2 * h == SUBLANES else jnp.where(right, roll(total, h), roll(total, -h))
        before, after = before + jnp.where(right, other, 0.0), after + jnp.where(right, 0.0, other)
        h *= 2
    return [x.reshape(g.shape) for x in (*levels, before, after)]


def _within_eight_backward(dtype: Any, _: Any, cts: list[Array]) -> tuple[Array]:
    """One product with the ones of all heads side by side, for which the matrix units have the time in this pass."""
    H, C, D = cts[0].shape
    found = _product(_spans(C), jnp.concatenate(list(jnp.concatenate(cts, axis=1)), axis=1)[None], "TN", dtype)[0]
    return (jnp.stack([found[:, h * D : (h + 1) * D] for h in range(H)]),)


_within_eight.defvjp(lambda g, dtype: (_within_eight(g, dtype), None), _within_eight_backward)


def _levels(g: Array, dtype: Any) -> tuple[list[Array], Array, Array]:
    """The exponents of vector decays [H C D]: per level, of blocks of 2 h tokens (h = 1, 2, 4, ...), of a token in the
    right half the sum from the half's begin to it, of one in the left half the sum after it to the half's end; then
    both for the chunk.
    """
    C, h = g.shape[1], SUBLANES
    g = _base_2(g)
    *levels, before, after = _within_eight(g, dtype)
    before, after = _blocks(before, h), _blocks(after, h)
    totals = [jnp.sum(x, axis=1, keepdims=True) for x in _blocks(g, h)]
    while h < C:
        pairs = range(0, len(totals), 2)
        levels.append(jnp.concatenate([x for p in pairs for x in (after[p], before[p + 1])], axis=1))
        before = [jnp.concatenate([before[p], before[p + 1] + totals[p]], axis=1) for p in pairs]
        after = [jnp.concatenate([after[p] + totals[p + 1], after[p + 1]], axis=1) for p in pairs]
        totals = [totals[p] + totals[p + 1] for p in pairs]
        h *= 2
    return levels, before[0], after[0]


def _right(x: Array, h: int) -> Array:
    """The second halves of blocks of 2 h rows; below 8, all rows."""
    return x if h < SUBLANES else jnp.concatenate(_blocks(x, h)[1::2], axis=1)


def _put_right(x: Array, rows: Array, h: int) -> Array:
    """x with `rows`, which are as `_right` gives them, in the place of its own."""
    if h < SUBLANES:
        return rows
    blocks = _blocks(x, h)
    blocks[1::2] = _blocks(rows, h)
    return jnp.concatenate(blocks, axis=1)


def _halves(left: Array, right: Array, h: int) -> Array:
    """[H C columns]: of blocks of 2 h rows the first half of `left`, the second of `right`."""
    if h < SUBLANES:
        return jnp.where(lax.broadcasted_iota(jnp.int32, (1, left.shape[1], 1), 1) & h != 0, right, left)
    return _put_right(left, _right(right, h), h)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _pairs(n: Statics, q: Array | None, k: Array, exponents: list[Array]) -> tuple[Array | None, Array | None]:
    """q k^T with vector decays, lower with the diagonal, and for the delta rule k k^T strictly lower, [H C C].

    By the highest bit in which two tokens differ, section 4.3 of arXiv:2312.06635 carried to the end: of a block of 2 h
    tokens those of the right half meet those of the left, each with its own exponent, so that without the delta rule
    one array has the queries of the one and the keys of the other. Above the
    diagonal the cotangents must be zero, as the results are.
    """
    return _pairs_forward(n, q, k, exponents)[0]


def _pairs_forward(n: Statics, q: Array | None, k: Array, exponents: list[Array]) -> Any:
    i, j = _indices(n.C)
    bit = jnp.where(i > j, _highest_bit(n.C), 0)
    qk = None if q is None else jnp.where(i == j, dot(q, k, "NT", n.dtype), 0.0)
    found = [qk] * (q is not None) + [jnp.zeros((k.shape[0], n.C, n.C), jnp.float32)] * n.delta
    decays = [jnp.exp2(x) for x in exponents]
    for level, decay in enumerate(decays):
        h = 1 << level
        own, sides = _sides(n, q, k, decay, h)
        products = _product(sides, own, "NT", n.dtype)
        mask = _right(bit, h) == h
        for m, rows in enumerate(_blocks(products, products.shape[1] // len(found))):
            found[m] = _put_right(found[m], jnp.where(mask, rows, _right(found[m], h)), h)
    return (None if q is None else found[0], found[-1] if n.delta else None), (q, k, decays)


def _sides(n: Statics, q: Array | None, k: Array, decay: Array, h: int) -> tuple[Array, Array]:
    """The left tokens' rows with their decays, [H C D], and those of the right ones that they meet: q's, then k's."""
    own = (k if n.delta else _halves(k, q, h)) * decay
    if h >= 2 * SUBLANES:
        own = own.astype(n.dtype)
    if not n.delta:
        return own, _right(own, h)
    sides = [_right(own, h)]
    if q is not None:
        sides.insert(0, (_right(q, h) * _right(decay, h)).astype(own.dtype))
    return own, jnp.concatenate(sides, axis=1)


def _pairs_backward(n: Statics, residuals: Any, cts: tuple[Array | None, Array | None]) -> Any:
    q, k, decays = residuals
    i, j = _indices(n.C)
    bit = _highest_bit(n.C)
    dq, dk, dexponents = None, 0.0, []
    if q is not None:
        diagonal = jnp.where(i == j, cts[0], 0.0)
        dq, dk = _product(diagonal, k, "NN", n.dtype), _product(diagonal, q, "TN", n.dtype)
    if not n.delta:  # a level's rows of queries and of keys from one product with the pairs and their transpose
        both = (cts[0] + cts[0].swapaxes(1, 2)).astype(n.dtype)
    for level, decay in enumerate(decays):
        h = 1 << level
        own, sides = _sides(n, q, k, decay, h)
        if not n.delta:
            d = _product(jnp.where(bit == h, both, 0), own, "NN", n.dtype) * decay
            dexponents.append(d * _halves(k, q, h))
            if h < SUBLANES:  # the other line would serve, for 3% more cycles
                of_q = _halves(jnp.zeros_like(d), d, h)
                dq, dk = dq + of_q, dk + (d - of_q)
            else:
                dq, dk = _halves(dq, dq + d, h), _halves(dk + d, dk, h)
            continue
        mask = _right(jnp.where(i > j, bit, 0), h) == h
        masked = [jnp.where(mask, _right(x, h), 0.0) for x in cts if x is not None]
        masked = jnp.concatenate(masked, axis=1).astype(n.dtype)
        *of_q, of_k = _blocks(_product(masked, own, "NN", n.dtype), mask.shape[1])
        d = _product(masked, sides, "TN", n.dtype)  # zeros in the right halves, as of_k has them in the left ones
        d = (d + of_k if h < SUBLANES else _put_right(d, of_k, h)) * decay
        dk, dexponent = dk + d, d * k
        for x in of_q:
            x = x * _right(decay, h)
            dq = _put_right(dq, _right(dq, h) + x, h)
            dexponent = _put_right(dexponent, _right(dexponent, h) + x * _right(q, h), h)
        dexponents.append(dexponent)
    return dq, dk, dexponents


_pairs.defvjp(_pairs_forward, _pairs_backward)


# ---- the chunk


@dataclass(frozen=True)
class Statics:
    """What a chunk is compiled for."""

    C: int
    decay: str  # "none", "scalar", "vector"
    delta: bool
    dtype: Any  # of the products
    scale: float


class Tokens(NamedTuple):
    """The tokens of one chunk of H heads, float32. Where there are fewer heads of q, k or v, neighbours share them."""

    q: Array | None  # [Hq C D]; None where no output is wanted
    k: Array  # [Hk C D]
    v: Array  # [Hv C V]
    g: Array | None  # log_decay [H 1 C] or [H C D]
    beta: Array | None  # [H 1 C]


def _shared(x: Array | None, H: int) -> Array | None:
    """Each head's own copy."""
    if x is None or x.shape[0] == H:
        return x
    return jnp.broadcast_to(x[:, None], (x.shape[0], H // x.shape[0], *x.shape[1:])).reshape(H, *x.shape[1:])


def chunk(
    n: Statics, t: Tokens, S: Array, starts: Array | None = None, known: Array | None = None
) -> tuple[Array | None, Array, Array | None]:
    """out [H C V] if there are queries, the next state [H D V], and for the delta rule (I + A)^-1; all float32.

    Args:
      n, t, S: what is compiled for, the tokens, the state before them.
      starts: float32 [1 1 C], how many segments began since the chunk's begin, up to each token.
      known: (I + A)^-1 [H C C], where it was computed before.
    """
    q, k, v = (_shared(x, S.shape[0]) for x in (t.q, t.k, t.v))
    g, rounded, of_q = t.g, 1, 1  # pieces of what is as exact as the inputs
    if q is not None and n.scale != 1.0:
        q, of_q = q * n.scale, 1 if math.frexp(n.scale)[0] == 0.5 else 2
    i, j = _indices(n.C)
    q_in, k_in, k_out, kept = q, k, k, None
    if n.decay == "vector":
        exponents, before, after = _levels(g, n.dtype)
        into, out_of = _exp(before), _exp(after)
        a, b = _indices(g.shape[2])
        kept = jnp.exp(_column(jnp.sum(g, axis=1, keepdims=True), a == b))
        qk, kk = (None, None) if q is None and not n.delta else _pairs(n, q, k, exponents)
    else:
        qk = None if q is None else dot(q, k, "NT", n.dtype, (of_q, 1))
        kk = dot(k, k, "NT", n.dtype) if n.delta else None
        if n.decay == "scalar":
            between = jnp.exp(_between(g, n.dtype))
            qk, kk = (None if x is None else x * between for x in (qk, kk))
            into, out_of = jnp.exp(_column(g, i >= j)), jnp.exp(_column(g, i < j))
            kept = jnp.exp(jnp.sum(g, axis=2, keepdims=True))
    if n.decay != "none":
        q_in, k_in, k_out, rounded, of_q = None if q is None else q * into, k * into, k * out_of, 2, 2
    lower, below, passed = i >= j, i > j, S
    if starts is not None:
        own, last = _column(starts, i == j), starts[:, :, n.C - 1 :]
        lower, below = (x & (own == starts) for x in (lower, below))
        q_in, k_in = (None if x is None else jnp.where(own == 0.0, x, 0.0) for x in (q_in, k_in))
        k_out, passed = jnp.where(own == last, k_out, 0.0), jnp.where(last == 0.0, S, 0.0)
    x, of_v = None, 1
    if n.delta:
        beta, of_v = _column(t.beta, i == j), 2
        x = inverse(jnp.where(below, kk, 0.0) * beta, known, n.dtype)
        v = dot(x, beta * (v - dot(k_in, S, "NN", n.dtype, (rounded, 2, 2))), "NN", n.dtype, (2, 2, 2))
    out = None
    if q is not None:
        out = dot(q_in, S, "NN", n.dtype, (of_q, 2)) + dot(jnp.where(lower, qk, 0.0), v, "NN", n.dtype)
    passed = passed if kept is None else kept * passed
    return out, passed + dot(k_out, v, "TN", n.dtype, (rounded, of_v)), x
