"""The algebra of partial attention: merging over any partition, in any order, equals attention over the union."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longattn.ops.partial import Affine, Partial, advance, chain, finish, logaddexp, merge

SHAPE, V, KEYS = (2, 3, 5), 7, 11
EMPTY = Partial(jnp.zeros((*SHAPE, V)), jnp.full(SHAPE, -jnp.inf))
jitted_merge = jax.jit(merge)


def softmax(logits, values):
    """A Partial by definition, in float64: logits [... S] with -inf where hidden, values [S V]."""
    total = np.exp(logits).sum(-1)
    out = np.exp(logits) @ values / np.where(total == 0, 1, total)[..., None]
    with np.errstate(divide="ignore"):
        return Partial(jnp.asarray(out, jnp.float32), jnp.asarray(np.log(total), jnp.float32))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0, 1), st.floats(0.1, 20), st.data())
def test_any_order_of_merges_is_the_whole(seed, hidden, spread, data):
    rng = np.random.default_rng(seed)
    logits = np.where(rng.random((*SHAPE, KEYS)) < hidden, -np.inf, spread * rng.standard_normal((*SHAPE, KEYS)))
    values = rng.standard_normal((KEYS, V))
    owner = rng.integers(0, 4, KEYS)  # parts may be empty
    parts = [softmax(logits[..., owner == i], values[owner == i]) for i in range(4)]
    order = data.draw(st.permutations(range(4)))
    left = functools.reduce(jitted_merge, [parts[i] for i in order])
    tree = jitted_merge(jitted_merge(parts[0], parts[1]), jitted_merge(parts[2], parts[3]))
    whole = softmax(logits, values)
    for merged in (left, tree):
        # float32 lse is known to |lse| eps, and so are the weights: 3 merges, and the parts' own rounding.
        eps = np.finfo(np.float32).eps * 8 * (1 + np.abs(np.where(np.isfinite(whole.lse), whole.lse, 0)).max())
        np.testing.assert_allclose(merged.lse, whole.lse, rtol=eps, atol=eps)
        np.testing.assert_allclose(merged.out, whole.out, rtol=eps, atol=eps * np.abs(values).max())


def random_partial(seed, empty=0.3):
    rng = np.random.default_rng(seed)
    lse = np.where(rng.random(SHAPE) < empty, -np.inf, rng.standard_normal(SHAPE))
    out = np.where(np.isinf(lse)[..., None], 0, rng.standard_normal((*SHAPE, V)))
    return Partial(jnp.asarray(out, jnp.float32), jnp.asarray(lse, jnp.float32))


def test_empty_is_the_unit_and_merge_commutes():
    a, b = random_partial(0), random_partial(1)
    for merged in (merge(a, EMPTY), merge(EMPTY, a)):
        np.testing.assert_array_equal(merged.out, a.out)
        np.testing.assert_array_equal(merged.lse, a.lse)
    for x, y in zip(merge(a, b), merge(b, a)):
        np.testing.assert_array_equal(x, y)


def naive(a, b):
    """Without any guard, for finite lse."""
    lse = jnp.log(jnp.exp(a.lse) + jnp.exp(b.lse))
    return Partial(jnp.exp(a.lse - lse)[..., None] * a.out + jnp.exp(b.lse - lse)[..., None] * b.out, lse)


def test_gradients():
    a, b = random_partial(0, empty=0.0), random_partial(1, empty=0.0)
    cotangents = random_partial(2, empty=0.0)
    for expected, got in zip(
        jax.tree.leaves(jax.vjp(naive, a, b)[1](cotangents)), jax.tree.leaves(jax.vjp(merge, a, b)[1](cotangents))
    ):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)  # of sums of V = 7 terms of order 1


@pytest.mark.parametrize("lost", [0.0, 3.0, np.inf, np.nan])
def test_gradients_at_minus_infinity(lost):
    """Where both are empty nothing flows, whatever the cotangent of lse; where one is, the other's gradient passes."""
    a, b = random_partial(0, empty=0.5), random_partial(1, empty=0.5)
    both = np.isneginf(a.lse) & np.isneginf(b.lse)
    only_b = np.isneginf(a.lse) & ~both
    assert both.any()
    assert only_b.any()
    cotangents = random_partial(2, empty=0.0)
    cotangents = cotangents._replace(lse=jnp.where(both, lost, cotangents.lse))
    da, db = jax.vjp(merge, a, b)[1](cotangents)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((da, db)))
    assert not np.any(da.lse[both])
    assert not np.any(db.lse[both])
    np.testing.assert_array_equal(da.out[only_b], jnp.zeros_like(da.out[only_b]))
    np.testing.assert_array_equal(db.out[only_b], cotangents.out[only_b])
    np.testing.assert_allclose(db.lse[only_b], cotangents.lse[only_b], rtol=1e-6, atol=1e-6)


def test_merge_has_second_derivatives():
    a, b = random_partial(0, empty=0.0), random_partial(1, empty=0.0)

    def second(f):
        return jax.grad(
            lambda a: sum(jnp.sum(x**2) for x in jax.tree.leaves(jax.grad(lambda a: jnp.sum(f(a, b).out))(a)))
        )

    for expected, got in zip(second(naive)(a), second(merge)(a)):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_finish():
    p, sinks = random_partial(0), jnp.asarray([0.5, -1.0, -jnp.inf, 2.0, 0.0])
    done = finish(p, sinks, jnp.bfloat16)
    assert done.out.dtype == jnp.bfloat16
    assert done.lse.dtype == jnp.float32
    sink = Partial(jnp.zeros((*SHAPE, V)), jnp.broadcast_to(sinks[None, None], SHAPE))  # a key with the value zero
    whole = merge(p, sink)
    np.testing.assert_allclose(done.lse, whole.lse, rtol=1e-6)
    np.testing.assert_array_equal(done.out, whole.out.astype(jnp.bfloat16))
    assert finish(p).out is p.out
    empty = finish(EMPTY, sinks)
    np.testing.assert_array_equal(empty.lse, sink.lse)
    np.testing.assert_array_equal(empty.out, sink.out)
    gradients = jax.grad(lambda p, s: jnp.sum(jnp.where(jnp.isfinite(finish(p, s).lse), finish(p, s).lse, 0)), (0, 1))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradients(p, sinks)))


def test_logaddexp_far_apart():
    a, b = jnp.array([1e30, -1e30, -jnp.inf, 0.0]), jnp.array([-1e30, -1e30, 5.0, jnp.inf * -1])
    np.testing.assert_array_equal(logaddexp(a, b), jnp.array([1e30, -1e30, 5.0, 0.0]))


@pytest.mark.parametrize("transition", [(1,), (5,), (5, 5)], ids=["a number", "a number per row", "a matrix"])
def test_chained_maps_are_maps_one_after_the_other(transition):
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.standard_normal((2, 3, *shape)), jnp.float32)
    a, b, c = (Affine(normal(*transition), normal(5, 7)) for _ in range(3))
    S = normal(5, 7)
    after = advance(advance(advance(S, a), b), c)
    for order in (chain(chain(a, b), c), chain(a, chain(b, c))):
        np.testing.assert_allclose(advance(S, order), after, rtol=1e-4, atol=1e-4)
    M = np.asarray(a.transition)
    matrix = M if len(transition) == 2 else np.eye(5) * M[..., None]
    np.testing.assert_allclose(advance(S, a), matrix @ np.asarray(S) + a.state, rtol=1e-5, atol=1e-5)
