"""The reference against a loop over queries, against numerical derivatives, and in jvp and second order."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.test_util import check_grads

import longattn
from longattn import mask as m

B, T, S, H, K, D, V = 1, 3, 5, 4, 2, 3, 2
attend = functools.partial(longattn.attention_with_lse, implementation="reference")


def inputs():
    rng = np.random.default_rng(0)
    shapes = {"q": (B, T, H, D), "k": (B, S, K, D), "v": (B, S, K, V), "bias": (H, 1, S), "sinks": (H,)}
    return {name: rng.standard_normal(shape) for name, shape in shapes.items()}


def test_loop():
    """Softmax by its definition, one query at a time."""
    x = inputs()
    mask = m.Window(2, 1)
    with jax.enable_x64(True):
        out, lse = attend(**x, mask=mask, softcap=2.0, scale=0.9)
    for t in range(T):
        for h in range(H):
            seen = [s for s in range(S) if -1 <= t - s <= 2]
            logits = {}
            for s in seen:
                dot = 0.9 * float(x["q"][0, t, h] @ x["k"][0, s, h // 2])
                logits[s] = 2.0 * math.tanh(dot / 2.0) + x["bias"][h, 0, s]
            total = sum(math.exp(z) for z in logits.values()) + math.exp(x["sinks"][h])
            value = sum(math.exp(z) / total * x["v"][0, s, h // 2] for s, z in logits.items())
            np.testing.assert_allclose(out[0, t, h], value, rtol=1e-13)
            np.testing.assert_allclose(lse[0, t, h], math.log(total), rtol=1e-13)


def test_derivatives_of_first_and_second_order():
    x = inputs()
    mask = m.Causal() & ~m.Prefix(1)  # leaves the first query without a key
    names = list(x)

    def f(*arrays):
        out, lse = attend(**dict(zip(names, arrays)), mask=mask, softcap=2.0)
        return out, lse

    with jax.enable_x64(True):
        arrays = tuple(jnp.asarray(x[name]) for name in names)
        check_grads(f, arrays, order=1, modes=("fwd",), rtol=1e-6, atol=1e-6)
        check_grads(jax.jit(f), arrays, order=2, modes=("rev",), rtol=1e-6, atol=1e-6)


def test_empty_rows_without_sinks_in_second_order():
    x = inputs()
    q, k, v = (jnp.asarray(x[name], jnp.float32) for name in "qkv")

    def loss(q, k, v):
        out, lse = attend(q, k, v, mask=m.Causal() & ~m.Prefix(2))
        return jnp.sum(out**2) + jnp.sum(jnp.where(jnp.isfinite(lse), lse, 0) ** 2)

    second = jax.jit(jax.grad(lambda *x: sum(jnp.sum(g**2) for g in jax.grad(loss, (0, 1, 2))(*x)), (0, 1, 2)))(q, k, v)
    assert all(np.isfinite(g).all() for g in second)
    np.testing.assert_array_equal(second[0][:, :2], jnp.zeros((B, 2, H, D)))
