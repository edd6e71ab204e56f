"""Tests of longattn.models.transformer. Sizes are small and unlike each other, so that a swapped axis fails."""

import dataclasses
import functools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longattn.config import Model, RoPE, Softmax
from longattn.mask import Causal, Window
from longattn.models import REMAT, Context, Transformer, head, init_params
from longattn.models.transformer import period
from longattn.train.loss import cross_entropy, labels_and_weights
from tests.slow import but_few

LOCAL = Softmax(mask=Causal() & Window(5), rope=RoPE(base=100.0))
GLOBAL = Softmax(qk_norm=True, sinks=True, softcap=20.0, rope=None)
BASE = Model(N=4, E=12, F=20, H=6, K=2, D=4, W=17, dtype="float32")
MODELS = {
    "softmax": BASE,
    "hybrid": dataclasses.replace(BASE, mixers=(LOCAL, GLOBAL), tie=False),
    "loop": dataclasses.replace(BASE, N=2, mixers=(LOCAL, GLOBAL), mlp_chunk=8),
    "layer": dataclasses.replace(BASE, N=1, mixers=(GLOBAL,), mlp_chunk=8),
    "yarn": dataclasses.replace(BASE, mixers=(Softmax(rope=RoPE(scaling="yarn", factor=4.0, original_T=16)),)),
}
T = 23
TOKENS = jax.random.randint(jax.random.key(7), (2, T), 0, 17, jnp.int32)


@functools.cache
def parameters(model):
    return init_params(model, jax.random.key(0))


@functools.partial(jax.jit, static_argnames=("model", "context"))
def logits(model, params, tokens, positions=None, segment_ids=None, context=None):
    return Transformer(model, context).apply({"params": params}, tokens, positions, segment_ids)[0]


def packed(lengths, rows=2):
    """Positions that restart and ids that differ per document."""
    positions = np.concatenate([np.arange(n) for n in lengths])
    ids = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    return tuple(jnp.asarray(np.tile(a, (rows, 1)), jnp.int32) for a in (positions, ids))


@pytest.mark.parametrize("name", but_few(["softmax", "loop", "yarn"]))
def test_causal_to_the_bit(name):
    """Another token t leaves all logits before t bitwise as they were, and changes those at t."""
    model = MODELS[name]
    params = parameters(model)
    before = logits(model, params, TOKENS)
    assert before.shape == (2, T, 17)
    assert before.dtype == jnp.float32
    for t in (0, 9, T - 1):
        after = logits(model, params, TOKENS.at[0, t].add(1) % 17)
        np.testing.assert_array_equal(after[0, :t], before[0, :t])
        np.testing.assert_array_equal(after[1], before[1])
        assert not np.allclose(after[0, t], before[0, t])


@pytest.mark.parametrize("name", but_few(["softmax", "loop"]))
def test_packed_documents_do_not_see_each_other(name):
    model = MODELS[name]
    params = parameters(model)
    positions, ids = packed([6, 11, 6])
    whole = logits(model, params, TOKENS, positions, ids)
    other = logits(model, params, TOKENS.at[:, 6:17].add(1) % 17, positions, ids)
    np.testing.assert_array_equal(other[:, :6], whole[:, :6])
    np.testing.assert_array_equal(other[:, 17:], whole[:, 17:])  # later, and still bitwise the same
    for start, stop in ((0, 6), (6, 17), (17, 23)):
        alone = logits(model, params, TOKENS[:, start:stop])
        np.testing.assert_allclose(whole[:, start:stop], alone, rtol=1e-4, atol=1e-5)


def test_positions_are_read():
    """With RoPE only differences of positions count; the window counts positions, not indices."""
    model = dataclasses.replace(BASE, mixers=(LOCAL,))
    params = parameters(model)
    arange = jnp.tile(jnp.arange(T, dtype=jnp.int32)[None], (2, 1))
    plain = logits(model, params, TOKENS)
    np.testing.assert_allclose(logits(model, params, TOKENS, arange), plain, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(logits(model, params, TOKENS, arange + 1_000_000), plain, rtol=1e-4, atol=1e-5)
    apart = logits(model, params, TOKENS, arange * 6)  # further apart than the window: no token sees another
    alone = logits(model, params, TOKENS.reshape(-1, 1)).reshape(apart.shape)
    np.testing.assert_allclose(apart, alone, rtol=1e-4, atol=1e-5)


def test_parameters():
    """Names and shapes, what is scanned, and the scale of the first logits."""
    shapes = lambda model: jax.tree.map(lambda p: p.shape, parameters(model))
    layer = {
        "mixer": {"q": (12, 6, 4), "k": (12, 2, 4), "v": (12, 2, 4), "out": (6, 4, 12)},
        "mixer_norm": {"scale": (12,)},
        "mlp": {"gate": (12, 20), "up": (12, 20), "down": (20, 12)},
        "mlp_norm": {"scale": (12,)},
    }
    is_shape = lambda x: isinstance(x, tuple)
    stacked = jax.tree.map(lambda s: (4, *s), layer, is_leaf=is_shape)
    top = {"embedding": (17, 12), "norm": {"scale": (12,)}}
    assert shapes(BASE) == top | {"layers": {"layer_0": stacked}}
    assert shapes(dataclasses.replace(BASE, scan=False)) == top | {f"layer_{i}": layer for i in range(4)}
    hybrid = shapes(MODELS["hybrid"])
    assert hybrid["head"] == (17, 12)
    assert hybrid["layers"]["layer_1"]["mixer"]["sinks"] == (2, 6)
    assert set(hybrid["layers"]) == {"layer_0", "layer_1"}
    assert {"layer_0", "layer_1"} < set(shapes(MODELS["loop"]))


def test_initial_scales():
    model = Model(N=8, E=64, F=128, H=4, K=4, D=16, W=64, tie=False)
    params = parameters(model)
    block = params["layers"]["layer_0"]
    for leaf, std in (
        (params["embedding"], 64**-0.5),
        (params["head"], 64**-0.5),
        (block["mixer"]["q"], 64**-0.5),
        (block["mlp"]["gate"], 64**-0.5),
        (block["mixer"]["out"], (64 * 16) ** -0.5),  # fan-in H D = 64, and 1 / sqrt(2 N) = 1/4
        (block["mlp"]["down"], (128 * 16) ** -0.5),
    ):
        np.testing.assert_allclose(np.std(leaf), std, rtol=0.15)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    first = logits(model, params, TOKENS)
    assert 0.7 < float(jnp.std(first)) < 1.3


@pytest.mark.parametrize("tie", [True, False])
def test_hidden_and_head_make_the_logits(tie):
    model = dataclasses.replace(BASE, tie=tie)
    params = parameters(model)
    x, state = Transformer(model).apply({"params": params}, TOKENS, method="hidden")
    assert state is None
    assert head(params, model).shape == (17, 12)
    got = jnp.einsum("BTE,WE->BTW", x, head(params, model))
    np.testing.assert_allclose(got, logits(model, params, TOKENS), rtol=1e-5, atol=1e-6)


@functools.cache
def loss_and_grad(model):
    """Jitted params -> (mean loss, gradients) on TOKENS."""
    labels, weights = labels_and_weights(TOKENS, None, None, jnp.ones(TOKENS.shape))

    def loss(params):
        x, _ = Transformer(model).apply({"params": params}, TOKENS, method="hidden")
        return cross_entropy(x, head(params, model), labels, weights, chunk=16)[0] / jnp.sum(weights)

    return jax.jit(jax.value_and_grad(loss))


def unstack(params, model):
    """The parameters of scanned layers as those of a loop."""
    p = period(model)
    layers = params["layers"]
    loop = {f"layer_{i}": jax.tree.map(lambda a, i=i: a[i // p], layers[f"layer_{i % p}"]) for i in range(model.N)}
    return {k: v for k, v in params.items() if k != "layers"} | loop


@pytest.mark.parametrize("name", but_few(["softmax", "hybrid"]))
def test_scan_equals_loop(name):
    model = MODELS[name]
    params = parameters(model)
    loop = dataclasses.replace(model, scan=False)
    assert jax.tree.structure(unstack(params, model)) == jax.tree.structure(parameters(loop))
    loss, grads = loss_and_grad(model)(params)
    loop_loss, loop_grads = loss_and_grad(loop)(unstack(params, model))
    np.testing.assert_allclose(loss, loop_loss, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), unstack(grads, model), loop_grads)


@pytest.mark.parametrize(
    ("name", "policy"),
    but_few([("softmax", "attention"), *(("softmax", x) for x in REMAT if x != "attention"), ("layer", "attention")]),
)
def test_remat_changes_nothing(name, policy):
    model = MODELS[name]
    params = parameters(model)
    loss, grads = loss_and_grad(model)(params)
    again, again_grads = loss_and_grad(dataclasses.replace(model, remat=policy))(params)
    np.testing.assert_allclose(again, loss, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), again_grads, grads)


def primitives(jaxpr, found=None):
    """How often each primitive occurs in a jaxpr, nested ones included; `name` with its label."""
    found = Counter() if found is None else found
    for equation in jaxpr.eqns:
        label = equation.params["name"] if equation.primitive.name == "name" else ""
        found[f"{equation.primitive.name} {label}".strip()] += 1
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                primitives(inner, found)
    return found


@pytest.mark.slow
def test_remat_of_attention_runs_no_attention_forward_again():
    """Counted in the traced gradient, and as loops in the compiled program: the model has no other loops."""
    model = dataclasses.replace(BASE, N=1)  # one layer, no scan over layers
    params = parameters(model)
    tokens = jnp.zeros((1, 600), jnp.int32)  # several tiles, so attention loops over them

    def trace(f):
        traced = jax.jit(f).trace(params)
        return traced, primitives(traced.jaxpr.jaxpr)

    def gradient(remat):
        m = dataclasses.replace(model, remat=remat)
        return jax.grad(lambda p: jnp.sum(Transformer(m).apply({"params": p}, tokens, method="hidden")[0] ** 2))

    def loops(traced):
        return traced.lower().compile().as_text().count(" while(")

    forward, _ = trace(lambda p: Transformer(model).apply({"params": p}, tokens, method="hidden")[0])
    traced, found = {}, {}
    for policy in ("none", *REMAT):
        traced[policy], found[policy] = trace(gradient(policy))
    named = {policy: (c["name attention_out"], c["name attention_lse"]) for policy, c in found.items()}
    once, again = (1, 1), (2, 1)  # of a forward pass that runs twice the first lse is unused
    assert named == {"none": once, "attention": once, "offload": once, "dots": once, "full": again}
    # "attention" does recompute the rest: the projections of q, k, v and the MLP's first half
    assert found["none"]["dot_general"] < found["attention"]["dot_general"] < found["full"]["dot_general"]
    once, again = loops(traced["attention"]), loops(traced["full"])
    assert loops(traced["none"]) == once == again - loops(forward) < again


def test_remat_keeps_less():
    """Bytes from forward to backward: none > dots > attention > full; "attention" adds out and lse of each layer."""
    model = dataclasses.replace(BASE, scan=False)
    params = parameters(model)

    def kept(remat):
        m = dataclasses.replace(model, remat=remat)
        f = lambda p: jnp.sum(Transformer(m).apply({"params": p}, TOKENS, method="hidden")[0])
        residuals = jax.tree.leaves(jax.eval_shape(lambda p: jax.vjp(f, p)[1], params))
        return sum(a.size * a.dtype.itemsize for a in residuals)

    sizes = [kept(remat) for remat in ("none", "dots", "attention", "full")]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 4
    B, (H, D) = 2, (model.H, model.D)
    assert sizes[2] - sizes[3] == model.N * 4 * B * T * H * (D + 1)


@pytest.mark.slow
def test_bfloat16_computes_in_bfloat16_and_stays_close():
    narrow = dataclasses.replace(BASE, dtype="bfloat16")
    params = parameters(BASE)
    x, _ = jax.eval_shape(lambda p: Transformer(narrow).apply({"params": p}, TOKENS, method="hidden"), params)
    assert x.dtype == jnp.bfloat16
    exact, rounded = logits(BASE, params, TOKENS), logits(narrow, params, TOKENS)
    assert rounded.dtype == jnp.float32
    assert float(jnp.linalg.norm(exact - rounded) / jnp.linalg.norm(exact)) < 0.03
    _, grads = loss_and_grad(narrow)(params)
    assert all(g.dtype == jnp.float32 for g in jax.tree.leaves(grads))
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(grads))


def test_implementation_of_the_context():
    params = parameters(BASE)
    reference = logits(BASE, params, TOKENS, context=Context("reference"))
    np.testing.assert_allclose(logits(BASE, params, TOKENS), reference, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="implementation"):
        logits(BASE, params, TOKENS, context=Context("no such"))


def test_it_learns():
    """Twenty steps of plain gradient descent on one row more than halve the loss: every parameter is connected."""
    params = parameters(BASE)
    step = loss_and_grad(BASE)
    first, grads = step(params)
    assert all(float(jnp.max(jnp.abs(g))) > 0 for g in jax.tree.leaves(grads))
    for _ in range(40):
        loss, grads = step(params)
        params = jax.tree.map(lambda p, g: p - 0.5 * g, params, grads)
    assert float(loss) < 0.5 * float(first)


def test_untied_models_start_from_logits_of_deviation_one():
    """Whose expected loss is ln W + 1/2."""
    untied = dataclasses.replace(BASE, tie=False)
    first, _ = loss_and_grad(untied)(parameters(untied))
    assert abs(float(first) - np.log(17) - 0.5) < 0.3
