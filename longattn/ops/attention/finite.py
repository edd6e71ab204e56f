"""Keeps what is not finite to those who see it.

A hidden logit is replaced, but a hidden value, and in gradients every factor, is multiplied by 0; and 0 times NaN is
NaN. So the factors that are multiplied are finite, and NaN travels through the logits alone: in the forward pass
through the keys, in the backward pass through the lse of the rows that saw it.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array


def only(x: Array) -> Array:
    """Returns x with 0 for what is not finite."""
    return jnp.where(jnp.isfinite(x), x, jnp.zeros_like(x))


def keys_and_values(k: Array, v: Array) -> tuple[Array, Array]:
    """Returns k and v of the forward pass: a token of which anything is not finite has NaN for a key."""
    finite = (jnp.isfinite(k).all(-1) & jnp.isfinite(v).all(-1))[..., None]
    return jnp.where(finite, k, jnp.full_like(k, jnp.nan)), only(v)


class Factors(NamedTuple):
    """Holds what the backward pass multiplies."""

    q: Array  # [B T H D]
    k: Array  # [B S K D]
    v: Array  # [B S K V]
    do: Array  # [B T H V]
    delta: Array  # rowsum(do out) - dlse, [B T H]
    lse: Array  # NaN for each row with something that is not finite, -inf for one that sees no key


def factors(q: Array, k: Array, v: Array, out: Array, lse: Array, do: Array, dlse: Array, dtype: DTypeLike) -> Factors:
    """Returns the factors of the backward pass, its statistics in `dtype`. Rows that see no key send nothing."""
    empty = lse == -jnp.inf
    do = jnp.where(empty[..., None], jnp.zeros_like(do), do)
    delta = jnp.where(empty, 0.0, (do.astype(dtype) * out.astype(dtype)).sum(-1) - dlse)
    finite = jnp.isfinite(q).all(-1) & jnp.isfinite(do).all(-1) & jnp.isfinite(delta)
    lse = jnp.where(finite | empty, lse, jnp.nan)
    return Factors(only(q), only(k), only(v), only(do), only(delta), lse)
