"""Arrays on explicit mesh axes: the results of one device, on the axes of the inputs, and nothing is sent."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import longattn
from longattn import mask as m
from longattn.models import attention_fn
from longattn.ops.conv import long_convolution, short_convolution
from longattn.ops.linear import linear_step
from tests.slow import but_few

B, T, H, K, D = 4, 40, 6, 2, 8
ROWS, HEADS = P("a"), P("a", None, "b")


@functools.cache
def mesh() -> jax.sharding.Mesh:
    return jax.make_mesh((2, 2), ("a", "b"), devices=jax.devices()[:4])  # its axes are explicit


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def qkv(heads: int = K) -> dict[str, np.ndarray]:
    return {"q": normal(B, T, H, D), "k": normal(B, T, heads, D), "v": normal(B, T, heads, D + 1)}


IDS = np.cumsum(np.random.default_rng(0).random((B, T)) < 0.1, 1).astype(np.int32)
PREFIX = m.Causal() | m.Prefix(np.arange(B, dtype=np.int32))
BLOCKS = m.BlockSparse(8, np.random.default_rng(1).random((B, H, 5, 5)) < 0.5)
with_lse = longattn.attention_with_lse
delta = functools.partial(longattn.linear_attention, segment_ids=IDS)
CASES: dict[str, tuple[Any, dict[str, np.ndarray], P]] = {
    "attention": (with_lse, qkv(), HEADS),
    "rows alone": (with_lse, qkv(), ROWS),
    "heads alone": (with_lse, qkv(), P(None, None, "b")),
    "rows over both axes": (with_lse, qkv(), P(("a", "b"))),
    "one key head": (with_lse, qkv(1), HEADS),
    "packed, a prefix, sinks": (
        lambda q, k, v, sinks: with_lse(q, k, v, mask=PREFIX, segment_ids=IDS, sinks=sinks),
        qkv() | {"sinks": normal(H)}, HEADS,
    ),
    "positions, blocks, a bias": (
        lambda q, k, v, bias: with_lse(q, k, v, mask=BLOCKS, positions=(IDS, IDS), bias=bias),
        qkv() | {"bias": normal(H, 1, T)}, HEADS,
    ),
    "the reference": (functools.partial(with_lse, implementation="reference"), qkv(), HEADS),
    "delta rule": (
        lambda q, k, v, log_decay, beta, S: delta(q, k, v, log_decay=-log_decay**2, beta=beta**2, initial_state=S),
        {"q": normal(B, T, 1, D), "k": normal(B, T, 1, D) / 3, "v": normal(B, T, H, D)}
        | {"log_decay": normal(B, T, H), "beta": normal(B, T, H) / 2, "S": normal(B, H, D, D)}, HEADS,
    ),
    "a fixed decay": (
        lambda q, k, v: longattn.linear_attention(q, k, v, log_decay=jnp.arange(-6.0, 0)),
        {"q": normal(B, T, H, D), "k": normal(B, T, H, D), "v": normal(B, T, H, D)}, HEADS,
    ),
    "a token": (
        linear_step, {"q": normal(B, H, D), "k": normal(B, H, D), "v": normal(B, H, 5), "state": normal(B, H, D, 5)},
        P("a", "b"),
    ),
    "short convolution": (
        lambda x, weight, bias: short_convolution(x, weight, bias, segment_ids=IDS),
        {"x": normal(B, T, 6), "weight": normal(6, 3), "bias": normal(6)}, HEADS,
    ),
    "long convolution": (long_convolution, {"u": normal(B, T, 6), "kernel": normal(6, T)}, HEADS),
}  # fmt: skip


def placed(x: np.ndarray, spec: P) -> jax.Array:
    """On the mesh: what has rows as said, but whole along axes of size 1, and the rest whole."""
    names = [name if size > 1 else None for name, size in zip(spec, x.shape)] if x.shape[0] == B else []
    return jax.device_put(x, NamedSharding(mesh(), P(*names)))


FIRST = ["attention", "short convolution"]


@pytest.mark.parametrize("name", but_few(sorted(CASES, key=lambda name: name not in FIRST), len(FIRST)))
def test_results_and_gradients_are_those_of_one_device(name):
    f, arrays, spec = CASES[name]

    def both(**arrays):
        results, pull = jax.vjp(lambda arrays: f(**arrays), arrays)
        return results, pull(jax.tree.map(jnp.cos, results))

    given = {name: placed(x, P("a", "b") if name == "S" else spec) for name, x in arrays.items()}
    with jax.set_mesh(mesh()):
        got = jax.jit(both)(**given)
        text = jax.jit(lambda arrays: f(**arrays)).lower(given).compile().as_text()
    expected = jax.jit(both)(**arrays)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), got, expected)
    first = jax.tree.leaves(got[0])[0]
    assert first.sharding.is_equivalent_to(NamedSharding(mesh(), P(*spec)), first.ndim)
    assert not any(word in text for word in ("all-gather", "all-reduce", "all-to-all", "collective-permute"))


def test_flax_layers_attend():
    import flax.linen as nn

    x = jax.device_put(normal(B, T, 16), NamedSharding(mesh(), ROWS))
    layer = nn.MultiHeadDotProductAttention(num_heads=H, attention_fn=attention_fn, qkv_features=2 * H)
    params = layer.init(jax.random.key(0), normal(B, T, 16), mask=m.Causal())
    with jax.set_mesh(mesh()):
        got = jax.jit(lambda x: layer.apply(params, x, mask=m.Causal()))(x)
    np.testing.assert_allclose(got, layer.apply(params, normal(B, T, 16), mask=m.Causal()), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("name", "q", "k"), [("q", P(None, "a"), P()), ("q", P(None, None, None, "a"), P()), ("k", HEADS, ROWS)]
)
def test_other_axes_are_refused_with_the_remedy(name, q, k):
    arrays = qkv()
    given = {"q": jax.device_put(arrays["q"], NamedSharding(mesh(), q))}
    given |= {name: jax.device_put(arrays[name], NamedSharding(mesh(), k)) for name in ("k", "v")}
    said = rf"{name} \[4, 40, \d, 8\] is sharded as .* axes B and H, alike in q, k, v. Use jax.sharding.reshard, or .*"
    with pytest.raises(NotImplementedError, match=said):
        longattn.attention(**given)
