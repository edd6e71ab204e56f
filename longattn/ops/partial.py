"""How results over parts of a sequence combine: attention over some of the keys, and states over some of the tokens.

Partial results of attention over disjoint sets of keys merge into the result over their union:

    lse = logaddexp(lse_a, lse_b);   out = exp(lse_a - lse) out_a + exp(lse_b - lse) out_b

(section 3.1 of arXiv:2205.14135, normalised at every step). Up to rounding `merge` is associative and commutative, and
(0, -inf) is its neutral element. So rings, split-key decoding and sparse branches are orders of merges. Everything is
differentiable in both fields. At lse = -inf values and gradients are exact zeros, never NaN.

Consecutive tokens change the state of linear attention by an affine map. `chain` composes the maps of two parts:

    S -> M S + N;   later . earlier = (M_l M_e, M_l N_e + N_l)

M is a product of decays, one number per channel; with the delta rule (arXiv:2406.06484) it is a matrix. Matrices do not
commute, so the order of the parts matters. Chaining is associative up to rounding. M is 0 where a segment begins.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.lax import Precision
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from longattn.shapes import Out, Statistic


class Partial(NamedTuple):
    """The result of attention over some of the keys."""

    out: Out  # float32 (float64 for float64 inputs), normalised over the keys seen; zero if no key is seen
    lse: Statistic  # the same dtype, natural logarithm of the sum of exp(logits); -inf if no key is seen


def _finite(lse: Array) -> Array:
    """Returns lse with 0 for -inf, to be subtracted under exp: -inf - -inf would be NaN."""
    return jnp.where(lse == -jnp.inf, 0.0, lse)


def logaddexp(a: Array, b: Array) -> Array:
    """Returns log(exp(a) + exp(b)). Value and gradients are right at -inf, even for non-finite cotangents there."""
    m = jax.lax.stop_gradient(_finite(jnp.maximum(a, b)))
    total = jnp.exp(a - m) + jnp.exp(b - m)
    return jnp.where(total == 0, -jnp.inf, m + jnp.log(jnp.where(total == 0, 1.0, total)))


def merge(a: Partial, b: Partial) -> Partial:
    """Returns attention over the union of two disjoint sets of keys."""
    lse = logaddexp(a.lse, b.lse)
    weight_a, weight_b = jnp.exp(a.lse - _finite(lse)), jnp.exp(b.lse - _finite(lse))
    return Partial(weight_a[..., None] * a.out + weight_b[..., None] * b.out, lse)


def finish(p: Partial, sinks: Float[Array, "H"] | None = None, dtype: DTypeLike | None = None) -> Partial:
    """Adds the sinks (one more logit per head in the denominator) after the last merge, and casts `out`.

    Call it once: merging results that already hold the sinks counts them twice.

    Args:
      p: attention over all keys.
      sinks: one logit per head, or None.
      dtype: the dtype of the returned `out`; None keeps float32. `lse` keeps its dtype.

    Returns:
      The finished attention. Where no key is visible `out` is zero and `lse` is the sink's logit.
    """
    out, lse = p
    if sinks is not None:
        sinks = jnp.broadcast_to(sinks.astype(lse.dtype).reshape((1,) * (lse.ndim - 1) + sinks.shape), lse.shape)
        total = logaddexp(lse, sinks)
        out, lse = jnp.exp(lse - _finite(total))[..., None] * out, total
    return Partial(out if dtype is None else out.astype(dtype), lse)


class Affine(NamedTuple):
    """The map S -> transition S + state by which consecutive tokens change a state. float32, or float64."""

    transition: Float[Array, "B H #D"] | Float[Array, "B H D D"]  # decays per row of S, or one, or a matrix
    state: Float[Array, "B H D V"]  # the state after the tokens, from zeros


def _times(transition: Array, x: Array) -> Array:
    """Returns the transition times a state, or times a transition of its own kind, in full precision.

    Where the transition is zero, nothing is left of what was there, of NaN neither.
    """
    if transition.ndim == 4:
        x = jnp.where((transition != 0).any((-1, -2), keepdims=True), x, 0)
        return jnp.einsum("BHCD,BHDV->BHCV", transition, x, precision=Precision.HIGHEST)
    transition = transition if x.ndim == 3 else transition[..., None]
    return transition * jnp.where(transition == 0, 0, x)


def advance(S: Float[Array, "B H D V"], tokens: Affine) -> Float[Array, "B H D V"]:
    """Returns the state after the tokens, from the state before them."""
    return _times(tokens.transition, S) + tokens.state


def chain(earlier: Affine, later: Affine) -> Affine:
    """Returns the map of earlier tokens followed by later ones."""
    return Affine(_times(later.transition, earlier.transition), advance(earlier.state, later))
