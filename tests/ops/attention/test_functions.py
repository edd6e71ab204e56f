"""Masks whose functions read arrays from outside, traced ones too, as FlexAttention's users write them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import longattn
from longattn import mask as m
from longattn import parallel
from longattn.ops.attention import xla
from tests.ops.interpreter import as_on_tpu
from tests.slow import but_few

B, T, H, D = 2, 40, 2, 4
RNG = np.random.default_rng(0)
Q, K, V = (RNG.standard_normal((B, T, H, D)).astype(np.float32) for _ in range(3))
DOCUMENTS = np.cumsum(RNG.random(T) < 0.2).astype(np.int32)


def of_documents(table):
    return m.Fn(lambda q, k: jnp.where(table[q] == table[k], True, False)) & m.Causal()


def nested(table):
    return m.Not(m.Fn(lambda q, k: table[q] != table[k])) & m.Causal() | m.Fn(lambda q, k: k < table[0] + 2)


def grads(attend):
    return jax.grad(lambda q, k, v: jnp.sum(jnp.sin(attend(q, k, v))), (0, 1, 2))


def same(got, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, expected)


@pytest.mark.parametrize("rule", but_few([of_documents, nested]))
@pytest.mark.parametrize("name", ["xla", "reference"])
def test_what_is_traced_is_as_what_is_not(rule, name):
    tuning = xla.Tuning(16, 8) if name == "xla" else None

    def attend(table):
        return lambda q, k, v: longattn.attention(q, k, v, mask=rule(table), implementation=name, tuning=tuning)

    expected = grads(attend(jnp.asarray(DOCUMENTS)))(Q, K, V)
    same(jax.jit(lambda table, *x: grads(attend(table))(*x))(DOCUMENTS, Q, K, V), expected)
    same(jax.jit(lambda table, *x: attend(table)(*x))(DOCUMENTS, Q, K, V), attend(jnp.asarray(DOCUMENTS))(Q, K, V))
    remat = lambda table, *x: grads(jax.checkpoint(attend(table)))(*x)
    same(jax.jit(remat)(DOCUMENTS, Q, K, V), expected)


def test_a_mesh_refuses_with_the_remedy():
    mesh = parallel.make_mesh(seq=2, devices=jax.devices()[:2])
    with pytest.raises(
        NotImplementedError, match="reads a traced array.* segment_ids, positions, Prefix or BlockSparse"
    ):
        jax.jit(lambda table: parallel.attention(Q, K, V, mask=of_documents(table), mesh=mesh)).lower(DOCUMENTS)
    attend = lambda q, table: longattn.attention(q, q, q, mask=of_documents(table))
    over = jax.shard_map(attend, mesh=mesh, in_specs=(P(), P()), out_specs=P())
    same(jax.jit(over)(Q, DOCUMENTS), attend(Q, jnp.asarray(DOCUMENTS)))  # without a gradient it is served


def test_an_answer_with_axes_of_its_own_is_refused():
    @jax.jit
    def f(lengths):
        return longattn.attention(Q, K, V, mask=m.Fn(lambda q, k: k < lengths[:, None, None, None]))

    with pytest.raises(
        NotImplementedError, match=r"one pair of positions the shape \[2, 1, 1, 1\]: index it by position"
    ):
        f(np.array([3, 5]))


def test_kernels_refuse_with_the_reason():
    with as_on_tpu(), pytest.raises(NotImplementedError, match="a function of the mask reads a traced array"):
        jax.jit(lambda table: longattn.attention(Q, K, V, mask=of_documents(table), implementation="pallas_tpu")).lower(
            DOCUMENTS
        )
