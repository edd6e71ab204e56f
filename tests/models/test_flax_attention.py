"""Tests of longattn.models.attention_fn inside Flax's own modules, Linen and NNX, and of Transformer bridged to NNX."""

import ast
import functools
import inspect
import textwrap

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longattn.config import Model
from longattn.mask import Causal, Window
from longattn.models import Context, Transformer, attention_fn

OURS = functools.partial(attention_fn, implementation="reference")


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def linen(**kwargs):
    return nn.MultiHeadDotProductAttention(num_heads=4, qkv_features=20, **kwargs)


def nnx_module(**kwargs):
    """Four heads of queries, two of keys and values, with the same weights at every call."""
    return nnx.MultiHeadAttention(4, 12, 20, num_kv_heads=2, decode=False, rngs=nnx.Rngs(0), **kwargs)


@pytest.mark.parametrize("module", [nn.MultiHeadDotProductAttention, nnx.MultiHeadAttention])
def test_every_keyword_of_the_caller_is_a_parameter(module):
    """Linen drops keywords that the function lacks without a word; NNX passes them all."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(module)))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    calls = [call for call in calls if getattr(call.func, "attr", "") == "attention_fn"]
    named = {keyword.arg for call in calls for keyword in call.keywords if keyword.arg}
    assigned = [node for node in ast.walk(tree) if isinstance(node, ast.Assign)]
    for node in assigned:
        target = node.targets[0]
        if isinstance(target, ast.Name) and target.id == "attn_kwargs" and isinstance(node.value, ast.Call):
            named |= {keyword.arg for keyword in node.value.keywords}
        if isinstance(target, ast.Subscript) and getattr(target.value, "id", "") == "attn_kwargs":
            named.add(ast.literal_eval(target.slice))
    assert {"mask", "dropout_rate", "deterministic", "precision"} <= named
    assert named <= set(inspect.signature(attention_fn).parameters)


@pytest.mark.parametrize("batch", [(2, 3), pytest.param((), marks=pytest.mark.slow)])
def test_linen(batch):
    x = jax.random.normal(jax.random.key(0), (*batch, 7, 12))
    ours, theirs = linen(attention_fn=OURS), linen()
    params = ours.init(jax.random.key(1), x)
    for mask, dense in ((None, None), (Causal(), nn.make_causal_mask(jnp.ones((*batch, 7))))):

        def loss(p, module, mask):
            y = module.apply(p, x, mask=mask)
            return jnp.sum(jnp.sin(y)), y

        (_, got), grads = jax.value_and_grad(loss, has_aux=True)(params, ours, mask)
        (_, want), wanted = jax.value_and_grad(loss, has_aux=True)(params, theirs, dense)
        close(got, want)
        jax.tree.map(close, grads, wanted)


@pytest.mark.parametrize(
    ("batch", "masked", "is_causal"),
    [
        *(((2, 3), masked, is_causal) for masked in (False, True) for is_causal in (False, True)),
        pytest.param((2,), True, True, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_nnx(batch, masked, is_causal):
    x = jax.random.normal(jax.random.key(0), (*batch, 7, 12))
    window = Window(2, 3)
    dense = jnp.broadcast_to(window.dense(7, 7), (*batch, 4, 7, 7))

    @nnx.jit(static_argnames="mask")
    def run(module, mask, dense=None):
        def loss(module):
            y = module(x, mask=dense if mask is None else mask, is_causal=is_causal)
            return jnp.sum(jnp.sin(y)), y

        return nnx.value_and_grad(loss, has_aux=True)(module)

    with jax.numpy_rank_promotion("allow"):
        (_, got), grads = run(nnx_module(attention_fn=OURS), window if masked else None)
        (_, want), wanted = run(nnx_module(), None, dense if masked else None)
    close(got, want)
    jax.tree.map(close, grads, wanted)


def test_is_causal_is_and_of_both_masks():
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 7, 4, 5))
    got = OURS(q, k, v, mask=Window(2, 3), is_causal=True)
    np.testing.assert_array_equal(got, OURS(q, k, v, mask=Causal() & Window(2, 3)))
    np.testing.assert_array_equal(OURS(q, k, v, is_causal=True), OURS(q, k, v, mask=Causal()))
    close(got, nnx.dot_product_attention(q, k, v, mask=Window(2, 3).dense(7, 7)[None, None], is_causal=True))


def test_nnx_positions():
    """Two documents in a row: positions restart, and a window counts them."""
    x = jax.random.normal(jax.random.key(0), (2, 7, 12))
    at = jnp.asarray([[0, 1, 2, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6]], jnp.int32)
    module = nnx_module(attention_fn=OURS)
    bound = nnx_module(attention_fn=functools.partial(OURS, positions=at))
    with jax.numpy_rank_promotion("allow"):
        got = module(x, mask=Window(0), input_positions=at)
        np.testing.assert_array_equal(got, bound(x, mask=Window(0)))
        assert not np.allclose(got, module(x, mask=Window(0)))
        with pytest.raises(ValueError, match="input_positions"):
            bound(x, mask=Window(0), input_positions=at)


def test_bias_and_dtype():
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 7, 4, 5))
    bias = jax.random.normal(jax.random.key(1), (4, 7, 7))[None]
    want = nn.dot_product_attention(q, k, v, bias)
    close(OURS(q, k, v, bias), want)
    close(OURS(q[:, None], k[:, None], v[:, None], bias[:, None])[:, 0], want)
    assert OURS(q, k, v, dtype=jnp.bfloat16).dtype == jnp.bfloat16


def test_packing_by_partial():
    x = jax.random.normal(jax.random.key(0), (1, 7, 12))
    segment_ids = jnp.array([[1, 1, 1, 2, 2, 2, 2]], jnp.int32)
    packed = linen(attention_fn=functools.partial(OURS, segment_ids=segment_ids))
    alone = linen(attention_fn=OURS)
    params = alone.init(jax.random.key(1), x)
    close(packed.apply(params, x)[:, 3:], alone.apply(params, x[:, 3:]))


def test_linen_refusals():
    x = jnp.ones((2, 7, 12))
    ours = linen(attention_fn=attention_fn)
    params = linen().init(jax.random.key(1), x)
    with pytest.raises(ValueError, match=r"longattn mask, such as mask=Causal\(\)"):
        ours.apply(params, x, mask=nn.make_causal_mask(jnp.ones((2, 7))))
    dropping = linen(attention_fn=attention_fn, dropout_rate=0.5)
    with pytest.raises(NotImplementedError, match=r"dropout_rate=0\.5"):
        dropping.apply(params, x, deterministic=False, rngs={"dropout": jax.random.key(0)})
    with pytest.raises(NotImplementedError, match="sown"):
        ours.apply(params, x, sow_weights=True)
    with pytest.raises(NotImplementedError, match="einsum"):
        linen(attention_fn=attention_fn, qk_attn_weights_einsum_cls=lambda: jnp.einsum).apply(params, x)


def test_nnx_refusals():
    x = jnp.ones((2, 7, 12))
    with jax.numpy_rank_promotion("allow"):
        ours = nnx_module(attention_fn=attention_fn)
        with pytest.raises(ValueError, match=r"longattn mask, such as mask=Causal\(\)"):
            ours(x, mask=nn.make_causal_mask(jnp.ones((2, 7))))
        with pytest.raises(NotImplementedError, match="sown"):
            ours(x, sow_weights=True)
        with pytest.raises(NotImplementedError, match=r"dropout_rate=0\.5"):
            nnx_module(attention_fn=attention_fn, dropout_rate=0.5)(x, deterministic=False)
        ours.init_cache((2, 7, 12))
        with pytest.raises(ValueError, match="decode=True"):
            ours(x[:, :1], decode=True)


@pytest.mark.slow
def test_transformer_bridged_to_nnx():
    """`nnx.bridge.ToNNX(Transformer(...))` has Linen's parameters, logits and gradients."""
    model = Model(N=2, E=12, F=20, H=6, K=2, D=4, W=17, dtype="float32")
    transformer = Transformer(model, Context("reference"))
    tokens = jax.random.randint(jax.random.key(7), (2, 9), 0, 17, jnp.int32)
    weight = jax.random.normal(jax.random.key(8), (2, 9, 17))

    @jax.jit
    def of_linen(params):
        return jax.value_and_grad(lambda p: jnp.sum(weight * transformer.apply({"params": p}, tokens)[0]))(params)

    bridged = nnx.bridge.ToNNX(transformer, rngs=nnx.Rngs(3))
    nnx.bridge.lazy_init(bridged, tokens)

    @nnx.jit
    def of_nnx(module):
        return nnx.value_and_grad(lambda m: jnp.sum(weight * m(tokens)[0]))(module)

    value, grads = of_nnx(bridged)
    params = nnx.to_pure_dict(nnx.state(bridged, nnx.Param))
    init = transformer.init(nnx.Rngs(3).params(), tokens)["params"]
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, init)
    wanted_value, wanted = of_linen(params)
    close(value, wanted_value)
    jax.tree.map(close, nnx.to_pure_dict(grads), wanted)
