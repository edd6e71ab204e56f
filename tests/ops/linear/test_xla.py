"""Promises of the chunked back end alone: linear memory, few saved states, and no copies for shared heads."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

import longattn
from longattn.ops.linear import xla
from longattn.ops.linear.contract import Arrays, Options
from tests.ops.contract.test_linear import equations
from tests.slow import but_few

H, D = 2, 16


def arguments(T, kind):
    x, scalar = jax.ShapeDtypeStruct((1, T, H, D), jnp.float32), jax.ShapeDtypeStruct((1, T, H), jnp.float32)
    decays = {"scalar": {"log_decay": scalar}, "vector": {"log_decay": x}}
    return {"q": x, "k": x, "v": x} | decays[kind] | {"beta": scalar}


def loss(given):
    out, S = longattn.linear_attention(**given, implementation="xla", tuning=xla.Tuning(16))
    return jnp.sum(out**2) + jnp.sum(S)


@pytest.mark.parametrize("kind", but_few(["scalar", "vector"]))
def test_memory_is_linear_in_length(kind):
    """Memory of forward and backward pass."""

    def temporary_bytes(T):
        return jax.jit(jax.grad(loss)).lower(arguments(T, kind)).compile().memory_analysis().temp_size_in_bytes

    small, large = temporary_bytes(2048), temporary_bytes(4096)
    assert large <= 2 * small
    assert large < 12 * 4 * 4096 * H * D  # of a few arrays as large as q; a state per token would be D of them


SPANS = [(1, 64, 1), (256, 64, 1), (257, 64, 2), (2048, 64, 8), (2048, 512, 4)]


@pytest.mark.parametrize(("T", "chunk", "states"), SPANS)
def test_a_state_is_saved_per_span_or_per_longer_chunk(T, chunk, states):
    given = arguments(T, "vector")
    x = Arrays(**given)
    plan = xla.check(x, Options(1.0, "float32", xla.Tuning(chunk)))
    saved = jax.eval_shape(lambda x: xla._forward(x, plan)[2], x)
    assert saved.shape == (states, 1, H, 1, D, D)


@pytest.mark.parametrize(("Hq", "Hk", "products"), [(1, 1, 1), (2, 2, 2), (2, 3, 6), (6, 1, 6)])
def test_products_of_shared_heads_are_computed_once(Hq, Hk, products):
    q, k, v, decay = (jnp.zeros((1, 8, heads, 4)) for heads in (Hq, Hk, 6, 6))
    plan = lambda log_decay: xla.check(Arrays(q, k, v, log_decay), Options(1.0, "float32"))
    assert plan(decay[..., 0]).sizes[:2] == (products, 6 // products)
    assert plan(decay).sizes[:2] == (6, 1)


def test_shared_heads_are_nowhere_repeated_along_the_sequence():
    """Forward and backward, with heads as in Mamba-2: no array is as large as keys repeated for half of the heads."""
    T, heads, size = 4096, 8, 64
    shape = lambda *sizes: jax.ShapeDtypeStruct((1, T, *sizes), jnp.float32)
    given = {"q": shape(1, size), "k": shape(1, size), "v": shape(heads, 8), "log_decay": shape(heads)}
    found = equations(jax.make_jaxpr(jax.grad(loss))(given).jaxpr)
    largest = max(x.aval.size for equation in found for x in equation.outvars)
    assert T * size <= largest < T * size * heads / 2
