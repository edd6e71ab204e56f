"""Products on the matrix unit and the inverse of the delta rule, for all heads of a program at once.

Of bfloat16 factors, a float32 number is the sum of one or two bfloat16 pieces: one leaves out 2^-9 of it, two 2^-17.
R and L are the rows and columns of any matrix.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array

SUBLANES = 8
_BASE = 16  # rows of the diagonal blocks that are inverted by a product of powers
_SUMMED = {"NN": (2, 1), "NT": (2, 2), "TN": (1, 1)}  # by form, the axes of both [H R L] that are summed over


def _split(x: Array, pieces: int) -> list[Array]:
    found = [x.astype(jnp.bfloat16)]
    if pieces == 2:
        found.append((x.astype(jnp.float32) - found[0].astype(jnp.float32)).astype(jnp.bfloat16))
    return found


def product(a: Array, b: Array, form: str, dtype: DTypeLike, pieces: tuple[int, ...] = (1, 1)) -> Array:
    """Returns the product per head, float32. It has no gradient of its own: see `dot`.

    Args:
      a, b: [H R L] each.
      form: "N" for an operand as it stands, "T" for one that is transposed.
      dtype: of the factors. float32 takes full products, and bfloat16 the pieces.
      pieces: of a and of b, for bfloat16. The product of both second pieces is left out.
    """
    of_a, of_b = _SUMMED[form]
    dimensions = (((of_a,), (of_b,)), ((0,), (0,)))
    multiply = functools.partial(lax.dot_general, dimension_numbers=dimensions, preferred_element_type=jnp.float32)
    if dtype == jnp.float32:
        return multiply(a.astype(dtype), b.astype(dtype), precision=lax.Precision.HIGHEST)
    (a, *rest_a), (b, *rest_b) = (_split(x, n) for x, n in zip((a, b), pieces[:2]))
    return sum([multiply(rest, b) for rest in rest_a] + [multiply(a, rest) for rest in rest_b], start=multiply(a, b))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def dot(a: Array, b: Array, form: str, dtype: DTypeLike, pieces: tuple[int, ...] = (1, 1)) -> Array:
    """Returns `product`, with gradients.

    Args:
      pieces: of a, of b, and of the cotangent (1 by default) where it meets a. There a has as many as in the product;
        all other factors of the gradients are rounded.
    """
    return product(a, b, form, dtype, pieces)


def _dot_forward(a: Array, b: Array, form: str, dtype: DTypeLike, pieces: tuple[int, ...]) -> Any:
    return product(a, b, form, dtype, pieces), (a, b)


def _dot_backward(
    form: str, dtype: DTypeLike, pieces: tuple[int, ...], residuals: Any, ct: Array
) -> tuple[Array, Array]:
    (a, b), of_a, of_ct = residuals, pieces[0], (*pieces, 1)[2]
    if form == "NN":
        return product(ct, b, "NT", dtype), product(a, ct, "TN", dtype, (of_a, of_ct))
    if form == "NT":
        return product(ct, b, "NN", dtype), product(ct, a, "TN", dtype, (of_ct, of_a))
    return product(b, ct, "NT", dtype), product(a, ct, "NN", dtype, (of_a, of_ct))


dot.defvjp(_dot_forward, _dot_backward)


def indices(C: int) -> tuple[Array, Array]:
    """Row and column, [1 C C]."""
    return tuple(lax.broadcasted_iota(jnp.int32, (1, C, C), axis) for axis in (1, 2))


def highest_bit(C: int) -> Array:
    """The highest bit in which row and column differ, [1 C C]: the size of the largest blocks that hold only one."""
    i, j = indices(C)
    x = i ^ j
    for shift in (1, 2, 4):
        x = x | x >> shift
    return x ^ x >> 1


def blocks(x: Array, h: int) -> list[Array]:
    """Cuts [H R L] into blocks of h rows."""
    return [x[:, r : r + h] for r in range(0, x.shape[1], h)]


def _inverse(a: Array, dtype: DTypeLike) -> Array:
    """(I + a)^-1 for a strictly lower triangular.

    A diagonal block d of 16 rows has the inverse (I - d)(I + d^2)(I + d^4)(I + d^8), since d^16 = 0. Then the size is
    doubled by [[x, 0], [-y c x, y]] until it is C. In bfloat16 one step of Newton's method follows, whose residual
    belongs to the rounded inverse and is exact to 2^-17.
    """
    C = a.shape[-1]
    i, j = indices(C)
    multiply = functools.partial(product, form="NN", dtype=dtype)
    bit = highest_bit(C)
    power = jnp.where(bit < _BASE, a, 0.0)
    x = jnp.where(i == j, 1.0, -power)
    for _ in range(3):
        power = multiply(power, power)
        x = x + multiply(x, power)
    size = _BASE
    while size < C:
        c = jnp.where(bit == size, a, 0.0)
        parts = blocks(x, size)
        corner = blocks(multiply(multiply(jnp.concatenate(parts[1::2], axis=1), c), x), size)
        parts[1::2] = [y - z for y, z in zip(parts[1::2], corner)]
        x = jnp.concatenate(parts, axis=1)
        size *= 2
    if dtype == jnp.float32:
        return x
    x = x.astype(dtype)
    one = jnp.where(i == j, 1.0, 0.0)
    return x.astype(jnp.float32) + multiply(x, one - product(one + a, x, "NN", dtype, (2, 1)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def inverse(a: Array, known: Array | None, dtype: DTypeLike) -> Array:
    """Returns (I + a)^-1 [H C C], or `known` where it was computed before."""
    return _inverse(a, dtype) if known is None else known


def _inverse_backward(dtype: DTypeLike, x: Array, ct: Array) -> Any:
    multiply = functools.partial(product, dtype=dtype)
    return -multiply(multiply(x, ct, "TN"), x, "NT"), None


inverse.defvjp(lambda a, known, dtype: (inverse(a, known, dtype),) * 2, _inverse_backward)
