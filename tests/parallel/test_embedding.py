"""Rows of a sliced embedding: those of the whole one, and their gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longattn.parallel import embedding
from longattn.parallel.mesh import make_mesh


@pytest.mark.parametrize("sizes", [(2, 1, 1, 4), (1, 2, 2, 2), (2, 4, 1, 1), (8, 1, 1, 1)])
def test_rows_and_their_gradient_are_those_of_the_whole_table(sizes):
    mesh = make_mesh(*sizes)
    W, E, B, T = 11, 16, 8, 12
    rng = np.random.default_rng(0)
    table = jnp.asarray(rng.normal(size=(W, E)), jnp.float32)
    tokens = jnp.asarray(rng.integers(0, W, (B, T)), jnp.int32)
    cotangent = jnp.asarray(rng.normal(size=(B, T, E)), jnp.bfloat16)
    spec = jax.P(("data", "fsdp"), "seq")

    def sliced(table):
        return embedding.rows(table, tokens, mesh, spec, 3.0, jnp.bfloat16)

    def whole(table):
        return (3.0 * jnp.take(table, tokens, axis=0)).astype(jnp.bfloat16)

    out, pull = jax.vjp(jax.jit(sliced), table)
    expected, expected_pull = jax.vjp(whole, table)
    assert out.sharding.is_equivalent_to(jax.NamedSharding(mesh, spec), 3)
    np.testing.assert_array_equal(out, expected)
    # The same sums of float32, in another order.
    np.testing.assert_allclose(pull(cotangent)[0], expected_pull(cotangent)[0], rtol=1e-5, atol=1e-5)
    gathered = [
        line for line in jax.jit(sliced).lower(table).compile().as_text().splitlines() if " all-gather(" in line
    ]
    assert not any("f32[" in line.partition(" all-gather(")[0] for line in gathered)  # ids alone, never the table
