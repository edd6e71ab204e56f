"""One chunk of linear attention, all its heads at once: the body of `xla`'s scan.

With S the state before the chunk, and g(j, i] the sum of log_decay over the tokens after j up to i (0 is before all),

    A_ij = beta_i (k_i . k_j) e^g(j, i], below the diagonal                         the delta rule; else U = v
    U    = (I + A)^-1 beta (v - e^g(0, i] k S)
    o    = scale * (e^g(0, i] q S + P U),  P_ij = (q_i . k_j) e^g(j, i], on and below the diagonal
    S'   = e^g(0, C] S + (e^g(j, C] k)^T U

Section 3.3 of arXiv:2412.06464, with a plus in the inverse; arXiv:2510.26692 for a decay per channel, whose factors
stand inside the products over D.

No exponent is positive and none is a difference of two sums, so every decay is exact to rounding. For a decay per
channel the pairs (i, j) are split by the highest bit in which they differ. With m the last token of the left half of
the smallest block that holds both, g(j, i] = g(j, m] + g(m, i], and each summand goes to its own factor. This is the
secondary chunking of section 4.3 of arXiv:2312.06635, carried to the end.

Letters: heads are [K G], G of them with the same q and k. T and S are the reading and the written token of a pair
within the chunk (in einsum strings; the array S is the state). R readers are multiplied at once, such as k and q.
J blocks of h tokens make up a chunk.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.lax import Precision
from jax.typing import DTypeLike
from jaxtyping import Array

_product = functools.partial(jnp.matmul, precision=Precision.HIGHEST)


class Sizes(NamedTuple):
    """Static sizes of a chunk. Products of q and k are computed once per K; with decays per channel G is 1."""

    K: int
    G: int
    C: int  # tokens, a power of two
    scale: float
    dtype: DTypeLike  # of states and accumulators
    precision: Precision  # of products; half-precision operands are widened, and a device may round them back


class Tokens(NamedTuple):
    """The arrays of one chunk, [B C ...]."""

    q: Array | None  # None where only the state is asked for
    k: Array
    v: Array
    log_decay: Array | None
    beta: Array | None
    starts: Array | None  # number of segments started since the chunk's first token


def _halves(x: Array) -> tuple[Array, Array]:
    """Splits pairs of blocks [... J h columns] into their left and right blocks, [... J/2 h columns] each."""
    x = x.reshape(*x.shape[:-3], -1, 2, *x.shape[-2:])
    return x[..., 0, :, :], x[..., 1, :, :]


def _triangular(diagonal: Array, corner: Callable[[Array, Array], Array]) -> Array:
    """Builds [... C C] from its diagonal [... C]: blocks a, b [... J h h] become [[a, 0], [corner(a, b), b]]."""
    x = diagonal[..., None, None]
    while x.shape[-3] > 1:
        a, b = _halves(x)
        c = corner(a, b)
        x = jnp.concatenate([jnp.concatenate([a, jnp.zeros_like(c)], -1), jnp.concatenate([c, b], -1)], -2)
    return x[..., 0, :, :]


def _inverse(A: Array) -> Array:
    """(I + A)^-1 for A strictly lower triangular: [[a, 0], [c, b]]^-1 = [[a^-1, 0], [-b^-1 c a^-1, b^-1]]."""

    def corner(a: Array, b: Array) -> Array:
        J, h = a.shape[-3:-1]
        c = A.reshape(*A.shape[:-2], J, 2, h, J, 2, h)[..., 1, :, :, 0, :]
        same = jnp.expand_dims(jnp.eye(J, dtype=bool)[:, None, :, None], tuple(range(A.ndim - 2)))
        c = jnp.sum(jnp.where(same, c, 0.0), -2)
        return -_product(_product(b, c), a)

    return _triangular(jnp.ones_like(A[..., 0]), corner)


@jax.custom_vjp
def _solve(A: Array, x: Array) -> Array:
    """U = (I + A)^-1 x, in full float32 products. Its gradients are dx = (I + A)^-T dU and dA = -dx U^T."""
    return _product(_inverse(A), x)


def _solve_forward(A: Array, x: Array) -> tuple[Array, tuple[Array, Array]]:
    inverse = _inverse(A)
    U = _product(inverse, x)
    return U, (inverse, U)


def _solve_backward(residuals: tuple[Array, Array], dU: Array) -> tuple[Array, Array]:
    inverse, U = residuals
    dx = _product(inverse.swapaxes(-1, -2), dU)
    return -_product(dx, U.swapaxes(-1, -2)), dx


_solve.defvjp(_solve_forward, _solve_backward)


class _Decays(NamedTuple):
    """Decay factors within a chunk: all in [0, 1], and 0 where a segment starts in between."""

    since: Array  # [B K G C D|1], e^g(0, i]: what token i still sees of the state before the chunk
    until: Array  # [B K G C D|1], e^g(j, C]: what the state after the chunk still has of token j
    pairs: Array  # [B K|1 G|1 C C], e^g(j, i]; with a decay per channel only 0 and 1, and `levels` has the factors
    levels: list[tuple[Array, Array]]  # for a decay per channel and h = 1, 2, 4 ...: see `_sums`


def _heads(x: Array, H: int, n: Sizes) -> Array:
    """[B C h ...] -> [B H C ...]. Shared heads are copied here, within a chunk, and nowhere else."""
    return jnp.repeat(x.astype(n.dtype).swapaxes(1, 2), H // x.shape[2], axis=1)


def _sums(a: Array) -> list[tuple[Array, Array]]:
    """Sums a [... C D] within blocks of h = 1, 2, 4 ... C tokens [... J h D]: up to each token, and after it."""
    a = a[..., None, :]
    found = [(a, jnp.zeros_like(a))]
    while found[-1][0].shape[-3] > 1:
        (left, right), (before, after) = (_halves(x) for x in found[-1])
        since = jnp.concatenate([left, right + left[..., -1:, :]], -2)
        until = jnp.concatenate([before + right[..., -1:, :], after], -2)
        found.append((since, until))
    return found


def _decays(t: Tokens, n: Sizes) -> _Decays:
    B, H = t.k.shape[0], n.K * n.G
    starts = jnp.zeros((B, n.C), jnp.int32) if t.starts is None else t.starts
    inherits, lasts = starts == 0, starts == starts[:, -1:]
    visible = jnp.tri(n.C, dtype=bool)[None] & (starts[:, :, None] == starts[:, None])
    pairs, levels = visible[:, None, None].astype(n.dtype), []
    if t.log_decay is None:
        since = until = jnp.zeros((B, H, n.C, 1), n.dtype)
    elif t.log_decay.ndim == 3:
        a = _heads(t.log_decay, H, n)[..., None]
        sums = _product(
            jnp.tri(n.C, dtype=n.dtype)[None, None], jnp.where(jnp.tri(n.C, k=-1, dtype=bool)[None, None], a, 0.0)
        )
        pairs = jnp.exp(jnp.where(visible[:, None], sums, -jnp.inf)).reshape(B, n.K, n.G, n.C, n.C)
        since, until = sums[..., :1] + a[..., :1, :], sums[..., -1, :, None]
    else:
        *sums, (since, until) = _sums(_heads(t.log_decay, H, n))
        since, until = since[..., 0, :, :], until[..., 0, :, :]
        levels = [(jnp.exp(a), jnp.exp(b)) for a, b in sums]

    def factor(visible: Array, sums: Array) -> Array:
        decay = jnp.exp(jnp.where(visible[:, None, :, None], sums, -jnp.inf))
        return decay.reshape(B, n.K, n.G, *decay.shape[2:])

    return _Decays(factor(inherits, since), factor(lasts, until), pairs, levels)


def _pairs(readers: Array, k: Array, decays: _Decays, n: Sizes) -> Array:
    """(y_i . k_j) e^g(j, i] on and below the diagonal, [B K G R C C], for readers y [B K R C D]."""
    if not decays.levels:
        products = jnp.einsum("BKRTD,BKSD->BKRTS", readers, k, precision=n.precision)
        return decays.pairs[:, :, :, None] * products[:, :, None]
    levels = iter(decays.levels)

    def corner(a: Array, b: Array) -> Array:
        (_, since), (until, _) = (_halves(x) for x in next(levels))
        h = a.shape[-1]
        right = _halves(readers.reshape(*readers.shape[:3], -1, h, readers.shape[-1]))[1] * since[:, :, None]
        left = _halves(k.reshape(*k.shape[:2], -1, h, k.shape[-1]))[0] * until
        return jnp.einsum("BKRJTD,BKJSD->BKRJTS", right, left, precision=n.precision)

    pairs = _triangular(jnp.sum(readers * k[:, :, None], -1), corner)
    return decays.pairs[:, :, :, None] * pairs[:, :, None]


def chunk(S: Array, t: Tokens, n: Sizes) -> tuple[Array, Array | None]:
    """Returns the state after a chunk [B K G D V], and its output [B C H V]."""
    dot = functools.partial(jnp.einsum, precision=n.precision)
    k, v = _heads(t.k, n.K, n), _heads(t.v, n.K * n.G, n)
    U = v.reshape(v.shape[0], n.K, n.G, *v.shape[2:])
    with jax.named_scope("decays"):
        decays = _decays(t, n)
    readers = [k] if t.beta is not None else []
    readers += [_heads(t.q, n.K, n) * n.scale] if t.q is not None else []
    if readers:
        y = jnp.stack(readers, 2)
        with jax.named_scope("pairs"):
            pairs = _pairs(y, k, decays, n)
        with jax.named_scope("read"):
            read = dot("BKGRTD,BKGDV->BKGRTV", y[:, :, None] * decays.since[:, :, :, None], S)
    if t.beta is not None:
        with jax.named_scope("solve"):
            beta = _heads(t.beta, n.K * n.G, n).reshape(*U.shape[:4], 1)
            A = jnp.where(jnp.tri(n.C, k=-1, dtype=bool)[None, None, None], beta * pairs[:, :, :, 0], 0.0)
            U = _solve(A, beta * (U - read[:, :, :, 0]))
    out = None
    if t.q is not None:
        with jax.named_scope("out"):
            out = read[:, :, :, -1] + dot("BKGTS,BKGSV->BKGTV", pairs[:, :, :, -1], U)
            out = out.reshape(v.shape).swapaxes(1, 2)
    with jax.named_scope("write"):
        S = decays.since[:, :, :, -1, :, None] * S + dot("BKGSD,BKGSV->BKGDV", k[:, :, None] * decays.until, U)
    return S, out
