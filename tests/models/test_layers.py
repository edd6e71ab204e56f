"""Tests of longattn.models.layers."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longattn.config import Model, RoPE
from longattn.models.layers import RMSNorm, SwiGLU, rope_frequencies, rope_temperature, rotate, swiglu


def test_rmsnorm():
    x = jax.random.normal(jax.random.key(0), (2, 5, 7)) * 3
    scale = jnp.arange(1.0, 8.0)
    got = RMSNorm(1e-6).apply({"params": {"scale": scale}}, x)
    want = np.asarray(x) / np.sqrt(np.mean(np.asarray(x) ** 2, -1, keepdims=True)) * np.arange(1, 8)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    halves = np.asarray(x, np.float64)[..., :6].reshape(2, 5, 2, 3)
    halves /= np.sqrt(np.mean(halves**2, -1, keepdims=True))
    grouped = RMSNorm(1e-6, 2).apply({"params": {"scale": scale[:6]}}, x[..., :6])
    np.testing.assert_allclose(grouped, halves.reshape(2, 5, 6) * np.arange(1, 7), rtol=1e-5)
    half = RMSNorm(1e-6).apply({"params": {"scale": scale}}, x.astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), want, rtol=2e-2)


def test_plain_and_linear_frequencies():
    np.testing.assert_allclose(rope_frequencies(RoPE(base=100.0), 8), [1, 100**-0.25, 0.1, 100**-0.75])
    np.testing.assert_allclose(rope_frequencies(RoPE(base=100.0, scaling="linear", factor=4.0), 4), [0.25, 0.025])
    assert rope_temperature(None) == rope_temperature(RoPE(scaling="linear", factor=4.0)) == 1


# D 128, base 10^4, L 4096, s 16: pair i turns 4096 / (2 pi 10^(i / 16)) times, 32 at i = 20.94, 1 at i = 45.03.
# The attention factor 0.1 ln 16 + 1 = 1.277259 multiplies q and k, so the logits get its square, 1.631390.
YARN = RoPE(scaling="yarn", factor=16.0, original_T=4096)


@pytest.mark.parametrize(
    ("rope", "share"),
    [
        (YARN, (46 - 32) / (46 - 20)),
        (dataclasses.replace(YARN, truncate=False), (45.026881 - 32) / (45.026881 - 20.944482)),
        # what version 3 called yarn: i = 32 turns 6.5190 times
        (dataclasses.replace(YARN, scaling="llama3", high_freq_factor=32.0, attention_factor=1.277259), 5.5190 / 31),
    ],
    ids=["truncate", "exact", "turns"],
)
def test_yarn_by_hand(rope, share):
    """Pairs up to 20 keep their frequency, those from 46 on have it divided, pair 32 keeps a share of 0.01."""
    got, plain = rope_frequencies(rope, 128), rope_frequencies(RoPE(), 128)
    np.testing.assert_allclose(got[:21], plain[:21], rtol=1e-12)
    np.testing.assert_allclose(got[46:], plain[46:] / 16, rtol=1e-12)
    np.testing.assert_allclose(got[32], 0.01 * (share + (1 - share) / 16), rtol=1e-5)
    np.testing.assert_allclose(rope_temperature(rope), 1.631390, rtol=1e-6)


def test_rotation_by_hand():
    x = jax.random.normal(jax.random.key(0), (1, 3, 2, 6))
    positions = jnp.array([[0, 7, 4000]], jnp.int32)
    frequencies = rope_frequencies(RoPE(), 6)
    got = rotate(x, positions, frequencies)
    for t, p in enumerate([0, 7, 4000]):
        for i, f in enumerate(frequencies):
            c, s = math.cos(p * f), math.sin(p * f)
            a, b = np.asarray(x[0, t, :, i], np.float64), np.asarray(x[0, t, :, i + 3], np.float64)
            np.testing.assert_allclose(got[0, t, :, i], a * c - b * s, atol=1e-5)
            np.testing.assert_allclose(got[0, t, :, i + 3], b * c + a * s, atol=1e-5)
    np.testing.assert_array_equal(
        rotate(x, None, frequencies), rotate(x, jnp.arange(3, dtype=jnp.int32)[None], frequencies)
    )


@pytest.mark.parametrize("shift", [1, 1_000_003, 2**30])
def test_logits_depend_on_differences_of_positions_only(shift):
    """Also a billion tokens in, where the float32 product position * frequency would keep no useful digit."""
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 5, 2, 16))
    near = jnp.array([[3, 900, 17, 2, 4000]], jnp.int32)
    frequencies = rope_frequencies(RoPE(base=500_000.0), 16)

    def logits(positions):
        return jnp.einsum("BTHD,BSHD->BHTS", *(rotate(x, positions, frequencies) for x in (q, k)), precision="highest")

    np.testing.assert_allclose(logits(near), logits(near + shift), atol=5e-6)


@pytest.mark.parametrize("base", [1e4, 5e5, 1e9, 1e12])
def test_angles_are_exact_for_any_base_and_position(base):
    """With a base of 1e12 the last pair turns by 2**-43 turns a token: 32 bits for a frequency would stop it."""
    D, positions = 64, np.array([0, 1, 7, 4095, 1_000_003, 2**31 - 1, -1, -5000, -(2**31)])
    frequencies = rope_frequencies(RoPE(base=base), D)
    angles = np.asarray(positions[:, None] * np.asarray(frequencies, np.longdouble) % (2 * np.pi), np.float64)
    x = jnp.zeros((1, len(positions), 1, D)).at[..., : D // 2].set(1.0)
    got = rotate(x, jnp.asarray(positions, jnp.int32)[None], frequencies)[0, :, 0]
    np.testing.assert_allclose(got, np.concatenate([np.cos(angles), np.sin(angles)], -1), atol=5e-7)
    slow = rotate(x, jnp.full((1, len(positions)), 10**6, jnp.int32), frequencies)[0, 0, 0, -1]
    np.testing.assert_allclose(slow, np.sin(10**6 * frequencies[-1]), rtol=1e-3)


@pytest.mark.parametrize("chunk", [1, 4, 6, 12, 13])
def test_mlp_in_chunks_equals_whole(chunk):
    x = jax.random.normal(jax.random.key(0), (2, 12, 8))
    cotangent = jax.random.normal(jax.random.key(1), x.shape)
    whole = SwiGLU(Model(N=2, E=8, F=20))
    params = whole.init(jax.random.key(2), x)["params"]
    shapes = {name: p.shape for name, p in params.items()}
    assert shapes == {"gate": (8, 20), "up": (8, 20), "down": (20, 8)}
    run = lambda mlp: jax.jit(jax.vjp(lambda p, x: mlp.apply({"params": p}, x), params, x)[1])(cotangent)
    pieces = SwiGLU(Model(N=2, E=8, F=20, mlp_chunk=chunk))
    y = pieces.apply({"params": params}, x)
    np.testing.assert_allclose(y, whole.apply({"params": params}, x), rtol=1e-5, atol=1e-6)
    x64 = np.asarray(x, np.float64)
    gate, up, down = (np.asarray(params[n], np.float64) for n in ("gate", "up", "down"))
    silu = x64 @ gate / (1 + np.exp(-x64 @ gate))
    np.testing.assert_allclose(y, (silu * (x64 @ up)) @ down, rtol=1e-5, atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), run(pieces), run(whole))


def test_mlp_in_chunks_bounds_memory():
    """The hidden [B T F] is neither kept for the backward pass nor built in it."""
    T, F = 4096, 256
    x = jnp.ones((1, T, 8))

    def memory(chunk):
        mlp = SwiGLU(Model(E=8, F=F, mlp_chunk=chunk))
        params = mlp.init(jax.random.key(0), x[:, :1])["params"]
        grad = jax.jit(jax.grad(lambda p, x: jnp.sum(mlp.apply({"params": p}, x) ** 2), (0, 1)))
        return grad.lower(params, x).compile().memory_analysis().temp_size_in_bytes

    assert memory(256) < 4 * T * F <= memory(None)


def test_mlp_gradients_in_chunks_are_summed_in_float32():
    """In bfloat16, many chunks are no less accurate than one: the sum over chunks must not round at each step."""
    x = jax.random.normal(jax.random.key(0), (1, 512, 16), jnp.bfloat16)
    gate, up = jax.random.normal(jax.random.key(1), (2, 16, 8)) / 4
    down = jax.random.normal(jax.random.key(2), (8, 16)) / 3
    params = {"gate": gate, "up": up, "down": down}

    def grads(chunk):
        mlp = SwiGLU(Model(E=16, F=8, mlp_chunk=chunk))
        return jax.grad(lambda p: jnp.sum(mlp.apply({"params": p}, x).astype(jnp.float32)))(params)

    exact = jax.grad(lambda p: jnp.sum(swiglu(x.astype(jnp.float32), **p)))(params)
    distance = lambda g: {n: float(jnp.linalg.norm(g[n] - exact[n])) for n in g}
    pieces, whole = distance(grads(8)), distance(grads(None))
    for name in params:
        assert pieces[name] <= 2 * whole[name]
