"""The XLA back end takes linear memory and computes no tile in which nothing is visible."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import longattn
from longattn import mask as m
from longattn.ops.attention import xla
from longattn.ops.attention.contract import Options
from longattn.ops.attention.xla import forward, logits, tiling
from tests.ops import oracle
from tests.slow import but_few

H, D = 2, 16


def loss(q, k, v, mask):
    out, lse = longattn.attention_with_lse(q, k, v, mask=mask, implementation="xla")
    return jnp.sum(out**2) + jnp.sum(lse)


def temporary_bytes(T, mask):
    x = jax.ShapeDtypeStruct((1, T, H, D), jnp.float32)
    f = jax.jit(jax.grad(functools.partial(loss, mask=mask), (0, 1, 2)))
    return f.lower(x, x, x).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("mask", but_few([m.Causal(), m.Window(64)]), ids=str)
def test_memory_is_linear_in_length(mask):
    """Forward and backward. From 4096 on the tiles have their full size."""
    small, large = temporary_bytes(4096, mask), temporary_bytes(8192, mask)
    assert large <= 2 * small
    assert large < 8192 * 8192 * 4 * H / 8  # far below one [B H T S] matrix


@pytest.mark.parametrize(
    ("mask", "reach"),
    but_few([(m.Window(31), 32), (m.Causal() & m.Chunked(64), 64), (m.Causal() & ~m.Prefix(64), 0)]),
    ids=str,
)
def test_empty_tiles_are_never_computed(mask, reach):
    """Their keys hold NaN, which even a weight of zero would spread."""
    T, poisoned, tuning = 256, 64, xla.Tuning(16, 16)
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((1, T, H, D)), jnp.float32) for _ in range(3))
    poison = jnp.where(jnp.arange(T) < poisoned, jnp.nan, 0.0)[None, :, None, None]
    attend = functools.partial(longattn.attention_with_lse, mask=mask, implementation="xla", tuning=tuning)
    (out, lse), pull = jax.vjp(attend, q, k + poison, v + poison)
    clean = poisoned + reach  # queries from here on see no tile with NaN
    loud = jnp.where(jnp.isnan(poison), 1e18, 0.0)  # beyond SAFE like NaN: the same of the two loops runs
    expected, expected_lse = attend(q, k + loud, v)
    np.testing.assert_array_equal(out[:, clean:], expected[:, clean:])
    np.testing.assert_array_equal(lse[:, clean:], expected_lse[:, clean:])
    dq, _, _ = pull((jnp.ones_like(out), jnp.ones_like(lse)))
    assert np.isfinite(dq[:, clean:]).all()


def test_segments_skip_tiles_too():
    T, tuning = 128, xla.Tuning(16, 16)
    ids = jnp.asarray(np.arange(T) // 32 % 3, jnp.int32)[None]  # documents 0 1 2 0
    x = jnp.ones((1, T, H, D))
    v = x.at[:, 32:64].set(jnp.nan)  # document 1
    out = longattn.attention(x, x, v, mask=m.Full(), segment_ids=ids, implementation="xla", tuning=tuning)
    assert np.isnan(out[:, 32:64]).all()
    np.testing.assert_allclose(out[:, :32], 1.0, rtol=1e-6)
    np.testing.assert_allclose(out[:, 64:], 1.0, rtol=1e-6)


@pytest.mark.slow
def test_tuning_changes_the_result_by_rounding_only():
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((1, 100, H, D)), jnp.float32) for _ in range(3))
    one, other = (
        longattn.attention(q, k, v, implementation="xla", tuning=tuning)
        for tuning in (xla.Tuning(7, 13), xla.Tuning(64, 32))
    )
    np.testing.assert_allclose(one, other, rtol=0, atol=32 * np.finfo(np.float32).eps)  # weights sum to 1, |v| < 4


def test_tuning_errors():
    with pytest.raises(ValueError, match="sizes of at least 1"):
        xla.Tuning(0, 16)


@pytest.mark.slow
@pytest.mark.parametrize("mask", but_few([m.Causal(), m.Causal() & m.Window(40), m.Causal() & ~m.Window(40)]), ids=str)
def test_tiles_with_and_without_a_maximum_meet_in_one_call(mask):
    """Queries of every second tile are long, so that logits reach 500 there and stay below SAFE elsewhere."""
    T, tuning = 160, xla.Tuning(16, 32)
    rng = np.random.default_rng(1)
    q, k, v = (rng.standard_normal((1, T, H, D)).astype(np.float32) for _ in range(3))
    q *= np.where(np.arange(T) // 16 % 2, 100.0, 1.0).astype(np.float32)[None, :, None, None]
    small = np.asarray(forward.is_small(*_tiled(q, k, tuning)))
    assert small.any() and not small.all()
    segment_ids = jnp.asarray(np.arange(T, dtype=np.int32) // 70)[None]
    positions = np.arange(T, dtype=np.int32)
    same = np.asarray(segment_ids[0, :, None] == segment_ids)
    visible = np.asarray(mask(positions[:, None], positions[None])) & same
    do, dlse = rng.standard_normal(q.shape), rng.standard_normal(q.shape[:3])
    truth, plain = (
        oracle.attention(q, k, v, visible[None, None], scale=D**-0.5, do=do, dlse=dlse, dtype=dtype)
        for dtype in (np.float64, np.float32)
    )
    attend = functools.partial(
        longattn.attention_with_lse, mask=mask, segment_ids=segment_ids, implementation="xla", tuning=tuning
    )
    (out, lse), pull = jax.vjp(attend, *map(jnp.asarray, (q, k, v)))
    grads = pull((jnp.asarray(do, jnp.float32), jnp.asarray(dlse, jnp.float32)))
    got = dict(zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *grads)))
    oracle.assert_accurate(got, {n: truth[n] for n in got}, {n: plain[n] for n in got}, np.float32)


def _tiled(q, k, tuning):
    """Returns the tiles of queries and keys of one call, its layout and its options."""
    q, k = jnp.asarray(q), jnp.asarray(k)
    options = Options(scale=D**-0.5, softcap=None, out_dtype="float32", in_order=True, tuning=tuning)
    n = tiling.make_layout(q, k, k, options)
    return tiling.query_tiles(logits.scaled(q, n, options), n), tiling.key_tiles(k, n), n, options


def test_second_order_names_the_reference():
    q = jnp.ones((1, 8, H, D))
    with pytest.raises(NotImplementedError, match="implementation='reference'"):
        jax.grad(lambda q: jnp.sum(jax.grad(loss)(q, q, q, m.Causal())))(q)


def test_exp():
    """The CPU's own exp: relative error of a few units in the last place down to the smallest normal numbers."""
    x = np.concatenate([np.linspace(-87, forward.SAFE, 20001), [-88.5, -100, -1e30, -np.inf]]).astype(np.float32)
    got, truth = np.asarray(jax.jit(logits.exp)(x), np.float64), np.exp(x.astype(np.float64))
    normal = x > -87
    error = np.abs(got - truth)[normal] / truth[normal]
    assert error.max() < 1e-5  # x log2(e) is rounded once, at up to 126: 2**-24 * 126 * ln 2
    assert (error[np.abs(x[normal]) < 20]).max() < 2e-6
    assert not got[x < -88.4].any()
