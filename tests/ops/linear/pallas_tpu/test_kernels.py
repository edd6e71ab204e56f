"""Promises of the TPU kernels beside the contract, which compares their results: sizes, memory, parts of a chunk."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

import longattn
from longattn.ops.linear import pallas_tpu
from longattn.ops.linear.pallas_tpu import products, tuning, vector_decay
from longattn.ops.linear.pallas_tpu.cost import chunk_cost
from longattn.ops.linear.pallas_tpu.statics import Statics
from tests.ops import oracle
from tests.ops.interpreter import as_on_tpu


def equations(jaxpr):
    """Yields all equations, those of inner jaxprs included, but none inside kernels."""
    for equation in jaxpr.eqns:
        yield equation
        if equation.primitive.name != "pallas_call":
            for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


def shapes_of(T, H=4, D=64, V=32, dtype=jnp.bfloat16):
    array = jax.ShapeDtypeStruct
    return {
        "q": array((2, T, 1, D), dtype), "k": array((2, T, 1, D), dtype), "v": array((2, T, H, V), dtype),
        "log_decay": array((2, T, H), jnp.float32), "beta": array((2, T, H), jnp.float32),
    }  # fmt: skip


def traced(f, arrays):
    with as_on_tpu():
        return list(equations(jax.make_jaxpr(f)(arrays).jaxpr))


def attend(arrays):
    return longattn.linear_attention(**arrays, implementation="pallas_tpu")


def test_forward_alone_writes_no_states_and_one_per_512_tokens_are_kept_for_the_gradient():
    (kernel,) = [e for e in traced(attend, shapes_of(2100)) if e.primitive.name == "pallas_call"]
    assert sorted(x.aval.shape for x in kernel.outvars) == [(2, 4, 64, 32), (2, 4, 2100, 32)]
    found = traced(lambda arrays: jax.vjp(attend, arrays)[0], shapes_of(2100))
    (kept,) = [e.outvars[0].aval for e in found if e.primitive.name == "name"]
    assert kept.shape == (2, 4, 5, 64, 32) and kept.dtype == jnp.float32


@pytest.mark.parametrize("T", [1, 37, 2100])
def test_tokens_are_not_filled_up(T):
    """Only scalars per token and head are padded, whatever the length."""
    found = traced(lambda arrays: jax.vjp(attend, arrays)[1](jax.eval_shape(attend, arrays)), shapes_of(T))
    padded = [e.invars[0].aval.shape for e in found if e.primitive.name == "pad"]
    assert padded and set(padded) == {(2, 4, T)}
    repeated = [e.outvars[0].aval.shape for e in found if e.primitive.name == "broadcast_in_dim"]
    assert (2, 4, T, 64) not in repeated and (2, T, 4, 64) not in repeated


@pytest.mark.parametrize("given", [{"chunk": 48}, {"chunk": 512}, {"heads": 0}])
def test_tuning_is_validated(given):
    with pytest.raises(ValueError, match=f"self.{next(iter(given))}="):
        pallas_tpu.Tuning(**given)


def test_heads_of_a_program_share_whole_heads_or_parts_of_one():
    assert tuning.heads_of(8, (8, 8, 8), 8) == [8, 4, 2, 1]
    assert tuning.heads_of(8, (1, 1, 8), 4) == [4, 2, 1]
    assert tuning.heads_of(12, (2, 3, 12), 8) == [2, 1]
    assert tuning.heads_of(6, (3, 6, 2), 8) == [6, 1]


def test_every_core_has_as_many_programs_where_heads_allow_it(monkeypatch):
    problem = functools.partial(tuning.Problem, T=512, D=128, V=128, decay="scalar", delta=True, dtype=jnp.bfloat16)
    heads = lambda B, H, given=None: tuning.choose(problem(B, H, H, H, H), given).block_H
    assert [heads(1, 8), heads(2, 8), heads(1, 1)] == [8, 8, 1]
    monkeypatch.setattr(tuning, "_cores", lambda: 2)
    assert [heads(1, 8), heads(2, 8), heads(1, 1), heads(1, 8, pallas_tpu.Tuning(heads=8))] == [4, 8, 1, 8]


def test_sizes_that_do_not_fit_are_refused():
    array = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    x = array((1, 512, 1, 1024))
    with as_on_tpu(), pytest.raises(NotImplementedError, match="D=1024 and V=1024 do not fit the 56 MiB"):
        jax.eval_shape(functools.partial(longattn.linear_attention, implementation="pallas_tpu"), x, x, x)


def test_other_targets_are_refused():
    x = jnp.ones((1, 8, 1, 8))
    with pytest.raises(NotImplementedError, match="the kernels are for TPUs, the target is 'cpu'"):
        longattn.linear_attention(x, x, x, implementation="pallas_tpu")


# ---- the parts of a chunk, as plain functions


def lower(C):
    """Returns A of the delta rule, [2 C C], and (I + A)^-1 in float64."""
    rng = np.random.default_rng(0)
    k = rng.standard_normal((2, C, 32))
    k /= np.linalg.norm(k, axis=2, keepdims=True)
    a = np.tril(rng.uniform(0, 1, (2, C, 1)) * (k @ k.swapaxes(1, 2)), -1).astype(np.float32)
    return a, np.linalg.inv(np.eye(C) + a.astype(np.float64))


@pytest.mark.parametrize("C", [16, 256])
def test_inverse_and_its_gradient(C):
    (a, exact), ct = lower(C), np.random.default_rng(1).standard_normal((2, C, C)).astype(np.float32)
    x, pull = jax.vjp(lambda a: products.inverse(a, None, jnp.dtype(jnp.float32)), jnp.asarray(a))
    plain = np.linalg.inv(np.eye(C, dtype=np.float32) + a)
    results = [{"x": x, "da": -(x.mT @ ct.astype(x.dtype)) @ x.mT} for x in (exact, plain)]
    oracle.assert_accurate({"x": np.asarray(x), "da": np.asarray(pull(jnp.asarray(ct))[0])}, *results, np.float32)
    np.testing.assert_array_equal(np.triu(x, 1), np.zeros_like(x))


@pytest.mark.parametrize("C", [16, 256])
def test_inverse_in_bfloat16_is_no_worse_than_of_a_matrix_given_to_17_bits(C):
    a, exact = lower(C)
    given = a * (1 + 2.0**-17 * np.random.default_rng(1).choice([-1, 1], a.shape))
    allowed = np.linalg.norm(np.linalg.inv(np.eye(C) + given) - exact)
    x = products.inverse(jnp.asarray(a), None, jnp.dtype(jnp.bfloat16))
    assert np.linalg.norm(x - exact) < allowed
    np.testing.assert_array_equal(np.triu(x, 1), np.zeros_like(x))


@pytest.mark.parametrize("pieces", [(1, 1), (2, 2)])
def test_products_of_pieces(pieces):
    """An operand in two bfloat16 pieces leaves out 2^-17 of it, in one piece 2^-9."""
    a, b = (jnp.asarray(np.random.default_rng(i).standard_normal((1, 64, 64)), jnp.float32) for i in range(2))
    exact = np.asarray(a, np.float64)[0] @ np.asarray(b, np.float64)[0]
    error = np.linalg.norm(products.dot(a, b, "NN", jnp.dtype(jnp.bfloat16), pieces)[0] - exact) / np.linalg.norm(exact)
    most = 2.0**-8 if pieces == (1, 1) else 2.0**-16
    assert most / 64 < error < most


@pytest.mark.parametrize("C", [16, 128])
def test_levels_are_sums_between_tokens(C):
    """Every pair's exponents add up to the sum over (j, i], for decays from 0 to -30, and so do gradients."""
    rng, heights = np.random.default_rng(0), [2**b for b in range(C.bit_length() - 1)]
    g = np.where(rng.random((1, C, 3)) < 0.5, 0.0, -30 * rng.random((1, C, 3)) ** 4).astype(np.float32)
    cts = rng.standard_normal((len(heights) + 2, *g.shape)).astype(np.float32)

    def kernel(g, cts, found, gradient):
        (levels, before, after), pull = jax.vjp(lambda g: vector_decay.exponents(g, jnp.float32), g[...])
        for i, x in enumerate([*levels, before, after]):
            found[i] = x
        (gradient[...],) = pull(([cts[i] for i in range(len(heights))], cts[-2], cts[-1]))

    with as_on_tpu():
        shapes = [jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in (cts, g)]
        found, gradient = map(np.asarray, pl.pallas_call(kernel, out_shape=shapes)(g, cts))
    t, u = np.indices((C, C))  # a token, and one of those that it sums
    sums = [np.where(t & h, u <= t, u > t) & (t // h == u // h) for h in heights] + [u <= t, u > t]
    expected = np.einsum("xtu,xbtd->bud", np.stack(sums).astype(np.float64), cts)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-5)
    found = found / np.log2(np.e)
    *levels, before, after = found[:, 0]
    total = np.cumsum(g[0], 0, dtype=np.float64)
    i, j = np.tril_indices(C, -1)
    for h, exponent in zip(heights, levels):
        here = np.floor(np.log2(i ^ j)) == np.log2(h)
        between = total[i[here]] - total[j[here]]
        np.testing.assert_allclose(exponent[i[here]] + exponent[j[here]], between, rtol=1e-5, atol=1e-9)
        assert (exponent <= 0).all()
    np.testing.assert_allclose(before, total, rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(after, total[-1:] - total, rtol=1e-5, atol=1e-9)


def product_flops(jaxpr):
    """Returns the FLOPs of all products, with those of loops as often as they run."""
    total = 0
    for e in jaxpr.eqns:
        if e.primitive.name == "dot_general":
            (summed, _), _ = e.params["dimension_numbers"]
            total += 2 * e.outvars[0].aval.size * np.prod([e.invars[0].aval.shape[i] for i in summed], dtype=int)
        inner = [x for x in jax.tree.leaves(e.params, is_leaf=lambda x: hasattr(x, "eqns")) if hasattr(x, "eqns")]
        total += e.params.get("length", 1) * sum(map(product_flops, inner))
    return total


@pytest.mark.parametrize("kind", ["none", "scalar", "vector", "scalar_delta", "vector_delta"])
def test_xla_is_told_the_products_of_a_kernels_own_equations(kind):
    """There are 3 spans, the last one not full, and two programs for each of two sequences."""
    arrays = shapes_of(1100, H=16)
    if "delta" not in kind:
        del arrays["beta"]
    if kind == "none":
        del arrays["log_decay"]
    if "vector" in kind:
        arrays["log_decay"] = jax.ShapeDtypeStruct((2, 1100, 16, 64), jnp.float32)
    found = traced(lambda arrays: jax.vjp(attend, arrays)[1](jax.eval_shape(attend, arrays)), arrays)
    kernels = {e.params["name"]: e for e in found if e.primitive.name == "pallas_call"}
    told = {name.removeprefix("longattn_linear_"): e.params["cost_estimate"] for name, e in kernels.items()}
    forward = kernels["longattn_linear_forward"].params
    assert told["forward"].flops == 2 * 2 * 3 * product_flops(forward["jaxpr"]) > 0
    # The gradient of a product is two products; with the delta rule the inverse is not computed again for it.
    assert told["backward"].flops > (2 if "delta" not in kind else 1) * told["forward"].flops


def test_products_of_a_chunk_by_hand():
    """Without decay: q k^T, its product with v, q S with a state in two pieces, k^T v. A fold has the last alone."""
    C, D, V = 32, 48, 16
    n = Statics(C, "none", False, jnp.bfloat16, 1.0)
    assert chunk_cost(n, D, V, "out") == (2 * (C * C * D + C * C * V + 3 * C * D * V), 0)
    assert chunk_cost(n, D, V, "state") == chunk_cost(n, D, V, "pull") == (2 * C * D * V, 0)
    n = Statics(C, "none", False, jnp.float32, 1.0)
    assert chunk_cost(n, D, V, "out") == (2 * (C * C * D + C * C * V + 2 * C * D * V), 0)
