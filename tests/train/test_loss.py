"""Tests of longattn.train.loss against dense cross-entropy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longattn.train.loss import cross_entropy, labels_and_weights
from tests.slow import but_few


def dense(x, w, labels, weights, z_loss):
    """The definition, with all logits at once."""
    logits = jnp.einsum("BTE,WE->BTW", x.astype(jnp.float32), w.astype(jnp.float32))
    log_partition = jax.nn.logsumexp(logits, -1)
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], -1)[..., 0]
    return jnp.sum(weights * (nll + z_loss * log_partition**2)), nll


def inputs(B, T, E, W, dtype=jnp.float32, seed=0):
    k = jax.random.split(jax.random.key(seed), 4)
    x = jax.random.normal(k[0], (B, T, E), dtype)
    w = 0.3 * jax.random.normal(k[1], (W, E), jnp.float32)
    weights = jnp.where(jax.random.bernoulli(k[3], 0.7, (B, T)), 1.5, 0.0)
    return x, w, jax.random.randint(k[2], (B, T), 0, W, jnp.int32), weights


@pytest.mark.parametrize("z_loss", but_few([1e-2, 0.0]))
@pytest.mark.parametrize("chunk", but_few([14, 1, 1000, 22, 3, 6], 3))  # remainders, below B, all at once, a divisor
def test_equals_dense_with_every_gradient(chunk, z_loss):
    x, w, labels, weights = inputs(2, 11, 7, 13)

    def ours(x, w, weights):
        loss, aux = cross_entropy(x, w, labels, weights, chunk=chunk, z_loss=z_loss)
        return 0.37 * loss, aux  # a cotangent other than 1

    def theirs(x, w, weights):
        loss, nll = dense(x, w, labels, weights, z_loss)
        return 0.37 * loss, nll

    (loss, aux), grads = jax.jit(jax.value_and_grad(ours, (0, 1, 2), has_aux=True))(x, w, weights)
    (expected, nll), expected_grads = jax.value_and_grad(theirs, (0, 1, 2), has_aux=True)(x, w, weights)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    np.testing.assert_allclose(aux["nll"], nll, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(aux["nll_sum"], jnp.sum(weights * nll), rtol=1e-6)
    assert aux["weight_sum"] == jnp.sum(weights)
    for got, want in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-6)
    plain, aux = jax.jit(lambda: cross_entropy(x, w, labels, weights, chunk=chunk, z_loss=z_loss))()
    np.testing.assert_allclose(0.37 * plain, loss, rtol=1e-6)  # the path without gradients
    np.testing.assert_allclose(aux["nll"], nll, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("label", [-100, -1, 13, 2**31 - 1])
def test_a_label_that_is_none_counts_only_with_a_weight(label):
    x, w, labels, weights = inputs(2, 5, 7, 13)
    weights = jnp.ones_like(weights).at[1, 2].set(0.0)
    run = jax.jit(
        jax.value_and_grad(lambda x, w, labels, weights: cross_entropy(x, w, labels, weights, chunk=4)[0], (0, 1))
    )
    expected = run(x, w, labels, weights)
    labels = labels.at[1, 2].set(label)
    jax.tree.map(np.testing.assert_array_equal, run(x, w, labels, weights), expected)
    assert np.isnan(run(x, w, labels, weights.at[1, 2].set(0.5))[0])


def test_aux_carries_no_gradient():
    x, w, labels, weights = inputs(2, 5, 4, 6)
    grad = jax.grad(lambda x: cross_entropy(x, w, labels, weights, chunk=4)[1]["nll_sum"])(x)
    np.testing.assert_array_equal(grad, 0)


def test_bfloat16_error_is_at_most_twice_that_of_plain_bfloat16():
    x, w, labels, weights = inputs(2, 64, 32, 50, jnp.bfloat16)

    def plain(x, w):
        logits = jnp.einsum("BTE,WE->BTW", x, w.astype(x.dtype)).astype(jnp.float32)
        return -jnp.sum(weights * jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], -1)[..., 0])

    exact = jax.grad(lambda x, w: dense(x, w, labels, weights, 0.0)[0], (0, 1))(x.astype(jnp.float32), w)
    ours = jax.grad(lambda x, w: cross_entropy(x, w, labels, weights, chunk=20)[0], (0, 1))(x, w)
    theirs = jax.grad(plain, (0, 1))(x, w)
    assert [g.dtype for g in ours] == [jnp.bfloat16, jnp.float32]
    for got, base, want in zip(ours, theirs, exact, strict=True):
        error, allowed = (np.linalg.norm(np.asarray(a, np.float32) - want) for a in (got, base))
        assert error <= 2 * allowed


def test_extreme_logits_stay_finite():
    x, w, labels, weights = inputs(1, 6, 4, 5)
    loss, grads = jax.value_and_grad(lambda x: cross_entropy(1e4 * x, w, labels, weights, chunk=2)[0])(x)
    assert np.isfinite(loss)
    assert np.isfinite(grads).all()


def buffers(jaxpr, found=None):
    """Yields the size in elements of every intermediate of a jaxpr, nested ones included."""
    found = set() if found is None else found
    for equation in jaxpr.eqns:
        found |= {int(np.prod(v.aval.shape)) for v in equation.outvars}
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                buffers(inner, found)
    return found


def test_logits_never_exist_at_once():
    """The traced gradient has no such intermediate, and the compiled one no such memory."""
    B, T, E, W, chunk = 2, 2048, 16, 1024, 256
    x, w, labels, weights = inputs(B, T, E, W)

    def temp(f):
        traced = jax.jit(jax.value_and_grad(f, (0, 1))).trace(x, w)
        return max(buffers(traced.jaxpr.jaxpr)), traced.lower().compile().memory_analysis().temp_size_in_bytes

    largest, memory = temp(lambda x, w: cross_entropy(x, w, labels, weights, chunk=chunk)[0])
    assert largest == chunk * W
    assert memory < 4 * 4 * chunk * W  # a few chunks of float32 logits
    largest, memory = temp(lambda x, w: dense(x, w, labels, weights, 0.0)[0])
    assert largest == B * T * W  # both measures see them where they exist
    assert memory >= 4 * B * T * W


def test_in_shard_map_the_head_gradient_is_summed():
    x, w, labels, weights = inputs(4, 6, 5, 7)
    mesh = jax.make_mesh((2, 2), ("data", "seq"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    spec = jax.P("data", "seq")

    @jax.shard_map(mesh=mesh, in_specs=(spec, jax.P(), spec, spec), out_specs=jax.P())
    def sharded(x, w, labels, weights):
        return jax.lax.psum(cross_entropy(x, w, labels, weights, chunk=2)[0], ("data", "seq"))

    got = jax.jit(jax.value_and_grad(sharded, (0, 1)))(x, w, labels, weights)
    want = jax.value_and_grad(lambda x, w: dense(x, w, labels, weights, 0.0)[0], (0, 1))(x, w)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, want)


def test_labels_stop_at_segments_and_position_jumps():
    tokens = jnp.array([[5, 6, 7, 8, 9, 0, 0]], jnp.int32)
    positions = jnp.array([[0, 1, 2, 0, 1, 0, 0]], jnp.int32)
    segments = jnp.array([[1, 1, 1, 2, 2, 0, 0]], jnp.int32)
    weights = jnp.array([[0, 1, 0.5, 1, 2, 0, 0]])
    labels, label_weights = labels_and_weights(tokens, positions, segments, weights)
    np.testing.assert_array_equal(labels, [[6, 7, 0, 9, 0, 0, 0]])
    np.testing.assert_array_equal(label_weights, [[1, 0.5, 0, 2, 0, 0, 0]])
    labels, label_weights = labels_and_weights(tokens, positions, jnp.ones_like(tokens), weights)
    np.testing.assert_array_equal(label_weights, [[1, 0.5, 0, 2, 0, 0, 0]])  # positions alone separate too
    labels, label_weights = labels_and_weights(tokens, None, None, weights)
    np.testing.assert_array_equal(labels, [[6, 7, 8, 9, 0, 0, 0]])
    np.testing.assert_array_equal(label_weights, [[1, 0.5, 1, 2, 0, 0, 0]])


@pytest.mark.parametrize(
    ("change", "message"),
    [({"w": (13, 8)}, "same E"), ({"labels": (2, 10)}, "labels.shape"), ({"weights": (11,)}, "weights.shape")],
)
def test_bad_shapes(change, message):
    x, w, labels, weights = inputs(2, 11, 7, 13)
    arguments = {"x": x, "w": w, "labels": labels, "weights": weights}
    arguments |= {k: jnp.zeros(s, arguments[k].dtype) for k, s in change.items()}
    with pytest.raises(ValueError, match=message):
        cross_entropy(*arguments.values(), chunk=4)
    with pytest.raises(ValueError, match="chunk=0"):
        cross_entropy(x, w, labels, weights, chunk=0)
