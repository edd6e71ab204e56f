"""Linear attention over a mesh against one device: batch and heads sharded, every gradient, and what is refused.

`test_linear_state` shards the sequence.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import longattn
from longattn import config as c
from longattn import parallel
from longattn.models import Context, Transformer, init_params
from longattn.models.sharding import shardings
from longattn.train.step import context_of, state_shapes
from tests.slow import but_few

B, T, D, V = 4, 9, 5, 7
IDS = np.tile(np.repeat([1, 2], (4, 5)), (B, 1)).astype(np.int32)


def mesh_of(*sizes):
    return parallel.make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])


def inputs(heads, decay, beta):
    """Arrays of a call by their names, and the cotangents of its results."""
    rng, H = np.random.default_rng(0), max(heads)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    call = {n: normal(B, T, h, d) for n, h, d in zip("qkv", heads, (D, D, V))}
    call["k"] /= np.linalg.norm(call["k"], axis=-1, keepdims=True)
    shape = {"fixed": (H,), "scalar": (B, T, H), "vector": (B, T, H, D)}.get(decay)
    if shape:
        call["log_decay"] = -np.abs(normal(*shape))
    if beta:
        call["beta"] = rng.uniform(0, 1, (B, T, H)).astype(np.float32)
    call["initial_state"] = normal(B, H, D, V)
    return call, (normal(B, T, H, V), normal(B, H, D, V))


def results(f, call, cotangents):
    def outputs_and_gradients(call, cotangents):
        y, pull = jax.vjp(lambda call: f(**call, segment_ids=IDS, scale=0.5), call)
        return y, pull(cotangents)

    return jax.jit(outputs_and_gradients)(call, cotangents)


@pytest.mark.parametrize(
    ("mesh", "heads", "decay", "beta"),
    but_few(
        [
            ((1, 1, 3, 1), (3, 3, 6), "scalar", True),
            ((2, 2, 2, 1), (1, 1, 4), "scalar", False),  # one query and key head, on all devices
            ((2, 1, 2, 1), (4, 2, 4), None, False),
            ((1, 2, 2, 1), (6, 6, 6), "fixed", False),
            ((4, 1, 1, 1), (3, 3, 3), "vector", True),
        ],
        2,
    ),
)
def test_equals_one_device(mesh, heads, decay, beta):
    mesh = mesh_of(*mesh)
    call, cotangents = inputs(heads, decay, beta)
    expected = results(longattn.linear_attention, call, cotangents)
    got = results(lambda **call: parallel.linear_attention(**call, mesh=mesh), call, cotangents)
    assert got[0][0].sharding.is_equivalent_to(NamedSharding(mesh, P(("data", "fsdp"), None, "tensor")), 4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, expected)


def test_refusals():
    call, _ = inputs((4, 2, 4), None, False)
    with pytest.raises(ValueError, match="T=9 must be a multiple of 2, the devices on 'seq'; pad it to 10"):
        parallel.linear_attention(**call, mesh=mesh_of(1, 1, 1, 2))
    with pytest.raises(NotImplementedError, match="the 2 heads of k do not divide over the 4 devices on 'tensor'"):
        parallel.linear_attention(**call, mesh=mesh_of(1, 1, 4, 1))
    with pytest.raises(ValueError, match="B=4 must be a multiple of 8"):
        parallel.linear_attention(**call, mesh=mesh_of(8, 1, 1, 1))
    with pytest.raises(ValueError, match="v.shape"):
        parallel.linear_attention(call["q"], call["k"], call["v"][:, 1:], mesh=mesh_of(2, 1, 1, 1))
    with pytest.raises(ValueError, match="mesh=None needs a current mesh"):
        parallel.linear_attention(**call)


MIXERS = (c.Mamba2(state=8), c.RetNet(), c.Softmax())
MODEL = c.Model(N=3, E=8, F=12, H=4, K=2, D=4, W=17, dtype="float32", mixers=MIXERS)


def test_models_on_a_mesh_equal_those_on_one_device():
    cfg = c.Config(model=MODEL, data=c.MQAR(T=16, B=4, pairs=2, vocabulary=16), mesh=c.Mesh(data=2, fsdp=2, tensor=2))
    context = context_of(cfg)
    shapes = jax.eval_shape(lambda: init_params(MODEL, jax.random.key(0)))
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda p: 0.3 * rng.standard_normal(p.shape).astype(p.dtype), shapes)
    tokens = jax.random.randint(jax.random.key(1), (B, 16), 0, 17, jnp.int32)
    f = lambda context: jax.jit(lambda p, t: Transformer(MODEL, context).apply({"params": p}, t)[0])
    spread = jax.device_put(params, shardings(context.mesh, params, MODEL))
    np.testing.assert_allclose(f(context)(spread, tokens), f(None)(params, tokens), rtol=1e-4, atol=1e-5)


# A mixer of each decay; the others have the same calls but for a token's own features, and Gated DeltaNet is in the
# hybrid.
FAMILY = (c.LinearAttention(), c.RetNet(), c.Mamba2(state=8), c.KimiDeltaAttention())


@pytest.mark.parametrize(
    ("mixers", "mesh"),
    [
        ((c.GatedDeltaNet(), c.Softmax()), c.Mesh(data=2, tensor=2, seq=2)),
        (FAMILY, c.Mesh(data=2, seq=2)),
    ],
    ids=["hybrid", "all"],
)
@pytest.mark.slow
def test_loss_and_gradients_of_sharded_sequences_are_those_of_one_device(mixers, mesh):
    """Packed documents cross the shards, also in the short convolutions of Gated DeltaNet."""
    model, T = dataclasses.replace(MODEL, N=len(mixers), mixers=mixers, remat="none"), 8
    context = Context(mesh=mesh_of(*dataclasses.astuple(mesh)[:4]))
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    params = jax.tree.map(lambda p: 0.3 * rng.standard_normal(p.shape).astype(p.dtype), shapes)
    tokens, labels = jnp.asarray(rng.integers(0, 17, (2, B, T)), jnp.int32)
    lengths = (3, 4, 1)
    ids = jnp.tile(jnp.repeat(jnp.array([2, 1, 3], jnp.int32), jnp.array(lengths)), (B, 1))
    positions = jnp.tile(jnp.concatenate([jnp.arange(n, dtype=jnp.int32) for n in lengths]), (B, 1))

    def loss(params, context):
        logits, _ = Transformer(model, context).apply({"params": params}, tokens, positions, ids)
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], 2))

    f = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    (expected, gradients), (got, spread) = f(params, None), f(params, context)
    rtol = np.finfo(np.float32).eps * np.sqrt(B * T * model.E)
    np.testing.assert_allclose(got, expected, rtol=rtol)
    for a, b in zip(jax.tree.leaves(spread), jax.tree.leaves(gradients), strict=True):
        assert np.linalg.norm(a - b) <= 10 * rtol * np.linalg.norm(b)  # errors of a gradient's factors multiply


def test_every_parameter_has_a_rule():
    """Parameters with heads are sharded by head."""
    family = (c.Performer(), c.GLA(), c.Mamba2(groups=2), c.GatedDeltaNet(), c.KimiDeltaAttention())
    model = dataclasses.replace(MODEL, N=5, mixers=family)
    cfg = c.Config(model=model, data=c.MQAR(T=16, B=4, pairs=2, vocabulary=16), mesh=c.Mesh(fsdp=2, tensor=2, seq=2))
    for i in range(5):
        for name, p in state_shapes(cfg, context_of(cfg)).params[f"layer_{i}"]["mixer"].items():
            heads = (
                name not in ("norm", "b", "c", "b_conv", "c_conv", "b_conv_bias", "c_conv_bias") and "down" not in name
            )
            assert heads == ("tensor" in jax.tree.leaves(p)[0].sharding.spec), name
