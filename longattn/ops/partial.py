"""The two algebras of parts of a sequence: of softmax attention, and of states.

Partial results of attention over disjoint sets of keys merge into the result over their union:

    lse = logaddexp(lse_a, lse_b);   out = exp(lse_a - lse) out_a + exp(lse_b - lse) out_b

(section 3.1 of arXiv:2205.14135, normalised at every step). `merge` is associative and commutative up to rounding, with
`EMPTY = (0, -inf)` as its unit, so rings, split-key decoding and sparse branches are orders of merges. Everything is
differentiable in both fields, and at lse = -inf values and gradients are exact zeros, never NaN.

What consecutive tokens do to the state of linear attention is an affine map, and those of consecutive parts `chain`:

    S -> M S + N;   later . earlier = (M_l M_e, M_l N_e + N_l)

M is a product of decays, a number per channel; with the delta rule (arXiv:2406.06484) a matrix. As matrices do not
commute the order of the parts matters; that of chaining does not, up to rounding. Where a segment begins M is 0.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.lax import Precision
from jaxtyping import Array, Float

from longattn.shapes import Out, Statistic


class Partial(NamedTuple):
    """Attention over some of the keys."""

    out: Out  # float32 (float64 for float64 inputs), normalised over the keys seen; zeros where there is none
    lse: Statistic  # the same dtype, natural logarithm of the sum of exp(logits); -inf where no key is seen


def _finite(lse: Array) -> Array:
    """`lse` with 0 for -inf: what to subtract under exp, where -inf - -inf would be NaN."""
    return jnp.where(lse == -jnp.inf, 0.0, lse)


def logaddexp(a: Array, b: Array) -> Array:
    """log(exp(a) + exp(b)) whose value and gradients are right at -inf, also for non-finite cotangents there."""
    m = jax.lax.stop_gradient(_finite(jnp.maximum(a, b)))
    total = jnp.exp(a - m) + jnp.exp(b - m)
    return jnp.where(total == 0, -jnp.inf, m + jnp.log(jnp.where(total == 0, 1.0, total)))


def merge(a: Partial, b: Partial) -> Partial:
    """Attention over the union of two disjoint sets of keys."""
    lse = logaddexp(a.lse, b.lse)
    weight_a, weight_b = jnp.exp(a.lse - _finite(lse)), jnp.exp(b.lse - _finite(lse))
    return Partial(weight_a[..., None] * a.out + weight_b[..., None] * b.out, lse)


def finish(p: Partial, sinks: Float[Array, "H"] | None = None, dtype: Any = None) -> Partial:
    """The end of an order of merges: adds the sinks, one more logit per head in the denominator, and casts `out`.

    Call it once: merging results that already hold the sinks would count them twice.

    Args:
      p: attention over all keys.
      sinks: one logit per head, or None for none.
      dtype: of the result's `out`; None keeps float32. `lse` keeps its dtype.

    Returns:
      The finished attention; where no key is visible, `out` is zero and `lse` the sink's logit.
    """
    out, lse = p
    if sinks is not None:
        sinks = jnp.broadcast_to(sinks.astype(lse.dtype).reshape((1,) * (lse.ndim - 1) + sinks.shape), lse.shape)
        total = logaddexp(lse, sinks)
        out, lse = jnp.exp(lse - _finite(total))[..., None] * out, total
    return Partial(out if dtype is None else out.astype(dtype), lse)


class Affine(NamedTuple):
    """What consecutive tokens do to a state S [B H D V], which becomes transition S + state. float32, or float64."""

    transition: Float[Array, "B H #D"] | Float[Array, "B H D D"]  # decays of rows of S, 1 for all of them, or a matrix
    state: Float[Array, "B H D V"]  # what they make of a state of zeros


def _times(transition: Array, x: Array) -> Array:
    """The transition times a state or a transition of its own kind, in full products."""
    if transition.ndim == 4:
        return jnp.einsum("BHCD,BHDV->BHCV", transition, x, precision=Precision.HIGHEST)
    return (transition if x.ndim == 3 else transition[..., None]) * x


def advance(S: Float[Array, "B H D V"], tokens: Affine) -> Float[Array, "B H D V"]:
    """The state after the tokens, from the one before them."""
    return _times(tokens.transition, S) + tokens.state


def chain(earlier: Affine, later: Affine) -> Affine:
    """What earlier tokens and then later ones do."""
    return Affine(_times(later.transition, earlier.transition), advance(earlier.state, later))
